"""Gemma 3 is refused, with the reason."""

from __future__ import annotations

import pytest
import transformers as tf

from sgl_runtime import hf
from sgl_runtime.errors import CheckpointError
from sgl_runtime.families.gemma3 import Gemma3

from .models import HIDDEN


def make_config(layers: int, **changes: object) -> tf.Gemma3Config:
    text = tf.Gemma3TextConfig(
        hidden_size=HIDDEN, num_hidden_layers=layers, num_attention_heads=4, sliding_window=512, **changes
    )
    return tf.Gemma3Config(text_config=text.to_dict(), vision_config={"model_type": "siglip_vision_model"})


def test_it_is_refused_with_the_reason() -> None:
    """As in the 4B model: 34 layers, every sixth of them sees everything."""
    with pytest.raises(CheckpointError) as caught:
        Gemma3.check_config(make_config(34))
    message = str(caught.value)
    assert "in both directions, and 29 of its 34 layers attend to the last 512 positions only." in message
    assert "docs/families.md" in message


def test_it_is_refused_without_windows_too() -> None:
    with pytest.raises(CheckpointError, match=r"in both directions\. The attention and mass kernels"):
        Gemma3.check_config(make_config(2, layer_types=["full_attention"] * 2))


def test_a_model_in_memory_is_refused_too() -> None:
    text = tf.Gemma3TextConfig(
        vocab_size=50,
        hidden_size=HIDDEN,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
    )
    vision = tf.SiglipVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, image_size=28
    )
    config = tf.Gemma3Config(
        text_config=text.to_dict(), vision_config=vision.to_dict(), mm_tokens_per_image=1, image_token_index=7
    )
    with pytest.raises(CheckpointError, match=r"Gemma 3 is not supported: .* 3 of its 3 layers"):
        hf.view(tf.Gemma3ForConditionalGeneration(config))


def test_what_it_reads_is_what_transformers_calls_it() -> None:
    assert Gemma3.model_types == (tf.Gemma3Config.model_type,)
    assert Gemma3.text_models == (tf.Gemma3TextConfig.model_type,)
    assert hasattr(tf, Gemma3.architecture)
