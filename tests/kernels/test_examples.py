"""The examples run, and what they record is what the eager attention matrices of the same model hold."""

import copy
import importlib.util
import inspect
from pathlib import Path

import pytest
import torch
from kernel_helpers import assert_as_accurate

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "mass_of_any_model.py"


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("mass_of_any_model", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def llava(example):
    model, inputs = example.tiny_llava()
    again = {"input_ids": inputs["input_ids"].clone(), "pixel_values": torch.randn(1, 3, 32, 32)}
    again["input_ids"][0, :3] = torch.tensor([3, 2, 60])  # a second prompt, as long as the first
    return model, {name: torch.cat([inputs[name], again[name]]) for name in inputs}


def qwen2_vl(_):
    """Two images between text, M-RoPE, groups of four query heads."""
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

    text = {
        "vocab_size": 100,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]},
    }
    vision = {"depth": 1, "embed_dim": 32, "hidden_size": 64, "num_heads": 2, "mlp_ratio": 2, "patch_size": 4}
    special = {"image_token_id": 99, "video_token_id": 98, "vision_start_token_id": 97}
    torch.manual_seed(1)
    model = Qwen2VLForConditionalGeneration(Qwen2VLConfig(text_config=text, vision_config=vision, **special))
    input_ids = torch.tensor([[4, 97, *[99] * 6, 8, 15, 97, *[99] * 4, 16, 23, 42]])
    return model.eval(), {
        "input_ids": input_ids,
        "mm_token_type_ids": (input_ids == 99).int(),
        "pixel_values": torch.randn(4 * 6 + 4 * 4, 3 * 2 * 4 * 4),
        "image_grid_thw": torch.tensor([[1, 4, 6], [1, 4, 4]]),
    }


def matrices(model, inputs, dtype):
    """(layers, B, Hq, S, S) attention of the model in `dtype`, the eager way."""
    wide = copy.deepcopy(model).to(dtype)
    wide.set_attn_implementation("eager")
    with torch.inference_mode():
        cast = {k: v.to(dtype) if v.is_floating_point() else v for k, v in inputs.items()}
        return torch.stack(wide(**cast, output_attentions=True).attentions)


def received(attention, is_visual, rows):
    """Sum over the rows (B, S), where the column is a visual token."""
    return (attention * rows[:, None, :, None]).sum(3) * is_visual[:, None]  # (layers, B, Hq, S)


@pytest.mark.parametrize("family", [llava, qwen2_vl])
def test_mass_equals_the_sums_of_eager_attention(example, family):
    model, inputs = family(example)
    is_visual = inputs["input_ids"] == 99
    truth, plain = (
        received(matrices(model, inputs, d), is_visual, ~is_visual) for d in (torch.double, torch.float32)
    )
    mass, head_mass = example.record_mass(model, inputs["input_ids"])
    with torch.inference_mode():
        model(**inputs)
    assert_as_accurate("head mass", head_mass, truth.double(), plain)
    assert_as_accurate("mass", mass, truth.double().sum((0, 2)), plain.sum((0, 2)))
    assert torch.equal(mass == 0, ~is_visual)


def test_generated_tokens_count_when_they_are_fed(example):
    model, inputs = llava(example)
    prompt = inputs["input_ids"]
    mass, head_mass = example.record_mass(model, prompt)
    tokens = model.generate(**inputs, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    fed = tokens[:, :-1]  # the last one is never fed
    assert fed.shape[1] == prompt.shape[1] + 3
    is_visual = torch.zeros_like(fed, dtype=torch.bool)
    is_visual[:, : prompt.shape[1]] = prompt == 99
    rows = ~is_visual  # a generated token is text, whatever its id
    whole = {**inputs, "input_ids": fed}
    assert (fed[:, prompt.shape[1] :] != 99).all()
    truth, plain = (
        received(matrices(model, whole, d), is_visual, rows)[..., : prompt.shape[1]]
        for d in (torch.double, torch.float32)
    )
    assert_as_accurate("mass", mass, truth.double().sum((0, 2)), plain.sum((0, 2)))
    assert_as_accurate("head mass", head_mass, truth.double(), plain)


@pytest.mark.parametrize("family", [llava, qwen2_vl])
def test_model_answers_as_before(example, family):
    model, inputs = family(example)
    with torch.inference_mode():
        expected = (
            copy.deepcopy(model)
            .double()(**{k: v.double() if v.is_floating_point() else v for k, v in inputs.items()})
            .logits
        )
        plain = model(**inputs).logits
        example.record_mass(model, inputs["input_ids"])
        assert_as_accurate("logits", model(**inputs).logits, expected, plain)


@pytest.mark.parametrize("family", [llava, qwen2_vl])
def test_fastv_scores_are_the_last_row_of_one_layer(example, family):
    model, inputs = family(example)
    is_visual = inputs["input_ids"] == 99
    for prune_layer in (1, 2, 3):
        truth = matrices(model, inputs, torch.double)[prune_layer - 1, :, :, -1].mean(1) * is_visual
        plain = matrices(model, inputs, torch.float32)[prune_layer - 1, :, :, -1].mean(1) * is_visual
        scores = example.fastv_scores(model, inputs, prune_layer)
        assert_as_accurate("FastV", scores, truth.double(), plain)
        best = scores.masked_fill(~is_visual, -1).argsort(1, descending=True)
        assert torch.equal(best, truth.masked_fill(~is_visual, -1).argsort(1, descending=True))


def test_padding_is_refused(example):
    model, inputs = llava(example)
    example.record_mass(model, inputs["input_ids"])
    attention_mask = torch.ones_like(inputs["input_ids"])
    attention_mask[1, 0] = 0
    with pytest.raises(ValueError, match="got prompts with padding, expected none"):
        model(**inputs, attention_mask=attention_mask)


def test_it_takes_under_thirty_lines_and_runs(example, capsys):
    source = inspect.getsource(example.record_mass)
    code, _, rest = source.partition('"""')
    code += rest.partition('"""')[2]
    assert len([line for line in code.splitlines() if line.strip()]) < 30
    example.main()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" keeps ")[0].strip() for line in lines] == ["attention mass", "FastV"]
