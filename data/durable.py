"""Folders that several processes write, and that a kill or a power cut may interrupt at any moment."""

import contextlib
import errno
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

# Of file systems that have no locks.
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


@contextlib.contextmanager
def locked(path: Path, notice: str) -> Iterator[bool]:
    """Holds the lock that the file at path stands for, among all processes that see it; it ends with the process.

    The file is made, and removed at the end; after a kill it stays, and is no obstacle. notice: printed where another
    process holds the lock, which is then waited for. Gives False, without a lock, where the file system has none.
    Raises OSError where the file cannot be made.
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
                with contextlib.suppress(OSError):
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


def sync(folder: Path, *, files: bool = True) -> None:
    """Returns when the names in a folder, and with `files` what is in its files, will outlast a power cut."""
    for path in (*(folder.iterdir() if files else ()), folder):
        opened = os.open(path, os.O_RDONLY)
        try:
            os.fsync(opened)
        except OSError as error:
            # Some file systems of a network sync no folders.
            if path is not folder or error.errno != errno.EINVAL:
                raise
        finally:
            os.close(opened)
