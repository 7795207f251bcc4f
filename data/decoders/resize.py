"""Crop, resize and flip in compiled code: the antialiased triangle filter, bit for bit as Pillow's BILINEAR.

Pillow resizes rows, rounds to bytes, then columns, with weights in fixed point; so does this.
"""

import math

import numpy as np
from numba import njit
from numpy.typing import NDArray

# Pillow's fixed point: 8 bits of pixel and 2 of headroom leave 22 of the 32 for the weight.
_PRECISION = 22
_HALF = 1 << (_PRECISION - 1)


@njit(nogil=True, cache=True)
def _weights(size: int, out_size: int):
    """For each of out_size outputs over `size` inputs: the first input, how many, and their fixed-point weights."""
    step = size / out_size
    support = max(step, 1.0)
    most = math.ceil(support) * 2 + 1
    firsts = np.empty(out_size, np.int64)
    counts = np.empty(out_size, np.int64)
    weights = np.zeros((out_size, most), np.int32)
    row = np.empty(most, np.float64)
    for i in range(out_size):
        center = (i + 0.5) * step
        first = max(int(center - support + 0.5), 0)
        last = min(int(center + support + 0.5), size)
        total = 0.0
        for k in range(last - first):
            row[k] = max(1.0 - abs((k + first - center + 0.5) / support), 0.0)
            total += row[k]
        for k in range(last - first):
            weights[i, k] = int(row[k] / total * (1 << _PRECISION) + 0.5)
        firsts[i] = first
        counts[i] = last - first
    return firsts, counts, weights


@njit(nogil=True, cache=True)
def crop_resize(
    image: NDArray[np.uint8], top: int, left: int, height: int, width: int, flip: bool, out: NDArray[np.uint8]
) -> None:
    """Writes the box (pixels) of image [H, W, 3] into out [R, R, 3], resized, and mirrored where flip is set.

    The filter sees nothing outside the box. The box must lie within the image.
    """
    resolution = out.shape[0]
    x_firsts, x_counts, x_weights = _weights(width, resolution)
    y_firsts, y_counts, y_weights = _weights(height, resolution)
    rows = np.empty((height, resolution * 3), np.uint8)
    for y in range(height):
        line = image[top + y]
        for x in range(resolution):
            red, green, blue = _HALF, _HALF, _HALF
            base = left + x_firsts[x]
            for k in range(x_counts[x]):
                weight = x_weights[x, k]
                red += line[base + k, 0] * weight
                green += line[base + k, 1] * weight
                blue += line[base + k, 2] * weight
            place = (resolution - 1 - x if flip else x) * 3
            rows[y, place] = red >> _PRECISION
            rows[y, place + 1] = green >> _PRECISION
            rows[y, place + 2] = blue >> _PRECISION
    sums = np.empty(resolution * 3, np.int32)
    for y in range(resolution):
        sums[:] = _HALF
        for k in range(y_counts[y]):
            weight = y_weights[y, k]
            line = rows[y_firsts[y] + k]
            for i in range(resolution * 3):
                sums[i] += line[i] * weight
        target = out[y].reshape(resolution * 3)
        for i in range(resolution * 3):
            target[i] = sums[i] >> _PRECISION
