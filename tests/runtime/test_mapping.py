"""Masses between grids that differ: against a loop over all pairs in fp64, and what must stay the same."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sgl_runtime import mapping
from sgl_runtime.errors import PromptError
from sgl_runtime.families.base import grid_cells
from sgl_runtime.mapping import Cells, per_image_ranking, rank, resample, same_grid


def brute(mass: Tensor, small: Cells, large: Cells) -> list[float]:
    """`resample` by its definition, in Python's own fp64."""
    out = [0.0] * len(large)
    givers, takers = small.boxes.double().tolist(), large.boxes.double().tolist()
    for i, box in enumerate(givers):
        same = [j for j in range(len(large)) if large.image[j] == small.image[i]]
        volumes = {}
        for j in same:
            volume = 1.0
            for (a, b), (c, d) in zip(box, takers[j], strict=True):
                volume *= max(0.0, min(b, d) - max(a, c))
            volumes[j] = volume
        if not any(volumes.values()):
            away = {
                j: sum((a + b - c - d) ** 2 for (a, b), (c, d) in zip(box, takers[j], strict=True))
                for j in same
            }
            volumes = {min(same, key=lambda j: (away[j], j)): 1.0}
        for j, volume in volumes.items():
            out[j] += float(mass[0, i]) * volume / sum(volumes.values())
    return out


def cells(*grids: Tensor) -> Cells:
    """One image per argument."""
    image = torch.arange(len(grids)).repeat_interleave(torch.tensor([len(boxes) for boxes in grids]))
    return Cells(image, torch.cat(list(grids)))


def tiles(rows: int, columns: int, side: int) -> Tensor:
    """Tiles of side x side tokens, and a thumbnail of as many."""
    parts = [
        grid_cells(side, side, (r / rows, (r + 1) / rows, c / columns, (c + 1) / columns))
        for r in range(rows)
        for c in range(columns)
    ]
    return torch.cat([*parts, grid_cells(side, side)])


def film(frames: int, rows: int, columns: int) -> Tensor:
    """A video's cells, frame by frame."""
    grid = grid_cells(rows, columns).repeat(frames, 1, 1)
    bounds = torch.linspace(0, 1, frames + 1)
    grid[:, 0, 0] = bounds[:-1].repeat_interleave(rows * columns)
    grid[:, 0, 1] = bounds[1:].repeat_interleave(rows * columns)
    return grid


def masses(count: int, seed: int = 0) -> Tensor:
    return torch.rand(1, count, generator=torch.Generator().manual_seed(seed)).exp2() - 0.9


KINDS = {
    "grid": grid_cells(3, 4),
    "finer": grid_cells(7, 9),
    "coarse": grid_cells(1, 2),
    "tiles": tiles(2, 3, 2),
    "box": grid_cells(2, 3, (0.1, 0.7, 0.2, 0.9)),
    "film": film(3, 2, 2),
    "newlines": torch.cat((grid_cells(2, 2), torch.tensor([[[0.0, 1], [0, 0.5], [1, 1]]]))),
}


@pytest.mark.parametrize("of_large", KINDS)
@pytest.mark.parametrize("of_small", KINDS)
def test_resample_is_its_definition(of_small: str, of_large: str) -> None:
    small = cells(KINDS[of_small], KINDS["finer"])
    large = cells(KINDS[of_large], KINDS["tiles"])
    mass = masses(len(small))
    out = resample(mass, small, large)
    assert out.dtype == torch.float32
    expected = torch.tensor(brute(mass, small, large))
    # Neighbours touch, and by the rounding of their ends some overlap, which `brute` does not forgive.
    torch.testing.assert_close(out[0].double(), expected.double(), rtol=1e-5, atol=1e-6 * float(mass.mean()))
    assert float(out.double().sum()) == pytest.approx(float(mass.double().sum()), rel=1e-6)
    for image in (0, 1):
        assert float(out[0, large.image == image].sum()) == pytest.approx(
            float(mass[0, small.image == image].sum()), rel=1e-5
        )


@st.composite
def random_cells(draw: st.DrawFn) -> Cells:
    """Boxes of any place and size, empty ones too, on a lattice where fp32 is exact."""
    images = draw(st.lists(st.integers(1, 6), min_size=2, max_size=2))
    share = st.integers(0, 16).map(lambda n: n / 16)
    box = st.lists(st.tuples(share, share).map(sorted), min_size=3, max_size=3)
    boxes = draw(st.lists(box, min_size=sum(images), max_size=sum(images)))
    image = torch.repeat_interleave(torch.arange(2), torch.tensor(images))
    return Cells(image, torch.tensor(boxes, dtype=torch.float32))


