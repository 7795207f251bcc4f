"""Block storage: an image as 4x4 blocks of fixed size, so that any box is read without decoding anything else.

An image is three planes one after the other: Y, then Cb and Cr halved both ways (odd sizes rounded up), as JFIF defines
them. A plane is its blocks row by row, each of them BC4 (also called RGTC1 and ATI1), 8 bytes: endpoint 0, endpoint 1,
and 16 codes of 3 bits, little-endian, the first pixel in the lowest bits, rows first. Code 0 is endpoint 0, code 1 is
endpoint 1, and codes 2 to 7 are the six steps from the first to the second. Endpoint 0 is always above endpoint 1:
otherwise codes 6 and 7 would mean 0 and 255. Blocks that reach beyond a plane repeat its last row and column.
"""

import hashlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numba import njit
from numpy.typing import NDArray
from PIL import Image

from data import lanes
from data.lanes import EXPANDED, FITTED, expand_blocks, fit_blocks

SIDE = 4
BLOCK_BYTES = 8
# Expanded planes are at most this many pixels higher and wider than the image.
PADDING = SIDE * EXPANDED


def encode(image: Image.Image) -> bytes:
    """An RGB image as blocks; `size` returns how many bytes they take."""
    luma, cb, cr = image.convert("YCbCr").split()
    return b"".join(encode_plane(np.asarray(plane)).tobytes() for plane in (luma, cb.reduce(2), cr.reduce(2)))


