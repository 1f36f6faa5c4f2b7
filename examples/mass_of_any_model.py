"""The attention mass of visual tokens, in a transformers model that knows nothing of this package.

    python examples/mass_of_any_model.py

`record_mass` is all there is to it. It needs `sgl_kernels` alone, not the runtime, and a model that attends
through transformers' AttentionInterface: LLaVA, Qwen2-VL, InternVL and most others.
"""

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from sgl_kernels import decode_attention, prefill_mass, select_tokens


def record_mass(model, input_ids, rows=None):
    """Let `model` record, from now on, what the visual tokens of the prompts (B, S) receive: mass, head_mass.

    mass (B, S) sums over layers, heads and rows, head_mass (layers, B, Hq, S) over rows: all text rows, or
    those at positions `rows` (B, R) int32, and the rows of generated tokens. Both are 0 at positions of text.
    """
    text = model.config.get_text_config()
    position = torch.arange(input_ids.shape[1], dtype=torch.int32, device=input_ids.device)
    is_visual = input_ids == model.config.image_token_id
    visual = position.where(is_visual, -1)  # -1 is padding: a slot for each position, so that mass is (B, S)
    counted = position.where(~is_visual, -1) if rows is None else rows
    mass = torch.zeros(input_ids.shape, device=input_ids.device)
    head_mass = mass[:, None].repeat(text.num_hidden_layers, 1, text.num_attention_heads, 1)

    def attention(module, query, key, value, attention_mask, scaling=None, **options):
        if attention_mask is not None:  # with sdpa_mask, None means causal and nothing padded
            raise ValueError("record_mass got prompts with padding, expected none; run them one by one")
        received = {"head_mass": head_mass[module.layer_idx], "softmax_scale": scaling}
        if query.shape[2] > 1:
            prefill_mass(query, key, counted, visual, mass, **received)
            return sdpa_attention_forward(module, query, key, value, None, scaling=scaling, **options)
        lens = torch.full((len(key),), key.shape[2], dtype=torch.int32, device=key.device)
        row = decode_attention(query[:, :, 0], key, value, lens, visual_index=visual, mass=mass, **received)
        return row[:, None], None

    AttentionInterface.register("sgl_mass", attention)
    AttentionMaskInterface.register("sgl_mass", sdpa_mask)  # else the mask is dropped and nobody is told
    model.set_attn_implementation({"text_config": "sgl_mass"})
    return mass, head_mass


def fastv_scores(model, inputs, prune_layer):
    """FastV's score of each visual token (B, S): attention from the last prompt token, averaged over heads.

    Of layer `prune_layer` - 1, for pruning on entry to `prune_layer`; arXiv 2403.06764.
    """
    batch, length = inputs["input_ids"].shape
    last = torch.full((batch, 1), length - 1, dtype=torch.int32, device=inputs["input_ids"].device)
    _, head_mass = record_mass(model, inputs["input_ids"], rows=last)
    with torch.inference_mode():
        model(**inputs)
    return head_mass[prune_layer - 1].mean(1)


def tiny_llava():
    """A LLaVA with random weights, and one prompt of 16 visual tokens between text."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    vision = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=32,
        patch_size=8,
    )
    text = LlamaConfig(
        vocab_size=100,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_id=99)
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(config).eval()
    input_ids = torch.tensor([[1, 5, 8, *[99] * 16, 17, 4, 23, 42]])
    return model, {"input_ids": input_ids, "pixel_values": torch.randn(1, 3, 32, 32)}


def main():
    model, inputs = tiny_llava()
    mass, _ = record_mass(model, inputs["input_ids"])
    model.generate(**inputs, max_new_tokens=5, do_sample=False)
    visual = (inputs["input_ids"][0] == model.config.image_token_id).nonzero().int().T  # (1, N)
    lens = torch.tensor([inputs["input_ids"].shape[1]], dtype=torch.int32)
    scores = fastv_scores(model, inputs, prune_layer=2)
    for name, received in (("attention mass", mass), ("FastV", scores)):
        kept, count = select_tokens(received[:, visual[0].long()], visual, lens, num_keep=4)
        print(f"{name:<15} keeps positions {kept[0, : count[0]].tolist()}")


if __name__ == "__main__":
    main()
