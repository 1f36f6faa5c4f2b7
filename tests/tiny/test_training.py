from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from sgl_runtime.tiny import recipe, train
from sgl_runtime.tiny.scenes import make_scene


@pytest.fixture(scope="module")
def task() -> train.LanguageTask:
    torch.manual_seed(0)
    model = recipe.build_model(recipe.SIZES["small"])
    model.set_attn_implementation("eager")
    return train.LanguageTask(model)


def test_packed_questions_see_the_image_and_themselves_only(task: train.LanguageTask) -> None:
    """A packed question's loss targets get the logits that transformers gives the question asked alone."""
    scene = make_scene("train", 3, 0)
    ids, targets = task.rows([scene], np.random.default_rng(0))
    assert ids.shape[1] == task.mask.shape[-1]
    hidden = task.model.model.language_model(
        input_ids=ids, attention_mask=task.mask, position_ids=task.positions, use_cache=False
    ).last_hidden_state
    start = len(task.prefix)
    for kind in train.SLOTS:
        length = train.QUESTION_LENGTH[kind] + 3 + train.ANSWER_LENGTH[kind] + 1
        alone = torch.cat([ids[:, : len(task.prefix)], ids[:, start : start + length]], dim=1)
        expected = task.model.model.language_model(input_ids=alone, use_cache=False).last_hidden_state
        got = hidden[:, start : start + length]
        torch.testing.assert_close(got, expected[:, len(task.prefix) :], rtol=1e-4, atol=1e-4)
        start += length
    assert start == ids.shape[1]
    counted = targets[0] != train.IGNORE
    assert torch.equal(ids[0, 1:][counted[:-1]], targets[0][counted])


def test_vision_labels_are_near_the_items() -> None:
    scene = make_scene("train", 5, 0)
    labels = train.VisionTask.labels([scene])[0].reshape(16, 16, 4)
    for item in scene.items:
        color, shape, letter, digit = labels[item.y // 16, item.x // 16].tolist()
        assert list(train.COLORS)[color - 1] == item.color
        assert train.SHAPES[shape - 1] == item.shape
        assert train.LETTERS[letter - 1] + train.DIGITS[digit - 1] == item.label
    assert (labels[..., 0] > 0).sum() < 6 * len(scene.items)


def test_a_stopped_run_ends_where_an_uninterrupted_one_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train, "SAVE_EVERY", 2)

    def scenes(step: int) -> list:
        if stop_at is not None and step == stop_at:
            raise KeyboardInterrupt
        return [make_scene("train", step, 0)]

    def fit(path: Path) -> None:
        torch.manual_seed(1)
        model = recipe.build_model(recipe.SIZES["small"])
        task = train.VisionTask(model.model.vision_tower, recipe.SIZES["small"].vision_width)
        train.fit(task, path, steps=4, lr=1e-3, scenes=scenes)

    stop_at: int | None = None
    fit(tmp_path / "whole.safetensors")
    stop_at = 3
    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path / "stopped.safetensors")
    assert int(load_file(tmp_path / "stopped.safetensors")["step"]) == 2
    stop_at = None
    fit(tmp_path / "stopped.safetensors")
    whole, stopped = (load_file(tmp_path / f"{name}.safetensors") for name in ("whole", "stopped"))
    assert whole.keys() == stopped.keys()
    assert all(torch.equal(whole[name], stopped[name]) for name in whole)