def decode(stored: NDArray[np.uint8], height: int, width: int) -> NDArray[np.uint8]:
    """An image's pixels, uint8 [height, width, 3], from its blocks, uint8 [size]; chroma enlarged as by libjpeg."""
    part = around(height, width, 0, 0, height, width)
    room = np.empty((height + PADDING) * (width + PADDING) * 3, np.uint8)
    luma, *halves = expand_planes(stored, height, width, part, room)
    chroma = [Image.fromarray(half[: (height + 1) // 2, : (width + 1) // 2]) for half in halves]
    enlarged = [plane.resize((plane.width * 2, plane.height * 2), Image.Resampling.BILINEAR) for plane in chroma]
    bands = [plane.crop((0, 0, width, height)) for plane in (Image.fromarray(luma), *enlarged)]
    return np.asarray(Image.merge("YCbCr", bands).convert("RGB"))


def encode_plane(plane: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """A plane, uint8 [height, width], as blocks: uint8 [rows, columns * BLOCK_BYTES]."""
    height, width = plane.shape
    padding = ((0, -height % SIDE), (0, -width % (SIDE * FITTED)))
    words = _encode(np.pad(plane, padding, mode="edge"))[:, : -(-width // SIDE)]
    return np.ascontiguousarray(words, "<u8").view(np.uint8)


def decode_plane(blocks: NDArray[np.uint8], height: int, width: int) -> NDArray[np.uint8]:
    """A plane's pixels, uint8 [height, width], from its blocks, uint8 [rows, columns * BLOCK_BYTES]."""
    window = Window(0, across(height), 0, across(width))
    room = np.empty((height + PADDING) * (width + PADDING), np.uint8)
    return expand(np.ascontiguousarray(blocks).reshape(-1), window.columns, window, room)[:height, :width].copy()


def size(height, width):
    """Bytes of the blocks of images of these sizes in pixels (ints, or arrays of them)."""
    half_height, half_width = (height + 1) // 2, (width + 1) // 2
    return BLOCK_BYTES * (across(height) * across(width) + 2 * across(half_height) * across(half_width))


@njit(nogil=True)
def across(pixels):
    """The number of blocks that cover this many pixels."""
    return (pixels + SIDE - 1) // SIDE


class Window(NamedTuple):
    """Blocks of a plane: first row and number of rows, first column and number of columns."""

    row: int
    rows: int
    column: int
    columns: int


class Around(NamedTuple):
    """Where the blocks are that a box needs, in Y and in both Cb and Cr; both begin at the same point of the image."""

    luma: Window
    chroma: Window


@njit(nogil=True)
def around(height: int, width: int, top: int, left: int, box_height: int, box_width: int) -> Around:
    """The blocks that a box (pixels) of an image of height x width needs.

    Cb and Cr are needed one pixel beyond the box, because upsampling them reads that far.
    """
    row, column = max((top - 1) // 2, 0) // SIDE, max((left - 1) // 2, 0) // SIDE
    last_row = min((top + box_height) // 2, (height - 1) // 2) // SIDE
    last_column = min((left + box_width) // 2, (width - 1) // 2) // SIDE
    return Around(
        Window(2 * row, across(top + box_height) - 2 * row, 2 * column, across(left + box_width) - 2 * column),
        Window(row, last_row - row + 1, column, last_column - column + 1),
    )


@njit(nogil=True)
def expand_planes(stored: NDArray[np.uint8], height: int, width: int, part: Around, room: NDArray[np.uint8]):
    """Y, Cb and Cr of a part of an image, from its blocks, uint8 [size].

    room: uint8, at least 3 * (height + PADDING) * (width + PADDING). Returns views of it, uint8 [rows * SIDE, w], with
    w a multiple of EXPANDED blocks; values beyond the part's columns are undefined.
    """
    across_luma, across_chroma = across(width), across((width + 1) // 2)
    luma_bytes = across(height) * across_luma * BLOCK_BYTES
    chroma_bytes = across((height + 1) // 2) * across_chroma * BLOCK_BYTES
    luma = expand(stored[:luma_bytes], across_luma, part.luma, room)
    room = room[luma.size :]
    cb = expand(stored[luma_bytes : luma_bytes + chroma_bytes], across_chroma, part.chroma, room)
    cr = expand(stored[luma_bytes + chroma_bytes :], across_chroma, part.chroma, room[cb.size :])
    return luma, cb, cr


@njit(nogil=True)
def expand(blocks: NDArray[np.uint8], columns: int, window: Window, room: NDArray[np.uint8]):
    """A window of a plane from its blocks, uint8 [n], `columns` of them per row; see expand_planes."""
    whole, rest = window.columns // EXPANDED, window.columns % EXPANDED
    stride = (whole + (rest > 0)) * EXPANDED * SIDE
    used = room[: window.rows * SIDE * stride]
    last = np.zeros(EXPANDED * BLOCK_BYTES, np.uint8)
    for row in range(window.rows):
        start = ((window.row + row) * columns + window.column) * BLOCK_BYTES
        out = row * SIDE * stride
        for _ in range(whole):
            expand_blocks(blocks, start, used, out, stride)
            start += EXPANDED * BLOCK_BYTES
            out += EXPANDED * SIDE
        if rest:
            # From a copy, since the bytes may end with these blocks.
            for i in range(rest * BLOCK_BYTES):
                last[i] = blocks[start + i]
            expand_blocks(last, 0, used, out, stride)
    return used.reshape(window.rows * SIDE, stride)


def _compiled(sources: str):
    """The encoder, kept compiled on disk as long as `sources` and this file stay the same (as data.decoders.ffcv's)."""

    @njit(nogil=True, cache=True)
    def encode(plane):
        """The blocks, uint64 [rows, columns], of a plane whose sizes are multiples of SIDE and of SIDE * FITTED."""
        sources  # noqa: B018
        words = np.empty((plane.shape[0] // SIDE, plane.shape[1] // SIDE), np.uint64)
        pixels, flat = plane.reshape(-1), words.reshape(-1)
        for i in range(0, len(flat), FITTED):
            row, column = i // words.shape[1], i % words.shape[1]
            fit_blocks(pixels, row * SIDE * plane.shape[1] + column * SIDE, plane.shape[1], flat, i)
        return words

    return encode


_encode = _compiled(hashlib.sha256(Path(lanes.__file__).read_bytes()).hexdigest())
