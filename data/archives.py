"""Image files in zip and tar archives, with random access from any process.

A zip file and an uncompressed tar file are read in place. A compressed tar file can only be read sequentially, so it is
unpacked once, to one uncompressed temporary tar file. No member is ever written under its own name.

Archives may be built to fill memory or disk. No more of a zip member is inflated than the index declares, no file
larger than MOST_BYTES is read as an image, and unpacking a compressed tar stops if it grows more than images can.
"""

import bz2
import gzip
import hashlib
import io
import lzma
import os
import re
import shutil
import stat
import struct
import tarfile
import tempfile
import weakref
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple

from PIL import Image

from command import first_line
from data import DataError
from data.layouts import ANNOTATIONS
from data.pixels import EXTENSIONS, open_image

# An image file in an archive is read as a whole: at most the size of an uncompressed RGB image at which Pillow starts
# to warn, about 9,500 x 9,500 pixels.
MOST_BYTES = 256 << 20
# An unpacked tar takes at most this many times the bytes of the compressed one, or _UNPACKED_ANYWAY, whichever is more.
# Images hardly compress; a tar of small ones does, because of its headers and padding, to about a fifth.
_MOST_GROWTH, _UNPACKED_ANYWAY = 100, 1 << 30
# Tar headers that precede another header (long names, for example) are read as a whole.
_EXTENDED = (
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
)
_MOST_HEADER_BYTES = 1 << 20

# The type of an archive is read from its first bytes: names are often wrong, and a .tar may be compressed.
_COMPRESSED: dict[bytes, Callable[[Path], Any]] = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ\0": lzma.open}
_ZSTANDARD = b"\x28\xb5\x2f\xfd"
_ENDING = re.compile(r"\.(zip|tar|tgz|txz|tbz2?|tar\.(gz|xz|bz2))$", re.IGNORECASE)
_LOCAL_SIGNATURE = b"PK\3\4"
_LOCAL_HEADER = struct.Struct("<4s22x2H")  # of a zip member: signature, lengths of its name and its extra field

# Everything that the standard library raises for damaged archives, besides OSError
_DAMAGE = (
    zipfile.BadZipFile,
    tarfile.TarError,
    zlib.error,
    lzma.LZMAError,
    struct.error,
    EOFError,
    NotImplementedError,
    RecursionError,  # of headers that all announce another one
    ValueError,
)


class ZipMember(NamedTuple):
    """An image file in a zip: offset of its local header, stored size in bytes, whether it is deflated, its CRC-32.

    length: bytes of the file itself, according to the index.
    """

    archive: str
    name: str
    offset: int
    size: int
    deflated: bool
    crc: int
    length: int

    def __str__(self) -> str:
        return f"{self.archive}:{self.name}"


class TarMember(NamedTuple):
    """An image file in a tar: offset of its first byte in the uncompressed tar, and its size in bytes."""

    archive: str
    name: str
    offset: int
    size: int

    def __str__(self) -> str:
        return f"{self.archive}:{self.name}"


def read_zip_member(member: ZipMember) -> Image.Image:
    """Opens the image. Raises ValueError or OSError if it is damaged or not an image."""
    return open_image(io.BytesIO(_zip_contents(member)))


def _zip_contents(member: ZipMember) -> bytes:
    """The bytes of the file. Raises ValueError or OSError if it is damaged."""
    # Not by zipfile, which reads the list of all members first: 12 s and 700 MB per process for a million of them.
    _check_length(max(member.length, member.size))
    try:
        with open(member.archive, "rb") as file:
            file.seek(member.offset)
            signature, name_length, extra_length = _LOCAL_HEADER.unpack(file.read(_LOCAL_HEADER.size))
            file.seek(name_length + extra_length, os.SEEK_CUR)
            contents = file.read(member.size)
        if member.deflated:
            # One byte more than expected, to detect a member that inflates to more.
            contents = zlib.decompressobj(-zlib.MAX_WBITS).decompress(contents, member.length + 1)
    except (struct.error, zlib.error) as error:
        raise ValueError(f"damaged in the archive ({error})") from None
    if len(contents) != member.length:
        raise ValueError("damaged in the archive (it holds more bytes than the archive's index says, or fewer)")
    if signature != _LOCAL_SIGNATURE or zlib.crc32(contents) != member.crc:
        raise ValueError("damaged in the archive (wrong checksum)")
    return contents


