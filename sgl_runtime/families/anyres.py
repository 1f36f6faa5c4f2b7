"""Where the visual tokens of an image lie: in one square crop, and in crops of a larger canvas."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Tower:
    """How the vision tower sees one square crop.

    Attributes
    ----------
    size, patch : pixels along a side of a crop and of a patch
    extra : features in front of the patches' own: the class token, where it is kept
    """

    size: int
    patch: int
    extra: int = 0

    @property
    def side(self) -> int:
        """Patches along a side of a crop."""
        return self.size // self.patch

    @property
    def tokens(self) -> int:
        """Features of one crop."""
        return self.side**2 + self.extra

    def edges(self, first: int, last: int, count: int) -> Tensor:
        """Return the count + 1 borders, in pixels, of ``count`` equal parts of patches ``first`` to ``last``.

        Patches are counted over crops that lie side by side. Pixels at the end of a crop that do not fill a
        patch belong to its last patch.
        """
        at = torch.linspace(first, last, count + 1, dtype=torch.float64)
        whole = at.floor()
        begin, end = self._pixel(whole), self._pixel(whole + 1)
        return begin + (at - whole) * (end - begin)

    def _pixel(self, patch: Tensor) -> Tensor:
        return patch // self.side * self.size + patch % self.side * self.patch


@dataclass(frozen=True)
class Layout:
    """The tokens of an image that the vision tower sees whole and in crops of a larger canvas.

    Attributes
    ----------
    image : (height, width) of the image in pixels
    crops : (rows, columns) of crops in the canvas
    box : top, bottom, left, right of the part of the canvas that keeps its tokens, in patches
    grid : (rows, columns) of tokens that this part becomes
    """

    tower: Tower
    image: tuple[int, int]
    crops: tuple[int, int]
    box: tuple[int, int, int, int]
    grid: tuple[int, int]

    @classmethod
    def of(cls, image: tuple[int, int], pinpoints: Any, tower: Tower, most: int | None = None) -> Layout:
        """Lay out an image of ``(height, width)``; ``most``: shrink a canvas beyond that many crops."""
        from transformers.image_processing_utils import select_best_resolution

        height, width = select_best_resolution(image, pinpoints)
        crops = height // tower.size, width // tower.size
        box = _unpadded(image, (crops[0] * tower.side, crops[1] * tower.side))
        rows, columns = box[1] - box[0], box[3] - box[2]
        if most is not None:
            ratio = math.sqrt(rows * columns / (most * tower.side**2))
            if ratio > 1.1:
                rows, columns = int(rows // ratio), int(columns // ratio)
        return cls(tower, image, crops, box, (rows, columns))

    @property
    def num_crops(self) -> int:
        """Crops that go through the vision tower, the whole image among them."""
        return 1 + self.crops[0] * self.crops[1]

    @property
    def tokens(self) -> int:
        """Visual tokens: the whole image's, then those of the crops with one newline per row."""
        rows, columns = self.grid
        return self.tower.tokens + rows * (columns + 1)

    def cells(self) -> Tensor:
        """Return the cells (tokens, 3, 2), see `sgl_runtime.families.base.Prepared`.

        A newline token gets the cell of the last patch of its row.
        """
        side = self.tower.side
        whole = self.tower.edges(0, side, side) / self.tower.size
        canvas = self.crops[0] * self.tower.size, self.crops[1] * self.tower.size
        top, bottom, left, right = self.box
        down = self.tower.edges(top, bottom, self.grid[0])
        across = self.tower.edges(left, right, self.grid[1])
        fitted = _fitted(self.image, canvas)
        down = shares(down, (canvas[0] - fitted[0]) // 2, fitted[0])
        across = shares(across, (canvas[1] - fitted[1]) // 2, fitted[1])
        return torch.cat([cells_between(whole, whole), cells_between(down, across, newlines=True)])


def shares(edges: Tensor, begin: int, length: int) -> Tensor:
    """Return borders in pixels as shares of what begins at ``begin`` and is ``length`` long, in [0, 1]."""
    return ((edges - begin) / length).clamp(0, 1)


def cells_between(down: Tensor, across: Tensor, *, newlines: bool = False) -> Tensor:
    """Return the cells (N, 3, 2) of a grid, row by row, between its borders.

    Parameters
    ----------
    down, across
        Borders of the rows and of the columns, as shares of the image.
    newlines
        Each row ends in a newline token, which gets the cell of the last patch; in a row without patches, all
        of the row.
    """
    rows, columns = len(down) - 1, len(across) - 1
    cells = torch.empty(rows, columns + newlines, 3, 2)
    cells[..., 0, 0], cells[..., 0, 1] = 0, 1
    cells[..., 1, 0], cells[..., 1, 1] = down[:-1, None], down[1:, None]
    cells[:, :columns, 2, 0], cells[:, :columns, 2, 1] = across[:-1], across[1:]
    if newlines:
        cells[:, columns, 2] = cells[:, columns - 1, 2] if columns else torch.tensor([0.0, 1.0])
    return cells.flatten(0, 1)


def _unpadded(image: tuple[int, int], canvas: tuple[int, int]) -> tuple[int, int, int, int]:
    """Return top, bottom, left, right of the patches of a canvas that an image of this shape fills."""
    (height, width), (rows, columns) = image, canvas
    if width / height > columns / rows:
        padding = (rows - int(round(height * (columns / width), 7))) // 2
        return padding, rows - padding, 0, columns
    padding = (columns - int(round(width * (rows / height), 7))) // 2
    return 0, rows, padding, columns - padding


def _fitted(image: tuple[int, int], canvas: tuple[int, int]) -> tuple[int, int]:
    """Return (height, width) of an image enlarged or shrunk until it fits exactly into a canvas."""
    scale = [whole / own for whole, own in zip(canvas, image, strict=True)]
    if scale[1] < scale[0]:
        return min(math.ceil(image[0] * scale[1]), canvas[0]), canvas[1]
    return canvas[0], min(math.ceil(image[1] * scale[0]), canvas[1])
