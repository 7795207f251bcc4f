"""Crop, resize, flip and convert to RGB in compiled code: the antialiased triangle filter of Pillow's BILINEAR.

A crop is made in bands of 32 rows: resized along y, transposed, resized along x as if that were y again, so that every
step works on 32 neighbouring numbers. A JPEG's planes are resized before they become RGB, which leaves far fewer pixels
to convert, and chroma is never enlarged to full size: its weights are the triangle filter's after those of libjpeg's
"fancy" chroma upsampling (3/4 of the nearer sample, 1/4 of the further one), two linear maps in one.

All arithmetic is in integers, so the same bytes come out on every machine; weights of 14 bits do for reductions up to
some hundredfold. Against Pillow on the decoded image, which
rounds to bytes between its two passes and where libjpeg converts to RGB, values differ by 1 now and then; in
saturated colours, which libjpeg clips before the resize and this after it, they can differ by more.
"""

import math

import numpy as np
from numba import njit
from numpy.typing import NDArray

from data.lanes import LANES, colour, join, mix, weave

# Weights have 14 bits after the point, what lies between the two passes has 6: products stay within 32 bits.
_ONE = 1 << 14

# BT.601, full range, as JFIF has it, with 14 bits after the point: Cr to red, Cb and Cr from green, Cb to blue.
_FACTORS = (22970, 5638, 11700, 29032)


@njit(nogil=True)
def _taps(size: int, resolution: int, flip: bool):
    """The triangle filter from `size` inputs to `resolution` outputs: first input, number, weights of each output.

    firsts, counts: int64 [R]. weights: float64 [R, most], summing to 1. flip reverses the outputs.
    """
    step = size / resolution
    support = max(step, 1.0)
    most = math.ceil(support) * 2 + 1
    firsts = np.empty(resolution, np.int64)
    counts = np.empty(resolution, np.int64)
    weights = np.zeros((resolution, most), np.float64)
    for output in range(resolution):
        i = resolution - 1 - output if flip else output
        center = (output + 0.5) * step
        first = max(int(center - support + 0.5), 0)
        last = min(int(center + support + 0.5), size)
        total = 0.0
        for k in range(last - first):
            weight = max(1.0 - abs((k + first - center + 0.5) / support), 0.0)
            weights[i, k] = weight
            total += weight
        for k in range(last - first):
            weights[i, k] /= total
        firsts[i] = first
        counts[i] = last - first
    return firsts, counts, weights


