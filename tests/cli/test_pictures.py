from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sgl_runtime.pictures import save_guidance, token_map


def test_one_tile_is_a_square_grid() -> None:
    picture, thumbnail = token_map(np.arange(16), (1, 1, False))
    assert thumbnail is None
    assert np.array_equal(picture, np.arange(16).reshape(4, 4))


def test_tiles_go_back_into_the_picture() -> None:
    """Token t of the tile at (row, column) stands for the patch there; the thumbnail comes last."""
    columns, rows, side = 3, 2, 2
    expected = np.random.default_rng(0).random((rows * side, columns * side))
    values = [
        expected[r * side + y, c * side + x]
        for r in range(rows)
        for c in range(columns)
        for y in range(side)
        for x in range(side)
    ]
    picture, thumbnail = token_map(np.array([*values, 9, 8, 7, 6]), (columns, rows, True))
    assert np.array_equal(picture, expected)
    assert thumbnail is not None
    assert thumbnail.tolist() == [[9, 8], [7, 6]]


def test_a_count_that_fills_no_tiles_is_refused() -> None:
    with pytest.raises(ValueError, match="17 visual tokens do not fill 1 square tiles"):
        token_map(np.arange(17), (1, 1, False))


def test_dropped_patches_are_dimmed(tmp_path: Path) -> None:
    path = tmp_path / "new" / "picture.png"
    white = Image.new("RGB", (64, 64), "white")
    mass = np.zeros(16)
    mass[0] = 1.0
    save_guidance(path, white, mass, np.array([0]), (1, 1, False), title="what is $this", note="one kept")
    picture = np.asarray(Image.open(path).convert("L")).astype(float)
    third = picture[int(picture.shape[0] * 0.35) : -8, int(picture.shape[1] * 0.69) : -8]
    assert ((third > 40) & (third < 80)).mean() > 0.6  # 15 of 16 patches at 22 % of white
    assert list(tmp_path.rglob("*.partial")) == []


def test_a_failed_picture_leaves_no_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="square tiles"):
        save_guidance(
            tmp_path / "p.png",
            Image.new("RGB", (8, 8)),
            np.zeros(7),
            np.array([0]),
            (1, 1, False),
            title="",
            note="",
        )
    assert list(tmp_path.iterdir()) == []
