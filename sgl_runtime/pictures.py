"""Pictures of guidance: where the small VLM looked, and what the large VLM gets to see."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from PIL import Image, ImageOps

from sgl_runtime.config import num_kept
from sgl_runtime.files import whole_file

if TYPE_CHECKING:
    from sgl_runtime.pipeline import SGLPipeline, SGLResult

_DIM = 0.22  # brightness of dropped patches
_HEAT = 0.65  # share of the heat map's colour
_SIDE = 384  # of a map, in points
_SHOWN = 768  # longer side of a panel, in pixels
_FAMILIES = (  # the first has Latin, Greek, Cyrillic; the others what it lacks, of Linux, Windows and macOS
    "DejaVu Sans",
    *("Noto Sans CJK SC", "Noto Sans CJK JP", "Noto Sans CJK KR", "WenQuanYi Zen Hei", "WenQuanYi Micro Hei"),
    *("Microsoft YaHei", "Yu Gothic", "Malgun Gothic"),
    *("PingFang SC", "Hiragino Sans", "Apple SD Gothic Neo", "Arial Unicode MS"),
    *("Noto Emoji", "Segoe UI Emoji"),
)


class Panel(NamedTuple):
    """An RGB picture and what it shows."""

    image: Image.Image
    caption: str


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


def guidance_panels(pipe: SGLPipeline, image: Image.Image, prompt: str, result: SGLResult) -> list[Panel]:
    """Return the image, attention received in the small VLM over it, and what of it the large VLM sees.

    Parameters
    ----------
    pipe
        Gave ``result``; has processors.
    image
        The one RGB image that ``prompt`` was about.
    """
    assert pipe.small_processor is not None
    assert pipe.large_processor is not None
    boxes, kept = pipe.small_processor(image, prompt)["visual_cells"].numpy(), result.kept_visual
    large = boxes if result.exited else pipe.large_processor(image, prompt)["visual_cells"].numpy()
    num_keep = num_kept(len(large), pipe.config.keep_ratio)
    note = f"large VLM sees {num_keep} of {len(large)} tokens"
    if kept is None:
        kept = result.mass.topk(num_keep).indices
        note = "small VLM was sure: large VLM not asked, or it would see this"
    is_kept = np.zeros(len(large))
    is_kept[kept] = 1.0
    return draw_panels(image, token_maps(result.mass.numpy(), boxes), token_maps(is_kept, large), note)


def draw_panels(
    image: Image.Image, heat: Sequence[np.ndarray], seen: Sequence[np.ndarray], note: str
) -> list[Panel]:
    """Return the image, a heat map over it, and the image with dropped patches dimmed; 768 pixels long each.

    Parameters
    ----------
    image
        RGB.
    heat
        Attention received by each visual token, from `token_maps`.
    seen
        1 for visual tokens that the large VLM keeps, else 0, from `token_maps`.
    note
        Caption of what is kept.
    """
    image = ImageOps.contain(image, (_SHOWN, _SHOWN))
    panels = [Panel(image, "image")]
    for number, values in enumerate(heat):
        where = "" if number == 0 else ", whole image" if number == len(heat) - 1 else f", pass {number + 1}"
        panels.append(Panel(_heated(image, values), f"attention received in the small VLM{where}"))
    for number, values in enumerate(seen):
        panels.append(Panel(_dimmed(image, values), note if number == 0 else "kept on the whole image"))
    return panels


def drawable(text: str, instead: str) -> str:
    """Return ``text`` where installed fonts have its characters, else ``instead``: no boxes for letters."""
    from matplotlib.font_manager import findfont, get_font

    fonts = [get_font(findfont(family)) for family in _installed()]
    known = all(char.isspace() or any(font.get_char_index(ord(char)) for font in fonts) for char in text)
    return text if known else instead


def save_guidance(path: Path, panels: Sequence[Panel], *, title: str) -> None:
    """Write a PNG of panels of one size side by side, whole or not at all.

    Parameters
    ----------
    title
        Lines above the panels; left out where no installed font has its characters.
    """
    # The object interface: pyplot would keep global state and look for a display.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    width, height = panels[0].image.size
    above = 0.9 + 0.25 * title.count("\n")
    figure = Figure(figsize=(3.6 * len(panels), 3.6 * min(2.0, height / width) + above), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(drawable(title, ""), fontsize=13, fontfamily=_installed(), parse_math=False)
    for axes, panel in zip(figure.subplots(1, len(panels)), panels, strict=True):
        axes.imshow(panel.image)
        axes.set_title(panel.caption, fontsize=10, parse_math=False)
        axes.set_axis_off()
    with whole_file(path) as partial:
        figure.savefig(partial, format="png", dpi=110)


def _installed() -> list[str]:
    from matplotlib.font_manager import fontManager

    found = {font.name for font in fontManager.ttflist}
    return [family for family in _FAMILIES if family in found]


def _heated(image: Image.Image, values: np.ndarray) -> Image.Image:
    from matplotlib import colormaps

    span = values.max() - values.min()
    colours = colormaps["inferno"]((values - values.min()) / (span or 1.0), bytes=True)[..., :3]
    heat = Image.fromarray(np.ascontiguousarray(colours)).resize(image.size, Image.Resampling.NEAREST)
    return Image.blend(image.convert("L").convert("RGB"), heat, _HEAT)


def _dimmed(image: Image.Image, seen: np.ndarray) -> Image.Image:
    light = Image.fromarray(np.uint8(255 * (_DIM + (1 - _DIM) * seen))).resize(
        image.size, Image.Resampling.NEAREST
    )
    pixels = np.asarray(image, dtype=np.float32) * (np.asarray(light, dtype=np.float32)[..., None] / 255)
    return Image.fromarray(pixels.astype(np.uint8))
