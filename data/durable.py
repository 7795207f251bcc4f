"""Files and folders that exist completely or not at all, whenever a process or its machine stops; their locks."""

import errno
import fcntl
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from command import first_line

_FULL = (errno.ENOSPC, errno.EDQUOT)
# Errors of file systems without locks.
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


@contextmanager
def locked(path: Path, notice: str) -> Iterator[bool]:
    """Holds a lock, identified by the file at path, among all processes that see it; it ends with the process.

    The file is made, and removed at the end; one that stays after a kill does no harm. notice: printed if another
    process holds the lock, before waiting for it. Yields False, without a lock, if the file system does not support
    locks. Raises OSError if the file cannot be made.
    """
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            held = _lock(file, notice)
            # The process that held it may have removed the file since; then this lock is on a file without a name.
            if not _is_named(file, path):
                continue
            try:
                yield held
            finally:
                with suppress(OSError):
                    os.unlink(path)
            return
        finally:
            os.close(file)


def _lock(file: int, notice: str) -> bool:
    try:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(notice, flush=True)
            fcntl.flock(file, fcntl.LOCK_EX)
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        return False
    return True


def _is_named(file: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file), os.stat(path))
    except FileNotFoundError:
        return False


@contextmanager
def replacing(path: Path, *, keep: Path | None = None) -> Iterator[BinaryIO]:
    """Yields a file to write; it replaces `path`, synced to disk, when the context ends without an error.

    keep: where the previous file at `path` is kept. Raises OSError if that fails; `path` is then unchanged.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        with open(partial, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if keep and path.is_file():
            keep.unlink(missing_ok=True)
            try:
                os.link(path, keep)
            except OSError:
                # Some file systems have no hard links; then there is no file at `path` for a moment.
                os.replace(path, keep)
        os.replace(partial, path)
    except BaseException:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def write_text(path: Path, text: str) -> None:
    """Writes `text` to a file, unless it has that content already. Raises OSError as `replacing` does."""
    content = text.encode()
    with suppress(OSError):
        if path.read_bytes() == content:
            return
    with replacing(path) as file:
        file.write(content)


def make_folder(folder: Path) -> None:
    """Makes a folder and its parents unless they exist. Raises OSError."""
    missing = [each for each in (folder, *folder.parents) if not each.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for each in missing:
        sync_folder(each.parent)


def sync_folder(folder: Path) -> None:
    """Syncs a folder's list of files to disk. Raises OSError."""
    opened = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(opened)
    except OSError as error:
        # Some network file systems cannot sync folders.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(opened)


def sync_files(folder: Path) -> None:
    """Syncs a folder's files and their names to disk; the folder has no subfolders. Raises OSError."""
    for path in folder.iterdir():
        with open(path, "rb") as file:
            os.fsync(file.fileno())
    sync_folder(folder)


def partial_prefix(out: Path) -> str:
    """Prefix of the names of temporary folders beside `out` that are to replace it, made under its lock."""
    return f".{out.name}.partial-"


def move_folder(made: Path, out: Path, *, replaced: Path) -> None:
    """Moves a complete folder to `out`. A folder that is there is moved to `replaced`, and restored if moving fails."""
    try:
        if out.exists():
            out.rename(replaced)
        made.rename(out)
    except BaseException:
        _give_back(replaced, out)
        raise
    sync_folder(out.parent)


def remove_leftovers(out: Path) -> None:
    """Removes temporary folders of killed processes beside `out`. Only for the process that holds its lock."""
    for path in out.parent.iterdir():
        if re.fullmatch(re.escape(partial_prefix(out)) + r"\w+", path.name):
            # Left by a process that was killed between the two steps of replacing a folder.
            _give_back(path / "replaced", out)
            shutil.rmtree(path, ignore_errors=True)


def _give_back(replaced: Path, out: Path) -> None:
    if replaced.exists() and not out.exists():
        replaced.rename(out)


def is_full(error: OSError) -> bool:
    """Whether a disk, or a user's share of it, is full."""
    return error.errno in _FULL


def reason(error: BaseException, path: Path) -> str:
    """Why the file could not be written, for a message; a full disk is named as such."""
    cause: BaseException | None = error
    # torch.save may raise another error while it handles the first.
    while cause is not None and not isinstance(cause, OSError):
        cause = cause.__context__
    if isinstance(cause, OSError) and is_full(cause):
        return f"the disk of {path.parent} is full"
    return (cause.strerror if isinstance(cause, OSError) else None) or first_line(error)


def in_units(size: int) -> str:
    """A number of bytes in readable units."""
    value, units = float(size), ["bytes", "kB", "MB", "GB", "TB", "PB", "EB"]
    while value >= 999.5 and len(units) > 1:
        value, units = value / 1000, units[1:]
    return f"{value:.3g} {units[0]}"
