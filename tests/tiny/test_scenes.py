from __future__ import annotations

import re

import numpy as np
import pytest

from sgl_runtime.tiny import recipe
from sgl_runtime.tiny.scenes import KINDS, Scene, make_scene


def solve(scene: Scene, text: str) -> list[str]:
    """Every answer the items allow, from the words of the question alone."""
    if found := re.fullmatch(r"describe the shape with (\w\d)", text):
        return [item.name for item in scene.items if item.label == found[1]]
    if found := re.fullmatch(r"how many (\w+) shapes", text):
        return [str(sum(item.color == found[1] for item in scene.items))]
    names = re.fullmatch(r"read the (\w+ \w+)(?: and the (\w+ \w+))?", text)
    assert names, text
    labels = [[item.label for item in scene.items if item.name == name] for name in names.groups() if name]
    assert all(len(found) == 1 for found in labels), f"{text} is ambiguous"
    return [" ".join(found[0] for found in labels)]


@pytest.mark.parametrize("split", ["train", "test"])
def test_each_question_has_one_answer_and_it_is_the_given_one(split: str) -> None:
    seen = set()
    for index in range(60):
        scene = make_scene(split, index, 6)
        for question in scene.questions:
            seen.add(question.kind)
            assert solve(scene, question.text) == [question.answer]
    assert seen == set(KINDS)


def test_a_scene_follows_from_split_and_index() -> None:
    one, again = make_scene("test", 7), make_scene("test", 7)
    assert np.array_equal(np.asarray(one.image), np.asarray(again.image))
    assert one.questions == again.questions
    for other in (make_scene("test", 8), make_scene("train", 7)):
        assert not np.array_equal(np.asarray(one.image), np.asarray(other.image))


def test_labels_are_drawn_where_the_items_say() -> None:
    for index in range(20):
        scene = make_scene("test", index)
        pixels = np.asarray(scene.image).astype(int)
        for item in scene.items:
            box = pixels[item.y - 8 : item.y + 8, item.x - 12 : item.x + 12]
            assert np.ptp(box, axis=(0, 1)).max() > 90, f"no ink on {item}"


def test_tokenizer_writes_and_reads_every_question() -> None:
    tokenizer = recipe.build_tokenizer()
    for index in range(60):
        for question in make_scene("test", index, 6).questions:
            for text in (question.text, question.answer):
                ids = tokenizer(text).input_ids
                assert recipe.UNK not in ids
                assert tokenizer.decode(ids) == text
            assert 1 <= len(tokenizer(question.answer).input_ids) <= 4
    assert tokenizer("read the red circle?").input_ids == tokenizer("read  the red circle").input_ids
    assert recipe.UNK in tokenizer("read the pink circle").input_ids
