"""The plugin for lmms-eval: beside the real package where there is one, else a stand-in of conftest.py."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
from PIL import Image

from sgl_runtime import Video, plugins, tiny
from sgl_runtime.errors import ConfigError, SGLError

from .conftest import HAS_LMMS_EVAL, SETTINGS

PAIR = {"small": str(tiny.SMALL), "large": str(tiny.LARGE)}
GREEDY = {"until": ["\n\n"], "max_new_tokens": 12, "temperature": 0, "do_sample": False}


@pytest.fixture(scope="module")
def model(lmms_eval_plugin):
    return lmms_eval_plugin.SGLVLM(**PAIR, batch_size="4", num_frames=2, **SETTINGS)


@pytest.fixture
def told(lmms_eval_plugin, monkeypatch):
    """What the plugin logs, and its metrics."""
    told = SimpleNamespace(lines=[], metrics=[])
    logger = SimpleNamespace(info=told.lines.append, warning=told.lines.append)
    monkeypatch.setattr(lmms_eval_plugin, "logger", logger)
    monkeypatch.setattr(lmms_eval_plugin, "log_metrics", lambda **metrics: told.metrics.append(metrics))
    return told


def request(plugin, number, settings=None):
    metadata = {"task": "scenes", "doc_id": number, "repeats": 1}
    arguments = ("", to_messages, GREEDY | (settings or {}), number, "scenes", "test")
    return plugin.Instance("generate_until", arguments, 0, metadata)


def to_messages(content):
    return [{"role": "user", "content": content}]


def ask(plugin, model, contents, settings=()):
    """Answer documents that are the contents of their messages; ``settings`` by number."""
    model.task_dict = {"scenes": {"test": contents}}
    return model.generate_until([request(plugin, i, dict(settings).get(i)) for i in range(len(contents))])


def contents_of(scenes):
    return [
        [{"type": "image", "url": Image.open(scenes.image(i))}, {"type": "text", "text": row["question"]}]
        for i, row in enumerate(scenes.rows)
    ]


def test_answers_are_the_pipelines_and_costs_are_told(lmms_eval_plugin, model, scenes, expected, told):
    answers = ask(lmms_eval_plugin, model, contents_of(scenes))
    assert [answer.text for answer in answers] == [result.text for result in expected]
    counts = [len(result.token_ids) for result in expected]
    assert [answer.token_counts.output_tokens for answer in answers] == counts
    exited = sum(result.exited for result in expected)
    (line,), (metrics,) = told.lines, told.metrics
    assert line.startswith(f"sgl_vlm: requests 12, exited with the small answer {exited}, failed 0; ")
    assert "large_decode" in line
    assert metrics["total_gen_tokens"] == sum(counts)
    more = metrics["additional_metrics"]
    assert (more["num_requests"], more["exited"], more["failed"]) == (12, exited, 0)
    assert 0 < more["seconds_small_prefill"] < metrics["total_elapsed_time"]


def test_limits_and_stops_of_each_request(lmms_eval_plugin, model, scenes, pipe, expected, told):
    two = next(i for i, result in enumerate(expected) if " " in result.text)
    other = (two + 1) % len(expected)
    answers = ask(
        lmms_eval_plugin,
        model,
        contents_of(scenes),
        {two: {"until": ["", " "]}, other: {"max_new_tokens": 1, "until": " "}, 11: {"max_new_tokens": 99}},
    )
    texts = [result.text for result in expected]
    texts[two] = texts[two].split(" ")[0]
    texts[other] = pipe.small_processor.decode(expected[other].token_ids[:1])
    assert [answer.text for answer in answers] == texts
    assert answers[other].token_counts.output_tokens == 1
    assert "up to 99 tokens; max_new_tokens=12 bounds" in told.lines[0]


def test_a_request_that_fails_leaves_the_others(lmms_eval_plugin, model, scenes, expected, told):
    contents = contents_of(scenes)[:6]
    contents[2][0]["url"] = "missing.png"
    contents[5] = [{"type": "audio", "url": "a.wav"}]
    answers = ask(lmms_eval_plugin, model, contents)
    assert [answer.text for answer in answers] == ["" if i in (2, 5) else expected[i].text for i in range(6)]
    assert "failed 2" in told.lines[0]
    assert told.lines[1].startswith("scenes, document 2 failed and gets the empty answer: There is no image")
    assert "document 5" in told.lines[2]
    with pytest.raises(SGLError, match=r"Every one of 2 requests failed\. The first: There is no image"):
        ask(lmms_eval_plugin, model, [contents[2], contents[5]])


def test_nothing_asked_nothing_answered(lmms_eval_plugin, model, told):
    assert ask(lmms_eval_plugin, model, []) == []


def test_several_images_and_videos(lmms_eval_plugin, model, scenes, pipe, told):
    first, second = scenes.image(0), scenes.image(4)
    frames = [first, second]
    texts = [{"type": "text", "text": text} for text in ("read the red circle in ", " or ", "read it")]
    images = [{"type": "image", "url": first}, {"type": "image", "url": second}]
    contents = [
        [texts[0], images[0], texts[1], images[1]],
        [{"type": "video", "url": frames}, texts[2]],
        [{"type": "video", "url": frames, "start_time": 1.0}, texts[2]],
    ]
    answers = ask(lmms_eval_plugin, model, contents)
    assert answers[0].text == pipe([first, second], "read the red circle in <image> or <image>").text
    assert answers[1].text == pipe(Video(frames, num_frames=2), "read it").text
    assert answers[2].text == ""
    assert "got 'video section'" in told.lines[-1]


@pytest.mark.parametrize(
    "settings", [{"do_sample": True}, {"do_sample": None, "temperature": 0.7}, {"num_beams": 3}]
)
def test_sampling_and_beams_are_refused_before_any_work(lmms_eval_plugin, model, scenes, told, settings):
    with pytest.raises(ConfigError, match=r"Task scenes asks for .* decodes greedily.*--gen_kwargs"):
        ask(lmms_eval_plugin, model, contents_of(scenes), {11: settings})
    assert told.metrics == []


def test_settings_without_effect_are_told(lmms_eval_plugin, model, scenes, expected, told):
    settings = {"temperature": 0.2, "do_sample": False, "top_p": 0.9, "num_beams": None, "seed": 1}
    (answer,) = ask(lmms_eval_plugin, model, contents_of(scenes)[:1], {0: settings})
    assert answer.text == expected[0].text
    assert told.lines[0] == "Task scenes: sgl_vlm takes no account of seed."


def test_other_kinds_of_task_are_refused(model):
    with pytest.raises(NotImplementedError, match="scores no given answers"):
        model.loglikelihood([])
    with pytest.raises(NotImplementedError, match="one round"):
        model.generate_until_multi_round([])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"batch_size": "auto"}, "--batch_size must be a positive integer, got 'auto'"),
        ({"max_batch": 4}, "takes max_batch from --batch_size"),
        ({"keep_ratio": 20}, "looks like a percentage"),
        ({"pretrained": "x"}, "pretrained: there is no such setting"),
    ],
)
def test_wrong_arguments(lmms_eval_plugin, options, words):
    with pytest.raises(ConfigError, match=words):
        lmms_eval_plugin.SGLVLM(**PAIR, **options)


def test_several_processes_are_refused(lmms_eval_plugin, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="one process"):
        lmms_eval_plugin.SGLVLM(**PAIR)


def test_the_manifest_names_the_model(lmms_eval_plugin):
    manifest = plugins.lmms_eval_manifest()
    assert manifest.model_id == "sgl_vlm"
    module, _, name = manifest.chat_class_path.rpartition(".")
    assert getattr(sys.modules[module], name) is lmms_eval_plugin.SGLVLM
    assert lmms_eval_plugin.SGLVLM.is_simple is False


TASK = """
task: sgl_scenes
dataset_path: json
dataset_kwargs:
  data_files: {folder}/test.jsonl
