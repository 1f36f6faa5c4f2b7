"""Repairs of Triton's interpreter (3.6), in force only under TRITON_INTERPRET=1: the kernels stay GPU code.

* NumPy 2.4 refuses `int()` of an array of one element, which is what the bounds of a loop are.
* `tl.dot` multiplies bf16, which NumPy does not know, as the integers that hold its bits.
* fp32 becomes bf16 by truncation, where a GPU rounds to nearest even.
* Every call of a function such as `tl.sum` patches the whole language anew, which takes longer than the sum.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter

_patched_modules: set[str] = set()


def silence() -> np.errstate:
    return np.errstate(all="ignore")


def repair() -> None:
    interpreter._patch_lang_tensor = _patch_tensor
    interpreter.InterpreterBuilder.create_dot = _dot
    interpreter.InterpreterBuilder.cast_impl = _cast
    interpreter.InterpretedFunction.__call__ = _call


_original_patch_tensor = interpreter._patch_lang_tensor
_original_dot = interpreter.InterpreterBuilder.create_dot
_original_cast = interpreter.InterpreterBuilder.cast_impl


def _patch_tensor(tensor: Any, scope: Any) -> None:
    _original_patch_tensor(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))


def _dot(builder: Any, a: Any, b: Any, *rest: Any) -> Any:
    a, b = (builder.cast_impl(x, tl.float32) if x.dtype == tl.bfloat16 else x for x in (a, b))
    return _original_dot(builder, a, b, *rest)


def _cast(builder: Any, source: Any, target: Any) -> Any:
    kinds = source.dtype.scalar, target.scalar
    if kinds == (tl.bfloat16, tl.float32):
        data = (source.data.astype(np.uint32) << 16).view(np.float32)
        return interpreter.TensorHandle(data, tl.float32)
    if kinds == (tl.float32, tl.bfloat16):
        bits = source.data.view(np.uint32)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        data = np.where(np.isnan(source.data), 0x7FC0, rounded).astype(np.uint16)
        return interpreter.TensorHandle(data, tl.bfloat16)
    return _original_cast(builder, source, target)


def _call(function: Any, *arguments: Any, **options: Any) -> Any:
    if function.fn.__module__ not in _patched_modules:
        _patched_modules.add(function.fn.__module__)
        interpreter._patch_lang(function.fn)
    return function.rewrite()(*arguments, **options)
