"""What the small VLM's masses mean to the large one: which of its visual tokens they rank, and how."""

from __future__ import annotations

import torch
from torch import Tensor

from sgl_runtime import mapping
from sgl_runtime.config import SGLConfig, num_kept
from sgl_runtime.errors import PromptError
from sgl_runtime.requests import Prompt


def check_match(small: Prompt, large: Prompt) -> None:
    """Raise PromptError unless the masses of one prompt can rank the visual tokens of the other.

    They can when token stands for token: the same cells, or, where the processors did not say which, the same
    number in the same spans. With cells they can be resampled.
    """
    if small.cells is not None and large.cells is not None:
        mapping.check_images(small.cells, large.cells)
        return
    grids = f"{list(small.spans)} in the small VLM and {list(large.spans)} in the large VLM"
    advice = (
        "Use two VLMs of one family with the same image settings, or say what each token covers with "
        "visual_image and visual_cells, as SGLPipeline.from_pretrained() does."
    )
    if small.num_visual != large.num_visual:
        raise PromptError(
            f"The small VLM has {small.num_visual} visual tokens and the large VLM {large.num_visual} "
            f"(spans: {grids}). {advice}"
        )
    if len(small.spans) == len(large.spans) and small.spans != large.spans:
        raise PromptError(f"The images' visual tokens differ: {grids}. {advice}")


def rank(mass: Tensor, small: Prompt, large: Prompt, config: SGLConfig) -> Tensor:
    """Return what ranks the large VLM's visual tokens, (1, N_large) fp32.

    Parameters
    ----------
    mass : (1, N_small) fp32
        Attention received in the small VLM, on the large one's device.
    """
    ours, theirs = large.cells, small.cells
    if ours is not None and theirs is not None and not mapping.same_grid(theirs, ours):
        mass = mapping.rank(mass, theirs, ours)
    if config.keep_scope == "image":
        mass, _ = mapping.per_image_ranking(mass, large.image_of, config.keep_ratio)
    return mass


def num_keep(prompt: Prompt, config: SGLConfig) -> int:
    """Return how many visual tokens of a prompt the large VLM keeps."""
    if config.keep_scope == "request":
        return num_kept(prompt.num_visual, config.keep_ratio)
    counts = torch.bincount(prompt.image_of)
    return sum(num_kept(count, config.keep_ratio) for count in counts.tolist() if count)
