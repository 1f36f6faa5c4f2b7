"""Gemma 3: known, so that it can be refused with the reason.

Three things would have to be in the ops first: attention in both directions among the tokens of one image,
in the prefill and in the rows that count for mass; attention to a window of positions, which pruning turns
into a varying number of cache slots; and a choice of two rotary tables per layer. Its norms (1 + weight, also
behind attention and MLP) and scaled embeddings are in the way too, but they are only arithmetic.
"""

from __future__ import annotations

from typing import Any

from sgl_runtime.errors import CheckpointError
from sgl_runtime.families.base import Family


class Gemma3(Family):
    """``Gemma3ForConditionalGeneration``; `check_config` refuses every one."""

    model_types = ("gemma3",)
    architecture = "Gemma3ForConditionalGeneration"
    text_models = ("gemma3_text",)

    @classmethod
    def check_config(cls, config: Any) -> None:
        """Raise CheckpointError that names what the ops lack."""
        text = config.text_config
        sliding = list(text.layer_types).count("sliding_attention")
        windows = (
            f", and {sliding} of its {len(text.layer_types)} layers attend to the last {text.sliding_window} "
            "positions only"
        )
        raise CheckpointError(
            "Gemma 3 is not supported: the tokens of an image attend to each other in both directions"
            f"{windows if sliding else ''}. The attention and mass kernels are causal and see the whole "
            "cache; they have no mask for an image, and a window counted in cache slots would be wrong once "
            "tokens are pruned. Use a model of a family that docs/families.md lists."
        )