@njit(nogil=True)
def _chroma_taps(firsts, counts, weights, start: int, origin: int, length: int):
    """The same filter over a plane of half the size: the taps composed with libjpeg's upsampling.

    start: where the box begins, in full-size pixels of the image. origin: where the plane at hand begins, in its own
    pixels. length: pixels of the whole image's plane, beyond whose ends the last one is repeated.
    """
    chroma_firsts = np.empty_like(firsts)
    chroma_counts = np.empty_like(counts)
    chroma_weights = np.zeros((len(firsts), weights.shape[1] // 2 + 3), np.float64)
    for i in range(len(firsts)):
        lowest = max((start + firsts[i] - 1) >> 1, 0)
        highest = lowest
        for k in range(counts[i]):
            pixel = start + firsts[i] + k
            near = pixel >> 1
            far = min(max(near + (1 if pixel & 1 else -1), 0), length - 1)
            chroma_weights[i, near - lowest] += 0.75 * weights[i, k]
            chroma_weights[i, far - lowest] += 0.25 * weights[i, k]
            highest = max(highest, near, far)
        chroma_firsts[i] = lowest - origin
        chroma_counts[i] = highest - lowest + 1
    return chroma_firsts, chroma_counts, chroma_weights


@njit(nogil=True)
def _in_integers(counts, weights):
    """Weights int16 [R, most] of which each row sums to exactly _ONE: a flat colour stays what it is."""
    rounded = np.zeros(weights.shape, np.int16)
    for i in range(len(counts)):
        total, largest = 0, 0
        for k in range(counts[i]):
            weight = int(weights[i, k] * _ONE + 0.5)
            rounded[i, k] = weight
            total += weight
            if weight > rounded[i, largest]:
                largest = k
        rounded[i, largest] += _ONE - total
    return rounded


@njit(nogil=True)
def _resize_y(source, start: int, n: int, firsts, counts, weights, band: int, rows, words, transposed) -> None:
    """Resizes columns start..start+n-1 of source uint8 [H, W] along y: LANES rows from row `band` on, transposed.

    transposed: int16 [n * LANES], 6 bits after the point. rows: int16 and words: int64, room for what lies between.
    """
    stride = source.shape[1]
    flat = source.reshape(-1)
    most = weights.shape[1]
    flat_weights = weights.reshape(-1)
    width = max(n, LANES)
    for j in range(min(LANES, len(firsts) - band)):
        y = band + j
        place = firsts[y] * stride + start
        for x in range(0, n, LANES):
            # The last step begins earlier instead of reading beyond the end.
            x = max(min(x, n - LANES), 0)
            mix(flat, place + x, stride, counts[y], flat_weights, y * most, 8, rows, j * width + x)
    # Four rows travel as one 64-bit word: a quarter of the scattered stores. Packed apart, which vectorises.
    for four in range(LANES // 4):
        a = rows[four * 4 * width :]
        b, c, d = a[width:], a[2 * width :], a[3 * width :]
        packed = words[four * n :]
        for x in range(n):
            packed[x] = a[x] | np.int64(b[x]) << 16 | np.int64(c[x]) << 32 | np.int64(d[x]) << 48
    target = transposed.view(np.int64)
    for x in range(n):
        for four in range(LANES // 4):
            target[x * (LANES // 4) + four] = words[four * n + x]


@njit(nogil=True)
def _wide_enough(source, start: int, n: int):
    """source, and where its columns start..start+n-1 begin; copied if it might be read beyond its end."""
    if n >= LANES:
        return source, start
    wide = np.zeros((source.shape[0], LANES), np.uint8)
    wide[:, :n] = source[:, start : start + n]
    return wide, 0


@njit(nogil=True)
def _write_pixels(columns, x: int, words, y: int, resolution: int, out_bytes, out_words) -> None:
    """Rows y.. and columns x..x+7 of a crop, from columns int32 [8 * LANES], red in the lowest byte.

    out_bytes, out_words: the crop flat, as uint8 and as int64. words: room for int64 [3 * LANES].
    """
    rows = min(LANES, resolution - y)
    if resolution % 8:
        for j in range(min(8, resolution - x)):
            for i in range(rows):
                place = ((y + i) * resolution + x + j) * 3
                out_bytes[place] = columns[j * LANES + i]
                out_bytes[place + 1] = columns[j * LANES + i] >> 8
                out_bytes[place + 2] = columns[j * LANES + i] >> 16
        return
    # Eight pixels are three 64-bit words, and a word costs no more to store than a byte.
    weave(columns, words)
    stride = resolution // 8 * 3
    place = y * stride + x // 8 * 3
    for i in range(rows):
        out_words[place] = words[i]
        out_words[place + 1] = words[LANES + i]
        out_words[place + 2] = words[2 * LANES + i]
        place += stride


@njit(nogil=True)
def crop_resize(
    image: NDArray[np.uint8], top: int, left: int, height: int, width: int, flip: bool, out: NDArray[np.uint8]
) -> None:
    """Writes the box (pixels) of an RGB image uint8 [H, W, 3] into out uint8 [R, R, 3], resized, mirrored if flip.

    The filter sees nothing outside the box. The box must lie within the image; both arrays are C-contiguous.
    """
    resolution = out.shape[0]
    out_bytes = out.reshape(-1)
    out_words = out_bytes[: len(out_bytes) // 8 * 8].view(np.int64)
    y_firsts, y_counts, y_weights = _taps(height, resolution, False)
    x_firsts, x_counts, x_weights = _taps(width, resolution, flip)
    y_rounded, x_rounded = _in_integers(y_counts, y_weights), _in_integers(x_counts, x_weights)
    flat_weights, most = x_rounded.reshape(-1), x_rounded.shape[1]
    n = width * 3
    lines, start = _wide_enough(image.reshape(image.shape[0], image.shape[1] * 3)[top : top + height], left * 3, n)
    rows = np.zeros(LANES * max(n, LANES), np.int16)
    words = np.empty(max(n * LANES // 4, 3 * LANES), np.int64)
    transposed = np.empty(n * LANES, np.int16)
    colours = np.empty(3 * LANES, np.int16)
    columns = np.zeros(8 * LANES, np.int32)
    for band in range(0, resolution, LANES):
        _resize_y(lines, start, n, y_firsts, y_counts, y_rounded, band, rows, words, transposed)
        for x in range(resolution):
            for c in range(3):
                place = (x_firsts[x] * 3 + c) * LANES
                mix(transposed, place, 3 * LANES, x_counts[x], flat_weights, x * most, 20, colours, c * LANES)
            join(colours, columns, x % 8 * LANES)
            if x % 8 == 7 or x == resolution - 1:
                _write_pixels(columns, x // 8 * 8, words, band, resolution, out_bytes, out_words)


@njit(nogil=True)
def crop_resize_planes(
    luma: NDArray[np.uint8],
    cb: NDArray[np.uint8],
    cr: NDArray[np.uint8],
    origin_y: int,
    origin_x: int,
    image_height: int,
    image_width: int,
    top: int,
    left: int,
    height: int,
    width: int,
    flip: bool,
    out: NDArray[np.uint8],
) -> None:
    """The same from the planes of a 4:2:0 JPEG, or of a part of it: luma uint8 [h, w], cb and cr of half its size.

    origin_y, origin_x: where the part begins within the image (pixels, even). The part must hold the box and, where
    the image goes on, one pixel more on each side of it, for chroma's sake. All arrays are C-contiguous.
    """
    resolution = out.shape[0]
    out_bytes = out.reshape(-1)
    out_words = out_bytes[: len(out_bytes) // 8 * 8].view(np.int64)
    half_height, half_width = (image_height + 1) // 2, (image_width + 1) // 2
    half_left = max((left - 1) // 2, 0)
    half_n = min((left + width) // 2, half_width - 1) - half_left + 1

    y_firsts, y_counts, y_weights = _taps(height, resolution, False)
    half_y_firsts, half_y_counts, half_y_weights = _chroma_taps(
        y_firsts, y_counts, y_weights, top, origin_y // 2, half_height
    )
    y_firsts += top - origin_y
    y_rounded, half_y_rounded = _in_integers(y_counts, y_weights), _in_integers(half_y_counts, half_y_weights)

    x_firsts, x_counts, x_weights = _taps(width, resolution, flip)
    half_x_firsts, half_x_counts, half_x_weights = _chroma_taps(
        x_firsts, x_counts, x_weights, left, half_left, half_width
    )
    x_rounded, half_x_rounded = _in_integers(x_counts, x_weights), _in_integers(half_x_counts, half_x_weights)
    flat_weights, most = x_rounded.reshape(-1), x_rounded.shape[1]
    half_flat_weights, half_most = half_x_rounded.reshape(-1), half_x_rounded.shape[1]

    luma, start = _wide_enough(luma, left - origin_x, width)
    cb, half_start = _wide_enough(cb, half_left - origin_x // 2, half_n)
    cr, half_start = _wide_enough(cr, half_left - origin_x // 2, half_n)

    rows = np.zeros(LANES * max(width, half_n, LANES), np.int16)
    words = np.empty(max(max(width, half_n) * LANES // 4, 3 * LANES), np.int64)
    luma_t = np.empty(width * LANES, np.int16)
    cb_t = np.empty(half_n * LANES, np.int16)
    cr_t = np.empty(half_n * LANES, np.int16)
    light = np.empty(LANES, np.int16)
    blue_difference = np.empty(LANES, np.int16)
    red_difference = np.empty(LANES, np.int16)
    columns = np.zeros(8 * LANES, np.int32)
    for band in range(0, resolution, LANES):
        _resize_y(luma, start, width, y_firsts, y_counts, y_rounded, band, rows, words, luma_t)
        for plane, plane_t in ((cb, cb_t), (cr, cr_t)):
            _resize_y(
                plane, half_start, half_n, half_y_firsts, half_y_counts, half_y_rounded, band, rows, words, plane_t
            )
        for x in range(resolution):
            place, count, weights = half_x_firsts[x] * LANES, half_x_counts[x], x * half_most
            mix(luma_t, x_firsts[x] * LANES, LANES, x_counts[x], flat_weights, x * most, 14, light, 0)
            mix(cb_t, place, LANES, count, half_flat_weights, weights, 14, blue_difference, 0)
            mix(cr_t, place, LANES, count, half_flat_weights, weights, 14, red_difference, 0)
            colour(light, blue_difference, red_difference, _FACTORS, columns, x % 8 * LANES)
            if x % 8 == 7 or x == resolution - 1:
                _write_pixels(columns, x // 8 * 8, words, band, resolution, out_bytes, out_words)
