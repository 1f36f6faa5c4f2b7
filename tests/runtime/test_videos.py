from __future__ import annotations

import os
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sgl_runtime import images, videos
from sgl_runtime.errors import ConfigError, ImageError
from sgl_runtime.videos import Video, open_video

av = pytest.importorskip("av", reason="reading video files needs PyAV, the extra video")
# Suffix, codec, pixel format, B-frames
FORMATS = [
    ("mp4", "libx264", "yuv420p", 2),
    ("mkv", "libx264", "yuv420p", 2),
    ("avi", "mpeg4", "yuv420p", 2),
    ("webm", "libvpx-vp9", "yuv420p", 0),
    ("ts", "libx264", "yuv420p", 2),
    ("gif", "gif", "rgb8", 0),
]
WIDTH, HEIGHT = 64, 48


def shade(number: int) -> int:
    return 16 + 7 * number


def write_video(
    path: Path,
    count: int = 30,
    *,
    codec: str = "libx264",
    pixels: str = "yuv420p",
    b_frames: int = 0,
    times: list[int] | None = None,
) -> Path:
    """Frame i is as grey as `shade` says, brighter in the top left corner; 10 frames a second."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=10)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, pixels
        if pixels == "yuv420p":
            stream.gop_size, stream.max_b_frames = 7, b_frames
            stream.options = {"sc_threshold": "0", **({"qmax": "2"} if codec == "mpeg4" else {})}
        for number in range(count):
            grey = np.full((HEIGHT, WIDTH, 3), shade(number), dtype=np.uint8)
            grey[: HEIGHT // 2, : WIDTH // 2] = 255
            frame = av.VideoFrame.from_ndarray(grey, format="rgb24")
            if times is not None:
                frame.pts = times[number]
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def numbers(frames: list[Image.Image]) -> list[int]:
    """Which frames these are, told from the bottom right corner."""
    greys = [np.asarray(frame)[-HEIGHT // 3 :, -WIDTH // 3 :].mean() for frame in frames]
    return [round((grey - 16) / 7) for grey in greys]


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Times of the frames that were decoded, but for those that a skip ended at."""
    seen: list[int] = []
    before: Callable[[Any], Any] = videos._next

    def count(frames: Any) -> Any:
        frame = before(frames)
        seen.append(frame.pts)
        return frame

    monkeypatch.setattr(videos, "_next", count)
    return seen


@pytest.mark.parametrize(("suffix", "codec", "pixels", "b_frames"), FORMATS)
@pytest.mark.parametrize("num_frames", [1, 4, 7, 30, 99])
def test_the_right_frames(
    tmp_path: Path, suffix: str, codec: str, pixels: str, b_frames: int, num_frames: int
) -> None:
    path = write_video(tmp_path / f"a.{suffix}", codec=codec, pixels=pixels, b_frames=b_frames)
    frames, seconds = open_video(Video(path, num_frames))
    wanted = {
        1: [15],
        4: [3, 11, 18, 26],
        7: [2, 6, 10, 15, 19, 23, 27],
        30: list(range(30)),
        99: list(range(30)),
    }[num_frames]
    assert numbers(frames) == wanted
    assert seconds == pytest.approx([number / 10 for number in wanted], abs=1e-3)
    assert {(frame.mode, frame.size) for frame in frames} == {("RGB", (WIDTH, HEIGHT))}
    corner = np.asarray(frames[0])[: HEIGHT // 3, : WIDTH // 3]
    assert corner.min() > 240


def test_frames_of_uneven_times(tmp_path: Path) -> None:
    """The frame is chosen by its number, and shown when it is shown."""
    times = [0, 1, 2, 3, 20, 40, 60, 80]
    path = write_video(tmp_path / "a.mp4", 8, times=times)
    frames, seconds = open_video(Video(path, 4))
    assert numbers(frames) == [1, 3, 5, 7]
    assert seconds == pytest.approx([0.1, 0.3, 4.0, 8.0])


def test_frames_between_are_skipped(tmp_path: Path, decoded: list[int]) -> None:
    path = write_video(tmp_path / "a.mkv", 31)
    frames, _ = open_video(Video(path, 2))
    assert numbers(frames) == [7, 23]
    assert decoded == [0, 2200, 2300]  # frames 7 and 21 are keyframes: a skip ends at them


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "ts"])
def test_skipping_with_b_frames(tmp_path: Path, decoded: list[int], suffix: str) -> None:
    """A transport stream is searched by when frames are decoded: what is asked for must not be overshot."""
    path = write_video(tmp_path / f"a.{suffix}", 31, b_frames=2)
    frames, _ = open_video(Video(path, 4))
    assert numbers(frames) == [3, 11, 19, 27]
    assert len(decoded) == 4 + 4 + 5 + 6  # 0 to 3, and those behind the keyframes 7, 14 and 21


