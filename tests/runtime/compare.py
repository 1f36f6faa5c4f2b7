"""When two runs of one request count as the same."""

from __future__ import annotations

import pytest
import torch

from sgl_runtime import SGLResult
from sgl_runtime.requests import Answer

NEAR = 1e-4  # what rounding may do to masses and scores when rows are padded or sit in a batch; ids are exact


def assert_same_result(one: SGLResult, other: SGLResult) -> None:
    exact = ("text", "token_ids", "exited", "small_text", "small_token_ids", "accepted_draft")
    assert {name: getattr(one, name) for name in exact} == {name: getattr(other, name) for name in exact}
    for name in ("decision_score", "confidence", "consistency"):
        score, expected = getattr(one, name), getattr(other, name)
        assert score == (None if expected is None else pytest.approx(expected, rel=NEAR))
    torch.testing.assert_close(one.mass, other.mass, rtol=NEAR, atol=0)
    for name in ("kept_index", "kept_visual"):
        kept, wanted = getattr(one, name), getattr(other, name)
        assert (kept is None) == (wanted is None)
        assert kept is None or torch.equal(kept, wanted)


def assert_same_answer(one: Answer, other: Answer) -> None:
    """The same, but for `accepted`: with and without a draft, say."""
    assert one.error is None
    assert other.error is None
    assert one.token_ids == other.token_ids
    assert one.logprobs == pytest.approx(other.logprobs, rel=NEAR)
    assert (one.kept_index is None) == (other.kept_index is None)
    assert one.kept_index is None or torch.equal(one.kept_index, other.kept_index)
    assert (one.mass is None) == (other.mass is None)
    if one.mass is not None:
        torch.testing.assert_close(one.mass, other.mass, rtol=NEAR, atol=0)
