from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sgl_runtime.families.base import grid_cells
from sgl_runtime.pictures import Panel, draw_panels, save_guidance, token_maps

SIDE = 384


def _points(picture: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """The value in the middle of each cell of a grid."""
    down, across = ((np.arange(n) + 0.5) * SIDE / n for n in (rows, columns))
    return picture[np.ix_(down.astype(int), across.astype(int))]


def test_one_tile_is_a_square_grid() -> None:
    (picture,) = token_maps(np.arange(16), grid_cells(4, 4).numpy())
    assert np.array_equal(_points(picture, 4, 4), np.arange(16).reshape(4, 4))


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
    boxes = [
        grid_cells(side, side, (r / rows, (r + 1) / rows, c / columns, (c + 1) / columns))
        for r in range(rows)
        for c in range(columns)
    ]
    cells = np.concatenate([*boxes, grid_cells(2, 2)])
    picture, thumbnail = token_maps(np.array([*values, 9, 8, 7, 6]), cells)
    assert np.array_equal(_points(picture, rows * side, columns * side), expected)
    assert _points(thumbnail, 2, 2).tolist() == [[9, 8], [7, 6]]


def test_tiles_with_seams_and_their_thumbnail() -> None:
    """Towers whose patches do not fill a tile leave seams; the thumbnail still has a map of its own."""
    half = [grid_cells(4, 4, (0, 0.98, left, left + 0.49)) for left in (0, 0.5)]
    cells = np.concatenate([*half, grid_cells(4, 4, (0, 0.98, 0, 0.98))])
    picture, thumbnail = token_maps(np.repeat([1, 2, 3], 16), cells)
    assert set(np.unique(picture)) == {0, 1, 2}
    assert set(np.unique(thumbnail)) == {0, 3}


def test_a_newline_is_not_drawn() -> None:
    """A newline stands where the last patch of its row does."""
    cells = grid_cells(2, 2).numpy()[[0, 1, 1, 2, 3, 3]]
    (picture,) = token_maps(np.array([1, 2, 50, 3, 4, 60]), cells)
    assert _points(picture, 2, 2).tolist() == [[1, 2], [3, 4]]


def test_a_count_that_is_not_that_of_the_cells_is_refused() -> None:
    with pytest.raises(ValueError, match="17 values came for 16 visual tokens"):
        token_maps(np.arange(17), grid_cells(4, 4).numpy())


def test_dropped_patches_are_dimmed(tmp_path: Path) -> None:
    path = tmp_path / "new" / "picture.png"
    white = Image.new("RGB", (64, 64), "white")
    mass = np.zeros(16)
    mass[0] = 1.0
    maps = token_maps(mass, grid_cells(4, 4).numpy())
    save_guidance(path, draw_panels(white, maps, maps, "one kept"), title="what is $this")
    picture = np.asarray(Image.open(path).convert("L")).astype(float)
    third = picture[int(picture.shape[0] * 0.35) : -8, int(picture.shape[1] * 0.69) : -8]
    assert ((third > 40) & (third < 80)).mean() > 0.6  # 15 of 16 patches at 22 % of white
    assert list(tmp_path.rglob("*.partial")) == []


def test_panels_show_the_mass_and_what_is_kept() -> None:
    """Brightest where the most attention went; kept patches as they are, dropped ones at 22 %."""
    grey = Image.new("RGB", (64, 32), (100, 100, 100))
    values = np.zeros(16)
    values[[3, 9]] = 2.0, 1.0
    heat, kept = (token_maps(each, grid_cells(4, 4).numpy()) for each in (values, values > 1))
    image, heated, dimmed = draw_panels(grey, heat, kept, "one kept")
    assert [panel.image.size for panel in (image, heated, dimmed)] == [(768, 384)] * 3
    assert [panel.caption for panel in (image, heated, dimmed)] == [
        "image",
        "attention received in the small VLM",
        "one kept",
    ]
    ends = {0.0: (0, 0, 4), 1.0: (252, 255, 164)}  # of inferno
    for value, (x, y) in {0.0: (96, 48), 1.0: (672, 48)}.items():
        expected = [0.65 * colour + 0.35 * 100 for colour in ends[value]]
        assert heated.image.getpixel((x, y)) == pytest.approx(expected, abs=2)
    assert dimmed.image.getpixel((672, 48)) == (100, 100, 100)
    assert dimmed.image.getpixel((288, 240)) == pytest.approx((22, 22, 22), abs=1)


def test_a_failed_picture_leaves_no_file(tmp_path: Path) -> None:
    panels = [Panel(Image.new("RGB", (8, 8)), "a"), Panel(np.zeros((4, 4, 7)), "b")]
    with pytest.raises(TypeError, match="Invalid shape"):
        save_guidance(tmp_path / "p.png", panels, title="")
    assert list(tmp_path.iterdir()) == []
