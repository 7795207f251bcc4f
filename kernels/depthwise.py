"""Depthwise 3x3 convolutions with padding 1 that read each tensor once: forward, and both gradients in one pass.

Activations are [B, C, H, W] in channels-last memory; on a GPU bfloat16 or float16. Products and sums are in float32.
Neighbouring pixels are read from the caches. A program of the backward pass processes pixels of the input: from the
output's gradient at their nine neighbours it computes the input's gradient, and with the input the weights' gradient.

The Triton versions have not yet been measured on a GPU.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from kernels.batch_statistics import division, output_like, packed, wide

# Pixels that a program processes at a time, forward and backward, and the maximum number of channels.
PIXELS, PIXELS_BACK, _CHANNELS = 32, 8, 64
WARPS_BACK = 2
# Minimum number of programs of the backward pass for large inputs; each sums gradients of weights separately.
_PROGRAMS = 2048


def depthwise(x: Tensor, weight: Tensor, *, stride: int = 1) -> Tensor:
    """Returns the convolution of each channel with its 3x3 filter, with padding 1, in x's dtype and channels-last.

    x: [B, C, H, W]. weight: [C, 1, 3, 3], any floating dtype; its gradient is in this dtype. stride: 1 or 2. Returns
    [B, C, ceil(H / stride), ceil(W / stride)]. Raises ValueError for other filters and strides.
    """
    if stride not in (1, 2):
        raise ValueError(f"stride={stride}: must be 1 or 2")
    if weight.shape != (x.shape[1], 1, 3, 3):
        raise ValueError(f"weight must be [{x.shape[1]}, 1, 3, 3], not {list(weight.shape)}")
    return _depthwise(x, weight, stride)


def reference(x: Tensor, weight: Tensor, *, stride: int = 1) -> Tensor:
    """The definition of depthwise in plain PyTorch; differentiable."""
    return F.conv2d(wide(x), wide(weight), stride=stride, padding=1, groups=x.shape[1]).to(x.dtype)


@torch.library.custom_op("label_refinery::depthwise", mutates_args=(), device_types="cpu")
def _depthwise(x: Tensor, weight: Tensor, stride: int) -> Tensor:
    return reference(x, weight, stride=stride).contiguous(memory_format=torch.channels_last)


@_depthwise.register_fake
def _(x: Tensor, weight: Tensor, stride: int) -> Tensor:
    return output_like(x, x.shape[1], stride)


@torch.library.custom_op("label_refinery::depthwise_backward", mutates_args=(), device_types="cpu")
def _depthwise_backward(gradient: Tensor, x: Tensor, weight: Tensor, stride: int) -> tuple[Tensor, Tensor]:
    """Returns the gradients with respect to x and to the weight."""
    of_x, of_weight, _ = torch.ops.aten.convolution_backward(
        wide(gradient),
        wide(x),
        wide(weight),
        None,
        [stride, stride],
        [1, 1],
        [1, 1],
        False,
        [0, 0],
        x.shape[1],
        [True, True, False],
    )
    return of_x.to(x.dtype).contiguous(memory_format=torch.channels_last), of_weight.to(weight.dtype).contiguous()


@_depthwise_backward.register_fake
def _(gradient: Tensor, x: Tensor, weight: Tensor, stride: int) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x, memory_format=torch.channels_last), weight.new_empty(weight.shape)


def _keep(ctx, inputs: tuple[Tensor, Tensor, int], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:2])
    ctx.stride = inputs[2]


def _backward(ctx, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
    return *_depthwise_backward(gradient, *ctx.saved_tensors, ctx.stride), None


_depthwise.register_autograd(_backward, setup_context=_keep)


# ---- their Triton version


@_depthwise.register_kernel("cuda")
def launch(x: Tensor, weight: Tensor, stride: int) -> Tensor:
    """The Triton version of the operator."""
    x, by_place = packed(x), _by_place(weight)
    y = output_like(x, x.shape[1], stride)
    (images, channels, height, width), (out_height, out_width) = x.shape, y.shape[2:]
    rows, block = images * out_height * out_width, tile(channels)
    with torch.cuda.device_of(x):
        _depthwise_kernel[(triton.cdiv(rows, PIXELS), triton.cdiv(channels, block))](
            x,
            by_place,
            y,
            rows,
            channels,
            height,
            width,
            out_height,
            out_width,
            STRIDE=stride,
            PIXELS=PIXELS,
            CHANNELS=block,
        )
    return y


@_depthwise_backward.register_kernel("cuda")
def launch_backward(gradient: Tensor, x: Tensor, weight: Tensor, stride: int) -> tuple[Tensor, Tensor]:
    """The Triton version of the operator's backward."""
    gradient, x, by_place = packed(gradient), packed(x), _by_place(weight)
    of_x = torch.empty_like(x)
    (images, channels, height, width), (out_height, out_width) = x.shape, gradient.shape[2:]
    rows, block = images * height * width, tile(channels)
    each, groups = division(rows, PIXELS_BACK, triton.cdiv(_PROGRAMS, triton.cdiv(channels, block)))
    sums = x.new_empty(groups, 9, channels, dtype=torch.float32)
    with torch.cuda.device_of(x):
        _depthwise_backward_kernel[(triton.cdiv(channels, block), groups)](
            gradient,
            x,
            by_place,
            of_x,
            sums,
            rows,
            each,
            channels,
            height,
            width,
            out_height,
            out_width,
            STRIDE=stride,
            PIXELS=PIXELS_BACK,
            CHANNELS=block,
            num_warps=WARPS_BACK,
        )
    # Added in a fixed order, so that results are deterministic.
    return of_x, sums.sum(0).t().reshape(weight.shape).to(weight.dtype).contiguous()


