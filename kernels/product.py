"""1x1 convolutions fused with parts of the batch normalisations before and after them.

Batch statistics need all of a convolution's output before any of it can be normalised, which costs separate passes over
memory: one to read for the statistics, one to read, normalise and write. A 1x1 convolution is a matrix product of
pixels and filters, whose kernel can do both: it normalises and activates its input after loading it, adds a residual if
there is one, and computes the moments of its output before storing it.

Tensors and statistics are as in batch_statistics.py. The Triton version has not yet been measured on a GPU.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from kernels.batch_statistics import (
    activate,
    add_rows,
    division,
    finish,
    kind,
    normalise,
    output_like,
    packed,
    statistics,
    wide,
)

# Rows (pixels) and input channels that a program processes at a time, its pipeline stages, and its warps.
ROWS, INPUTS, STAGES, WARPS = 128, 32, 3, 8
# Maximum number of output channels per program.
_OUTPUTS = 128


def product(
    x: Tensor,
    filters: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    *,
    affine: Tensor | None = None,
    stride: int = 1,
) -> tuple[Tensor, Tensor]:
    """Returns a 1x1 convolution's output, [B, N, ceil(H / stride), ceil(W / stride)], and its affine, float32 [2, N].

    x: [B, K, H, W]. filters: [N, K, 1, 1], x's dtype. weight, bias, eps: those of the batch normalisation after the
    convolution, float32 [N]; the affine is that normalisation's. affine: float32 [2, K]; if given, x is normalised with
    it and activated first. Raises ValueError for an affine together with a stride above 1.
    """
    if affine is not None and stride > 1:
        raise ValueError(f"stride={stride}: must be 1 for a product with an affine")
    return _product(x, filters, weight, bias, eps, affine, stride)


def sum_product(
    x: Tensor,
    affine: Tensor,
    other: Tensor,
    other_affine: Tensor | None,
    filters: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns normalise(x, affine, other, other_affine), a 1x1 convolution of it, and the affine of its output.

    The first is needed as the next residual. Arguments are those of `normalise` and `product`.
    """
    return _sum_product(x, affine, other, other_affine, filters, weight, bias, eps)


# ---- the definitions of the operators


@torch.library.custom_op("label_refinery::product", mutates_args=(), device_types="cpu")
def _product(
    x: Tensor, filters: Tensor, weight: Tensor, bias: Tensor, eps: float, affine: Tensor | None, stride: int
) -> tuple[Tensor, Tensor]:
    if affine is not None:
        x = normalise(x, affine)
    # Rounded once, as by cuDNN.
    y = F.conv2d(wide(x), wide(filters), stride=stride).to(x.dtype).contiguous(memory_format=torch.channels_last)
    return y, statistics(y, weight, bias, eps)


