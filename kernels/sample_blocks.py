"""Crops directly from block storage: blocks are decoded where the resize reads them, without intermediate results.

An image is three planes of 4x4 blocks (data/blocks.py): Y, and Cb and Cr halved both ways. A crop is its box resized by
the triangle filter (Pillow's BILINEAR), chroma by that filter after libjpeg's "fancy" upsampling, and then converted to
RGB, as on the CPU (data/decoders/resize.py).

A program computes a square tile of a crop: it loops over parts of the source pixels that the tile depends on, decodes
each, and multiplies it by the filter's weights along both axes. These are matrix products in float16, in which bytes
are exact and weights have a relative error of at most 1/2048.

The Triton version has not yet been measured on a GPU.
"""

from collections.abc import Sequence

import numpy as np
import torch
import triton
import triton.language as tl
from numpy.typing import NDArray
from torch import Tensor

# Pixels per side of the tile that a program computes, and the rows and columns that it decodes at a time.
# Weights of columns are recomputed for each ROWS rows, so ROWS is larger.
TILE, ROWS, COLUMNS = 32, 64, 16
WARPS = 4


def sample_blocks(
    blocks: Tensor, offsets: Tensor, sizes: Tensor, boxes: Tensor, flips: Tensor, resolution: int
) -> Tensor:
    """Returns crops of images in block storage: uint8 [B, 3, R, R], channels-last.

    blocks: int64 [N], each a block of 8 bytes, little-endian. offsets: int64 [B, 3], the index of the first block of
    each plane. It may be outside of `blocks`: only the rows of blocks given by `rows_read` are read.
    sizes: int32 [B, 2] (height, width) of the images in pixels. boxes: int32 [B, 4] (top, left, height, width) in
    pixels, within the images. flips: bool [B], True for mirrored crops. All are on one device.
    Raises ValueError for shapes that do not match; boxes and offsets are not checked.
    """
    count = len(offsets)
    columns = {"offsets": (offsets, [3]), "sizes": (sizes, [2]), "boxes": (boxes, [4]), "flips": (flips, [])}
    for name, (tensor, row) in columns.items():
        if list(tensor.shape) != [count, *row]:
            raise ValueError(f"{name} must be {[count, *row]}, not {list(tensor.shape)}")
    if blocks.ndim != 1 or blocks.dtype != torch.int64:
        raise ValueError(f"blocks must be int64 [N], not {blocks.dtype} {list(blocks.shape)}")
    return _sample_blocks(blocks, offsets, sizes, boxes, flips, resolution)


