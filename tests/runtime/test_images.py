from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sgl_runtime.errors import ConfigError, ImageError
from sgl_runtime.images import MAX_PIXELS_VARIABLE, open_image

from .checkpoints import picture


def _png(image: Image.Image, **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, "PNG", **options)
    return stream.getvalue()


def _bomb(side: int) -> bytes:
    """A valid PNG header that claims side x side pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b"\0" * 99))
        + chunk(b"IEND", b"")
    )


def test_path_bytes_and_pil_are_the_same(tmp_path: Path) -> None:
    image = picture()
    path = tmp_path / "a.png"
    path.write_bytes(_png(image))
    for source in (path, str(path), path.read_bytes(), image):
        assert np.array_equal(np.asarray(open_image(source)), np.asarray(image))


def test_a_name_that_only_looks_odd_is_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    picture().save("data.v1:x.png")
    assert open_image("data.v1:x.png").size == (70, 50)


@pytest.mark.parametrize("mode", ["L", "P", "1", "CMYK", "RGBA", "LA", "PA", "YCbCr"])
def test_modes_become_rgb(mode: str) -> None:
    image = open_image(picture().convert("L").convert(mode))
    assert image.mode == "RGB"
    spread = np.ptp(np.asarray(image).astype(int), axis=2)
    assert spread.max() <= 3  # grey stayed grey


def test_transparency_is_white() -> None:
    image = Image.new("RGBA", (2, 1), (10, 20, 30, 0))
    image.putpixel((1, 0), (10, 20, 30, 255))
    palette = Image.new("P", (1, 1), 0)
    palette.putpalette([10, 20, 30])
    assert np.asarray(open_image(image)).tolist() == [[[255, 255, 255], [10, 20, 30]]]
    assert np.asarray(open_image(_png(palette, transparency=0))).tolist() == [[[255, 255, 255]]]
    assert np.asarray(open_image(_png(palette))).tolist() == [[[10, 20, 30]]]


def test_sixteen_bits_are_scaled() -> None:
    grey = Image.fromarray(np.array([[0, 32896, 65535]], dtype=np.uint16))
    assert np.asarray(open_image(_png(grey)))[0, :, 0].tolist() == [0, 128, 255]


def test_exif_orientation(tmp_path: Path) -> None:
    image = picture(40, 20)
    exif = Image.Exif()
    exif[0x0112] = 6  # turn right by 90 degrees to see it upright
    image.save(tmp_path / "a.png", exif=exif)
    assert np.array_equal(np.asarray(open_image(tmp_path / "a.png")), np.rot90(np.asarray(image), -1))


@pytest.mark.parametrize(
    "url",
    [
        "http://x.org/a.png",
        "https://x.org/a.png",
        "HTTPS://x",
        "file:///etc/passwd",
        "s3://b/a",
        "data:image/png;base64,AA==",
    ],
)
def test_urls_are_never_fetched(url: str) -> None:
    with pytest.raises(ImageError, match="Download it first"):
        open_image(url)


@pytest.mark.parametrize("name", ["data:image/png;base64," + "A" * 9000, "A" * 9000, "A/" * 4500])
def test_names_in_errors_are_cut(name: str) -> None:
    with pytest.raises(ImageError) as failure:
        open_image(name)
    assert name[:20] in str(failure.value)
    assert len(str(failure.value)) < 400


def test_bad_files(tmp_path: Path) -> None:
    whole = _png(picture(200, 200))
    files = {
        "zero.png": (b"", "0 bytes"),
        "text.jpg": (b"hello, I am no picture", "not an image"),
        "cut.png": (whole[: len(whole) // 2], "damaged or cut short"),
        "header.png": (whole[:20], "not an image|damaged"),
    }
    for name, (data, message) in files.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(ImageError, match=message) as failure:
            open_image(tmp_path / name)
        assert name in str(failure.value)
        with pytest.raises(ImageError, match=message):
            open_image(data)
    with pytest.raises(ImageError, match="no image file"):
        open_image(tmp_path / "missing.png")
    with pytest.raises(ImageError, match="is a directory"):
        open_image(tmp_path)


@pytest.mark.parametrize("source", [None, 3, np.zeros((4, 4, 3))])
def test_other_types(source: Any) -> None:
    with pytest.raises(ImageError, match="must be a path, bytes or a PIL image"):
        open_image(source)


@pytest.mark.parametrize("name", ["a\0b", "x" * 5000, ""])
def test_impossible_names(name: str) -> None:
    with pytest.raises(ImageError):
        open_image(name)


def test_bombs(monkeypatch: pytest.MonkeyPatch) -> None:
    before = Image.MAX_IMAGE_PIXELS
    with pytest.raises(ImageError, match=r"900,000,000.*89,478,485.*SGL_MAX_IMAGE_PIXELS"):
        open_image(_bomb(30000))
    with pytest.raises(ImageError, match="the limit is 99"):
        open_image(picture(10, 10), max_pixels=99)
    assert open_image(picture(10, 10), max_pixels=100).size == (10, 10)
    monkeypatch.setenv(MAX_PIXELS_VARIABLE, "1000000000")
    with pytest.raises(ImageError, match="damaged"):  # past the limit, and then it has no pixels
        open_image(_bomb(20000))
    monkeypatch.setenv(MAX_PIXELS_VARIABLE, "lots")
    with pytest.raises(ConfigError, match="positive integer"):
        open_image(picture())
    assert before == Image.MAX_IMAGE_PIXELS