@pytest.mark.parametrize(("turn", "corner"), [(90, (0, 1)), (180, (1, 1)), (270, (1, 0))])
def test_rotation_is_applied(tmp_path: Path, turn: int, corner: tuple[int, int]) -> None:
    """A phone held upright writes "turn by 90 degrees clockwise": the top left corner goes to the right."""
    path = write_video(tmp_path / "a.mp4", 3)
    cosine, sine = {90: (0, 1), 180: (-1, 0), 270: (0, -1)}[turn]
    one = 1 << 16
    turned = struct.pack(">9i", cosine * one, sine * one, 0, -sine * one, cosine * one, 0, 0, 0, 1 << 30)
    plain = struct.pack(">9i", one, 0, 0, 0, one, 0, 0, 0, 1 << 30)
    data = path.read_bytes()
    at = data.index(plain, data.index(b"tkhd"))
    path.write_bytes(data[:at] + turned + data[at + len(plain) :])
    frames, _ = open_video(Video(path, 1))
    assert frames[0].size == ((HEIGHT, WIDTH) if turn % 180 else (WIDTH, HEIGHT))
    pixels = np.asarray(frames[0].convert("L")).astype(int)
    rows, columns = np.array_split(pixels, 2, 0), corner
    quarter = np.array_split(rows[columns[0]], 2, 1)[columns[1]]
    assert quarter.mean() > 240 > 100 > pixels.min()
    assert pixels.mean() < 140


def _images(count: int) -> list[Image.Image]:
    return [Image.new("RGB", (9, 6), (number, 0, 0)) for number in range(count)]


def test_a_list_of_images() -> None:
    frames, seconds = open_video(Video(_images(3)))
    assert [frame.getpixel((0, 0)) for frame in frames] == [(0, 0, 0), (1, 0, 0), (2, 0, 0)]
    assert seconds == [0.0, 1.0, 2.0]
    frames, seconds = open_video(Video(_images(10), num_frames=5, fps=2))
    assert [frame.getpixel((0, 0)) for frame in frames] == [(at, 0, 0) for at in (1, 3, 5, 7, 9)]
    assert seconds == [0.5, 1.5, 2.5, 3.5, 4.5]


def test_a_directory_of_images(tmp_path: Path) -> None:
    for number, image in enumerate(_images(4)):
        image.save(tmp_path / f"{3 - number}.png")
    (tmp_path / ".hidden").write_text("no image")
    (tmp_path / "deeper").mkdir()
    frames, seconds = open_video(Video(tmp_path, fps=4))
    assert [frame.getpixel((0, 0)) for frame in frames] == [(3, 0, 0), (2, 0, 0), (1, 0, 0), (0, 0, 0)]
    assert seconds == [0.0, 0.25, 0.5, 0.75]


def test_images_that_are_not_shown_are_not_opened(tmp_path: Path) -> None:
    sources: list[Any] = [tmp_path / "none.png", *_images(1), tmp_path / "none.png"]
    assert len(open_video(Video(sources, num_frames=1))[0]) == 1


def _empty_directory(path: Path) -> Path:
    (path / "empty").mkdir()
    return path / "empty"


def _text(path: Path) -> Path:
    (path / "a.mp4").write_text("This is no video.\n" * 99)
    return path / "a.mp4"


def _nothing(path: Path) -> Path:
    (path / "a.mp4").touch()
    return path / "a.mp4"


def _picture(path: Path) -> Path:
    _images(1)[0].save(path / "a.png")
    return path / "a.png"


def _cut(path: Path) -> Path:
    whole = write_video(path / "whole.mp4")
    (path / "a.mp4").write_bytes(whole.read_bytes()[:1500])
    return path / "a.mp4"