test_split: train
output_type: generate_until
doc_to_visual: !function utils.doc_to_visual
doc_to_text: question
doc_to_target: answer
process_results: !function utils.process_results
generation_kwargs:
  max_new_tokens: 12
  do_sample: false
metric_list:
  - metric: right
    aggregation: mean
    higher_is_better: true
metadata:
  version: 0.0
"""
FUNCTIONS = """
from PIL import Image

def doc_to_visual(doc):
    return [Image.open({folder!r} + "/" + doc["image"])]

def process_results(doc, results):
    return {{"right": float(results[0] == doc["answer"])}}
"""


@pytest.mark.skipif(not HAS_LMMS_EVAL, reason="needs lmms-eval: `make test-plugins`")
def test_its_own_command(scenes, expected, tmp_path):
    """Its command line on a task of local files, offline: the answers, the score, the counts."""
    task = tmp_path / "task"
    task.mkdir()
    (task / "scenes.yaml").write_text(TASK.format(folder=scenes.folder))
    (task / "utils.py").write_text(FUNCTIONS.format(folder=str(scenes.folder)))
    given = ",".join(f"{name}={value}" for name, value in (PAIR | SETTINGS).items())
    command = [sys.executable, "-m", "lmms_eval", "--model", "sgl_vlm", "--model_args", given]
    command += ["--tasks", "sgl_scenes", "--include_path", str(task), "--batch_size", "4", "--log_samples"]
    environment = os.environ | {"HF_HOME": str(tmp_path / "hf"), "HF_DATASETS_OFFLINE": "1"}
    done = subprocess.run(
        [*command, "--output_path", str(tmp_path / "out")], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    (samples,) = (tmp_path / "out").rglob("*_samples_sgl_scenes.jsonl")
    logged = [json.loads(line) for line in samples.read_text(encoding="utf-8").splitlines()]
    assert [sample["filtered_resps"] for sample in sorted(logged, key=lambda one: one["doc_id"])] == [
        result.text for result in expected
    ]
    (results,) = (tmp_path / "out").rglob("*_results.json")
    stored = json.loads(results.read_text(encoding="utf-8"))
    right = [result.text == row["answer"] for result, row in zip(expected, scenes.rows, strict=True)]
    assert stored["results"]["sgl_scenes"]["right,none"] == sum(right) / 12
    assert stored["throughput"]["avg_exited"] == sum(result.exited for result in expected)
    assert f"requests 12, exited with the small answer {sum(r.exited for r in expected)}" in done.stdout
    assert f"{sum(right) / 12:.4f}" in done.stdout
