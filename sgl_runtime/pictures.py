"""Pictures of guidance: where the small VLM looked, and what the large VLM gets to see."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from sgl_runtime.files import whole_file

_DIM = 0.22  # brightness of dropped patches
_SIDE = 384  # of a map, in points


def token_maps(values: np.ndarray, boxes: np.ndarray) -> list[np.ndarray]:
    """Put one value per visual token of an image back into the picture.

    Parameters
    ----------
    values : (N,)
        In prompt order.
    boxes : (N, 3, 2)
        What each token covers: ``visual_cells`` of the processor's output.

    Returns
    -------
    list of (384, 384)
        One for each time that the tokens go over the image: tiles, then a thumbnail.

    Raises
    ------
    ValueError
        There are not as many boxes as values.
    """
    if len(values) != len(boxes):
        raise ValueError(f"{len(values)} values came for {len(boxes)} visual tokens; is it one image?")
    maps: list[np.ndarray] = []
    painted = np.ones((_SIDE, _SIDE), dtype=bool)
    for value, (_, rows, columns), before in zip(values, boxes, [None, *boxes[:-1]], strict=True):
        if before is not None and np.array_equal(before[1:], (rows, columns)):
            continue  # a newline, which stands where the last patch of its row does
        (top, bottom), (left, right) = np.rint(_SIDE * np.stack((rows, columns))).astype(int)
        if painted[top:bottom, left:right].mean() > 0.5:  # the tokens begin to go over the image once more
            maps.append(np.zeros((_SIDE, _SIDE)))
            painted = np.zeros_like(painted)
        maps[-1][top:bottom, left:right] = value
        painted[top:bottom, left:right] = True
    return maps


def save_guidance(
    path: Path,
    image: Image.Image,
    heat: list[np.ndarray],
    seen: list[np.ndarray],
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
    heat
        Attention received by each visual token, from `token_maps`.
    seen
        1 for visual tokens that the large VLM keeps, else 0, from `token_maps`.
    title, note
        One line above the picture and one above the panel of what is kept.
    """
    panels: list[tuple[Image.Image, Any, str]] = [(image, None, "image")]
    for number, values in enumerate(heat):
        where = "" if number == 0 else ", whole image" if number == len(heat) - 1 else f", pass {number + 1}"
        panels.append((image, values, f"attention received in the small VLM{where}"))
    for number, values in enumerate(seen):
        panels.append((_dim(image, values), None, note if number == 0 else "kept on the whole image"))
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