@dataclass(frozen=True)
class TarReader:
    """Opens the images of one uncompressed tar. Called with a TarMember, raises OSError or ValueError."""

    path: str

    def __call__(self, member: TarMember) -> Image.Image:
        return open_image(io.BytesIO(self.contents(member)))

    def contents(self, member: TarMember) -> bytes:
        _check_length(member.size)
        with open(self.path, "rb") as file:
            file.seek(member.offset)
            return file.read(member.size)


def _check_length(size: int) -> None:
    if size > MOST_BYTES:
        raise ValueError(f"{size / 1e6:.0f} MB; at most {MOST_BYTES / 1e6:.0f} MB of a file in an archive are read")


@dataclass(frozen=True)
class Archive:
    """The image files of an archive.

    below: prefix of the paths, for messages. files: path (as `train/cat/1.jpg`) to member, for read. annotations:
    the contents of files that name the classes of images (data/layouts.py), by path.
    """

    below: str
    files: dict[str, Any]
    read: Callable[[Any], Image.Image]
    annotations: dict[str, bytes]


def archive_name(path: Path) -> str:
    """The name of an archive without its ending: `photos` for `photos.tar.gz`."""
    return _ENDING.sub("", path.name) or path.name


def fingerprint(path: Path) -> str:
    """Changes with the archive; fast, since it uses only the name, the size and the time of the last change."""
    status = path.stat()
    described = f"{path.name}\0{status.st_size}\0{status.st_mtime_ns}\n"
    return hashlib.sha256(described.encode(errors="surrogateescape")).hexdigest()


def open_archive(path: Path) -> Archive:
    """Lists the image files of a zip or a tar, unpacking a compressed tar to a temporary file.

    The temporary file is removed when the archive's `read` is no longer referenced, or when the process ends.
    Folders that contain all images are removed from their paths, except `train` and `val` and the last one, the class.
    Hidden files, links and files added by macOS are skipped. If two members have the same name, the later one is used,
    as when unpacking. A tar within a tar is a folder of that name.
    Raises DataError if the archive is damaged, encrypted, packed in a way that cannot be read, or the disk is full.
    """
    read: Callable[[Any], Image.Image] = read_zip_member
    contents: Callable[[Any], bytes] = _zip_contents
    try:
        with open(path, "rb") as file:
            head = file.read(6)
        if head.startswith(_ZSTANDARD):
            raise DataError(f"{path}: Zstandard cannot be read; unpack it and give the folder, or pack it as .tar")
        if head.startswith(b"PK"):
            members: dict[str, Any] = dict(_zip_members(path))
        else:
            packed = next((opener for magic, opener in _COMPRESSED.items() if head.startswith(magic)), None)
            read = reader = _unpacked(path, packed) if packed else TarReader(str(path))
            with open(reader.path, "rb") as file:
                members = dict(_tar_members(str(path), file))
            contents = reader.contents
        below, files = _unwrapped(members)
        listed = [place for place in files if _is_annotations(place)]
        annotations = {place: contents(files.pop(place)) for place in listed}
    except DataError:
        raise
    except (OSError, *_DAMAGE) as error:
        if isinstance(error, OSError) and error.errno:
            raise DataError(f"{path}: cannot be read ({error.strerror})") from None
        reason = first_line(error)
        raise DataError(f"{path}: damaged, or neither a zip nor a tar archive ({reason}); fetch it again") from None
    return Archive(f"{path}:{below}", files, read, annotations)


def _zip_members(path: Path) -> dict[str, ZipMember]:
    members = {}
    with zipfile.ZipFile(path) as archive:
        for info in archive.infolist():
            # Some archivers on Windows write backslashes.
            place = _wanted_path(info.filename.replace("\\", "/"))
            if place is None or info.is_dir() or stat.S_ISLNK(info.external_attr >> 16):
                continue
            if info.flag_bits & 1:
                raise DataError(f"{path}: encrypted; unpack it with its password and give the folder")
            if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise DataError(f"{path}: packed by method {info.compress_type}; pack it again, stored or deflated")
            deflated = info.compress_type == zipfile.ZIP_DEFLATED
            members[place] = ZipMember(
                str(path), info.filename, info.header_offset, info.compress_size, deflated, info.CRC, info.file_size
            )
    return members


