"""Ragged KV memory: layers before the prune layer hold every token, layers from it on the kept ones."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class KVCache:
    """Keys and values of one request in all layers, contiguous (batch, kv_heads, slots, head_dim) per layer.

    ``position`` (batch,) int32 counts the tokens fed so far, pruned ones included; layer i lacks
    ``dropped[i]`` of them, so its next free slot is ``position - dropped[i]``, on the device and with no copy
    per layer.
    """

    def __init__(
        self, keys: list[Tensor], values: list[Tensor], dropped: Sequence[int], prompt_length: int
    ) -> None:
        self.keys = keys
        self.values = values
        self.dropped = tuple(dropped)
        batch, device = keys[0].shape[0], keys[0].device
        self.position = torch.full((batch,), prompt_length, dtype=torch.int32, device=device)
        self._rows = torch.arange(batch, device=device)

    def fill(self, layer: int, k: Tensor, v: Tensor) -> None:
        """Write the prompt's keys and values (batch, kv_heads, tokens, head_dim) from slot 0 on."""
        self.keys[layer][:, :, : k.shape[2]] = k
        self.values[layer][:, :, : v.shape[2]] = v

    def append(self, layer: int, k: Tensor, v: Tensor) -> Tensor:
        """Write one token's k and v (batch, kv_heads, head_dim); return the valid lengths (batch,) int32."""
        slot = self.position - self.dropped[layer]  # (batch,)
        self.keys[layer][self._rows, :, slot] = k
        self.values[layer][self._rows, :, slot] = v
        return slot + 1

    def advance(self) -> None:
        """Count the token that all layers have just been fed."""
        self.position += 1


class KVMemory:
    """One growing allocation that a model's requests share in turn: a new cache overwrites the last one."""

    def __init__(
        self, num_layers: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.num_layers = num_layers
        self.num_kv_heads = num_kv_heads
        self.head_dim = head_dim
        self._storage = torch.empty(0, dtype=dtype, device=device)

    @property
    def allocated(self) -> int:
        """Elements allocated so far; 0 until the first cache."""
        return self._storage.numel()

    def cache(
        self, prompt_length: int, new_tokens: int, *, prune_layer: int | None = None, num_dropped: int = 0
    ) -> KVCache:
        """Return an empty cache for one request.

        Parameters
        ----------
        prompt_length
            Tokens of the prompt before pruning.
        new_tokens
            Generated tokens that will be fed.
        prune_layer, num_dropped
            Layers from ``prune_layer`` on get ``num_dropped`` fewer slots. None: no layer does.
        """
        first = self.num_layers if prune_layer is None else prune_layer
        dropped = [0] * first + [num_dropped] * (self.num_layers - first)
        shapes = [(1, self.num_kv_heads, prompt_length + new_tokens - d, self.head_dim) for d in dropped]
        sizes = [shape[1] * shape[2] * shape[3] for shape in shapes]
        if self.allocated < 2 * sum(sizes):
            with torch.inference_mode(False):  # an inference tensor could not be written to outside that mode
                self._storage = self._storage.new_empty(2 * sum(sizes))
        parts = iter(self._storage[: 2 * sum(sizes)].split([size for size in sizes for _ in range(2)]))
        pairs = [(next(parts).view(shape), next(parts).view(shape)) for shape in shapes]
        return KVCache([k for k, _ in pairs], [v for _, v in pairs], dropped, prompt_length)
