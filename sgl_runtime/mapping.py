"""From the small VLM's visual tokens to the large one's, when the two cut images differently.

A visual token looks at a box of its image. `resample` hands each small token's mass to the large tokens that
look at the same place, in proportion to the overlap: none is lost, none is made. `rank` divides that by how
many small tokens' worth each large token got, so it is a mean of the small tokens' masses, in the units of
one token. That is what tokens are ranked by, and not the mass itself, which grows with the box: of two tokens
with equal content the larger would win, a thumbnail's tokens would all be kept before those of its tiles,
and of two images the one that the large VLM cuts more coarsely. Attention knows no area: a key's share of
a softmax depends on what it shows, not on how much of the picture, and so the best guess at what a token
receives is what a small token at its place did.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

import sgl_kernels
from sgl_runtime.errors import PromptError

_SAME = 1e-4  # boxes are shares of an image; two cells are never this near to each other
_TOUCH = 1e-6  # neighbours share a border, of which rounding makes no overlap
_PAIRS_TOGETHER = 1 << 22  # of small and large tokens: 16 MiB for each intermediate result


@dataclass(frozen=True, eq=False)
class Cells:
    """Where the N visual tokens of one request look.

    Attributes
    ----------
    image : (N,) int64, number of the image or video in the request, in the order of the prompt
    boxes : (N, 3, 2) fp32, begin and end in time, height and width, as shares of that image in [0, 1]
    """

    image: Tensor
    boxes: Tensor

    def __post_init__(self) -> None:
        if self.image.dim() != 1 or self.boxes.shape != (len(self.image), 3, 2):
            raise ValueError(
                "Cells take image (N,) and boxes (N, 3, 2) of the same N, got "
                f"{tuple(self.image.shape)} and {tuple(self.boxes.shape)}."
            )

    def __len__(self) -> int:
        return len(self.image)


def same_grid(small: Cells, large: Cells) -> bool:
    """Return whether both see the same cells in the same order, so that token i stands for token i."""
    return (
        len(small) == len(large)
        and torch.equal(small.image, large.image)
        and bool(((small.boxes - large.boxes).abs() <= _SAME).all())
    )


def resample(mass: Tensor, small: Cells, large: Cells) -> Tensor:
    """Spread the mass of small tokens over the large tokens that look at the same place; the sum stays.

    A small token's mass goes to the large tokens of its image in proportion to the volumes of the overlaps.
    Where the large VLM covers an image several times, as tiles and a thumbnail do, each gets its share. A
    small token that overlaps none, as its box is empty or by rounding, gives all to the large token of its
    image with the nearest centre.

    Parameters
    ----------
    mass : Tensor
        (1, N_s) fp32. NaN and infinity reach those large tokens only that get a share.
    small, large : Cells
        Of the N_s and the N_l tokens, on the same device.

    Returns
    -------
    Tensor
        (1, N_l) fp32.

    Raises
    ------
    PromptError
        The two do not have the same images.
    """
    return _spread(mass, small, large)


def rank(mass: Tensor, small: Cells, large: Cells) -> Tensor:
    """Return what to rank large tokens by: the mean mass of the small tokens at their place.

    `resample` of the mass over `resample` of ones; the head of this file says why. Between equal grids, each
    covering its images once, it is the mass. A large token that no small one looks at ranks as one that got
    no attention.

    Parameters and errors are those of `resample`; returns (1, N_l) fp32.
    """
    spread, worth = _spread(torch.cat((mass, torch.ones_like(mass))), small, large).split(1)
    return torch.where(worth > 0, spread / worth, 0)


def _spread(values: Tensor, small: Cells, large: Cells) -> Tensor:
    """Spread values (k, N_s) of small tokens over large ones, (k, N_l), as `resample` says."""
    if values.dim() != 2 or values.shape[1] != len(small):
        raise ValueError(f"A mass must have the shape {(1, len(small))}, got {tuple(values.shape)}.")
    check_images(small, large)
    out = torch.zeros(len(values), len(large), dtype=torch.float32, device=values.device)
    for number in small.image.unique().tolist():
        givers, takers = ((cells.image == number).nonzero()[:, 0] for cells in (small, large))
        given, boxes = values[:, givers], large.boxes[takers]
        taken = torch.zeros(len(values), len(takers), dtype=torch.float32, device=values.device)
        together = max(1, _PAIRS_TOGETHER // len(takers))
        parts = zip(given.split(together, 1), small.boxes[givers].split(together), strict=True)
        for some, own in parts:
            shares = _shares(own, boxes)
            for row, one in zip(
                taken, some, strict=True
            ):  # where: a share of 0 makes NaN and infinity nothing
                row += torch.where(shares > 0, one[:, None] * shares, 0).sum(0)
        out[:, takers] = taken
    return out


def per_image_ranking(ranking: Tensor, image: Tensor, keep_ratio: float) -> tuple[Tensor, int]:
    """Rank so that each image keeps its own share: ``keep_scope="image"``.

    Parameters
    ----------
    ranking : Tensor
        (1, N) fp32.
    image : Tensor
        (N,) int64, the image of each token.
    keep_ratio : float
        Image i keeps ``max(1, int(N_i * keep_ratio))`` of its N_i tokens, as `sgl_kernels.select_tokens`
        chooses them: ties go to the lower position, NaN ranks below everything.

    Returns
    -------
    ranking : Tensor
        (1, N) fp32, 1 for tokens to keep and 0 for the others.
    num_keep : int
        How many are 1.
    """
    chosen, total = torch.zeros_like(ranking), 0
    for number in image.unique().tolist():
        members = (image == number).nonzero()[:, 0]
        count = len(members)
        keep = max(1, int(count * keep_ratio))
        positions = torch.arange(count, dtype=torch.int32, device=ranking.device)[None]
        lens = torch.full((1,), count, dtype=torch.int32, device=ranking.device)
        kept, _ = sgl_kernels.select_tokens(ranking[:, members], positions, lens, keep, out_len=keep)
        chosen[0, members[kept[0].long()]] = 1
        total += keep
    return chosen, total


def _shares(givers: Tensor, takers: Tensor) -> Tensor:
    """Return the share (n, m) of each box (n, 3, 2) that each of the others (m, 3, 2) gets; rows sum to 1."""
    overlap = givers.new_ones(len(givers), len(takers))
    distance = givers.new_zeros(len(givers), len(takers))
    for axis in range(3):
        begin, end = givers[:, axis, :1], givers[:, axis, 1:]  # (n, 1)
        other_begin, other_end = takers[:, axis, 0], takers[:, axis, 1]  # (m,)
        length = torch.minimum(end, other_end) - torch.maximum(begin, other_begin)
        overlap *= torch.where(length > _TOUCH, length, 0)
        distance += (begin + end - other_begin - other_end).square()
    total = overlap.sum(1, keepdim=True)
    nearest = torch.zeros_like(overlap).scatter(1, distance.argmin(1, keepdim=True), 1)
    return torch.where(total > 0, overlap / total, nearest)


def check_images(small: Cells, large: Cells) -> None:
    of_small, of_large = (set(cells.image.unique().tolist()) for cells in (small, large))
    if of_small != of_large:
        raise PromptError(
            "The two VLMs' visual tokens cannot be mapped: images "
            f"{sorted(of_small ^ of_large)} are seen by one of them only. "
            f"The small VLM sees {_describe(small)}; the large VLM sees {_describe(large)}. "
            "Give both the same images in the same order."
        )


def _describe(cells: Cells) -> str:
    """Say how many tokens each image has and how large their boxes are, for messages."""
    told = []
    for number in cells.image.unique().tolist():
        sizes = cells.boxes[cells.image == number].diff(dim=-1)[..., 0]  # (N_i, 3)
        least, most = sizes.amin(0).tolist(), sizes.amax(0).tolist()
        size = " x ".join(
            f"{a:.3g}" if b - a <= _SAME else f"{a:.3g}-{b:.3g}" for a, b in zip(least, most, strict=True)
        )
        told.append(f"image {number} as {len(sizes)} tokens of {size} (time x height x width)")
    return ", ".join(told) or "no image"
