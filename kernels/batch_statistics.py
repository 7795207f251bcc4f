"""Batch normalisation with batch statistics, forward only, in few passes over memory.

A layer's normalisation is represented by its *affine*, float32 [2, C]: the scale and the shift of each channel.
`statistics` reads a convolution's output once to compute it; `normalise` and `normalise_and_pool` apply it in the next
pass over these values. Products (product.py) do both themselves.

Activations are [B, C, H, W] in channels-last memory; on a GPU bfloat16 or float16. Sums are in float32, of squared
distances to each tile's mean, combined as by Chan et al. 1979, so that means far from 0 cause no cancellation.

The Triton versions have not yet been measured on a GPU.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

# Maximum number of groups into which the rows (pixels of the batch) of a tensor are divided, each with its own moments.
GROUPS = 256
# Channels whose moments one program combines.
FINISHED = 16
# Rows and channels that a program processes at a time, and its warps.
ROWS, CHANNELS, WARPS = 64, 64, 4
POOLED = 32


def statistics(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Returns the affine of a batch normalisation: float32 [2, C].

    x: its input, [B, C, H, W]. weight, bias: its parameters, float32 [C].
    """
    return _statistics(x, weight, bias, eps)


def normalise(x: Tensor, affine: Tensor, other: Tensor | None = None, other_affine: Tensor | None = None) -> Tensor:
    """Returns relu(normalised x + other) in x's dtype: [B, C, H, W], channels-last.

    x: [B, C, H, W]. affine: its normalisation, float32 [2, C]. other: the residual, shape and dtype of x, or None.
    other_affine: the residual's normalisation, float32 [2, C], or None if it is added unchanged.
    """
    return _normalise(x, affine, other, other_affine)


def normalise_and_pool(x: Tensor, affine: Tensor) -> Tensor:
    """Returns the maximum of relu(normalised x) in windows of 3 x 3 with stride 2 and padding 1, as in a ResNet's stem.

    x: [B, C, H, W]. affine: float32 [2, C]. Returns [B, C, (H + 1) // 2, (W + 1) // 2] in x's dtype, channels-last.
    """
    return _normalise_and_pool(x, affine)


# ---- the definitions of the operators


