"""Restart-grid JPEGs: encode one, cut a box out of its bytes.

A restart marker resets the state of a JPEG's entropy coding, so the bytes between two markers, a segment, can be moved.
With a restart interval that divides the MCUs (16x16 pixels) of a row, the segments form a grid of tiles, and the JPEG
of a tile-aligned region is: the headers with height and width patched, the region's segments, the markers renumbered.
The lengths of the segments are in an APP9 segment of the file, so no search is needed.

Any JPEG decoder reads the whole image; from a cut, it decodes that part of it, with the same pixels.
"""

import io
from typing import NamedTuple

import numpy as np
from numba import njit
from numpy.typing import NDArray
from PIL import Image

MCU = 16
_NAME = b"tiles\0"
# Segment lengths are 16-bit numbers in one APP segment, whose own length is also 16 bits.
_MOST_TILES = 32_000
# The grid, lengths included, costs less than this share of the bytes; otherwise it is made coarser, or omitted.
_OVERHEAD = 0.03
# Measured cost of a tile: its marker, padding of its last byte, a DC coefficient without prediction, its length.
_TILE_BYTES = 5.7

_SOI, _EOI, _SOS, _DQT, _DRI, _APP9, _APP14, _RST0 = 0xD8, 0xD9, 0xDA, 0xDB, 0xDD, 0xE9, 0xEE, 0xD0


