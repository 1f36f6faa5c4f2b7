"""What a benchmark times: for each op, tensors of a shape, our calls, stock torch's, and what each must move.

Bytes are counted, not measured: each input that the op needs read once, each output written once, whatever an
implementation reads twice or keeps in between. Operations are those of the matrix products.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from sgl_kernels import compositions

Shape = dict[str, Any]

# Letters as in the design, and r, the keep ratio: the fields of a shape and what they are when not given.
_ATTENTION = {"B": 1, "Hq": 16, "Hkv": 8, "D": 128, "S": 2048, "N": 1792}
_SELECTION = {"B": 1, "S": 2048, "N": 1792, "r": 0.2}
DEFAULTS: dict[str, Shape] = {
    "decode_attention": _ATTENTION,
    "prefill_mass": {**_ATTENTION, "R": 64},
    "select_tokens": _SELECTION,
    "prune_gather": {**_SELECTION, "C": 4096},
    "greedy_token": {"B": 4, "V": 151936},
    "token_logprobs": {"B": 4, "V": 151936},
}
TEXT_BEFORE = 64  # text tokens before the image, where the sequence has room for them


@dataclass(frozen=True)
class Cost:
    """The fewest bytes a call can move, and its operations."""

    bytes: int
    flops: int = 0


@dataclass(frozen=True)
class Workload:
    """One op at one shape.

    `ours` are functions of (namespace of ops, *inputs): `sgl_kernels`, or `sgl_kernels.reference`. "" is the
    op itself, other names are variants of it. `stock` are functions of the inputs. `costs` holds what differs
    from the cost of "".
    """

    op: str
    shape: Shape
    dtype: torch.dtype
    inputs: tuple[Tensor, ...]
    ours: dict[str, Callable[..., object]]
    stock: dict[str, Callable[..., object]]
    costs: dict[str, Cost] = field(default_factory=dict)

    def sides(self, ops: Any) -> dict[str, Callable[..., object]]:
        """`ours` as functions of the inputs alone."""
        return {name: partial(call, ops) for name, call in self.ours.items()}

    def cost(self, side: str) -> Cost:
        return self.costs.get(side, self.costs[""])

    @property
    def setting(self) -> str:
        return f"{describe(self.shape)} {str(self.dtype).removeprefix('torch.')}"


def describe(shape: Shape) -> str:
    return " ".join(f"{name}={value:g}" for name, value in shape.items())


def parse_shape(op: str, text: str) -> Shape:
    """A shape such as "B=4,S=8192,N=7168"; fields that are not named are those of `DEFAULTS`.

    Raises
    ------
    ValueError
        The op or a field is unknown, a value is no number that fits, or the values contradict each other.
    """
    if op not in DEFAULTS:
        raise ValueError(f"op is {op!r}, expected one of {', '.join(DEFAULTS)}")
    shape = dict(DEFAULTS[op])
    for part in filter(None, text.replace(",", " ").split()):
        name, _, value = part.partition("=")
        if name not in shape:
            raise ValueError(f"shape of {op} has no {part!r}, expected fields such as {describe(shape)}")
        try:
            shape[name] = float(value) if name == "r" else int(value)
        except ValueError:
            kind = "a number" if name == "r" else "an integer"
            raise ValueError(f"{name} of the shape is {value!r}, expected {kind}") from None
    return _checked(op, shape)


def build(op: str, shape: Shape, dtype: torch.dtype, device: torch.device) -> Workload:
    """The workload of one op: random inputs on `device`, each request full, one image after some text."""
    return _BUILDERS[op](shape, dtype, device)


def _checked(op: str, shape: Shape) -> Shape:
    for name, value in shape.items():
        if name != "r" and value < 1:
            raise ValueError(f"{name} of the shape is {value}, expected at least 1")
    if not 0 < shape.get("r", 1) <= 1:
        raise ValueError(f"r of the shape is {shape['r']:g}, expected a keep ratio in (0, 1]")
    for small, large in (("N", "S"), ("R", "S")):
        if small in shape and shape[small] > shape[large]:
            raise ValueError(f"{op}: {small} is {shape[small]} and S is {shape[large]}, expected at most S")
    if "Hq" in shape and shape["Hq"] % shape["Hkv"]:
        raise ValueError(
            f"{op}: Hq is {shape['Hq']} and Hkv is {shape['Hkv']}, expected Hq to be a multiple of Hkv"
        )
    return shape


def _decode_attention(n: Shape, dtype: torch.dtype, device: torch.device) -> Workload:
    q = _normal((n["B"], n["Hq"], n["D"]), dtype, device)
    k, v = (_normal((n["B"], n["Hkv"], n["S"], n["D"]), dtype, device) for _ in range(2))
    visual, mass = _visual(n, device), torch.zeros(n["B"], n["N"], device=device)

    def ours(ops: Any, q: Tensor, k: Tensor, v: Tensor, lens: Tensor, visual: Tensor, mass: Tensor) -> object:
        return ops.decode_attention(q, k, v, lens, visual_index=visual, mass=mass)

    def no_mass(ops: Any, q: Tensor, k: Tensor, v: Tensor, lens: Tensor, *_: Tensor) -> object:
        return ops.decode_attention(q, k, v, lens)

    def sdpa(q: Tensor, k: Tensor, v: Tensor, *_: Tensor) -> object:
        return scaled_dot_product_attention(q[:, :, None], k, v, enable_gqa=True)

    def grouped_sdpa(q: Tensor, k: Tensor, v: Tensor, *_: Tensor) -> object:
        return scaled_dot_product_attention(q.view(n["B"], n["Hkv"], -1, n["D"]), k, v)

    def flash(q: Tensor, k: Tensor, v: Tensor, *_: Tensor) -> object:
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return sdpa(q, k, v)

    attention = 2 * _bytes(q) + _bytes(k) + _bytes(v)
    flops = 4 * n["B"] * n["Hq"] * n["S"] * n["D"]
    return Workload(
        "decode_attention",
        n,
        dtype,
        (q, k, v, _lens(n, device), visual, mass),
        {"": ours, "no mass": no_mass},
        {
            "eager": lambda q, k, v, _, visual, mass: compositions.eager_decode(q, k, v, visual, mass),
            "grouped matmul": lambda q, k, v, _, visual, mass: compositions.grouped_decode(
                q, k, v, visual, mass
            ),
            "SDPA, no mass": sdpa,
            "SDPA over groups, no mass": grouped_sdpa,
            **({"flash SDPA, no mass": flash} if _has_flash(dtype, device) else {}),
        },
        {"": Cost(attention + _bytes(visual) + 2 * _bytes(mass), flops)}
        | {name: Cost(attention, flops) for name in _NO_MASS},
    )


_NO_MASS = ("no mass", "SDPA, no mass", "SDPA over groups, no mass", "flash SDPA, no mass")


def _prefill_mass(n: Shape, dtype: torch.dtype, device: torch.device) -> Workload:
    q = _normal((n["B"], n["Hq"], n["S"], n["D"]), dtype, device)
    k, v = (_normal((n["B"], n["Hkv"], n["S"], n["D"]), dtype, device) for _ in range(2))
    rows = _span(n["S"] - n["R"], n["S"], n["B"], device)
    visual, mass = _visual(n, device), torch.zeros(n["B"], n["N"], device=device)
    lse = torch.full((n["B"], n["Hq"], n["S"]), 8.0, device=device)

    def ours(
        ops: Any, q: Tensor, k: Tensor, _v: Tensor, rows: Tensor, visual: Tensor, mass: Tensor, *_: Tensor
    ) -> object:
        return ops.prefill_mass(q, k, rows, visual, mass)

    def given_lse(
        ops: Any, q: Tensor, k: Tensor, _v: Tensor, rows: Tensor, visual: Tensor, mass: Tensor, *rest: Tensor
    ) -> object:
        return ops.prefill_mass(q, k, rows, visual, mass, softmax_lse=rest[0])

    def eager(
        q: Tensor, k: Tensor, v: Tensor, rows: Tensor, visual: Tensor, mass: Tensor, *_: Tensor
    ) -> None:
        for b in range(n["B"]):  # all at once would need the matrix of every request in memory
            one = slice(b, b + 1)
            compositions.eager_prefill(q[one], k[one], v[one], rows[one], visual[one], mass[one])

    def flash(q: Tensor, k: Tensor, v: Tensor, *_: Tensor) -> object:
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    counted = n["B"] * n["Hq"] * n["R"] * n["D"] * q.element_size() + _bytes(rows)
    written = _bytes(visual) + 2 * _bytes(mass)
    visual_keys = _bytes(k) * n["N"] // n["S"] + n["B"] * n["Hq"] * n["R"] * 4  # and the LSE of each row
    flops = 2 * n["B"] * n["Hq"] * n["R"] * n["D"]
    return Workload(
        "prefill_mass",
        n,
        dtype,
        (q, k, v, rows, visual, mass, lse),
        {"": ours, "given lse": given_lse},
        {
            "eager full attention": eager,
            **({"flash attention, no mass": flash} if _has_flash(dtype, device) else {}),
        },
        {
            "": Cost(counted + _bytes(k) + written, flops * n["S"]),
            "given lse": Cost(counted + visual_keys + written, flops * n["N"]),
            "flash attention, no mass": Cost(
                2 * (_bytes(q) + _bytes(k)), 2 * n["B"] * n["Hq"] * n["D"] * n["S"] ** 2
            ),
        },
    )


def _select_tokens(n: Shape, dtype: torch.dtype, device: torch.device) -> Workload:
    mass, keep, rows = _random_mass(n, device)

    def ours(ops: Any, mass: Tensor, visual: Tensor, lens: Tensor, _: Tensor) -> object:
        return ops.select_tokens(mass, visual, lens, keep, out_len=rows)

    return Workload(
        "select_tokens",
        n,
        mass.dtype,
        (mass, _visual(n, device), _lens(n, device), _text(n, device)),
        {"": ours},
        {"topk, cat, sort": lambda mass, visual, _, text: compositions.topk_select(mass, visual, text, keep)},
        {"": Cost(8 * n["B"] * n["N"] + 4 * n["B"] * (rows + 2))},
    )


def _prune_gather(n: Shape, dtype: torch.dtype, device: torch.device) -> Workload:
    hidden = _normal((n["B"], n["S"], n["C"]), dtype, device)
    mass, keep, rows = _random_mass(n, device)

    def ours(ops: Any, hidden: Tensor, mass: Tensor, visual: Tensor, lens: Tensor, _: Tensor) -> object:
        return ops.prune_gather(hidden, mass, visual, lens, keep, out_len=rows)

    def select(ops: Any, _hidden: Tensor, mass: Tensor, visual: Tensor, lens: Tensor, _: Tensor) -> object:
        return ops.select_tokens(mass, visual, lens, keep, out_len=rows)

    moved = 2 * n["B"] * rows * n["C"] * hidden.element_size()
    selected = 8 * n["B"] * n["N"] + 4 * n["B"] * (rows + 2)
    return Workload(
        "prune_gather",
        n,
        dtype,
        (hidden, mass, _visual(n, device), _lens(n, device), _text(n, device)),
        {"": ours, "selection": select},
        {
            "topk, sort, cat, index_select": lambda hidden, mass, visual, _, text: compositions.topk_prune(
                hidden, mass, visual, text, keep
            ),
            "plain copy": lambda hidden, *_: hidden[:, :rows].clone(memory_format=torch.contiguous_format),
        },
        {"": Cost(moved + selected), "selection": Cost(selected), "plain copy": Cost(moved)},
    )


def _greedy_token(n: Shape, dtype: torch.dtype, device: torch.device) -> Workload:
    logits = _normal((n["B"], n["V"]), dtype, device)
    return Workload(
        "greedy_token",
        n,
        dtype,
        (logits,),
        {"": lambda ops, logits: ops.greedy_token(logits)},
        {"log_softmax, max": compositions.log_softmax_greedy},
        {"": Cost(_bytes(logits) + 12 * n["B"])},
    )


def _token_logprobs(n: Shape, dtype: torch.dtype, device: torch.device) -> Workload:
    logits = _normal((n["B"], n["V"]), dtype, device)
    targets = torch.randint(0, n["V"], (n["B"],), device=device)
    return Workload(
        "token_logprobs",
        n,
        dtype,
        (logits, targets),
        {"": lambda ops, logits, targets: ops.token_logprobs(logits, targets)},
        {"log_softmax, gather": compositions.log_softmax_gather},
        {"": Cost(_bytes(logits) + 12 * n["B"])},
    )


_BUILDERS = {
    "decode_attention": _decode_attention,
    "prefill_mass": _prefill_mass,
    "select_tokens": _select_tokens,
    "prune_gather": _prune_gather,
    "greedy_token": _greedy_token,
    "token_logprobs": _token_logprobs,
}


def _normal(size: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.randn(size, device=device).to(dtype)


def _random_mass(n: Shape, device: torch.device) -> tuple[Tensor, int, int]:
    """The masses, how many visual tokens are kept, and how many tokens that leaves."""
    keep = max(1, int(n["N"] * n["r"]))
    return torch.rand(n["B"], n["N"], device=device), keep, n["S"] - n["N"] + keep


def _span(start: int, stop: int, batch: int, device: torch.device) -> Tensor:
    return torch.arange(start, stop, dtype=torch.int32, device=device).repeat(batch, 1)


def _first_visual(n: Shape) -> int:
    return min(TEXT_BEFORE, n["S"] - n["N"])


def _visual(n: Shape, device: torch.device) -> Tensor:
    return _span(_first_visual(n), _first_visual(n) + n["N"], n["B"], device)


def _text(n: Shape, device: torch.device) -> Tensor:
    first = _first_visual(n)
    before, after = _span(0, first, n["B"], device), _span(first + n["N"], n["S"], n["B"], device)
    return torch.cat([before, after], 1)


def _lens(n: Shape, device: torch.device) -> Tensor:
    return torch.full((n["B"],), n["S"], dtype=torch.int32, device=device)


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _has_flash(dtype: torch.dtype, device: torch.device) -> bool:
    return device.type != "cuda" or dtype in (torch.bfloat16, torch.float16)
