"""Binarisation with the straight-through gradient (XNOR-Net: Rastegari et al. 2016, arXiv 1603.05279, section 3).

In plain PyTorch, so that the compiler can fuse it with the normalisation before it; a Triton operator is opaque to the
compiler (not measured).
"""

from typing import Any

import torch
from torch import Tensor


def binarise(x: Tensor) -> Tensor:
    """Returns the sign of x as +1 or -1, in x's dtype; sign(0) is +1. NaN stays NaN, so that divergence is noticed.

    x: float32, bfloat16 or float16, any shape and memory format. The gradient passes unchanged where |x| < 1 and is 0
    elsewhere.
    """
    return _Binarise.apply(x)


def reference(x: Tensor) -> Tensor:
    """The definition of binarise, differentiated by PyTorch."""
    sign = torch.where(x >= 0, 1, torch.where(x < 0, -1, x)).detach()
    passing = torch.where(x.abs() < 1, x, 0)
    # The difference is exactly 0 and carries the gradient.
    return sign + (passing - passing.detach())


class _Binarise(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        # One byte per element, where x would take two or four.
        ctx.save_for_backward(x.abs() < 1)
        return torch.where(x >= 0, 1, torch.where(x < 0, -1, x))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (passes,) = ctx.saved_tensors
        return torch.where(passes, gradient, 0)
