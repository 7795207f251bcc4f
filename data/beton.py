"""The `.beton` file of FFCV 1.0.2, read and written with NumPy alone.

Layout: header, field descriptors, one metadata row per image, then pages of encoded bytes (an image never crosses a
page), and at the end the allocation table with offset and length of each image's bytes. Files written here hold the two
fields `image` (RGBImageField, type 2) and `label` (IntField, type 1), which is what stock FFCV image loaders expect.
Files of block storage (data/blocks.py) hold `bytes` (BytesField, type 3), `height`, `width` and `label` (IntField):
stock FFCV opens them too, and does not mistake blocks for pixels.

Files written here also have a seal, in a place that stock FFCV ignores: a CRC-32 of every image's bytes, and a digest
of the index and of these checksums. A damaged file raises an error that names it, instead of training on garbage: the
index is checked when the file is opened, an image's bytes when they are first used. Files of other writers have no seal
and are read without these checks.
"""

import contextlib
import hashlib
import mmap
import os
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from data import DataError, blocks
from data.pixels import JPEG_PIXELS_PER_BYTE

_VERSION = 2
PAGE_SIZE = 8 << 20
_HEADER = np.dtype(
    [
        ("version", "<u2"),
        ("num_fields", "<u2"),
        ("page_size", "<u4"),
        ("num_samples", "<u8"),
        ("alloc_table_ptr", "<u8"),
    ],
    align=True,
)
_FIELD = np.dtype([("type_id", "<u1"), ("name", "S16"), ("arguments", ("<u1", (1024,)))], align=True)
_ALLOCATION = np.dtype([("sample_id", "<u8"), ("ptr", "<u8"), ("size", "<u8")])
_IMAGE = np.dtype([("mode", "<u1"), ("width", "<u2"), ("height", "<u2"), ("data_ptr", "<u8")])
_BYTES = np.dtype([("data_ptr", "<u8"), ("size", "<u8")])
_FLOAT_FIELD, _INT_FIELD, _IMAGE_FIELD, _BYTES_FIELD = 0, 1, 2, 3
# Fields whose metadata row has a fixed type; files with any other kind of field are not supported.
_ROW_TYPES = {_FLOAT_FIELD: np.dtype("<f8"), _INT_FIELD: np.dtype("<i8"), _IMAGE_FIELD: _IMAGE, _BYTES_FIELD: _BYTES}
_JPEG, _RAW = 0, 1
# Name and type of the fields, in order, of images and of block storage.
_IMAGES = ((b"image", _IMAGE_FIELD), (b"label", _INT_FIELD))
_BLOCKS = ((b"bytes", _BYTES_FIELD), (b"height", _INT_FIELD), (b"width", _INT_FIELD), (b"label", _INT_FIELD))
_MOST_PIXELS = 65535
# In the arguments of the image or bytes field, which stock FFCV leaves empty and ignores. The version is ours.
_SEAL = np.dtype([("name", "S16"), ("checksums_ptr", "<u8"), ("digest", ("<u1", (32,)))])
_SEAL_NAME, _SEAL_START = b"label-refinery 1", b"label-refinery"


class Encoded(NamedTuple):
    """One image to be written: its bytes, height and width in pixels, and class id.

    data: a JPEG, or blocks, or if raw the RGB pixels row by row, height * width * 3 bytes.
    """

    data: bytes
    height: int
    width: int
    label: int
    raw: bool = False


class FileIdentity(NamedTuple):
    """Which file, and in which state. inode: with its device. size: in bytes. changed: time in ns."""

    inode: tuple[int, int]
    size: int
    changed: int


def identity_of(file: int | Path) -> FileIdentity:
    """Of an open file, by its descriptor, or of the one at a path. Raises OSError."""
    status = os.stat(file)
    return FileIdentity((status.st_dev, status.st_ino), status.st_size, status.st_mtime_ns)