def _tar_members(path: str, file: IO[bytes]) -> Iterator[tuple[str, TarMember]]:
    """The images of an uncompressed tar and of tars within it, by path; offsets count from the start of the file."""
    for info, offset in _tar_files(path, file):
        place = _wanted_path(info.name)
        if place is not None:
            yield place, TarMember(path, place, offset, info.size)
        elif (tar := _path(info.name)) and tar.endswith(".tar"):
            file.seek(offset)
            for inner, inner_offset in _tar_files(path, file):
                place = _wanted_path(inner.name)
                if place is not None:
                    member = TarMember(path, f"{tar}/{place}", inner_offset, inner.size)
                    yield f"{tar.removesuffix('.tar')}/{place}", member


def _tar_files(path: str, file: IO[bytes]) -> Iterator[tuple[tarfile.TarInfo, int]]:
    """The regular files of the tar that begins at the file's current position, with the offset of their contents."""
    with tarfile.open(fileobj=file, mode="r:", tarinfo=_Header) as archive:
        while (info := archive.next()) is not None:
            archive.members.clear()  # type: ignore[attr-defined]  # it would keep all, 2 GB for a million
            if info.issparse():
                raise DataError(f"{path}: {info.name} is stored as a sparse file; pack it again without --sparse")
            if info.isreg():
                yield info, info.offset_data
        # tarfile treats any header it cannot read as the end, and the rest of a damaged archive would be missing.
        file.seek(archive.offset)
        if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            raise tarfile.ReadError("its end is missing")


class _Header(tarfile.TarInfo):
    """A member of a tar, none of whose extended headers is longer than _MOST_HEADER_BYTES."""

    def _proc_member(self, archive: tarfile.TarFile) -> tarfile.TarInfo:
        if self.type in _EXTENDED and self.size > _MOST_HEADER_BYTES:
            raise tarfile.ReadError(f"a header of {self.size} bytes")
        return super()._proc_member(archive)  # type: ignore[misc]


def _unpacked(path: Path, opener: Callable[[Path], Any]) -> TarReader:
    """Unpacks a compressed tar to a temporary one, which is removed with the returned reader."""
    place = tempfile.gettempdir()
    advice = "free some space, or set TMPDIR to a folder on another disk"
    size = path.stat().st_size
    # Images hardly compress: the archive's own size is a good estimate of the space it takes.
    if shutil.disk_usage(place).free < size:
        raise DataError(f"{path}: {size / 1e9:.1f} GB do not fit in {place}, where it has to be unpacked; {advice}")
    print(f"{path}: a compressed tar is unpacked to {place} first", flush=True)
    with opener(path) as packed, tempfile.NamedTemporaryFile("wb", suffix=".tar", delete=False) as unpacked:
        reader = TarReader(unpacked.name)
        remove = weakref.finalize(reader, Path(unpacked.name).unlink, missing_ok=True)
        try:
            while chunk := packed.read(1 << 20):
                if unpacked.tell() + len(chunk) > max(_MOST_GROWTH * size, _UNPACKED_ANYWAY):
                    raise DataError(
                        f"{path}: unpacks to more than {_MOST_GROWTH} times its size, which no images do; if it is "
                        "what it should be, unpack it and give the folder"
                    )
                unpacked.write(chunk)
            unpacked.flush()
        except OSError as error:
            remove()
            if error.errno:  # decompressors also raise OSError, without a number
                raise DataError(f"{path}: could not be unpacked to {place} ({error.strerror}); {advice}") from None
            raise
        except BaseException:
            remove()
            raise
    return reader


def _path(name: str) -> str | None:
    """A member's name as a plain relative path; None if it, or a folder that contains it, is hidden (or is `..`)."""
    parts = [part for part in name.split("/") if part not in ("", ".")]
    return None if any(part.startswith(".") or part == "__MACOSX" for part in parts) else "/".join(parts)


def _wanted_path(name: str) -> str | None:
    wanted = os.path.splitext(name)[1].lower() in EXTENSIONS or _is_annotations(name)
    return _path(name) if wanted else None


def _is_annotations(place: str) -> bool:
    return place.rpartition("/")[2] == ANNOTATIONS


def _unwrapped(members: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """Removes the folders that wrap all others. Returns them, and the images by the rest of their paths."""
    below, files = "", members
    while True:
        nested = [place for place in files if "/" in place]  # images outside class folders have no class
        tops = {place.partition("/")[0] for place in nested}
        deeper = any(place.count("/") > 1 for place in nested)
        if len(tops) != 1 or tops & {"train", "val"} or not deeper:
            return below, files
        (top,) = tops
        below += f"{top}/"
        files = {place.removeprefix(f"{top}/"): files[place] for place in nested}
