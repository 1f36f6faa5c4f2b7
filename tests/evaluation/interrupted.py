"""A run to be killed: python -m evaluation.interrupted DATA OUT, with the tiny pair, one example a batch."""

from __future__ import annotations

import sys

import torch

from sgl_runtime import SGLConfig, SGLPipeline, tiny
from sgl_runtime.evaluation.data import load
from sgl_runtime.evaluation.methods import make_methods
from sgl_runtime.evaluation.rankings import RANKINGS
from sgl_runtime.evaluation.results import Results, run

CHECKPOINTS = tiny.SMALL, tiny.LARGE


def evaluate(pipe: SGLPipeline, data: str, out: str) -> Results:
    methods = make_methods([RANKINGS["guided"], RANKINGS["random"]], [(0.2, 2)], pipe.large.num_layers)
    return run(pipe, load(data), methods, out, checkpoints=CHECKPOINTS, batch=1)


def load_pair() -> SGLPipeline:
    return SGLPipeline.from_pretrained(*CHECKPOINTS, config=SGLConfig(max_new_tokens=8))


if __name__ == "__main__":
    torch.set_num_threads(1)
    evaluate(load_pair(), *sys.argv[1:])
