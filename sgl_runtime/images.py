"""Opening images safely: from files, bytes or PIL, never from a URL, and never larger than a pixel limit."""

from __future__ import annotations

import io
import os
import re
import threading
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image as PILImage
from PIL import ImageOps

from sgl_runtime.errors import ConfigError, ImageError

Image = str | os.PathLike[str] | bytes | PILImage.Image

MAX_PIXELS = 89_478_485
MAX_PIXELS_VARIABLE = "SGL_MAX_IMAGE_PIXELS"
_URL = re.compile(r"^[a-zA-Z][a-zA-Z0-9+.-]+://|^data:", re.ASCII)
_pil_limit = threading.Lock()


def open_image(
    source: Image, max_pixels: int | None = None, *, formats: tuple[str, ...] | None = None
) -> PILImage.Image:
    """Return an image as upright RGB, fully decoded.

    EXIF orientation is applied, transparency is put on white, 16-bit grey is scaled to 8 bits, of an
    animation the first frame is taken.

    Parameters
    ----------
    source
        A path, encoded bytes (PNG, JPEG, ...), or a ``PIL.Image``.
    max_pixels
        Largest width x height that is decoded; default the environment variable SGL_MAX_IMAGE_PIXELS, else
        89,478,485.
    formats
        Names of those that are read, as Pillow has them; default all that it knows.

    Raises
    ------
    ImageError
        The source is a URL, missing, a directory, empty, not an image, damaged, or too large.
    """
    name, stream = _stream(source)
    try:
        image = source if isinstance(source, PILImage.Image) else _open(stream, formats)
    except PILImage.UnidentifiedImageError as error:
        read = "that Pillow reads" if formats is None else f"in {', '.join(formats)}"
        raise ImageError(f"{name} is not an image {read}.") from error
    except Exception as error:  # Pillow's decoders raise many kinds on damaged headers
        raise ImageError(f"{name} is not an image that can be read ({reason(error)}).") from error
    check_pixels(name, *image.size, max_pixels)
    try:
        return _to_rgb(ImageOps.exif_transpose(image))
    except Exception as error:  # decoding happens here: truncated and damaged data show up now
        raise ImageError(f"{name} is damaged or cut short ({reason(error)}).") from error


def check_pixels(name: str, width: int, height: int, max_pixels: int | None = None) -> None:
    """Raise ImageError unless ``name`` has at least one pixel, and no more than `open_image` decodes."""
    limit = _limit() if max_pixels is None else max_pixels
    if width * height == 0:
        raise ImageError(f"{name} has {width} x {height} pixels; an image needs at least one.")
    if width * height > limit:
        raise ImageError(
            f"{name} has {width} x {height} = {width * height:,} pixels; the limit is {limit:,}. Scale it "
            f"down, or raise the limit with the environment variable {MAX_PIXELS_VARIABLE}."
        )


def refuse_url(name: str) -> None:
    """Raise ImageError for a URL."""
    if _URL.match(name):
        raise ImageError(
            f"{cut(name)} is a URL, and URLs are never fetched. Download it first and give the file."
        )


def reason(error: BaseException) -> str:
    """Return the kind of an error and the first line of what it says."""
    text = str(error).strip()
    return f"{type(error).__name__}: {cut(text.splitlines()[0], 200)}" if text else type(error).__name__


def cut(text: str, longest: int = 80) -> str:
    """Return a text for a message: of a longer one its first characters."""
    return text if len(text) <= longest else f"{text[: longest - 1]}…"


def _stream(source: Image) -> tuple[str, Any]:
    """Return a name for messages, and what Pillow opens."""
    if isinstance(source, PILImage.Image):
        return "The image", None
    if isinstance(source, (bytes, bytearray)):
        if not source:
            raise ImageError("The image is 0 bytes long.")
        return f"The image of {len(source):,} bytes", io.BytesIO(source)
    if not isinstance(source, (str, os.PathLike)):
        raise ImageError(f"An image must be a path, bytes or a PIL image, got {type(source).__name__}.")
    name = os.fspath(source)
    refuse_url(name)
    try:
        path = Path(name).expanduser()
        if path.is_dir():
            raise ImageError(f"{name} is a directory; give one image file.")
        if not path.is_file():
            raise ImageError(f"There is no image file {cut(name, 200)}.")
        if path.stat().st_size == 0:
            raise ImageError(f"{name} is 0 bytes long.")
    except (OSError, RuntimeError, ValueError) as error:  # RuntimeError: an unknown ~user
        if isinstance(error, ImageError):
            raise
        raise ImageError(f"{cut(repr(name))} cannot be opened ({reason(error)}).") from error
    return name, path


def _open(stream: Any, formats: tuple[str, ...] | None) -> PILImage.Image:
    """Read the header only. Pillow's own limit is global; ours takes its place while the header is read."""
    with _pil_limit:
        before, PILImage.MAX_IMAGE_PIXELS = PILImage.MAX_IMAGE_PIXELS, None
        try:
            return PILImage.open(stream, formats=formats)
        finally:
            PILImage.MAX_IMAGE_PIXELS = before


def _to_rgb(image: PILImage.Image) -> PILImage.Image:
    image.load()
    if image.mode.startswith("I"):
        grey = np.asarray(image).astype(np.int64)
        return PILImage.fromarray((grey.clip(0, 65535) // 257).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return PILImage.alpha_composite(PILImage.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def _limit() -> int:
    text = os.environ.get(MAX_PIXELS_VARIABLE)
    if text is None:
        return MAX_PIXELS
    if not text.isdecimal() or int(text) < 1:
        raise ConfigError(f"{MAX_PIXELS_VARIABLE}={text!r} must be a positive integer.")
    return int(text)