def _by_place(weight: Tensor) -> Tensor:
    """Returns the weight as float32 [9, C], with channels contiguous as in activations."""
    return weight.reshape(-1, 9).t().float().contiguous()


def tile(channels: int) -> int:
    """Returns the number of channels per program."""
    return min(triton.next_power_of_2(channels), _CHANNELS)


@triton.jit
def _depthwise_kernel(
    x_ptr,
    weight_ptr,
    y_ptr,
    rows,
    channels,
    height,
    width,
    out_height,
    out_width,
    STRIDE: tl.constexpr,
    PIXELS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    row = tl.program_id(0) * PIXELS + tl.arange(0, PIXELS)
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    known = channel < channels
    line, column = row // out_width % out_height * STRIDE - 1, row % out_width * STRIDE - 1
    # The 64-bit offset is that of the tile's first image, so that offsets within a tile fit into 32 bits.
    first = tl.program_id(0) * PIXELS // (out_width * out_height)
    image = row // (out_width * out_height) - first
    x_ptr += first.to(tl.int64) * height * width * channels
    total = tl.zeros((PIXELS, CHANNELS), dtype=tl.float32)
    for down in tl.static_range(3):
        for right in tl.static_range(3):
            y, x = line + down, column + right
            inside = (row < rows) & (y >= 0) & (y < height) & (x >= 0) & (x < width)
            at = ((image * height + y) * width + x)[:, None] * channels + channel[None, :]
            value = tl.load(x_ptr + at, mask=inside[:, None] & known[None, :], other=0.0).to(tl.float32)
            weight = tl.load(weight_ptr + (down * 3 + right) * channels + channel, mask=known, other=0.0)
            total += value * weight[None, :]
    at = row[:, None].to(tl.int64) * channels + channel[None, :]
    tl.store(y_ptr + at, total, mask=(row < rows)[:, None] & known[None, :])


@triton.jit
def _depthwise_backward_kernel(
    gradient_ptr,
    x_ptr,
    weight_ptr,
    result_ptr,
    sums_ptr,
    rows,
    each,
    channels,
    height,
    width,
    out_height,
    out_width,
    STRIDE: tl.constexpr,
    PIXELS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    group = tl.program_id(1)
    start = group * each
    known = channel < channels
    # The gradient of each weight, per pixel; summed over the pixels at the end.
    a0 = tl.zeros((PIXELS, CHANNELS), dtype=tl.float32)
    a1, a2, b0, b1, b2, c0, c1, c2 = a0, a0, a0, a0, a0, a0, a0, a0
    for past in range(0, tl.minimum(each, rows - start), PIXELS):
        row = start + past + tl.arange(0, PIXELS)
        mask = (row < rows)[:, None] & known[None, :]
        at = tl.arange(0, PIXELS)[:, None] * channels + channel[None, :]
        begins = (start + past).to(tl.int64) * channels
        x = tl.load(x_ptr + begins + at, mask=mask, other=0.0).to(tl.float32)
        # With stride 1, the output pixel to which this input pixel contributes by the filter's first weight.
        line, column = row // width % height + 1, row % width + 1
        # The 64-bit offset is that of the tile's first image, so that offsets within a tile fit into 32 bits.
        first = (start + past) // (width * height)
        image = (row // (width * height) - first) * out_height
        places = gradient_ptr + first.to(tl.int64) * out_height * out_width * channels + channel[None, :]
        weights = weight_ptr + channel
        of_x = tl.zeros((PIXELS, CHANNELS), dtype=tl.float32)
        of_x, a0, a1, a2 = _filter_line(
            of_x,
            a0,
            a1,
            a2,
            x,
            places,
            weights,
            image,
            line,
            column,
            out_height,
            out_width,
            channels,
            mask,
            known,
            STRIDE,
        )
        of_x, b0, b1, b2 = _filter_line(
            of_x,
            b0,
            b1,
            b2,
            x,
            places,
            weights + 3 * channels,
            image,
            line - 1,
            column,
            out_height,
            out_width,
            channels,
            mask,
            known,
            STRIDE,
        )
        of_x, c0, c1, c2 = _filter_line(
            of_x,
            c0,
            c1,
            c2,
            x,
            places,
            weights + 6 * channels,
            image,
            line - 2,
            column,
            out_height,
            out_width,
            channels,
            mask,
            known,
            STRIDE,
        )
        tl.store(result_ptr + begins + at, of_x, mask=mask)
    sums_ptr += group * 9 * channels + channel
    tl.store(sums_ptr, tl.sum(a0, 0), mask=known)
    tl.store(sums_ptr + channels, tl.sum(a1, 0), mask=known)
    tl.store(sums_ptr + 2 * channels, tl.sum(a2, 0), mask=known)
    tl.store(sums_ptr + 3 * channels, tl.sum(b0, 0), mask=known)
    tl.store(sums_ptr + 4 * channels, tl.sum(b1, 0), mask=known)
    tl.store(sums_ptr + 5 * channels, tl.sum(b2, 0), mask=known)
    tl.store(sums_ptr + 6 * channels, tl.sum(c0, 0), mask=known)
    tl.store(sums_ptr + 7 * channels, tl.sum(c1, 0), mask=known)
    tl.store(sums_ptr + 8 * channels, tl.sum(c2, 0), mask=known)


@triton.jit
def _filter_line(
    of_x,
    left,
    middle,
    right,
    x,
    places,
    weights,
    image,
    line,
    column,
    out_height,
    out_width,
    channels,
    mask,
    known,
    STRIDE: tl.constexpr,
):
    """Adds the contributions of the three weights of a filter's row to the input's and the weights' gradients."""
    of_x, left = _filter_tap(
        of_x, left, x, places, weights, image, line, column, out_height, out_width, channels, mask, known, STRIDE
    )
    of_x, middle = _filter_tap(
        of_x,
        middle,
        x,
        places,
        weights + channels,
        image,
        line,
        column - 1,
        out_height,
        out_width,
        channels,
        mask,
        known,
        STRIDE,
    )
    of_x, right = _filter_tap(
        of_x,
        right,
        x,
        places,
        weights + 2 * channels,
        image,
        line,
        column - 2,
        out_height,
        out_width,
        channels,
        mask,
        known,
        STRIDE,
    )
    return of_x, left, middle, right


@triton.jit
def _filter_tap(
    of_x,
    of_weight,
    x,
    places,
    weights,
    image,
    line,
    column,
    out_height,
    out_width,
    channels,
    mask,
    known,
    STRIDE: tl.constexpr,
):
    inside = (line >= 0) & (line < out_height * STRIDE) & (column >= 0) & (column < out_width * STRIDE)
    if STRIDE > 1:
        inside = inside & (line % STRIDE == 0) & (column % STRIDE == 0)
    at = ((image + line // STRIDE) * out_width + column // STRIDE)[:, None] * channels
    gradient = tl.load(places + at, mask=mask & inside[:, None], other=0.0).to(tl.float32)
    weight = tl.load(weights, mask=known, other=0.0)
    return of_x + gradient * weight[None, :], of_weight + gradient * x