def rows_read(boxes: NDArray[np.integer]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Returns the rows of blocks that crops are computed from: the first, and one more than the last.

    boxes: int [n, 4] (top, left, height, width) in pixels. Each result is int64 [n, 2], for Y, and for Cb and Cr; the
    end may be beyond the plane's.
    """
    tops, bottoms = boxes[:, 0].astype(np.int64), (boxes[:, 0] + boxes[:, 2]).astype(np.int64)
    # For chroma, one sample more on either side.
    firsts = np.stack([tops // 4, np.maximum(tops // 2 - 1, 0) // 4], axis=1)
    return firsts, np.stack([(bottoms + 3) // 4, ((bottoms + 1) // 2 + 1 + 3) // 4], axis=1)


def planes(blocks: Tensor, offsets: Sequence[int], height: int, width: int) -> list[Tensor]:
    """Decodes an image's planes. Returns Y, float32 [height, width], and Cb and Cr, of half the sizes, rounded up.

    blocks, offsets: as in sample_blocks, for one image.
    """
    made = []
    shapes = [(height, width)] + 2 * [((height + 1) // 2, (width + 1) // 2)]
    for offset, (rows, columns) in zip(offsets, shapes, strict=True):
        down, across = (rows + 3) // 4, (columns + 3) // 4
        # Blocks outside of `blocks` have weight 0, so any value may replace them.
        places = torch.arange(offset, offset + down * across, device=blocks.device).clamp(0, len(blocks) - 1)
        words = blocks[places].view(down, across)
        bits = torch.arange(16, 64, 3, device=words.device)
        codes = words[:, :, None] >> bits & 7
        steps = torch.where(codes == 0, 0, torch.where(codes == 1, 7, codes - 1))
        values = ((words & 255)[:, :, None] * (7 - steps) + (words >> 8 & 255)[:, :, None] * steps + 3) // 7
        pixels = values.view(down, across, 4, 4).transpose(1, 2).reshape(4 * down, 4 * across)
        made.append(pixels[:rows, :columns].float())
    return made


def reference(blocks: Tensor, offsets: Tensor, sizes: Tensor, boxes: Tensor, flips: Tensor, resolution: int) -> Tensor:
    """The definition of sample_blocks: image by image, chroma upsampled to full size, the filter as matrices."""
    crops = []
    places = zip(offsets.tolist(), sizes.tolist(), boxes.tolist(), flips.tolist(), strict=True)
    for starts, (height, width), box, flip in places:
        luma, *halves = planes(blocks, starts, height, width)
        rows = _filter(height, box[0], box[2], resolution).to(luma)
        columns = _filter(width, box[1], box[3], resolution).to(luma)
        columns = columns.flip(0) if flip else columns
        taller, wider = _doubling(height).to(luma), _doubling(width).to(luma)
        full = [luma, *(taller @ half @ wider.T for half in halves)]
        y, cb, cr = (rows @ plane @ columns.T for plane in full)
        cb, cr = cb - 128, cr - 128
        crops.append(torch.stack([y + 1.402 * cr, y - 0.344136 * cb - 0.714136 * cr, y + 1.772 * cb]))
    made = torch.stack(crops) if crops else torch.empty(0, 3, resolution, resolution, device=blocks.device)
    return made.round().clamp(0, 255).byte().contiguous(memory_format=torch.channels_last)


def _filter(size: int, start: int, length: int, resolution: int) -> Tensor:
    """Returns the triangle filter from a box within `size` pixels to the resolution: float64 [R, size]."""
    step = length / resolution
    centers = start + (torch.arange(resolution, dtype=torch.float64) + 0.5) * step
    distances = (torch.arange(size) + 0.5 - centers[:, None]).abs()
    weights = (1 - distances / max(step, 1.0)).clamp(min=0)
    weights[:, :start] = weights[:, start + length :] = 0
    return weights / weights.sum(dim=1, keepdim=True)


def _doubling(size: int) -> Tensor:
    """Returns libjpeg's "fancy" upsampling to `size` pixels, 3/4 nearer + 1/4 farther sample: float64 [size, half]."""
    half = (size + 1) // 2
    pixels = torch.arange(size)
    near = pixels // 2
    far = (near + 2 * (pixels % 2) - 1).clamp(0, half - 1)
    weights = torch.zeros(size, half, dtype=torch.float64)
    weights[pixels, near] += 0.75
    weights[pixels, far] += 0.25
    return weights


@torch.library.custom_op("label_refinery::sample_blocks", mutates_args=(), device_types="cpu")
def _sample_blocks(
    blocks: Tensor, offsets: Tensor, sizes: Tensor, boxes: Tensor, flips: Tensor, resolution: int
) -> Tensor:
    return reference(blocks, offsets, sizes, boxes, flips, resolution)


@_sample_blocks.register_fake
def _(blocks: Tensor, offsets: Tensor, sizes: Tensor, boxes: Tensor, flips: Tensor, resolution: int) -> Tensor:
    return _empty(blocks, len(offsets), resolution)


@_sample_blocks.register_kernel("cuda")
def launch(blocks: Tensor, offsets: Tensor, sizes: Tensor, boxes: Tensor, flips: Tensor, resolution: int) -> Tensor:
    """The Triton version of the operator."""
    crops = _empty(blocks, len(offsets), resolution)
    tiles = triton.cdiv(resolution, TILE)
    if len(offsets):
        with torch.cuda.device_of(blocks):
            _sample_kernel[(len(offsets), tiles, tiles)](
                blocks.contiguous(),
                offsets.contiguous(),
                torch.cat([sizes, boxes, flips[:, None]], dim=1).int(),
                crops,
                resolution,
                TILE=TILE,
                ROWS=ROWS,
                COLUMNS=COLUMNS,
                num_warps=WARPS,
            )
    return crops


def _empty(blocks: Tensor, count: int, resolution: int) -> Tensor:
    shape = (count, 3, resolution, resolution)
    return torch.empty(shape, dtype=torch.uint8, device=blocks.device, memory_format=torch.channels_last)


@triton.jit
def _triangle(pixel, centers, support, start, end):
    """Returns the unnormalised weights of a pixel for outputs with these centres; 0 outside of the box."""
    weights = tl.maximum(1 - tl.abs(pixel.to(tl.float32) + 0.5 - centers) / support, 0)
    return tl.where((pixel >= start) & (pixel < end), weights, 0.0)


@triton.jit
def _weights(samples, centers, support, start, end, size, HALF: tl.constexpr):
    """Returns the unnormalised weights of a plane's samples; for a halved plane, through the upsampled pixels."""
    if not HALF:
        return _triangle(samples, centers, support, start, end)
    first = samples * 2
    near = _triangle(first, centers, support, start, end) + _triangle(first + 1, centers, support, start, end)
    far = _triangle(first - 1, centers, support, start, end) + _triangle(first + 2, centers, support, start, end)
    # Beyond the edges of a plane the outermost sample is repeated.
    far += tl.where(samples == 0, _triangle(samples, centers, support, start, end), 0.0)
    last = (size + 1) // 2 - 1
    far += tl.where(samples == last, _triangle(first + 1, centers, support, start, end), 0.0)
    return 0.75 * near + 0.25 * far


@triton.jit
def _span(centers, support, start, end, size, HALF: tl.constexpr):
    """Returns the first sample that outputs with these centres read, and one more than the last; see rows_read."""
    first = tl.maximum((tl.min(centers, 0) - support).to(tl.int32) - 1, start)
    last = tl.minimum((tl.max(centers, 0) + support).to(tl.int32) + 2, end)
    if HALF:
        first = tl.maximum(first // 2 - 1, 0)
        last = tl.minimum((last + 1) // 2 + 1, (size + 1) // 2)
    return first, last


@triton.jit
def _plane(
    blocks_ptr, height, width, rows, columns, row_scale, column_scale, tall, wide, box,
    HALF: tl.constexpr, TILE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Returns a resized tile of a plane: float32 [TILE, TILE]. rows, columns: its outputs' centres in image pixels."""
    top, left, bottom, right = box
    across = (width + 3) // 4
    if HALF:
        across = ((width + 1) // 2 + 3) // 4
    first_row, last_row = _span(rows, tall, top, bottom, height, HALF)
    first_column, last_column = _span(columns, wide, left, right, width, HALF)
    sums = tl.zeros((TILE, TILE), dtype=tl.float32)
    for row in range(first_row, last_row, ROWS):
        y = row + tl.arange(0, ROWS)
        partial = tl.zeros((ROWS, TILE), dtype=tl.float32)
        for column in range(first_column, last_column, COLUMNS):
            x = column + tl.arange(0, COLUMNS)
            inside = (y < last_row)[:, None] & (x < last_column)[None, :]
            word = tl.load(blocks_ptr + (y // 4 * across)[:, None] + (x // 4)[None, :], mask=inside, other=0)
            place = (y % 4 * 12)[:, None] + (x % 4 * 3)[None, :] + 16
            code = (word >> place).to(tl.int32) & 7
            step = tl.where(code == 0, 0, tl.where(code == 1, 7, code - 1))
            ends = word.to(tl.int32)
            sevenths = (ends & 255) * (7 - step) + (ends >> 8 & 255) * step
            # Division by 7 with rounding: exact for all pairs of bytes.
            pixels = (sevenths + 3) * 9363 >> 16
            weights = _weights(x[:, None], columns[None, :], wide, left, right, width, HALF) * column_scale[None, :]
            partial = tl.dot(pixels.to(tl.float16), weights.to(tl.float16), partial)
        weights = _weights(y[None, :], rows[:, None], tall, top, bottom, height, HALF) * row_scale[:, None]
        sums = tl.dot(weights.to(tl.float16), partial.to(tl.float16), sums)
    return sums


@triton.jit
def _totals(centers, support, start, end, CHUNK: tl.constexpr):
    """Returns the inverse of the sum of weights of each output."""
    first, last = _span(centers, support, start, end, end, False)
    total = tl.zeros_like(centers)
    for pixel in range(first, last, CHUNK):
        at = pixel + tl.arange(0, CHUNK)
        total += tl.sum(_triangle(at[None, :], centers[:, None], support, start, end), 1)
    return 1 / tl.maximum(total, 1e-6)


@triton.jit
def _sample_kernel(
    blocks_ptr,
    offsets_ptr,
    places_ptr,
    crops_ptr,
    resolution,
    TILE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    crop = tl.program_id(0).to(tl.int64)
    place = places_ptr + crop * 7
    height, width, top, left = tl.load(place), tl.load(place + 1), tl.load(place + 2), tl.load(place + 3)
    bottom, right, flip = top + tl.load(place + 4), left + tl.load(place + 5), tl.load(place + 6)
    y, x = tl.program_id(1) * TILE + tl.arange(0, TILE), tl.program_id(2) * TILE + tl.arange(0, TILE)
    down, along = (bottom - top) / resolution, (right - left) / resolution
    # Outputs beyond the crop are computed like the last ones, and are not written.
    rows = top + (tl.minimum(y, resolution - 1).to(tl.float32) + 0.5) * down
    columns = left + (tl.minimum(x, resolution - 1).to(tl.float32) + 0.5) * along
    tall, wide = tl.maximum(down, 1.0), tl.maximum(along, 1.0)
    row_scale, column_scale = _totals(rows, tall, top, bottom, COLUMNS), _totals(columns, wide, left, right, COLUMNS)
    box = (top, left, bottom, right)
    luma_ptr = blocks_ptr + tl.load(offsets_ptr + crop * 3)
    cb_ptr = blocks_ptr + tl.load(offsets_ptr + crop * 3 + 1)
    cr_ptr = blocks_ptr + tl.load(offsets_ptr + crop * 3 + 2)
    luma = _plane(
        luma_ptr, height, width, rows, columns, row_scale, column_scale, tall, wide, box, False, TILE, ROWS, COLUMNS
    )
    cb = (
        _plane(
            cb_ptr,
            height,
            width,
            rows,
            columns,
            row_scale,
            column_scale,
            tall,
            wide,
            box,
            True,
            TILE,
            ROWS // 2,
            COLUMNS,
        )
        - 128
    )
    cr = (
        _plane(
            cr_ptr,
            height,
            width,
            rows,
            columns,
            row_scale,
            column_scale,
            tall,
            wide,
            box,
            True,
            TILE,
            ROWS // 2,
            COLUMNS,
        )
        - 128
    )
    x = tl.where(flip != 0, resolution - 1 - x, x)
    pixel = crops_ptr + ((crop * resolution + y[:, None]) * resolution + x[None, :]) * 3
    inside = (y < resolution)[:, None] & ((x >= 0) & (x < resolution))[None, :]
    tl.store(pixel, _byte(luma + 1.402 * cr), mask=inside)
    tl.store(pixel + 1, _byte(luma - 0.344136 * cb - 0.714136 * cr), mask=inside)
    tl.store(pixel + 2, _byte(luma + 1.772 * cb), mask=inside)


@triton.jit
def _byte(values):
    return (tl.minimum(tl.maximum(values, 0.0), 255.0) + 0.5).to(tl.uint8)
