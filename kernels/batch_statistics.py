"""Batch normalisation by the batch's own statistics, forward only, in as few passes over memory as its parts allow.

A layer's normalisation is kept as its *affine*, float32 [2, C]: what each channel is multiplied by, and what is added
then. `statistics` reads a convolution's output once for it; `normalise` and `normalise_and_pool` apply it where the
values are read next. Products (product.py) do both by themselves.

Activations are [B, C, H, W] in channels-last memory; on a GPU bfloat16 or float16. Sums are in float32, of distances
from a mean: each tile's own, combined as by Chan et al. 1979, so that nothing is lost where a mean is far from 0.

The Triton versions have not yet been measured on a GPU.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

# Parts into which the rows (pixels of the batch) of a tensor are divided, at most: each has moments of its own.
GROUPS = 256
# Channels that a program combines the moments of.
FINISHED = 16
# Rows and channels that a program takes at a time, and its warps.
ROWS, CHANNELS, WARPS = 64, 64, 4
POOLED = 32


def statistics(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """The affine of a batch normalisation: float32 [2, C].

    x: what it normalises, [B, C, H, W]. weight, bias: its parameters, float32 [C].
    """
    return _statistics(x, weight, bias, eps)


def normalise(x: Tensor, affine: Tensor, other: Tensor | None = None, other_affine: Tensor | None = None) -> Tensor:
    """relu(x normalised + other), in x's dtype, channels-last.

    x: [B, C, H, W]. affine: its normalisation, float32 [2, C]. other: what a residual adds, as x, or nothing; by
    other_affine normalised itself, or as it is.
    """
    return _normalise(x, affine, other, other_affine)


def normalise_and_pool(x: Tensor, affine: Tensor) -> Tensor:
    """The maximum of relu(x normalised) in windows of 3 x 3 at a stride of 2, as at a ResNet's start.

    x: [B, C, H, W]. Returns [B, C, (H + 1) // 2, (W + 1) // 2] in x's dtype, channels-last.
    """
    return _normalise_and_pool(x, affine)


# ---- what defines the operators


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


# ---- their Triton versions: a pixel is a row of channels


@_statistics.register_kernel("cuda")
def launch_statistics(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """The Triton version of statistics' operator."""
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
    """The affine of all rows, float32 [2, C], from the moments of groups of `each` rows, float32 [groups, 2, C]."""
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
    """The Triton version of normalise's operator."""
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
    """The Triton version of normalise_and_pool's operator."""
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
    """How many rows each group has, whole blocks of them, and how many groups there are, at most `groups`."""
    each = triton.cdiv(triton.cdiv(rows, block), groups) * block
    return each, triton.cdiv(rows, each)


def packed(x: Tensor) -> Tensor:
    """In channels-last memory. Raises ValueError for a dtype that the kernels do not take."""
    if x.dtype not in (torch.bfloat16, torch.float16):
        raise ValueError(f"{x.dtype}: the kernels of a fused refinery take bfloat16 and float16")
    return x.contiguous(memory_format=torch.channels_last)


def output_like(x: Tensor, channels: int, stride: int) -> Tensor:
    """Memory for a convolution's or a pooling's output: [B, channels, ceil(H / stride), ceil(W / stride)]."""
    images, _, height, width = x.shape
    shape = (images, channels, (height - 1) // stride + 1, (width - 1) // stride + 1)
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


def kind(affine: Tensor | None, other: Tensor | None, other_affine: Tensor | None) -> str:
    """What `activate` is to do with these."""
    if affine is None:
        return "plain"
    if other is None:
        return "normalised"
    return "added" if other_affine is None else "both"


@triton.jit
def activate(x, other, affine_ptr, other_affine_ptr, channel, channels, there, KIND: tl.constexpr):
    """What a tile [M, C] becomes, in float32; channels beyond the last must be 0, and stay it.

    KIND: "normalised": relu(x normalised); "added": relu(x normalised + other); "both": the other normalised too.
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
    """The mean of rows so far, and the sum of squared distances from it, with those of a tile more, by channel.

    before: how many rows so far. y: float32 [M, C], of which `there` [M] says which count, `number` in all.
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
    # Rows of each group; beyond the last there is none.
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
            # No value is below 0, so that padding never wins. NaN stays.
            best = tl.where(mask & ((value > best) | (value != value)), value, best)
    at = row[:, None].to(tl.int64) * channels + channel[None, :]
    tl.store(y_ptr + at, best, mask=there)