@given(random_cells(), random_cells(), st.integers(0, 1000))
@settings(max_examples=200, deadline=None)
def test_resample_of_any_boxes(small: Cells, large: Cells, seed: int) -> None:
    mass = masses(len(small), seed)
    out = resample(mass, small, large)
    torch.testing.assert_close(out[0], torch.tensor(brute(mass, small, large)), rtol=1e-5, atol=1e-7)
    assert float(out.double().sum()) == pytest.approx(float(mass.double().sum()), rel=1e-6)
    ranks = rank(mass, small, large)
    low, high = float(mass.min()), float(mass.max())
    got = ranks[resample(torch.ones_like(mass), small, large) > 0]
    assert ((got >= low * (1 - 1e-5)) & (got <= high * (1 + 1e-5))).all()


def test_known_shares() -> None:
    """Two halves over three thirds; and tiles beside their thumbnail."""
    halves, thirds = cells(grid_cells(1, 2)), cells(grid_cells(1, 3))
    out = resample(torch.tensor([[6.0, 3.0]]), halves, thirds)
    torch.testing.assert_close(out, torch.tensor([[4.0, 3.0, 2.0]]))
    torch.testing.assert_close(
        rank(torch.tensor([[6.0, 3.0]]), halves, thirds), torch.tensor([[6.0, 4.5, 3.0]])
    )
    out = resample(torch.tensor([[8.0]]), cells(grid_cells(1, 1)), cells(tiles(2, 2, 1)))
    torch.testing.assert_close(out, torch.tensor([[1.0, 1.0, 1.0, 1.0, 4.0]]))


def test_a_small_pass_over_pairs_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    small, large = cells(KINDS["finer"], KINDS["tiles"]), cells(KINDS["tiles"], KINDS["newlines"])
    mass = masses(len(small))
    whole = resample(mass, small, large)
    monkeypatch.setattr(mapping, "_PAIRS_TOGETHER", 50)
    torch.testing.assert_close(resample(mass, small, large), whole, rtol=1e-6, atol=0)


def test_images_need_not_be_side_by_side() -> None:
    small, large = cells(KINDS["grid"], KINDS["coarse"]), cells(KINDS["finer"], KINDS["tiles"])
    mass = masses(len(small))
    order = torch.randperm(len(small), generator=torch.Generator().manual_seed(0))
    mixed = Cells(small.image[order], small.boxes[order])
    torch.testing.assert_close(resample(mass[:, order], mixed, large), resample(mass, small, large))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_not_finite_stays_at_its_place(bad: float) -> None:
    small, large = cells(grid_cells(2, 2)), cells(grid_cells(4, 4))
    mass = torch.tensor([[1.0, 1.0, 1.0, bad]])
    for out in (resample(mass, small, large), rank(mass, small, large)):
        wrong = ~out[0].isfinite().reshape(4, 4)
        assert wrong[2:, 2:].all()
        assert wrong.sum() == 4


def test_rank_is_the_mass_on_the_same_grid() -> None:
    grid = cells(KINDS["grid"], KINDS["finer"])
    mass = masses(len(grid))
    torch.testing.assert_close(rank(mass, grid, grid), mass, rtol=1e-5, atol=1e-6)


def test_rank_does_not_favour_large_cells() -> None:
    """Evenly attended images: by mass the thumbnail and the coarser image would win, by rank nothing does."""
    small = cells(grid_cells(4, 4), grid_cells(4, 4))
    large = cells(tiles(2, 2, 2), grid_cells(1, 2))
    mass = torch.ones(1, len(small))
    by_mass = resample(mass, small, large)[0]
    assert by_mass[16:20].min() > 3.9 * by_mass[:16].max()  # thumbnail against tiles
    assert by_mass[20:].min() > 3.9 * by_mass[:20].max()  # one image against the other
    torch.testing.assert_close(rank(mass, small, large)[0], torch.ones(len(large)))


def test_rank_does_not_favour_images_of_more_small_tokens() -> None:
    """A density would: the first image gets four times the mass, as it has four times the tokens."""
    small, large = cells(grid_cells(4, 4), grid_cells(2, 2)), cells(grid_cells(3, 3), grid_cells(3, 3))
    torch.testing.assert_close(rank(torch.ones(1, 20), small, large), torch.ones(1, 18))


def test_rank_finds_what_was_looked_at() -> None:
    """One hot cell: the large tokens inside it come first, those of a tile and the thumbnail's own."""
    small, large = cells(grid_cells(4, 4)), cells(tiles(2, 2, 4))
    mass = torch.full((1, 16), 0.01)
    mass[0, 5] = 1.0
    order = rank(mass, small, large)[0].argsort(descending=True, stable=True)
    inside = [
        j
        for j, ((_, _), (a, b), (c, d)) in enumerate(large.boxes.tolist())
        if 0.24 < a < b < 0.51 and 0.24 < c < d < 0.51
    ]
    assert sorted(order[: len(inside)].tolist()) == inside
    assert len(inside) == 5


