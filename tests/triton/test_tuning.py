import json
import math

import pytest
import torch

from benchmarks import tune_triton
from sgl_kernels.triton import launching


def test_committed_table_is_as_the_tuner_writes_it():
    committed = tune_triton.TABLE.read_text()
    assert tune_triton.text(json.loads(committed)) == committed


def test_every_task_starts_from_a_whole_configuration():
    for task in tune_triton.tasks():
        config = launching._config(task.entry, task.shape_class, "sm_90")
        assert set(task.choices) <= set(config), task
        assert all(config[name] in values for name, values in task.choices.items()), task


def test_later_entries_of_the_table_win(tmp_path, monkeypatch):
    table = {
        "op": {
            "default": {"any": {"a": 1, "b": 1, "c": 1}, "small": {"b": 2}},
            "amd": {"small": {"c": 3}},
            "gfx942": {"any": {"a": 4}},
        }
    }
    (tmp_path / "table.json").write_text(json.dumps(table))
    monkeypatch.setattr(launching, "TABLE", tmp_path / "table.json")
    expected = {
        ("small", "sm_90"): {"a": 1, "b": 2, "c": 1},
        ("large", "sm_90"): {"a": 1, "b": 1, "c": 1},
        ("small", "gfx90a"): {"a": 1, "b": 2, "c": 3},
        ("small", "gfx942"): {"a": 4, "b": 2, "c": 3},
    }
    for (shape_class, key), config in expected.items():
        assert launching._config.__wrapped__("op", shape_class, key) == config


def test_search_keeps_what_is_clearly_faster():
    def measure(configs):
        cost = {16: 3.0, 32: 1.0, 64: math.inf}
        return [cost[c["block"]] + (0.99 if c["warps"] == 8 else 1.0) for c in configs]

    choices = {"block": (16, 32, 64), "warps": (4, 8)}
    assert tune_triton.search({"block": 16, "warps": 4, "other": 1}, choices, measure) == {"block": 32}
    assert tune_triton.search({"block": 32, "warps": 4, "other": 1}, choices, measure) == {}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to tune for")
def test_without_a_gpu_nothing_is_written(tmp_path, capsys):
    table = tmp_path / "configs.json"
    table.write_text("{}")
    assert tune_triton.main(["--table", str(table)]) == 2
    assert "sees no GPU, so there is nothing to measure" in capsys.readouterr().err
    assert table.read_text() == "{}"


def test_unknown_op_is_refused(capsys):
    with pytest.raises(SystemExit):
        tune_triton.main(["--ops", "attention"])
    assert "unknown ops ['attention'], expected some of decode_attention" in capsys.readouterr().err
