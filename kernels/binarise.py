"""Binarisation with the straight-through gradient (XNOR-Net: Rastegari et al. 2016, arXiv 1603.05279, section 3).

The Triton version has not yet been measured on a GPU.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 1024


def binarise(x: Tensor) -> Tensor:
    """The sign of x as +1 or -1, in x's dtype; sign(0) is +1, and NaN stays NaN, so that a broken network is noticed.

    x: float32, bfloat16 or float16, any shape and memory format. The gradient passes unchanged where |x| < 1 and is 0
    elsewhere.
    """
    return _binarise(x)[0]


def reference(x: Tensor) -> Tensor:
    """The definition of binarise in plain PyTorch."""
    sign = torch.where(x >= 0, 1, torch.where(x < 0, -1, x)).detach()
    passing = torch.where(x.abs() < 1, x, 0)
    # The bracket is exactly 0 and carries the gradient.
    return sign + (passing - passing.detach())


@torch.library.custom_op("label_refinery::binarise", mutates_args=(), device_types="cpu")
def _binarise(x: Tensor) -> tuple[Tensor, Tensor]:
    """The signs, and for backward a bool tensor: where the gradient passes."""
    return torch.where(x >= 0, 1, torch.where(x < 0, -1, x)), x.abs() < 1


@_binarise.register_fake
def _(x: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(x, dtype=torch.bool)


@torch.library.custom_op("label_refinery::binarise_backward", mutates_args=(), device_types="cpu")
def _binarise_backward(gradient: Tensor, passes: Tensor) -> Tensor:
    return torch.where(passes, gradient, 0)


@_binarise_backward.register_fake
def _(gradient: Tensor, passes: Tensor) -> Tensor:
    return torch.empty_like(gradient)


def _keep(ctx, inputs: tuple[Tensor], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(output[1])


def _backward(ctx, gradient: Tensor, _: None) -> Tensor:
    (passes,) = ctx.saved_tensors
    return _binarise_backward(gradient, passes)


_binarise.register_autograd(_backward, setup_context=_keep)


@_binarise.register_kernel("cuda")
def launch(x: Tensor) -> tuple[Tensor, Tensor]:
    """The Triton version of the operator."""
    signs, passes = torch.empty_like(x), torch.empty_like(x, dtype=torch.bool)
    # Memory is traversed from end to end in any memory format: all tensors need the same layout, without gaps.
    if x.stride() != signs.stride():
        x = torch.empty_like(x).copy_(x)
    if x.numel():
        with torch.cuda.device_of(x):
            _binarise_kernel[(triton.cdiv(x.numel(), _BLOCK),)](x, signs, passes, x.numel(), BLOCK=_BLOCK)
    return signs, passes


@_binarise_backward.register_kernel("cuda")
def launch_backward(gradient: Tensor, passes: Tensor) -> Tensor:
    """The Triton version of the operator's backward."""
    result = torch.empty_like(gradient)
    if gradient.stride() != result.stride():
        gradient = torch.empty_like(gradient).copy_(gradient)
    if passes.stride() != result.stride():
        passes = torch.empty_like(result, dtype=torch.bool).copy_(passes)
    if result.numel():
        with torch.cuda.device_of(result):
            _backward_kernel[(triton.cdiv(result.numel(), _BLOCK),)](
                gradient, passes, result, result.numel(), BLOCK=_BLOCK
            )
    return result


@triton.jit
def _binarise_kernel(x_ptr, signs_ptr, passes_ptr, count, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at, mask=at < count).to(tl.float32)
    tl.store(signs_ptr + at, tl.where(x >= 0, 1.0, tl.where(x < 0, -1.0, x)), mask=at < count)
    tl.store(passes_ptr + at, tl.abs(x) < 1, mask=at < count)


@triton.jit
def _backward_kernel(gradient_ptr, passes_ptr, result_ptr, count, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    passes = tl.load(passes_ptr + at, mask=at < count)
    gradient = tl.load(gradient_ptr + at, mask=at < count).to(tl.float32)
    tl.store(result_ptr + at, tl.where(passes, gradient, 0), mask=at < count)