def test_unseen_places_rank_last() -> None:
    small, large = cells(grid_cells(2, 1, (0, 1, 0.25, 0.75))), cells(grid_cells(1, 4))
    ranks = rank(torch.tensor([[0.2, 0.4]]), small, large)
    torch.testing.assert_close(ranks, torch.tensor([[0.0, 0.3, 0.3, 0.0]]))


@pytest.mark.parametrize("parts", range(2, 12))
def test_a_border_is_no_overlap(parts: int) -> None:
    """However its ends were rounded in fp32: what small tokens end at, large ones behind it do not get."""
    for seen in range(1, parts):
        small = cells(grid_cells(1, 5, (0, 1, 0, seen / parts)))
        for finer in range(1, 9):
            ranks = rank(torch.ones(1, 5), small, cells(grid_cells(1, parts * finer)))[0]
            assert (ranks[: seen * finer] > 0).all()
            assert not ranks[seen * finer :].any()


def test_same_grid() -> None:
    one = cells(KINDS["grid"], KINDS["tiles"])
    assert same_grid(one, Cells(one.image, one.boxes + 5e-5))
    assert not same_grid(one, Cells(one.image, one.boxes + 2e-4))
    assert not same_grid(one, cells(KINDS["grid"]))
    assert not same_grid(one, cells(KINDS["tiles"], KINDS["grid"]))
    assert not same_grid(one, Cells(1 - one.image, one.boxes))
    assert not same_grid(cells(grid_cells(2, 3)), cells(grid_cells(3, 2)))


def test_images_of_one_only_are_named_with_both_grids() -> None:
    small, large = cells(grid_cells(2, 3)), cells(grid_cells(4, 4), tiles(1, 2, 2))
    with pytest.raises(PromptError) as caught:
        resample(torch.ones(1, 6), small, large)
    message = str(caught.value)
    assert "images [1] are seen by one of them only" in message
    assert "small VLM sees image 0 as 6 tokens of 1 x 0.5 x 0.333 " in message
    assert "image 0 as 16 tokens of 1 x 0.25 x 0.25 " in message
    assert "image 1 as 12 tokens of 1 x 0.5 x 0.25-0.5 " in message


def test_shapes_are_checked() -> None:
    one = cells(grid_cells(2, 3))
    with pytest.raises(ValueError, match=r"shape \(1, 6\), got \(6,\)"):
        resample(torch.ones(6), one, one)
    with pytest.raises(ValueError, match=r"got \(5,\) and \(6, 3, 2\)"):
        Cells(one.image[:5], one.boxes)


def best_of_each(ranking: list[float], image: list[int], keep_ratio: float) -> set[int]:
    """The rule, by sorting."""
    kept: set[int] = set()
    for number in set(image):
        members = [j for j in range(len(image)) if image[j] == number]
        isnan = {j: ranking[j] != ranking[j] for j in members}
        members.sort(key=lambda j: (isnan[j], 0.0 if isnan[j] else -ranking[j], j))
        kept |= set(members[: max(1, int(len(members) * keep_ratio))])
    return kept


@given(
    st.lists(
        st.tuples(st.sampled_from([0.0, 0.5, 1.0, 2.0, float("nan"), float("inf")]), st.integers(0, 3)),
        min_size=1,
        max_size=40,
    ),
    st.sampled_from([0.01, 0.2, 0.5, 0.9, 1.0]),
    st.booleans(),
)
@settings(max_examples=300, deadline=None)
def test_per_image_ranking(tokens: list[tuple[float, int]], keep_ratio: float, in_order: bool) -> None:
    values, image = [value for value, _ in tokens], [number for _, number in tokens]
    image = sorted(image) if in_order else image
    ranking, num_keep = per_image_ranking(torch.tensor([values]), torch.tensor(image), keep_ratio)
    expected = best_of_each(values, image, keep_ratio)
    assert ranking[0].nonzero()[:, 0].tolist() == sorted(expected)
    assert num_keep == len(expected)
    assert set(ranking[0].tolist()) <= {0.0, 1.0}


def test_per_image_ranking_of_one_image_is_the_request() -> None:
    ranking, num_keep = per_image_ranking(torch.tensor([[0.1, 0.4, 0.2, 0.3]]), torch.zeros(4).long(), 0.5)
    assert (ranking.tolist(), num_keep) == ([[0.0, 1.0, 0.0, 1.0]], 2)
