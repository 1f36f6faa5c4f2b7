"""Several processes that run one large VLM together.

torchrun starts them, transformers shards the model and does the collectives inside it; here is what a process
must know of the others. All of them make the same calls in the same order.
"""

from __future__ import annotations

import importlib.util
import os
from typing import TypeVar

import torch
import torch.distributed as dist

from sgl_runtime.errors import ConfigError

T = TypeVar("T")


def join(device: torch.device) -> tuple[int, torch.device]:
    """Return how many processes share the model, and the device of this one: ``cuda:LOCAL_RANK`` on CUDA.

    Raises
    ------
    ConfigError
        Not started by torchrun, ``accelerate`` is missing, or the device is not one that the processes can
        share.
    """
    if not (dist.is_initialized() or "WORLD_SIZE" in os.environ):
        raise ConfigError(
            "Tensor parallelism needs several processes, but this one was started alone. Start it with "
            "torchrun --nproc-per-node N, N being the number of GPUs."
        )
    processes = dist.get_world_size() if dist.is_initialized() else int(os.environ["WORLD_SIZE"])
    if processes == 1:
        return 1, device
    if importlib.util.find_spec("accelerate") is None:
        raise ConfigError(
            'transformers shards a model only with accelerate: pip install "sgl-vlm[parallel]".'
        )
    return processes, _own_device(device)


def is_first() -> bool:
    """Whether this process is the one that prints and writes files: rank 0, or the only one."""
    if dist.is_initialized():
        return dist.get_rank() == 0
    return os.environ.get("RANK", "0") == "0"


def agree(value: T, device: torch.device) -> T:
    """Return the ``value`` of rank 0, in every process; ``device`` is this process's.

    Tensors inside must lie on the CPU. Processes that go on from the same bits take the same decisions, and
    none waits for a collective that another never reaches.
    """
    box = [value]
    dist.broadcast_object_list(box, src=0, device=device)
    return box[0]


def leave() -> None:
    """Leave the process group, if there is one: before the process ends, after the last run."""
    if dist.is_initialized():
        dist.destroy_process_group()


def _own_device(device: torch.device) -> torch.device:
    """Return this process's device; transformers takes CUDA where there is CUDA, whatever it is told."""
    if device.type == "cpu":
        if torch.cuda.is_available():
            raise ConfigError(
                "device='cpu', but tensor parallelism runs on CUDA where there is CUDA. Write device='auto', "
                "or hide the GPUs with CUDA_VISIBLE_DEVICES=''."
            )
        return device
    rank, count = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if device.index not in (None, rank):
        raise ConfigError(
            f"device='{device}', but of a tensor-parallel model process {rank} runs on cuda:{rank}. Write "
            "device='auto' or 'cuda'."
        )
    if rank >= count:
        raise ConfigError(
            f"Process {rank} of this machine has no GPU: there are {count}. Start torchrun with "
            f"--nproc-per-node {count}."
        )
    torch.cuda.set_device(rank)
    return torch.device("cuda", rank)