class Beton:
    """A `.beton` opened for reading: sizes, labels and encoded bytes, without decoding anything.

    sizes: int32 [n, 2], height and width of each image in pixels. labels: int64 [n]. raw: bool [n], whether it is
    stored as pixels instead of JPEG.
    in_blocks: all images are stored as blocks (data/blocks.py).
    starts, lengths: int64 [n], where each image's bytes are. pages: int64 [n], the file page that holds each image.
    bytes: uint8, the whole file, mapped. fingerprint: hex digest of index and contents; of the index alone if the file
    has no seal, which still differs whenever an image was added, dropped, moved or encoded to another length.
    identity: of the file when it was opened. checksums: uint32 [n], CRC-32 of each image's bytes; None without a seal.
    Raises DataError when the file is missing, cut short, damaged, or of another format.

    A file that is removed, or replaced by another one, stays mapped as it was. Writes to the file itself are visible:
    an image's checksum is compared only once, and if the file has become shorter, reading an image that it no longer
    holds ends the process with SIGBUS. check_unchanged, which loaders call before each batch, detects such writes in
    time, unless batches that are being made are read at that moment or size and time have been restored.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        try:
            with open(self.path, "rb") as file:
                self.identity = identity_of(file.fileno())
                file_size = self.identity.size
                header, (image, label), self.in_blocks, allocations, seal, sealed = self._read_index(file, file_size)
                # Private: decoders that require writable buffers accept its views, and nothing is written to the file.
                # No memory is reserved for writes, so it may be larger than memory.
                flags = mmap.MAP_PRIVATE | getattr(mmap, "MAP_NORESERVE", 0x4000)
                mapped = mmap.mmap(file.fileno(), 0, flags=flags, prot=mmap.PROT_READ | mmap.PROT_WRITE)
        except OSError as error:
            raise DataError(f"{self.path}: cannot be opened ({error.strerror})") from None
        self.num_samples = len(label)
        if self.num_samples and max(image["height"].max(), image["width"].max()) > _MOST_PIXELS:
            raise self._broken(f"an image of more than {_MOST_PIXELS} pixels per side")
        self.sizes = np.stack([image["height"], image["width"]], axis=1).astype(np.int32)
        self.labels = label.astype(np.int64)
        if self.num_samples and (self.sizes.min() < 1 or self.labels.min() < 0):
            raise self._broken("an image without pixels or a negative class id")
        if self.num_samples and not self.in_blocks and image["mode"].max() > _RAW:
            raise self._broken("an image stored in an unknown way")

        self.lengths = self._lengths(image["data_ptr"], allocations, header["alloc_table_ptr"])
        self.starts = image["data_ptr"].astype(np.int64)
        self.raw = np.zeros(self.num_samples, np.bool_) if self.in_blocks else image["mode"] == _RAW
        if (self.lengths != self.sizes.prod(axis=1, dtype=np.int64) * 3)[self.raw].any():
            raise self._broken("a raw image of another size than the index says")
        if self.in_blocks and (self.lengths != blocks.size(*self.sizes.T.astype(np.int64))).any():
            raise self._broken("an image of another number of blocks than its size needs")
        # Before a decoder allocates memory for the size that a few bytes claim.
        claimed = self.sizes.prod(axis=1, dtype=np.int64) > self.lengths * JPEG_PIXELS_PER_BYTE
        if not self.in_blocks and (claimed := claimed & ~self.raw).any():
            image_number = int(claimed.argmax())
            height, width = self.sizes[image_number]
            raise self._broken(
                f"image {image_number} is {width}x{height} pixels by the index, which its {self.lengths[image_number]} "
                "bytes cannot hold"
            )
        self.pages = self.starts // int(header["page_size"])
        self.bytes = np.frombuffer(mapped, dtype=np.uint8)
        if seal is None:
            self.checksums = None
            digest = _digest(self.sizes, self.labels, self.starts, self.lengths, self.raw)
        else:
            self.checksums = self._verified_checksums(seal, sealed, file_size)
            digest = seal["digest"].tobytes()
        self.fingerprint = digest.hex()
        self._trusted = np.full(self.num_samples, self.checksums is None)

    def encoded(self, index: int) -> NDArray[np.uint8]:
        """The stored bytes of one image: uint8 [length], a view of the mapped file. Raises DataError if damaged."""
        start = self.starts[index]
        data = self.bytes[start : start + self.lengths[index]]
        if self.checksums is not None and not self._trusted[index]:
            if zlib.crc32(data.data) != self.checksums[index]:
                raise DataError(f"{self.path}: image {index} is damaged (its checksum differs); convert the set again")
            self._trusted[index] = True
        return data

    def check(self, indices: NDArray[np.int64]) -> None:
        """Compares the bytes of images not used before with their checksums. Raises DataError if damaged."""
        for index in indices[~self._trusted[indices]]:
            self.encoded(index)

    def check_unchanged(self) -> None:
        """Raises DataError if the open file has been written to since. Quick: reads nothing of the file itself."""
        try:
            now = identity_of(self.path)
        except FileNotFoundError:
            return
        except OSError as error:
            raise DataError(f"{self.path}: cannot be read any more ({error.strerror})") from None
        if now.inode == self.identity.inode and now != self.identity:
            raise DataError(f"{self.path}: was written to while it was in use; convert the set again")

    def _lengths(self, pointers: NDArray[np.uint64], allocations: NDArray, table: np.uint64) -> NDArray[np.int64]:
        """The length of the bytes that begin at each pointer; all must be before the allocation table."""
        # Column by column: with ImageNet's number of images, rows of the table and their copies take much memory.
        order = np.argsort(allocations["ptr"], kind="stable")
        places = allocations["ptr"][order]
        slots = np.minimum(np.searchsorted(places, pointers), max(len(places) - 1, 0))
        if len(pointers) and (places[slots] != pointers).any():
            raise self._broken("an image's bytes lie outside the file")
        lengths = allocations["size"][order[slots]]
        # Compared by differences, which cannot overflow.
        if ((pointers > table) | (lengths > table - np.minimum(pointers, table))).any():
            raise self._broken("an image's bytes lie outside the file")
        return lengths.astype(np.int64)

    def _verified_checksums(self, seal, index: tuple[NDArray, ...], file_size: int) -> NDArray[np.uint32]:
        """The images' checksums, after the digest of them and of the index has been verified."""
        start = int(seal["checksums_ptr"])
        if start + self.num_samples * 4 > file_size:
            raise self._broken("its seal is damaged")
        checksums = self.bytes[start : start + self.num_samples * 4].copy().view("<u4")
        if _digest(*index, checksums) != seal["digest"].tobytes():
            raise self._broken("its index is damaged")
        return checksums

    def _read_index(self, file: BinaryIO, file_size: int):
        """Header, image and label rows, allocations, the seal (or None), and what the seal's digest covers."""
        header = _read(file, _HEADER, 1)
        if header is None or header[0]["version"] != _VERSION:
            found = "cut short" if header is None else f"not FFCV version {_VERSION}"
            raise DataError(f"{self.path}: not a .beton file ({found}); convert the set again")
        header = header[0]
        fields = _read(file, _FIELD, int(header["num_fields"])) if header["num_fields"] <= 16 else None
        if fields is None or not header["page_size"] > 0:
            raise self._broken("its header is damaged or cut short")
        types = [int(field["type_id"]) for field in fields]
        in_blocks = tuple(zip(fields["name"].tolist(), types, strict=True)) == _BLOCKS
        of_images = set(types) <= {*_ROW_TYPES} - {_BYTES_FIELD} and {_IMAGE_FIELD, _INT_FIELD} <= set(types)
        if not of_images and not in_blocks:
            raise DataError(f"{self.path}: its fields are not one RGB image and one integer label, nor blocks")
        row_type = np.dtype([("", _ROW_TYPES[type_id]) for type_id in types], align=True)
        n, table = int(header["num_samples"]), int(header["alloc_table_ptr"])
        # Checked before reading, so that a damaged count never becomes a huge allocation.
        if file.tell() + n * row_type.itemsize > file_size:
            raise self._broken("it is cut short")
        rows = _read(file, row_type, n)
        if rows is None or table > file_size or (file_size - table) // _ALLOCATION.itemsize < n:
            raise self._broken("it is cut short")
        file.seek(table)
        allocations = _read(file, _ALLOCATION, (file_size - table) // _ALLOCATION.itemsize)
        if allocations is None:
            raise self._broken("it is cut short")
        place = types.index(_BYTES_FIELD if in_blocks else _IMAGE_FIELD)
        seal = fields["arguments"][place][: _SEAL.itemsize].copy().view(_SEAL)[0]
        if seal["name"] != _SEAL_NAME:
            if seal["name"].startswith(_SEAL_START):
                raise DataError(f"{self.path}: written by another version of label-refinery; convert the set again")
            seal = None
        names = row_type.names or ()
        if in_blocks:
            stored, height, width, label = (rows[name] for name in names)
            image: Any = {"data_ptr": stored["data_ptr"], "height": height, "width": width}
        else:
            image, label = (rows[names[types.index(kind)]] for kind in (_IMAGE_FIELD, _INT_FIELD))
        return header, (image, label), in_blocks, allocations, seal, (header, rows, allocations)

    def _broken(self, what: str) -> DataError:
        return DataError(f"{self.path}: {what}; convert the set again")


def _read(file, dtype: np.dtype, count: int) -> NDArray | None:
    """count records of dtype, or None if the file ends earlier."""
    data = file.read(dtype.itemsize * count)
    return np.frombuffer(data, dtype=dtype) if len(data) == dtype.itemsize * count else None


def _digest(*arrays: NDArray) -> bytes:
    digest = hashlib.sha256()
    for part in arrays:
        # Avoids a second copy in memory.
        digest.update(np.ascontiguousarray(part).view(np.uint8).data)
    return digest.digest()


def write_beton(path: str | Path, images: Iterable[Encoded], *, at_most: int, in_blocks: bool = False) -> int:
    """Writes images in the order given; the same images always give the same bytes. Returns how many there were.

    at_most: an upper bound of their number, which reserves space for the metadata in front of them. in_blocks: their
    data are blocks (data/blocks.py).
    Raises DataError when an image is larger than a page. On any error the half-written file is removed.
    """
    kinds = _BLOCKS if in_blocks else _IMAGES
    row_type = np.dtype([("", _ROW_TYPES[type_id]) for _, type_id in kinds], align=True)
    rows = np.zeros(at_most, dtype=row_type)
    allocations = np.zeros(at_most, dtype=_ALLOCATION)
    checksums = np.zeros(at_most, dtype="<u4")
    fields = np.zeros(len(kinds), dtype=_FIELD)
    fields["name"], fields["type_id"] = zip(*kinds, strict=True)
    rows_start = _HEADER.itemsize + fields.nbytes
    place = _next_page(rows_start + rows.nbytes)
    count = 0
    try:
        with open(path, "wb") as file:
            for image in images:
                size = len(image.data)
                if not 0 < size <= PAGE_SIZE:
                    raise DataError(f"image {count}: {size} bytes are none, or do not fit a page of {PAGE_SIZE}")
                if place % PAGE_SIZE + size > PAGE_SIZE:
                    place = _next_page(place)
                file.seek(place)
                file.write(image.data)
                if in_blocks:
                    rows[count] = (place, size), image.height, image.width, image.label
                else:
                    rows[count] = (_RAW if image.raw else _JPEG, image.width, image.height, place), image.label
                allocations[count] = count, place, size
                checksums[count] = zlib.crc32(image.data)
                place += size
                count += 1
            # The checksums follow the last image. FFCV maps whole pages, so that one is filled up, and expects the
            # allocation table to end the file.
            checksums_start = place
            table = _next_page(checksums_start + checksums[:count].nbytes)
            file.seek(checksums_start)
            file.write(checksums[:count].tobytes())
            file.truncate(table)
            file.seek(table)
            file.write(allocations[:count].tobytes())
            header = np.array([(_VERSION, len(fields), PAGE_SIZE, count, table)], dtype=_HEADER)[0]
            digest = _digest(header, rows[:count], allocations[:count], checksums[:count])
            seal = np.array([(_SEAL_NAME, checksums_start, np.frombuffer(digest, np.uint8))], dtype=_SEAL)
            fields["arguments"][0][: _SEAL.itemsize] = seal.view(np.uint8)
            file.seek(0)
            file.write(header.tobytes() + fields.tobytes() + rows[:count].tobytes())
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(path)
        raise
    return count


def _next_page(offset: int) -> int:
    return -(-offset // PAGE_SIZE) * PAGE_SIZE
