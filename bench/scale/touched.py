"""Finds the bytes of a stored file that a crop is made from, without making the crop.

The functions on crops return int64 [k, 2], the begin and end offsets of contiguous runs in the file, in order. They
take a `box` (top, left, height, width) of image `index` in pixels. Headers of JPEGs are included.
"""

import numpy as np
from numpy.typing import NDArray

from data import tiles
from data.beton import Beton
from data.blocks import BLOCK_BYTES, across, around
from kernels.sample_blocks import rows_read


def whole(beton: Beton, index: int, box: NDArray[np.integer]) -> NDArray[np.int64]:
    """Returns all bytes of the image, which a full decode reads, and also verifying its checksum at the first use."""
    start = beton.starts[index]
    return np.array([[start, start + beton.lengths[index]]])


def tiles_read(beton: Beton, index: int, box: NDArray[np.integer]) -> NDArray[np.int64]:
    """Returns the headers of a JPEG and the tiles that the box needs; the whole JPEG if it has no tiles."""
    stored = beton.encoded(index)
    found = tiles.layout(stored)
    top, left, height, width = map(int, box)
    region = tiles.cut(stored, found, top, left, height, width, np.empty(len(stored), np.uint8))
    if not found.subsampled or not region.size:
        return whole(beton, index, box)
    lengths = stored[found.lengths : found.lengths + 2 * found.tiles].view(">u2").astype(np.int64) + 2
    ends = found.scan + lengths.cumsum()
    tile_width = found.interval * tiles.MCU
    row, rows = region.top // tiles.MCU, -(-region.height // tiles.MCU)
    column, columns = region.left // tile_width, -(-region.width // tile_width)
    firsts = np.arange(row, row + rows) * (-(-found.width // tile_width)) + column
    runs = np.stack([ends[firsts] - lengths[firsts], ends[firsts + columns - 1]], axis=1)
    return beton.starts[index] + np.concatenate([[[0, found.scan]], runs])


def blocks_read(beton: Beton, index: int, box: NDArray[np.integer]) -> NDArray[np.int64]:
    """Returns the blocks that the CPU path decodes for a box: part of each row of blocks, in three planes."""
    height, width = map(int, beton.sizes[index])
    part = around(height, width, *map(int, box))
    runs = []
    windows = (part.luma, part.chroma, part.chroma)
    for window, (start, columns, _) in zip(windows, _planes(height, width), strict=True):
        firsts = start + np.arange(window.row, window.row + window.rows) * columns + window.column
        runs.append(np.stack([firsts, firsts + window.columns], axis=1))
    return beton.starts[index] + np.concatenate(runs) * BLOCK_BYTES


def rows_of_blocks_read(beton: Beton, index: int, box: NDArray[np.integer]) -> NDArray[np.int64]:
    """Returns the rows of blocks that are gathered for a GPU if the set does not fit into its memory."""
    height, width = map(int, beton.sizes[index])
    firsts, lasts = (found[0] for found in rows_read(np.asarray(box)[None]))
    of_plane = (0, 1, 1)  # luma, and twice chroma
    runs = [
        (start + columns * firsts[kind], start + columns * min(lasts[kind], rows))
        for kind, (start, columns, rows) in zip(of_plane, _planes(height, width), strict=True)
    ]
    return beton.starts[index] + np.array(runs, np.int64) * BLOCK_BYTES


def units(runs: NDArray[np.int64], size: int) -> NDArray[np.int64]:
    """Returns the indices of the units of `size` bytes that contain these runs, sorted and distinct: int64 [m]."""
    return np.unique(np.concatenate([np.arange(first // size, (end - 1) // size + 1) for first, end in runs]))


def reads(found: NDArray[np.int64]) -> int:
    """Returns the number of runs of adjacent units, which is the smallest number of reads."""
    return 1 + int((np.diff(found) > 1).sum())


def _planes(height: int, width: int) -> list[tuple[int, int, int]]:
    """Returns for Y, Cb and Cr the index of the first block, the blocks per row, and the number of rows."""
    luma = across(width), across(height)
    chroma = across((width + 1) // 2), across((height + 1) // 2)
    second = luma[0] * luma[1]
    return [(0, *luma), (second, *chroma), (second + chroma[0] * chroma[1], *chroma)]
