"""Rendered scenes with questions: labelled coloured shapes over clutter, noise and stray text.

A scene is a pure function of ``(split, index)``, so training and held-out scenes never meet and any scene of
a report can be rendered again. Nothing here knows about models.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

SIZE = 256
COLORS = {
    "red": (214, 48, 44),
    "green": (46, 160, 67),
    "blue": (44, 96, 214),
    "yellow": (236, 200, 40),
    "purple": (142, 60, 190),
    "orange": (240, 134, 30),
}
SHAPES = ("circle", "square", "triangle", "diamond")
LETTERS = "ABCEFHKLMNPRTXYZ"
DIGITS = "23456789"
KINDS = ("read", "read two", "describe", "count")
_KIND_SHARES = (0.4, 0.2, 0.2, 0.2)
MAX_COUNT = 4
SPLITS = {"train": 0, "test": 1, "demo": 2, "calibration": 3}

_FONT_FILES = sorted((Path(__file__).parent / "fonts").glob("*.ttf"))
_SPRITE_SCALE = 4  # shapes are drawn this much larger and scaled down, for smooth edges
_GRID, _JITTER = (
    16,
    5,
)  # label centres lie within _JITTER pixels of a node of a grid that is _GRID pixels wide


@dataclass(frozen=True)
class Item:
    """One labelled shape. ``x, y`` is the centre of its label in pixels."""

    color: str
    shape: str
    label: str
    x: int
    y: int

    @property
    def name(self) -> str:
        return f"{self.color} {self.shape}"


@dataclass(frozen=True)
class Question:
    """``targets`` are the items one must look at to answer."""

    kind: str
    text: str
    answer: str
    targets: tuple[Item, ...]


@dataclass(frozen=True)
class Scene:
    image: Image.Image  # RGB, SIZE x SIZE
    items: tuple[Item, ...]
    questions: tuple[Question, ...]


def make_scene(split: str, index: int, questions: int = 4, crowd: tuple[int, int] = (7, 13)) -> Scene:
    """Render scene ``index`` of ``split`` (a key of SPLITS) and ask that many ``questions`` about it.

    ``crowd`` bounds the number of items; fewer are placed where no room is left.
    """
    rng = np.random.default_rng([SPLITS[split], index])
    items, shape_sizes = _place_items(rng, crowd)
    image = _background(rng)
    for _ in range(rng.integers(2, 6)):
        _stray_text(image, rng)
    for item, size in zip(items, shape_sizes, strict=True):
        _draw_item(image, item, size, rng)
    image = _add_noise(image, rng)
    asked: list[Question] = []
    while len(asked) < questions:
        question = ask(KINDS[rng.choice(len(KINDS), p=_KIND_SHARES)], items, rng)
        if question:
            asked.append(question)
    return Scene(image, items, tuple(asked))


def ask(kind: str, items: tuple[Item, ...], rng: np.random.Generator) -> Question | None:
    """A question of ``kind`` whose answer the items determine uniquely, or None where they allow none."""
    names = [item.name for item in items]
    unique = [item for item in items if names.count(item.name) == 1]
    if kind == "describe":
        item = items[rng.integers(len(items))]
        return Question(kind, f"describe the shape with {item.label}", item.name, (item,))
    if kind == "count":
        # The count is drawn first, so that "1" is not the answer to most questions.
        by_color = {color: tuple(i for i in items if i.color == color) for color in COLORS}
        counts = sorted({len(found) for found in by_color.values()} - {0})
        wanted = counts[rng.integers(len(counts))]
        colors = [color for color, found in by_color.items() if len(found) == wanted]
        color = colors[rng.integers(len(colors))]
        return Question(kind, f"how many {color} shapes", str(wanted), by_color[color])
    if kind == "read" and unique:
        item = unique[rng.integers(len(unique))]
        return Question(kind, f"read the {item.name}", item.label, (item,))
    if kind == "read two" and len(unique) >= 2:
        one, two = (unique[i] for i in rng.choice(len(unique), 2, replace=False))
        text = f"read the {one.name} and the {two.name}"
        return Question(kind, text, f"{one.label} {two.label}", (one, two))
    return None


def _place_items(rng: np.random.Generator, crowd: tuple[int, int]) -> tuple[tuple[Item, ...], list[int]]:
    items: list[Item] = []
    sizes: list[int] = []
    wanted = int(rng.integers(crowd[0], crowd[1] + 1))
    labels: set[str] = set()
    colors = list(COLORS)
    for _ in range(400):
        if len(items) == wanted:
            break
        size = int(rng.integers(48, 61))
        x, y = (
            int(v)
            for v in rng.integers(2, 14, 2) * _GRID + _GRID // 2 + rng.integers(-_JITTER, _JITTER + 1, 2)
        )
        if any(math.hypot(x - i.x, y - i.y) < 0.53 * (size + s) for i, s in zip(items, sizes, strict=True)):
            continue
        color = colors[rng.integers(len(colors))]
        if sum(i.color == color for i in items) == MAX_COUNT:
            continue
        label = LETTERS[rng.integers(len(LETTERS))] + DIGITS[rng.integers(len(DIGITS))]
        if label in labels:
            continue
        labels.add(label)
        items.append(Item(color, SHAPES[rng.integers(len(SHAPES))], label, x, y))
        sizes.append(size)
    return tuple(items), sizes


def _background(rng: np.random.Generator) -> Image.Image:
    """A grey gradient with thin grey bars."""
    base = rng.uniform(120, 215) + rng.uniform(-12, 12, 3)  # (3,)
    slope = rng.uniform(-25, 25, 2)
    corners = np.array([[-1, -1], [-1, 1], [1, -1], [1, 1]]) @ slope  # (4,)
    pixels = np.clip(base + corners.reshape(2, 2, 1), 0, 255).astype(np.uint8)
    image = Image.fromarray(pixels).resize((SIZE, SIZE), Image.Resampling.BILINEAR)
    draw = ImageDraw.Draw(image)
    for _ in range(rng.integers(6, 15)):
        x, y, angle, length = (
            *rng.uniform(0, SIZE, 2),
            rng.uniform(0, math.pi),
            rng.uniform(20, 110),
        )
        end = (x + length * math.cos(angle), y + length * math.sin(angle))
        grey = int(rng.integers(60, 240))
        draw.line([(x, y), end], fill=(grey, grey, grey), width=int(rng.integers(1, 5)))
    return image


def _stray_text(image: Image.Image, rng: np.random.Generator) -> None:
    """A grey label on no shape: text that answers nothing."""
    text = LETTERS[rng.integers(len(LETTERS))] + DIGITS[rng.integers(len(DIGITS))]
    grey = int(rng.integers(40, 110))
    x, y = (int(v) for v in rng.integers(12, SIZE - 12, 2))
    _draw_label(image, text, x, y, (grey, grey, grey), rng)


def _draw_item(image: Image.Image, item: Item, size: int, rng: np.random.Generator) -> None:
    color = np.clip(np.array(COLORS[item.color]) + rng.integers(-18, 19, 3), 0, 255)
    mask, (dx, dy) = _shape_mask(item.shape, size)
    fill = tuple(int(v) for v in color)
    image.paste(fill, (item.x - dx, item.y - dy), mask)
    ink = (255, 255, 255) if rng.random() < 0.5 and item.color != "yellow" else (16, 16, 16)
    _draw_label(image, item.label, item.x, item.y, ink, rng)


@functools.cache
def _shape_mask(shape: str, size: int) -> tuple[Image.Image, tuple[int, int]]:
    """Coverage mask of a shape, and the place of its label inside the mask."""
    large = size * _SPRITE_SCALE
    mask = Image.new("L", (large, large))
    draw = ImageDraw.Draw(mask)
    if shape == "circle":
        draw.ellipse([0, 0, large - 1, large - 1], fill=255)
    elif shape == "square":
        edge = int(0.06 * large)
        draw.rectangle([edge, edge, large - 1 - edge, large - 1 - edge], fill=255)
    elif shape == "triangle":
        draw.polygon([(large / 2, 0), (large - 1, large - 1), (0, large - 1)], fill=255)
    else:
        draw.polygon(
            [(large / 2, 0), (large - 1, large / 2), (large / 2, large - 1), (0, large / 2)], fill=255
        )
    low = int(0.67 * size) if shape == "triangle" else size // 2
    return mask.resize((size, size), Image.Resampling.LANCZOS), (size // 2, low)


def _draw_label(
    image: Image.Image, text: str, x: int, y: int, ink: tuple[int, int, int], rng: np.random.Generator
) -> None:
    mask = _label_mask(text, int(rng.integers(len(_FONT_FILES))), int(rng.integers(20, 25)))
    image.paste(ink, (x - mask.width // 2, y - mask.height // 2), mask)


@functools.cache
def _label_mask(text: str, font: int, size: int) -> Image.Image:
    face = ImageFont.truetype(str(_FONT_FILES[font]), size)
    left, top, right, bottom = face.getbbox(text)
    mask = Image.new("L", (int(right - left) + 2, int(bottom - top) + 2))
    ImageDraw.Draw(mask).text((1 - left, 1 - top), text, fill=255, font=face)
    return mask


def _add_noise(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    field = _noise_field(int(rng.integers(4, 14)))
    x, y = rng.integers(0, field.shape[0] - SIZE, 2)
    noisy = np.asarray(image, dtype=np.int16) + field[x : x + SIZE, y : y + SIZE]
    return Image.fromarray(np.clip(noisy, 0, 255, out=noisy).astype(np.uint8))


@functools.cache
def _noise_field(sigma: int) -> np.ndarray:
    """Normal noise to cut from, (768, 768, 3) int16: drawing it afresh for each scene is slow."""
    return np.random.default_rng(sigma).normal(0, sigma, (768, 768, 3)).round().astype(np.int16)
