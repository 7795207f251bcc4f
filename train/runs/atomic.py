"""Files that are there as a whole or not at all, whenever a process or its machine ends."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from command import first_line

_FULL = (errno.ENOSPC, errno.EDQUOT)


@contextmanager
def replacing(path: Path, *, keep: Path | None = None) -> Iterator[BinaryIO]:
    """A file to be filled beside `path`, whose place it takes, on the disk, when the context ends without an error.

    keep: where the file that was at `path` stays. Raises OSError where that fails; `path` is then as it was.
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


def reason(error: BaseException, path: Path) -> str:
    """Why the file could not be written, for a message; a full disk is called that."""
    cause: BaseException | None = error
    # torch.save may raise an error of its own on the way out.
    while cause is not None and not isinstance(cause, OSError):
        cause = cause.__context__
    if isinstance(cause, OSError) and cause.errno in _FULL:
        return f"the disk of {path.parent} is full"
    return (cause.strerror if isinstance(cause, OSError) else None) or first_line(error)
