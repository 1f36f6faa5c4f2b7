"""Pictures of guidance: where the small VLM looked, and what the large VLM gets to see."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from sgl_runtime.files import whole_file

Tiling = tuple[int, int, bool]  # columns, rows, whether a thumbnail of the whole image follows
_DIM = 0.22  # brightness of dropped patches


def token_map(values: np.ndarray, tiling: Tiling) -> tuple[np.ndarray, np.ndarray | None]:
    """Put one value per visual token back into the picture.

    Parameters
    ----------
    values : (N,)
        In prompt order: tile by tile, each a square grid, row by row; the thumbnail last.
    tiling
        From `Processor.tiling`.

    Returns
    -------
    picture : (rows * side, columns * side)
    thumbnail : (side, side) or None

    Raises
    ------
    ValueError
        The number of values is not that of the tiles.
    """
    columns, rows, has_thumbnail = tiling
    tiles = columns * rows + has_thumbnail
    side = math.isqrt(len(values) // tiles)
    if tiles * side * side != len(values):
        raise ValueError(f"{len(values)} visual tokens do not fill {tiles} square tiles; is it one image?")
    grids = np.asarray(values).reshape(tiles, side, side)
    picture = grids[: columns * rows].reshape(rows, columns, side, side).swapaxes(1, 2)
    return picture.reshape(rows * side, columns * side), grids[-1] if has_thumbnail else None


def save_guidance(
    path: Path,
    image: Image.Image,
    mass: np.ndarray,
    kept: np.ndarray,
    tiling: Tiling,
    *,
    title: str,
    note: str,
) -> None:
    """Write a PNG: the image, the mass as a heat map over it, and the image with dropped patches dimmed.

    Parameters
    ----------
    path
        Written whole or not at all.
    image
        The RGB image the question was about.
    mass : (N,)
        Attention received by each visual token.
    kept : (num_keep,)
        Which visual tokens the large VLM keeps.
    tiling
        From `Processor.tiling`.
    title, note
        One line above the picture and one above its third panel.
    """
    heat, thumbnail = token_map(mass, tiling)
    is_kept = np.zeros(len(mass))
    is_kept[kept] = 1.0
    seen, seen_thumbnail = token_map(is_kept, tiling)
    panels = [
        (image, None, "image"),
        (image, heat, "attention received in the small VLM"),
        (_dim(image, seen), None, note),
    ]
    if thumbnail is not None and seen_thumbnail is not None:
        panels.insert(2, (image, thumbnail, "the same on the thumbnail"))
        panels.append((_dim(image, seen_thumbnail), None, "kept on the thumbnail"))
    _save_panels(path, panels, title)


def _dim(image: Image.Image, seen: np.ndarray) -> Image.Image:
    light = Image.fromarray(np.uint8(255 * (_DIM + (1 - _DIM) * seen))).resize(
        image.size, Image.Resampling.NEAREST
    )
    pixels = np.asarray(image, dtype=np.float32) * (np.asarray(light, dtype=np.float32)[..., None] / 255)
    return Image.fromarray(pixels.astype(np.uint8))


def _save_panels(path: Path, panels: list[tuple[Image.Image, Any, str]], title: str) -> None:
    # The object interface: pyplot would keep global state and look for a display.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    width, height = panels[0][0].size
    figure = Figure(figsize=(3.6 * len(panels), 3.6 * min(2.0, height / width) + 0.9), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=13, parse_math=False)
    for axes, (image, heat, caption) in zip(figure.subplots(1, len(panels)), panels, strict=True):
        grey = image.convert("L") if heat is not None else image
        axes.imshow(grey, cmap="gray", extent=(0, width, height, 0))
        if heat is not None:
            axes.imshow(
                heat, cmap="inferno", alpha=0.65, extent=(0, width, height, 0), interpolation="nearest"
            )
        axes.set_title(caption, fontsize=10, parse_math=False)
        axes.set_axis_off()
    with whole_file(path) as partial:
        figure.savefig(partial, format="png", dpi=110)
