"""Crop, resize, flip and convert to RGB in compiled code, with the antialiased triangle filter of Pillow's BILINEAR.

A crop is made in bands of 32 rows: resized along y, transposed, and resized along x as if that were y again, so that
every operation works on 32 adjacent numbers. A JPEG's planes are resized before they are converted to RGB, so far fewer
pixels are converted, and chroma is never upsampled to full size: its weights combine the triangle filter with libjpeg's
"fancy" chroma upsampling (3/4 of the nearer sample, 1/4 of the further one), since both are linear.

All arithmetic on pixels is in integers, so the result is the same on every machine. Weights of 14 bits are precise
enough for reductions up to a few hundredfold. Pillow rounds to bytes between its two passes, and libjpeg does when it
converts to RGB, so compared with Pillow on the decoded image values sometimes differ by 1. In saturated colours, which
libjpeg clips before the resize and this code after it, they can differ by more.
"""

import math
from typing import NamedTuple

import numpy as np
from numba import njit
from numpy.typing import NDArray

from data.lanes import LANES, SQUARE, colour, join, mix, transpose, write_pixels

# Weights have 14 fractional bits, and values between the two passes have 6, so products fit in 32 bits.
_ONE = 1 << 14

# BT.601 in full range, as in JFIF, with 14 fractional bits: Cr to red, Cb and Cr from green, Cb to blue.
_FACTORS = (22970, 5638, 11700, 29032)


class Triangle(NamedTuple):
    """The triangle filter from `size` inputs to R outputs; see `_weight` for the weight of an input.

    firsts: float64 [R], the index of each output's first input. inputs: the number of inputs per output.
    centers: float64 [R], each output's position, in units of inputs. slope: of the triangle.
    scales: float64 [R], factors that make each output's weights sum to 1.
    """

    size: int
    inputs: int
    slope: float
    firsts: NDArray[np.float64]
    centers: NDArray[np.float64]
    scales: NDArray[np.float64]


class Taps(NamedTuple):
    """The inputs and weights of R outputs.

    firsts: int64 [R], the index of each output's first input. inputs: the number of inputs per output, the same for
    all, which keeps loops predictable; some weights are 0. weights: int16 [inputs * R], input-major.
    """

    firsts: NDArray[np.int64]
    inputs: int
    weights: NDArray[np.int16]


@njit(nogil=True, inline="always")
def _weight(place, size, center, slope):
    """The unscaled weight of the input at index `place` (float64); 0 outside 0..size-1."""
    weight = 1.0 - abs(place - center) * slope
    weight = weight if weight > 0.0 else 0.0
    return weight if (place >= 0.0) & (place < size) else 0.0


# The loops below are over outputs and do one thing each, so that they vectorise.


@njit(nogil=True, error_model="numpy")
def _triangle(size: int, resolution: int, flip: bool) -> Triangle:
    """Returns the filter from `size` inputs to `resolution` outputs, in reverse order if flip."""
    step = size / resolution
    support = max(step, 1.0)
    slope = 1 / support
    count = min(math.ceil(2 * support), size)
    firsts = np.empty(resolution, np.float64)
    centers = np.empty(resolution, np.float64)
    scales = np.zeros(resolution, np.float64)
    begin, step = (size - 0.5 * step - 0.5, -step) if flip else (0.5 * step - 0.5, step)
    last = float(size - count)
    for i in range(resolution):
        centers[i] = begin + step * i
        first = math.floor(centers[i] - support + 1)
        first = first if first > 0.0 else 0.0
        firsts[i] = first if first < last else last
    for k in range(count):
        for i in range(resolution):
            scales[i] += _weight(firsts[i] + k, size, centers[i], slope)
    for i in range(resolution):
        scales[i] = 1 / scales[i]
    return Triangle(size, count, slope, firsts, centers, scales)


@njit(nogil=True)
def _taps(triangle: Triangle, origin: int) -> Taps:
    """Returns the filter's taps for an array in which the filter's first input is at index `origin`."""
    resolution = len(triangle.firsts)
    firsts, centers, scales = triangle.firsts, triangle.centers, triangle.scales
    weights = np.empty(triangle.inputs * resolution, np.float64)
    for k in range(triangle.inputs):
        of = weights[k * resolution : (k + 1) * resolution]
        for i in range(resolution):
            of[i] = _weight(firsts[i] + k, triangle.size, centers[i], triangle.slope) * scales[i]
    return Taps(firsts.astype(np.int64) + origin, triangle.inputs, _in_integers(weights, resolution))