@torch.library.custom_op("label_refinery::sum_product", mutates_args=(), device_types="cpu")
def _sum_product(
    x: Tensor,
    affine: Tensor,
    other: Tensor,
    other_affine: Tensor | None,
    filters: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    total = normalise(x, affine, other, other_affine)
    return total, *_product(total, filters, weight, bias, eps, None, 1)


@_product.register_fake
def _(
    x: Tensor, filters: Tensor, weight: Tensor, bias: Tensor, eps: float, affine: Tensor | None, stride: int
) -> tuple[Tensor, Tensor]:
    return output_like(x, filters.shape[0], stride), weight.new_empty(2, filters.shape[0])


@_sum_product.register_fake
def _(
    x: Tensor,
    affine: Tensor,
    other: Tensor,
    other_affine: Tensor | None,
    filters: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    total = torch.empty_like(x, memory_format=torch.channels_last)
    return total, output_like(x, filters.shape[0], 1), weight.new_empty(2, filters.shape[0])


# ---- their Triton version


@_product.register_kernel("cuda")
def launch(
    x: Tensor, filters: Tensor, weight: Tensor, bias: Tensor, eps: float, affine: Tensor | None, stride: int
) -> tuple[Tensor, Tensor]:
    """The Triton version of the operator of `product`."""
    _, *found = _launch(x, affine, None, None, filters, weight, bias, eps, stride)
    return found[0], found[1]


@_sum_product.register_kernel("cuda")
def launch_sum(
    x: Tensor,
    affine: Tensor,
    other: Tensor,
    other_affine: Tensor | None,
    filters: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The Triton version of the operator of `sum_product`."""
    return _launch(x, affine, other, other_affine, filters, weight, bias, eps, 1)


def _launch(
    x: Tensor,
    affine: Tensor | None,
    other: Tensor | None,
    other_affine: Tensor | None,
    filters: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    stride: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the sum (x itself without a residual), the product, and the product's affine."""
    x, filters = packed(x), filters.contiguous()
    y = output_like(x, filters.shape[0], stride)
    total = x if other is None else torch.empty_like(x)
    (_, inputs, height, width), (images, outputs, out_height, out_width) = x.shape, y.shape
    rows = images * out_height * out_width
    if inputs % INPUTS:
        raise ValueError(f"{inputs} channels: the kernel takes multiples of {INPUTS}")
    each, groups = division(rows, ROWS)
    moments = x.new_empty(groups, 2, outputs, dtype=torch.float32)
    block = tile(outputs)
    with torch.cuda.device_of(x):
        # Programs that read the same rows run at the same time, so that all except the first find them in the cache.
        _product_kernel[(triton.cdiv(outputs, block), groups)](
            x,
            weight if affine is None else affine,
            x if other is None else packed(other),
            weight if other_affine is None else other_affine,
            filters,
            total,
            y,
            moments,
            rows,
            each,
            inputs,
            outputs,
            height,
            width,
            out_height,
            out_width,
            STRIDE=stride,
            KIND=kind(affine, other, other_affine),
            ROWS=ROWS,
            INPUTS=INPUTS,
            OUTPUTS=block,
            num_warps=WARPS,
            num_stages=STAGES,
        )
    return total, y, finish(moments, rows, each, weight, bias, eps)


def tile(outputs: int) -> int:
    """Returns the number of output channels per program."""
    return min(max(triton.next_power_of_2(outputs), 16), _OUTPUTS)


@triton.jit
def _product_kernel(
    x_ptr,
    affine_ptr,
    other_ptr,
    other_affine_ptr,
    filters_ptr,
    sum_ptr,
    y_ptr,
    moments_ptr,
    rows,
    each,
    inputs,
    outputs,
    height,
    width,
    out_height,
    out_width,
    STRIDE: tl.constexpr,
    KIND: tl.constexpr,
    ROWS: tl.constexpr,
    INPUTS: tl.constexpr,
    OUTPUTS: tl.constexpr,
):
    output = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    group = tl.program_id(1)
    start = group * each
    mean = tl.zeros((OUTPUTS,), dtype=tl.float32)
    squares = tl.zeros((OUTPUTS,), dtype=tl.float32)
    for past in range(0, tl.minimum(each, rows - start), ROWS):
        first = start + past
        row = first + tl.arange(0, ROWS)
        there = row < rows
        # The 64-bit offset is that of the tile, so that offsets within it fit into 32 bits.
        begins, source = first.to(tl.int64), tl.arange(0, ROWS)
        if STRIDE > 1:
            line, column = row // out_width % out_height * STRIDE, row % out_width * STRIDE
            source = (row // (out_width * out_height) * height + line) * width + column
            begins = (first // (out_width * out_height)).to(tl.int64) * height * width
            source -= begins.to(tl.int32)
        y = tl.zeros((ROWS, OUTPUTS), dtype=tl.float32)
        for left in range(0, inputs, INPUTS):
            channel = left + tl.arange(0, INPUTS)
            at = source[:, None] * inputs + channel[None, :]
            mask = there[:, None]
            x = tl.load(x_ptr + begins * inputs + at, mask=mask, other=0.0)
            if KIND != "plain":
                other = x
                if KIND != "normalised":
                    other = tl.load(other_ptr + begins * inputs + at, mask=mask, other=0.0)
                x = activate(x, other, affine_ptr, other_affine_ptr, channel, inputs, channel < inputs, KIND).to(
                    x.dtype
                )
                if KIND != "normalised" and tl.program_id(0) == 0:
                    tl.store(sum_ptr + begins * inputs + at, x, mask=mask)
            at = output[None, :] * inputs + channel[:, None]
            filters = tl.load(filters_ptr + at, mask=(output < outputs)[None, :], other=0.0)
            y = tl.dot(x, filters, y)
        rounded = y.to(y_ptr.dtype.element_ty)
        at = tl.arange(0, ROWS)[:, None] * outputs + output[None, :]
        tl.store(y_ptr + first.to(tl.int64) * outputs + at, rounded, mask=there[:, None] & (output < outputs)[None, :])
        # Moments of the rounded values, so that exactly these are normalised to mean 0.
        number = tl.minimum(rows - first, ROWS).to(tl.float32)
        before = (first - start).to(tl.float32)
        mean, squares = add_rows(mean, squares, before, rounded.to(tl.float32), there, number)
    moments_ptr += group * 2 * outputs + output
    tl.store(moments_ptr, mean, mask=output < outputs)
    tl.store(moments_ptr + outputs, squares, mask=output < outputs)
