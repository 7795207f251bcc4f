"""Files and folders that are there as a whole or not at all, whenever a process or its machine ends; their locks."""

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
# Of file systems that have no locks.
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


@contextmanager
def locked(path: Path, notice: str) -> Iterator[bool]:
    """Holds the lock that the file at path stands for, among all processes that see it; it ends with the process.

    The file is made, and removed at the end; after a kill it stays, and is no obstacle. notice: printed where another
    process holds the lock, which is then waited for. Gives False, without a lock, where the file system has none.
    Raises OSError if the file cannot be made.
    """
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            held = _lock(file, notice)
            # The process that held it may have removed the file since; then the lock is one of a file without a name.
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
    """A file to be filled beside `path`, whose place it takes, on the disk, when the context ends without an error.

    keep: where the file that was at `path` stays. Raises OSError if that fails; `path` is then as it was.
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
                # Some file systems have no hard links; for a moment there is then no file at `path`.
                os.replace(path, keep)
        os.replace(partial, path)
    except BaseException:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def write_text(path: Path, text: str) -> None:
    """Makes `text` the content of a file. One that has it already is left alone. Raises OSError as `replacing`."""
    content = text.encode()
    with suppress(OSError):
        if path.read_bytes() == content:
            return
    with replacing(path) as file:
        file.write(content)


def make_folder(folder: Path) -> None:
    """Makes a folder, and those above it, unless they are there. Raises OSError."""
    missing = [each for each in (folder, *folder.parents) if not each.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for each in missing:
        sync_folder(each.parent)


def sync_folder(folder: Path) -> None:
    """Brings to the disk which files a folder has. Raises OSError."""
    opened = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(opened)
    except OSError as error:
        # Some network file systems sync no folders.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(opened)


def sync_files(folder: Path) -> None:
    """Brings to the disk what is in a folder's files, which it has none below, and their names. Raises OSError."""
    for path in folder.iterdir():
        with open(path, "rb") as file:
            os.fsync(file.fileno())
    sync_folder(folder)


def partial_prefix(out: Path) -> str:
    """How the names of folders begin that lie beside `out` and are to take its place, made under its lock."""
    return f".{out.name}.partial-"


def move_folder(made: Path, out: Path, *, replaced: Path) -> None:
    """Moves a complete folder to its place. What is there goes to `replaced`, and comes back if moving fails."""
    try:
        if out.exists():
            out.rename(replaced)
        made.rename(out)
    except BaseException:
        _give_back(replaced, out)
        raise
    sync_folder(out.parent)


def remove_leftovers(out: Path) -> None:
    """Removes what killed processes have left that were to fill `out`. Only for the process that holds its lock."""
    for path in out.parent.iterdir():
        if re.fullmatch(re.escape(partial_prefix(out)) + r"\w+", path.name):
            # Of one that was killed between the two steps of replacing a folder.
            _give_back(path / "replaced", out)
            shutil.rmtree(path, ignore_errors=True)


def _give_back(replaced: Path, out: Path) -> None:
    if replaced.exists() and not out.exists():
        replaced.rename(out)


def is_full(error: OSError) -> bool:
    """Whether a disk, or a user's share of it, is full."""
    return error.errno in _FULL


def reason(error: BaseException, path: Path) -> str:
    """Why the file could not be written, for a message; a full disk is called that."""
    cause: BaseException | None = error
    # torch.save may raise an error of its own on the way out.
    while cause is not None and not isinstance(cause, OSError):
        cause = cause.__context__
    if isinstance(cause, OSError) and is_full(cause):
        return f"the disk of {path.parent} is full"
    return (cause.strerror if isinstance(cause, OSError) else None) or first_line(error)


def in_units(size: int) -> str:
    """A number of bytes, as people read it."""
    value, units = float(size), ["bytes", "kB", "MB", "GB", "TB", "PB", "EB"]
    while value >= 999.5 and len(units) > 1:
        value, units = value / 1000, units[1:]
    return f"{value:.3g} {units[0]}"
