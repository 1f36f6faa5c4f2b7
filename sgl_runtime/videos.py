"""Opening videos safely: a few frames of a file, a directory or a list, never from a URL."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image as PILImage

from sgl_runtime.errors import ConfigError, ImageError
from sgl_runtime.images import Image, check_pixels, open_image, reason, refuse_url

# FFmpeg also takes text, single images and playlists that name other files or URLs for videos.
_FORMATS = "mov,matroska,webm,avi,gif,mpegts,mpeg,flv,ogg,asf"
_OPTIONS = {"format_whitelist": _FORMATS, "protocol_whitelist": "file"}


@dataclass(frozen=True, eq=False)
class Video:
    """A video, of which some frames are shown to a model.

    Attributes
    ----------
    source : a video file, a directory of frames, taken in the order of their names, or a list of images
    num_frames : at most so many frames are shown: those in the middle of as many equal parts of the video
    fps : frames per second of a directory or a list; a file knows its own

    Raises
    ------
    ConfigError
        ``num_frames`` or ``fps`` is not positive.
    """

    source: str | os.PathLike[str] | Sequence[Image]
    num_frames: int = 8
    fps: float = 1.0

    def __post_init__(self) -> None:
        if not isinstance(self.num_frames, int) or isinstance(self.num_frames, bool) or self.num_frames < 1:
            raise ConfigError(f"num_frames must be a positive integer, got {self.num_frames!r}.")
        if not isinstance(self.fps, (int, float)) or not 0 < self.fps < math.inf:
            raise ConfigError(f"fps must be a positive number, got {self.fps!r}.")


class Film(NamedTuple):
    """An opened video: the frames that are shown, upright RGB and of one size, and when, in seconds."""

    frames: list[PILImage.Image]
    seconds: list[float]


def open_video(video: Video) -> Film:
    """Return the frames of a video that are shown, and when.

    Only these are held in memory. Those of a file are turned upright as its metadata says; reading one needs
    PyAV, the extra ``video``.

    Returns
    -------
    frames : upright RGB, all of one size
    seconds : when each is shown, after the first frame of the video

    Raises
    ------
    ImageError
        The source is a URL, missing, empty or not a video; a frame is damaged, larger than `open_image`
        takes, or of another size than the first.
    ConfigError
        PyAV is not installed.
    """
    source = video.source
    if isinstance(source, (str, os.PathLike)):
        name = os.fspath(source)
        refuse_url(name)
        path = _existing(name)
        if path.is_file():
            frames, seconds = _from_file(path, name, video.num_frames)
        elif not path.is_dir():
            raise ImageError(f"{name} is neither a file nor a directory.")
        else:
            frames, seconds = _from_images(_files_of(path), f"{name} holds", video)
    elif isinstance(source, (list, tuple)):
        frames, seconds = _from_images(source, "The video has", video)
    else:
        raise ImageError(
            f"A video must be a path, a directory or a list of images, got {type(source).__name__}."
        )
    for number, frame in enumerate(frames):
        if frame.size != frames[0].size:
            raise ImageError(
                f"The frames of a video must be of one size: the first is {_by(frames[0].size)}, number "
                f"{number + 1} of those shown is {_by(frame.size)}."
            )
    return Film(frames, seconds)


def _existing(name: str) -> Path:
    try:
        path = Path(name).expanduser()
        if not path.exists():
            raise ImageError(f"There is no video file {name}.")
        if path.is_file() and path.stat().st_size == 0:
            raise ImageError(f"{name} is 0 bytes long.")
    except (OSError, RuntimeError, ValueError) as error:  # RuntimeError: an unknown ~user
        if isinstance(error, ImageError):
            raise
        raise ImageError(f"{name!r} cannot be opened ({reason(error)}).") from error
    return path


def _files_of(directory: Path) -> list[Path]:
    found = [path for path in directory.iterdir() if path.is_file() and not path.name.startswith(".")]
    return sorted(found, key=_counted)


def _counted(path: Path) -> tuple[list[str | int], str]:
    """Order names as one counts: frame2 before frame10."""
    parts = re.split(r"(\d+)", path.name)
    return [int(part) if i % 2 else part for i, part in enumerate(parts)], path.name


def _from_images(
    sources: Sequence[Image], has: str, video: Video
) -> tuple[list[PILImage.Image], list[float]]:
    if not sources:
        raise ImageError(f"{has} no frames; give at least one image.")
    shown = _middles(len(sources), video.num_frames)
    return [open_image(sources[at]) for at in shown], [at / video.fps for at in shown]


def _from_file(path: Path, name: str, num_frames: int) -> tuple[list[PILImage.Image], list[float]]:
    try:
        import av
    except ImportError as error:
        raise ConfigError(
            f'Reading {name} needs PyAV: pip install "sgl-vlm[video]". A directory or a list of frames does '
            "without."
        ) from error
    url = f"file:{path.absolute()}"  # a name like a:b.mp4 would be taken for a protocol
    try:
        with av.open(url, options=_OPTIONS) as container:
            times, keys = _timeline(container, name)
        with av.open(url, options=_OPTIONS) as container:
            stream = container.streams.video[0]
            shown = [times[at] for at in _middles(len(times), num_frames)]
            frames, seconds = [], []
            for frame in _frames_at(container, shown, keys):
                check_pixels(name, frame.width, frame.height)
                turned = frame.to_image().rotate(90 * round(frame.rotation / 90), expand=True)
                frames.append(turned)
                seconds.append(float((frame.pts - times[0]) * stream.time_base))
            return frames, seconds
    except ImageError:
        raise
    except Exception as error:  # FFmpeg's demuxers and decoders raise many kinds on damaged files
        raise ImageError(
            f"{name} is not a video that can be read ({reason(error)}). It must be a whole file in one of "
            f"the formats {_FORMATS.replace(',', ', ')}."
        ) from error


def _timeline(container: Any, name: str) -> tuple[list[int], list[tuple[int, int]]]:
    """Return when all frames are shown, and when keyframes are shown and decoded, without decoding any."""
    if not container.streams.video:
        raise ImageError(f"{name} holds no video, only {', '.join(s.type for s in container.streams)}.")
    stream = container.streams.video[0]
    check_pixels(name, stream.codec_context.width, stream.codec_context.height)
    times, keys = set(), []
    for packet in container.demux(stream):
        if packet.size and not packet.is_discard:
            times.add(packet.pts)
            if packet.is_keyframe:
                keys.append((packet.pts, packet.pts if packet.dts is None else packet.dts))
    if not times:
        raise ImageError(f"{name} holds no frames.")
    if None in times:
        raise ImageError(
            f"{name} does not say when its frames are shown. Convert it: ffmpeg -i IN -c:v libx264 OUT.mp4"
        )
    return sorted(times), keys


def _frames_at(container: Any, times: Sequence[int], keys: Sequence[tuple[int, int]]) -> Iterator[Any]:
    """Yield the frame shown at each of ``times``, ascending; skip to the keyframe before it, if possible."""
    frames = container.decode(video=0)
    frame = _next(frames)
    for time in times:
        key = max((key for key in keys if key[0] <= time), default=None)
        if key is not None and key[0] > frame.pts:
            frames, frame = _seek(container, key)
        while frame.pts < time:
            frame = _next(frames)
        yield frame


def _seek(container: Any, key: tuple[int, int]) -> tuple[Iterator[Any], Any]:
    """Return the frames from a keyframe or an earlier one on, and the first of them.

    Some formats find a keyframe by when it is shown, others by when it is decoded. The latter is never later,
    but makes the former begin one keyframe too early.
    """
    for time in key:
        container.seek(time, stream=container.streams.video[0])
        frames = container.decode(video=0)
        frame = next(frames, None)
        if frame is not None and frame.pts <= key[0]:
            return frames, frame
    raise EOFError("a keyframe cannot be found again")


def _next(frames: Iterator[Any]) -> Any:
    frame = next(frames, None)
    if frame is None:
        raise EOFError("it ends before its last frame")
    return frame


def _middles(count: int, parts: int) -> list[int]:
    """Return the numbers of the frames in the middle of ``parts`` equal parts of ``count``; all if fewer."""
    parts = min(count, parts)
    return [(2 * part + 1) * count // (2 * parts) for part in range(parts)]


def _by(size: tuple[int, int]) -> str:
    return f"{size[0]} x {size[1]}"
