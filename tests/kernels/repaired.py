"""Fixes Triton's interpreter where it differs from a GPU; imported before kernels are interpreted."""

import numpy as np
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

_patch_lang_tensor = interpreter._patch_lang_tensor
_convert_float = interpreter._convert_float
_create_dot = InterpreterBuilder.create_dot


def _patch_with_index(tensor, scope) -> None:
    """Triton before 3.8 converts a loop's bound with int() of a one-element array, which NumPy 2.5 rejects."""
    _patch_lang_tensor(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())


def _convert_rounding(data, given, wanted, mode):
    """The interpreter truncates float32 to bfloat16; a GPU rounds to nearest even."""
    if (given, wanted) != (tl.float32, tl.bfloat16):
        return _convert_float(data, given, wanted, mode)
    bits = np.ascontiguousarray(data, dtype=np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
    return np.where(np.isnan(data), bits >> 16 | 0x40, rounded).astype(np.uint16)


def _dot_of_values(self, a, b, *rest):
    """The interpreter multiplies the bits of bfloat16 as integers."""
    return _create_dot(self, *(_widened(one) if one.dtype.scalar == tl.bfloat16 else one for one in (a, b)), *rest)


def _widened(one: TensorHandle) -> TensorHandle:
    return TensorHandle((one.data.astype(np.uint32) << 16).view(np.float32), tl.float32)


interpreter._patch_lang_tensor = _patch_with_index
interpreter._convert_float = _convert_rounding
InterpreterBuilder.create_dot = _dot_of_values