def _playlist(path: Path) -> Path:
    (path / "a.m3u8").write_text("#EXTM3U\n#EXTINF:1,\nhttp://127.0.0.1:9/a.ts\n#EXT-X-ENDLIST\n")
    return path / "a.m3u8"


def _sound(path: Path) -> Path:
    with av.open(str(path / "a.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=16000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), dtype=np.float32), "fltp", "mono")
        frame.sample_rate = 16000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path / "a.mp4"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: path / "a.mp4", "There is no video file .*a.mp4"),
        (lambda path: f"{path}/\0.mp4", "cannot be opened|There is no video file"),
        (lambda path: "https://example.com/a.mp4", "is a URL, and URLs are never fetched"),
        (lambda path: "rtsp://example.com/a", "is a URL, and URLs are never fetched"),
        (lambda path: 7, "must be a path, a directory or a list of images, got int"),
        (lambda path: [], "The video has no frames"),
        (_empty_directory, "empty holds no frames"),
        (lambda path: ["https://example.com/a.png"], "is a URL, and URLs are never fetched"),
        (lambda path: [Image.new("RGB", (3, 4)), Image.new("RGB", (4, 3))], "the first is 3 x 4, number 2"),
        (_text, "a.mp4 is not a video that can be read"),
        (_nothing, "a.mp4 is 0 bytes long"),
        (_picture, "a.png is not a video that can be read"),
        (_cut, "a.mp4 is not a video that can be read"),
        (_playlist, "a.m3u8 is not a video that can be read"),
        (_sound, "a.mp4 holds no video, only audio"),
    ],
)
def test_what_is_no_video(tmp_path: Path, make: Callable[[Path], Any], message: str) -> None:
    with pytest.raises(ImageError, match=message):
        open_video(Video(make(tmp_path)))


def test_a_file_that_ends_early(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_video(tmp_path / "a.mp4", 5)
    monkeypatch.setattr(videos, "_timeline", lambda container, name: ([0, 10**9], []))
    with pytest.raises(ImageError, match=r"a.mp4 is not .*it ends before its last frame"):
        open_video(Video(path))


def test_a_stream_without_times(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_video(tmp_path / "a.h264", 5)
    monkeypatch.setattr(videos, "_OPTIONS", {})  # else it is refused for its format
    with pytest.raises(ImageError, match="does not say when its frames are shown"):
        open_video(Video(path))


def test_a_name_that_looks_like_a_protocol(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_video(tmp_path / "a.mp4", 3).rename(tmp_path / "data.v1:x.mp4")
    monkeypatch.chdir(tmp_path)
    assert len(open_video(Video("data.v1:x.mp4"))[0]) == 3


def test_too_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_video(tmp_path / "a.mp4", 3)
    monkeypatch.setenv(images.MAX_PIXELS_VARIABLE, str(WIDTH * HEIGHT))
    assert len(open_video(Video(path))[0]) == 3
    monkeypatch.setenv(images.MAX_PIXELS_VARIABLE, str(WIDTH * HEIGHT - 1))
    with pytest.raises(ImageError, match="64 x 48 = 3,072 pixels; the limit is 3,071"):
        open_video(Video(path))


def test_without_av(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_video(tmp_path / "a.mp4", 3)
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(ConfigError, match=r'pip install "sgl-vlm\[video\]"'):
        open_video(Video(path))
    assert len(open_video(Video(_images(2)))[0]) == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_frames": 0}, "num_frames must be a positive integer, got 0"),
        ({"num_frames": 2.0}, "num_frames must be a positive integer, got 2.0"),
        ({"fps": 0}, "fps must be a positive number, got 0"),
        ({"fps": float("nan")}, "fps must be a positive number, got nan"),
    ],
)
def test_wrong_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Video([], **options)


def test_what_is_no_video_at_all() -> None:
    with pytest.raises(ImageError, match="neither a file nor a directory"):
        open_video(Video(os.devnull))


def test_frames_of_a_directory_are_counted(tmp_path: Path) -> None:
    for number in (10, 2, 1):
        Image.new("RGB", (8, 8), (number, 0, 0)).save(tmp_path / f"frame{number}.png")
    frames, _ = open_video(Video(tmp_path, 3))
    assert [frame.getpixel((0, 0))[0] for frame in frames] == [1, 2, 10]