def encode(image: Image.Image, quality: int) -> bytes:
    """An RGB image as baseline 4:2:0 JPEG with a restart grid; plain if any grid costs over 3 % of the bytes."""
    plain = _jpeg(image, quality)
    columns, rows = -(-image.width // MCU), -(-image.height // MCU)
    for tile_columns in range(min(2, columns), columns + 1):
        tiles = rows * columns // tile_columns
        if columns % tile_columns or tiles > _MOST_TILES or tiles * _TILE_BYTES > _OVERHEAD * len(plain):
            continue
        gridded = _with_lengths(_jpeg(image, quality, restart_marker_blocks=tile_columns))
        if gridded and len(gridded) < (1 + _OVERHEAD) * len(plain):
            return gridded
    return plain


def _jpeg(image: Image.Image, quality: int, **options: int) -> bytes:
    buffer = io.BytesIO()
    # An empty comment, because Pillow would copy that of the original.
    image.save(buffer, "JPEG", quality=quality, subsampling="4:2:0", comment=b"", **options)
    return buffer.getvalue()


def _with_lengths(jpeg: bytes) -> bytes | None:
    """The same JPEG with its segments' lengths in an APP9 segment; None if one is too long for 16 bits."""
    array = np.frombuffer(jpeg, np.uint8)
    found = layout(array)
    data = array[found.scan : -2]
    marks = np.flatnonzero((data[:-1] == 0xFF) & (data[1:] >= _RST0) & (data[1:] < _RST0 + 8))
    lengths = np.diff(np.concatenate([[-2], marks, [len(data)]])) - 2
    if lengths.max() > 0xFFFF:
        return None
    table = _NAME + lengths.astype(">u2").tobytes()
    segment = bytes([0xFF, _APP9]) + (len(table) + 2).to_bytes(2, "big") + table
    # In front of the frame header; JFIF requires its own APP0 to come first.
    at = found.frame
    return jpeg[:at] + segment + jpeg[at:]


class Layout(NamedTuple):
    """Where the parts of a JPEG begin, in bytes, and the contents of its headers.

    frame: of SOF's marker (0: not a JPEG that this code can read). height, width: pixels. subsampled: three planes,
    chroma halved both ways (4:2:0). interval: MCUs between restart markers, or 0. lengths: of the first of `tiles`
    segment lengths, table: of the marker of the APP segment that holds them, scan: of the entropy-coded bytes.
    """

    frame: int
    height: int
    width: int
    subsampled: bool
    interval: int
    table: int
    lengths: int
    tiles: int
    scan: int


class Taken(NamedTuple):
    """The part of an image that a box needs, as written to a buffer by `take`.

    wrong: what is wrong with the image, or 0; height and width are then those of its headers. size: bytes of the JPEG
    or, for raw images, of the box's pixels. top, left, height, width: the part of the image that these are, in pixels.
    subsampled: see Layout.
    """

    wrong: int
    size: int
    top: int
    left: int
    height: int
    width: int
    subsampled: bool


# Errors found by `take`.
NO_JPEG, OTHER_SIZE, BROKEN_TILES = 1, 2, 3


class Region(NamedTuple):
    """A part of an image, in pixels, and the bytes of its JPEG in the buffer given; size 0: the image's own bytes."""

    size: int
    top: int
    left: int
    height: int
    width: int


@njit(nogil=True, cache=True)
def layout(jpeg: NDArray[np.uint8]) -> Layout:
    """Reads the headers of a JPEG, uint8 [n]; frame is 0 if they are damaged. Nothing beyond n is read."""
    n = len(jpeg)
    frame, height, width, interval, table, lengths, tiles = 0, 0, 0, 0, 0, 0, 0
    subsampled, adobe = False, False
    i = 2
    while i + 4 <= n and jpeg[i] == 0xFF:
        marker = jpeg[i + 1]
        # As libjpeg, since both must read the same size: FF may be repeated, and these markers have no length.
        if marker == 0xFF:
            i += 1
            continue
        if marker < 0xC0 or _RST0 <= marker <= _EOI:
            break
        length = (np.int64(jpeg[i + 2]) << 8) + jpeg[i + 3]
        end = i + 2 + length
        if length < 2 or end > n:
            break
        # SOF0 to SOF2: baseline, extended, progressive.
        if 0xC0 <= marker <= 0xC2 and length >= 8:
            frame = i
            height = (np.int64(jpeg[i + 5]) << 8) + jpeg[i + 6]
            width = (np.int64(jpeg[i + 7]) << 8) + jpeg[i + 8]
            subsampled = (
                length == 17
                and (jpeg[i + 9] == 3 and jpeg[i + 10] == 1 and jpeg[i + 13] == 2 and jpeg[i + 16] == 3)
                and (jpeg[i + 11] == 0x22 and jpeg[i + 14] == 0x11 and jpeg[i + 17] == 0x11)
            )
        elif marker == _DRI and length == 4:
            interval = (np.int64(jpeg[i + 4]) << 8) + jpeg[i + 5]
        elif marker == _APP14:
            adobe = True
        elif marker == _APP9 and length > 8:
            named = True
            for k in range(6):
                named = named and jpeg[i + 4 + k] == _NAME[k]
            if named:
                table, lengths, tiles = i, i + 10, (length - 8) // 2
        elif marker == _SOS:
            return Layout(frame, height, width, subsampled and not adobe, interval, table, lengths, tiles, end)
        i = end
    return Layout(0, 0, 0, False, 0, 0, 0, 0, 0)


@njit(nogil=True, cache=True)
def cut(
    jpeg: NDArray[np.uint8],
    found: Layout,
    top: int,
    left: int,
    height: int,
    width: int,
    out: NDArray[np.uint8],
) -> Region:
    """Writes the JPEG of the tiles that a box (pixels) needs to out, which must be as long as jpeg, uint8 [n].

    The region includes one pixel around the box: the decoder's chroma upsampling reads that far. It is the whole image,
    of size 0, if there is no grid; its size is -1 if the grid is damaged.
    """
    whole = Region(0, 0, 0, found.height, found.width)
    if found.tiles == 0 or found.interval == 0:
        return whole
    columns, rows = (found.width + MCU - 1) // MCU, (found.height + MCU - 1) // MCU
    damaged = Region(-1, 0, 0, 0, 0)
    across = columns // found.interval
    if columns % found.interval or across * rows != found.tiles:
        return damaged
    tile_width = found.interval * MCU
    first_row, last_row = max(top - 1, 0) // MCU, min(top + height, found.height - 1) // MCU
    first_tile, last_tile = max(left - 1, 0) // tile_width, min(left + width, found.width - 1) // tile_width
    if first_row == 0 and last_row == rows - 1 and first_tile == 0 and last_tile == across - 1:
        return whole
    part_top, part_left = first_row * MCU, first_tile * tile_width
    part_height = min((last_row + 1) * MCU, found.height) - part_top
    part_width = min((last_tile + 1) * tile_width, found.width) - part_left

    # The headers, without the table of the whole image's lengths.
    table_end = found.lengths + found.tiles * 2
    size = found.table
    out[:size] = jpeg[:size]
    frame = found.frame if found.frame < found.table else found.frame - (table_end - found.table)
    rest = found.scan - table_end
    out[size : size + rest] = jpeg[table_end : found.scan]
    size += rest
    out[frame + 5], out[frame + 6] = part_height >> 8, part_height & 255
    out[frame + 7], out[frame + 8] = part_width >> 8, part_width & 255

    # Read once, since they are checked and then used, and another process may write to the file that jpeg is mapped
    # from.
    lengths = np.empty(last_row * across + last_tile + 1, np.int64)
    for tile in range(len(lengths)):
        at = found.lengths + tile * 2
        lengths[tile] = (np.int64(jpeg[at]) << 8) + jpeg[at + 1]

    # The tiles of a row are contiguous in the file, so a row is copied at once; then its markers are renumbered.
    place, marks, run = found.scan, 0, 0
    for tile in range(len(lengths)):
        end = place + lengths[tile]
        if end + 2 > len(jpeg):
            return damaged
        column = tile % across
        if tile >= first_row * across and first_tile <= column <= last_tile:
            expected = _EOI if tile == found.tiles - 1 else _RST0 + tile % 8
            if jpeg[end] != 0xFF or jpeg[end + 1] != expected:
                return damaged
            if column == first_tile:
                run = place
            if column == last_tile:
                # A loop becomes a block copy; a slice assignment would go byte by byte.
                source, target = jpeg[run : end + 2], out[size:]
                for k in range(len(source)):
                    target[k] = source[k]
                for k in range(tile - last_tile + first_tile, tile + 1):
                    size += lengths[k] + 2
                    out[size - 1] = _RST0 + marks % 8
                    marks += 1
        place = end + 2
    out[size - 1] = _EOI
    return Region(size, part_top, part_left, part_height, part_width)


@njit(nogil=True, cache=True)
def take(
    stored: NDArray[np.uint8],
    size: NDArray[np.int32],
    box: NDArray[np.int64],
    out: NDArray[np.uint8],
) -> Taken:
    """Writes the part of a stored JPEG that a box needs, its tiles or all of it, to out, which must be as long.

    size: int [2], the height and width that the image should have. box: int64 [4] (top, left, height, width).
    Headers are read again from out, since another process may write to the file that stored is mapped from.
    """
    found = layout(stored)
    if found.frame == 0:
        return Taken(NO_JPEG, 0, 0, 0, 0, 0, False)
    if found.height != size[0] or found.width != size[1]:
        return Taken(OTHER_SIZE, 0, 0, 0, found.height, found.width, False)
    region = Region(0, 0, 0, found.height, found.width)
    if found.subsampled:
        region = cut(stored, found, int(box[0]), int(box[1]), int(box[2]), int(box[3]), out)
        if region.size < 0:
            return Taken(BROKEN_TILES, 0, 0, 0, 0, 0, False)
    length = region.size
    if length == 0:
        length = len(stored)
        # A loop becomes a block copy; a slice assignment would go byte by byte.
        for k in range(length):
            out[k] = stored[k]
    again = layout(out[:length])
    if again.height != region.height or again.width != region.width or again.subsampled != found.subsampled:
        return Taken(NO_JPEG, 0, 0, 0, 0, 0, False)
    return Taken(0, length, region.top, region.left, region.height, region.width, found.subsampled)


@njit(nogil=True, cache=True)
def take_all(
    file: NDArray[np.uint8],
    starts: NDArray[np.int64],
    lengths: NDArray[np.int64],
    sizes: NDArray[np.int32],
    raw: NDArray[np.bool_],
    boxes: NDArray[np.int64],
    out: NDArray[np.uint8],
    places: NDArray[np.int64],
) -> tuple[int, Taken]:
    """Copies the parts of n images of a file that the boxes int64 [n, 4] need, one after the other, to out, uint8.

    starts, lengths: int64 [n], of each image's bytes in the file; out must have space for all of them. sizes: int [n,
    2]. raw: bool [n]; the box's pixels are copied from raw images. places: int64 [n, 4], is filled with begin and end
    in out, and top and left in the image, of each part.
    Returns the index of the first damaged image and what is wrong with it; otherwise -1.
    """
    at = 0
    taken = Taken(0, 0, 0, 0, 0, 0, False)
    for i in range(len(starts)):
        stored = file[starts[i] : starts[i] + lengths[i]]
        if raw[i]:
            top, left, height = int(boxes[i, 0]), int(boxes[i, 1]), int(boxes[i, 2])
            row = int(boxes[i, 3]) * 3
            for y in range(height):
                begin = ((top + y) * sizes[i, 1] + left) * 3
                source, target = stored[begin : begin + row], out[at + y * row :]
                for k in range(len(source)):
                    target[k] = source[k]
            taken = Taken(0, height * row, top, left, height, row // 3, False)
        else:
            taken = take(stored, sizes[i], boxes[i], out[at:])
            if taken.wrong:
                return i, taken
        places[i, 0], places[i, 1] = at, at + taken.size
        places[i, 2], places[i, 3] = taken.top, taken.left
        at += taken.size
    return -1, taken