@njit(nogil=True)
def _chroma_taps(triangle: Triangle, start: int, origin: int, length: int) -> Taps:
    """Returns the taps of the same filter on a plane of half the size, composed with libjpeg's upsampling.

    start: first pixel of the box, in full-size pixels of the image. origin: first pixel of the array, in pixels of the
    plane. length: pixels of the whole image's plane, whose last pixel is repeated beyond its end.
    """
    resolution = len(triangle.firsts)
    centers, scales, slope, size = triangle.centers, triangle.scales, triangle.slope, triangle.size
    lowest = max((start - 1) >> 1, 0)
    highest = min((start + size) >> 1, length - 1)
    count = min((triangle.inputs + 2) // 2 + 1, highest - lowest + 1)
    firsts = np.empty(resolution, np.float64)
    for i in range(resolution):
        first = math.floor((start + triangle.firsts[i] - 1) * 0.5)
        first = first if first > lowest else float(lowest)
        firsts[i] = first if first < highest - count + 1 else float(highest - count + 1)
    weights = np.empty(count * resolution, np.float64)
    for k in range(count):
        of = weights[k * resolution : (k + 1) * resolution]
        for i in range(resolution):
            # A sample is the nearer one of two pixels and the further one of their neighbours; at an end of the plane,
            # one of the two pixels takes the place of the missing neighbour.
            pixel = 2 * (firsts[i] + k)
            before = pixel - 1 if pixel > 0.0 else 0.0
            after = pixel + 2 if pixel + 2 < 2.0 * length else 2.0 * length - 1
            near = _weight(pixel - start, size, centers[i], slope) + _weight(pixel + 1 - start, size, centers[i], slope)
            far = _weight(before - start, size, centers[i], slope) + _weight(after - start, size, centers[i], slope)
            of[i] = (0.75 * near + 0.25 * far) * scales[i]
    return Taps(firsts.astype(np.int64) - origin, count, _in_integers(weights, resolution))


@njit(nogil=True)
def _in_integers(weights, resolution: int):
    """Returns weights, int16 [inputs * R], that sum to exactly _ONE for each output, so flat colours do not change."""
    # Differences of rounded cumulative sums, so that rounding errors do not add up.
    for i in range(resolution, len(weights)):
        weights[i] += weights[i - resolution]
    rounded = np.empty(len(weights), np.int16)
    for i in range(resolution):
        rounded[i] = np.int32(math.floor(weights[i] * _ONE + 0.5))
    later, upto, before = rounded[resolution:], weights[resolution:], weights[: len(weights) - resolution]
    for i in range(len(later)):
        later[i] = np.int32(math.floor(upto[i] * _ONE + 0.5) - math.floor(before[i] * _ONE + 0.5))
    return rounded


@njit(nogil=True)
def _resize_y(source, start: int, n: int, taps: Taps, band: int, tile, transposed) -> None:
    """Resizes columns start..start+n-1 of source, uint8 [H, W], along y: LANES rows from row `band` on, transposed.

    transposed: int16 [max(n, LANES) * LANES], 6 fractional bits. tile: a buffer, int16 [LANES * LANES].
    """
    stride = source.shape[1]
    flat = source.reshape(-1)
    resolution = len(taps.firsts)
    for x in range(0, n, LANES):
        # The last step starts earlier instead of reading beyond the end.
        x = max(min(x, n - LANES), 0)
        for j in range(min(LANES, resolution)):
            place = taps.firsts[band + j] * stride + start + x
            mix(flat, place, stride, taps.inputs, taps.weights, band + j, resolution, 8, tile, j * LANES)
        transpose(tile, 0, LANES, transposed, x * LANES)


@njit(nogil=True)
def _wide_enough(source, start: int, n: int):
    """Returns source and `start`, or a padded copy of columns start..start+n-1 and 0 if there are fewer than LANES."""
    if n >= LANES:
        return source, start
    wide = np.zeros((source.shape[0], LANES), np.uint8)
    # Loops, since compiling a slice assignment takes seconds.
    for y in range(source.shape[0]):
        for x in range(n):
            wide[y, x] = source[y, start + x]
    return wide, 0


@njit(nogil=True)
def _write_pixels(columns, x: int, y: int, resolution: int, out) -> None:
    """Writes up to LANES rows from row y, and SQUARE columns from column x, of a crop.

    columns: int32 [SQUARE * LANES], red in the lowest byte. out: the flat crop, uint8.
    """
    if resolution >= LANES:
        for i in range(0, LANES, SQUARE):
            write_pixels(columns, i, out, ((y + i) * resolution + x) * 3, resolution * 3)
        return
    for j in range(min(SQUARE, resolution)):
        for i in range(resolution):
            place = ((y + i) * resolution + x + j) * 3
            out[place] = columns[j * LANES + i]
            out[place + 1] = columns[j * LANES + i] >> 8
            out[place + 2] = columns[j * LANES + i] >> 16


@njit(nogil=True)
def crop_resize(
    image: NDArray[np.uint8], top: int, left: int, height: int, width: int, flip: bool, out: NDArray[np.uint8]
) -> None:
    """Writes the box (pixels) of an RGB image, uint8 [H, W, 3], to out, uint8 [R, R, 3], resized, mirrored if flip.

    The filter reads nothing outside the box. The box must be inside the image; both arrays must be C-contiguous.
    """
    resolution = out.shape[0]
    flat_out = out.reshape(-1)
    y_taps = _taps(_triangle(height, resolution, False), 0)
    x_taps = _taps(_triangle(width, resolution, flip), 0)
    n = width * 3
    lines, start = _wide_enough(image.reshape(image.shape[0], image.shape[1] * 3)[top : top + height], left * 3, n)
    tile = np.zeros(LANES * LANES, np.int16)
    transposed = np.empty(max(n, LANES) * LANES, np.int16)
    colours = np.empty(3 * LANES, np.int16)
    columns = np.zeros(SQUARE * LANES, np.int32)
    for y in range(0, resolution, LANES):
        # The last bands and squares start earlier instead of ending beyond the crop.
        y = max(min(y, resolution - LANES), 0)
        _resize_y(lines, start, n, y_taps, y, tile, transposed)
        for x in range(0, resolution, SQUARE):
            x = max(min(x, resolution - SQUARE), 0)
            for j in range(min(SQUARE, resolution)):
                for c in range(3):
                    place = (x_taps.firsts[x + j] * 3 + c) * LANES
                    mix(
                        transposed,
                        place,
                        3 * LANES,
                        x_taps.inputs,
                        x_taps.weights,
                        x + j,
                        resolution,
                        20,
                        colours,
                        c * LANES,
                    )
                join(colours, columns, j * LANES)
            _write_pixels(columns, x, y, resolution, flat_out)


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
    """As crop_resize, from the planes of a 4:2:0 JPEG or a part of it: luma uint8 [h, w], cb and cr of half its size.

    origin_y, origin_x: position of the part in the image (pixels, even). The part must contain the box and, except at
    the image's edges, one more pixel on each side, which chroma needs. All arrays must be C-contiguous.
    """
    resolution = out.shape[0]
    flat_out = out.reshape(-1)
    half_height, half_width = (image_height + 1) // 2, (image_width + 1) // 2
    half_left = max((left - 1) // 2, 0)
    half_n = min((left + width) // 2, half_width - 1) - half_left + 1

    y_triangle, x_triangle = _triangle(height, resolution, False), _triangle(width, resolution, flip)
    y_taps, x_taps = _taps(y_triangle, top - origin_y), _taps(x_triangle, 0)
    half_y_taps = _chroma_taps(y_triangle, top, origin_y // 2, half_height)
    half_x_taps = _chroma_taps(x_triangle, left, half_left, half_width)

    luma, start = _wide_enough(luma, left - origin_x, width)
    cb, half_start = _wide_enough(cb, half_left - origin_x // 2, half_n)
    cr, half_start = _wide_enough(cr, half_left - origin_x // 2, half_n)

    tile = np.zeros(LANES * LANES, np.int16)
    luma_t = np.empty(max(width, LANES) * LANES, np.int16)
    cb_t = np.empty(max(half_n, LANES) * LANES, np.int16)
    cr_t = np.empty(max(half_n, LANES) * LANES, np.int16)
    planes = (
        (luma, start, width, y_taps, luma_t),
        (cb, half_start, half_n, half_y_taps, cb_t),
        (cr, half_start, half_n, half_y_taps, cr_t),
    )
    light = np.empty(LANES, np.int16)
    blue_difference = np.empty(LANES, np.int16)
    red_difference = np.empty(LANES, np.int16)
    columns = np.zeros(SQUARE * LANES, np.int32)
    for y in range(0, resolution, LANES):
        y = max(min(y, resolution - LANES), 0)
        for plane, first, n, taps, transposed in planes:
            _resize_y(plane, first, n, taps, y, tile, transposed)
        for x in range(0, resolution, SQUARE):
            x = max(min(x, resolution - SQUARE), 0)
            for j in range(min(SQUARE, resolution)):
                i = x + j
                place, weights = x_taps.firsts[i] * LANES, x_taps.weights
                mix(luma_t, place, LANES, x_taps.inputs, weights, i, resolution, 14, light, 0)
                place, weights, count = half_x_taps.firsts[i] * LANES, half_x_taps.weights, half_x_taps.inputs
                mix(cb_t, place, LANES, count, weights, i, resolution, 14, blue_difference, 0)
                mix(cr_t, place, LANES, count, weights, i, resolution, 14, red_difference, 0)
                colour(light, blue_difference, red_difference, _FACTORS, columns, j * LANES)
            _write_pixels(columns, x, y, resolution, flat_out)