@torch.library.custom_op("label_refinery::statistics", mutates_args=(), device_types="cpu")
def _statistics(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    variance, mean = torch.var_mean(wide(x), (0, 2, 3), correction=0)
    scale = weight * (variance + eps).rsqrt()
    return torch.stack([scale, bias - mean * scale])


@torch.library.custom_op("label_refinery::normalise", mutates_args=(), device_types="cpu")
def _normalise(x: Tensor, affine: Tensor, other: Tensor | None, other_affine: Tensor | None) -> Tensor:
    found = applied(x, affine)
    if other is not None:
        found += wide(other) if other_affine is None else applied(other, other_affine)
    return found.relu().to(x.dtype).contiguous(memory_format=torch.channels_last)


@torch.library.custom_op("label_refinery::normalise_and_pool", mutates_args=(), device_types="cpu")
def _normalise_and_pool(x: Tensor, affine: Tensor) -> Tensor:
    pooled = F.max_pool2d(applied(x, affine).relu(), 3, stride=2, padding=1)
    return pooled.to(x.dtype).contiguous(memory_format=torch.channels_last)


def applied(x: Tensor, affine: Tensor) -> Tensor:
    scale, shift = affine[:, :, None, None]
    return wide(x) * scale + shift


def wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


@_statistics.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    return weight.new_empty(2, x.shape[1])


@_normalise.register_fake
def _(x: Tensor, affine: Tensor, other: Tensor | None, other_affine: Tensor | None) -> Tensor:
    return torch.empty_like(x, memory_format=torch.channels_last)


@_normalise_and_pool.register_fake
def pooled_like(x: Tensor, affine: Tensor) -> Tensor:
    return output_like(x, x.shape[1], 2)


# ---- their Triton versions, in which a pixel is a row of channels


@_statistics.register_kernel("cuda")
def launch_statistics(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """The Triton version of the operator of `statistics`."""
    x = packed(x)
    rows, channels = x.numel() // x.shape[1], x.shape[1]
    each, groups = division(rows, ROWS)
    moments = x.new_empty(groups, 2, channels, dtype=torch.float32)
    with torch.cuda.device_of(x):
        _moments_kernel[(triton.cdiv(channels, CHANNELS), groups)](
            x, moments, rows, each, channels, ROWS=ROWS, CHANNELS=CHANNELS, num_warps=WARPS
        )
    return finish(moments, rows, each, weight, bias, eps)


def finish(moments: Tensor, rows: int, each: int, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Returns the affine of all rows, float32 [2, C].

    moments: mean and sum of squared distances to it for groups of `each` rows, float32 [groups, 2, C]. rows: in total.
    """
    groups, _, channels = moments.shape
    affine = moments.new_empty(2, channels)
    with torch.cuda.device_of(moments):
        _finish_kernel[(triton.cdiv(channels, FINISHED),)](
            moments,
            weight,
            bias,
            affine,
            rows,
            each,
            channels,
            eps,
            GROUPS=triton.next_power_of_2(groups),
            CHANNELS=FINISHED,
        )
    return affine


@_normalise.register_kernel("cuda")
def launch_normalise(x: Tensor, affine: Tensor, other: Tensor | None, other_affine: Tensor | None) -> Tensor:
    """The Triton version of the operator of `normalise`."""
    x = packed(x)
    y = torch.empty_like(x)
    rows, channels = x.numel() // x.shape[1], x.shape[1]
    with torch.cuda.device_of(x):
        _normalise_kernel[(triton.cdiv(rows, ROWS), triton.cdiv(channels, CHANNELS))](
            x,
            affine,
            x if other is None else packed(other),
            affine if other_affine is None else other_affine,
            y,
            rows,
            channels,
            KIND=kind(affine, other, other_affine),
            ROWS=ROWS,
            CHANNELS=CHANNELS,
            num_warps=WARPS,
        )
    return y


@_normalise_and_pool.register_kernel("cuda")
def launch_pool(x: Tensor, affine: Tensor) -> Tensor:
    """The Triton version of the operator of `normalise_and_pool`."""
    x = packed(x)
    y = pooled_like(x, affine)
    (images, channels, height, width), (out_height, out_width) = x.shape, y.shape[2:]
    rows = images * out_height * out_width
    with torch.cuda.device_of(x):
        _pool_kernel[(triton.cdiv(rows, POOLED), triton.cdiv(channels, CHANNELS))](
            x,
            affine,
            y,
            rows,
            channels,
            height,
            width,
            out_height,
            out_width,
            ROWS=POOLED,
            CHANNELS=CHANNELS,
            num_warps=WARPS,
        )
    return y


def division(rows: int, block: int, groups: int = GROUPS) -> tuple[int, int]:
    """Returns the number of rows per group, a multiple of `block`, and the number of groups, at most `groups`."""
    each = triton.cdiv(triton.cdiv(rows, block), groups) * block
    return each, triton.cdiv(rows, each)


def packed(x: Tensor) -> Tensor:
    """Returns x in channels-last memory. Raises ValueError for a dtype that the kernels do not support."""
    if x.dtype not in (torch.bfloat16, torch.float16):
        raise ValueError(f"{x.dtype}: this kernel takes bfloat16 and float16")
    return x.contiguous(memory_format=torch.channels_last)


def output_like(x: Tensor, channels: int, stride: int) -> Tensor:
    """Returns an empty output of a convolution or pooling: [B, channels, ceil(H / stride), ceil(W / stride)]."""
    images, _, height, width = x.shape
    shape = (images, channels, (height - 1) // stride + 1, (width - 1) // stride + 1)
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


def kind(affine: Tensor | None, other: Tensor | None, other_affine: Tensor | None) -> str:
    """Returns the KIND of `activate` for these arguments, or "plain" if nothing is normalised."""
    if affine is None:
        return "plain"
    if other is None:
        return "normalised"
    return "added" if other_affine is None else "both"


@triton.jit
def activate(x, other, affine_ptr, other_affine_ptr, channel, channels, there, KIND: tl.constexpr):
    """Returns a tile [M, C], normalised and activated, in float32; channels beyond the last must be 0 and stay 0.

    KIND: "normalised": relu(normalised x); "added": relu(normalised x + other); "both": other is normalised too.
    """
    scale = tl.load(affine_ptr + channel, mask=there, other=0.0)
    shift = tl.load(affine_ptr + channels + channel, mask=there, other=0.0)
    x = x.to(tl.float32) * scale[None, :] + shift[None, :]
    if KIND == "added":
        x += other.to(tl.float32)
    if KIND == "both":
        scale = tl.load(other_affine_ptr + channel, mask=there, other=0.0)
        shift = tl.load(other_affine_ptr + channels + channel, mask=there, other=0.0)
        x += other.to(tl.float32) * scale[None, :] + shift[None, :]
    # Not tl.maximum, which drops NaN.
    return tl.where(x < 0, 0.0, x)


@triton.jit
def add_rows(mean, squares, before, y, there, number):
    """Returns `mean` and `squares`, the sum of squared distances to it, per channel, updated with the rows of a tile.

    before: number of rows so far. y: the tile, float32 [M, C]. there: which of its rows count, [M]. number: how many.
    """
    own = tl.sum(tl.where(there[:, None], y, 0.0), 0) / number
    gap = tl.where(there[:, None], y - own[None, :], 0.0)
    off = own - mean
    mean += off * (number / (before + number))
    squares += tl.sum(gap * gap, 0) + off * off * (before * number / (before + number))
    return mean, squares


@triton.jit
def _moments_kernel(x_ptr, moments_ptr, rows, each, channels, ROWS: tl.constexpr, CHANNELS: tl.constexpr):
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    group = tl.program_id(1)
    start = group * each
    mean = tl.zeros((CHANNELS,), dtype=tl.float32)
    squares = tl.zeros((CHANNELS,), dtype=tl.float32)
    for past in range(0, tl.minimum(each, rows - start), ROWS):
        first = start + past
        row = first + tl.arange(0, ROWS)
        at = row[:, None].to(tl.int64) * channels + channel[None, :]
        x = tl.load(x_ptr + at, mask=(row < rows)[:, None] & (channel < channels)[None, :], other=0.0).to(tl.float32)
        number = tl.minimum(rows - first, ROWS).to(tl.float32)
        mean, squares = add_rows(mean, squares, (first - start).to(tl.float32), x, row < rows, number)
    moments_ptr += group * 2 * channels + channel
    tl.store(moments_ptr, mean, mask=channel < channels)
    tl.store(moments_ptr + channels, squares, mask=channel < channels)


@triton.jit
def _finish_kernel(
    moments_ptr,
    weight_ptr,
    bias_ptr,
    affine_ptr,
    rows,
    each,
    channels,
    eps,
    GROUPS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    group = tl.arange(0, GROUPS)
    there = channel < channels
    # Number of rows in each group; 0 beyond the last group.
    number = tl.minimum(tl.maximum(rows - group * each, 0), each).to(tl.float32)[:, None]
    at = moments_ptr + group[:, None] * 2 * channels + channel[None, :]
    known = (number > 0) & there[None, :]
    means = tl.load(at, mask=known, other=0.0)
    squares = tl.load(at + channels, mask=known, other=0.0)
    count = rows.to(tl.float32)
    mean = tl.sum(means * (number / count), 0)
    gap = means - mean[None, :]
    variance = tl.sum(squares + number * gap * gap, 0) / count
    weight = tl.load(weight_ptr + channel, mask=there, other=0.0)
    scale = weight / tl.sqrt(variance + eps)
    tl.store(affine_ptr + channel, scale, mask=there)
    shift = tl.load(bias_ptr + channel, mask=there, other=0.0) - mean * scale
    tl.store(affine_ptr + channels + channel, shift, mask=there)


@triton.jit
def _normalise_kernel(
    x_ptr,
    affine_ptr,
    other_ptr,
    other_affine_ptr,
    y_ptr,
    rows,
    channels,
    KIND: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    mask = (row < rows)[:, None] & (channel < channels)[None, :]
    at = row[:, None].to(tl.int64) * channels + channel[None, :]
    x = tl.load(x_ptr + at, mask=mask, other=0.0)
    other = x if KIND == "normalised" else tl.load(other_ptr + at, mask=mask, other=0.0)
    y = activate(x, other, affine_ptr, other_affine_ptr, channel, channels, channel < channels, KIND)
    tl.store(y_ptr + at, y, mask=mask)


@triton.jit
def _pool_kernel(
    x_ptr,
    affine_ptr,
    y_ptr,
    rows,
    channels,
    height,
    width,
    out_height,
    out_width,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    there = (row < rows)[:, None] & (channel < channels)[None, :]
    column, line = row % out_width * 2 - 1, row // out_width % out_height * 2 - 1
    image = (row // (out_width * out_height)).to(tl.int64)
    best = tl.zeros((ROWS, CHANNELS), dtype=tl.float32)
    for down in tl.static_range(3):
        for right in tl.static_range(3):
            y, x = line + down, column + right
            inside = (y >= 0) & (y < height) & (x >= 0) & (x < width)
            mask = there & inside[:, None]
            at = ((image * height + y) * width + x)[:, None] * channels + channel[None, :]
            value = tl.load(x_ptr + at, mask=mask, other=0.0)
            value = activate(value, value, affine_ptr, affine_ptr, channel, channels, channel < channels, "normalised")
            # Values are at least 0, so padding never exceeds them. NaN is kept.
            best = tl.where(mask & ((value > best) | (value != value)), value, best)
    at = row[:, None].to(tl.int64) * channels + channel[None, :]
    tl.store(y_ptr + at, best, mask=there)
