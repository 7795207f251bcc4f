"""A file of results: its path is checked before anything slow, and it exists completely or not at all."""

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import BinaryIO

from data.durable import is_full, locked, make_folder, reason, replacing
from train import TrainError

Write = Callable[[str], None]


@contextmanager
def result_file(path: Path, *, begins: str, option: str = "OUT") -> Iterator[Write]:
    """Yields a function that writes text to a file, which replaces `path` when the context ends without an error.

    An earlier result stays until then, and a lock allows only one process at a time to write. Devices and pipes are
    written directly. begins: how such results begin; any other file is not overwritten. option: the option that names
    the file. Bytes of file names that are not text are written unchanged.
    Raises TrainError if the file cannot be written.
    """

    def refusal(error: OSError) -> TrainError:
        why = reason(error, path) if is_full(error) else error.strerror or str(error)
        return TrainError(f"{option}={path}: cannot be written ({why}); name another file with {option}")

    # A link remains a link.
    place = Path(os.path.realpath(path))
    with ExitStack() as open_files:
        try:
            file = open_files.enter_context(_opened(path, place, begins, option))
        except OSError as error:
            raise refusal(error) from None

        def write(text: str) -> None:
            try:
                file.write(text.encode(errors="surrogateescape"))
            except OSError as error:
                raise refusal(error) from None

        yield write
        try:
            # Written, synced and renamed.
            open_files.close()
        except OSError as error:
            raise refusal(error) from None


@contextmanager
def _opened(path: Path, place: Path, begins: str, option: str) -> Iterator[BinaryIO]:
    if place.exists() and not place.is_file():
        if place.is_dir():
            raise TrainError(f"{option}={path}: is a folder; give the name of a file")
        with open(place, "wb") as file:
            yield file
        return
    make_folder(place.parent)
    waiting = f"{path}: is being written by another process; waiting for it"
    with locked(place.with_name(f".{place.name}.lock"), waiting):
        if place.is_file() and not _is_result(place, begins):
            raise TrainError(
                f"{option}={path}: is not an earlier result of this command, and would be overwritten; give another "
                f"{option}, or move it away"
            )
        with replacing(place) as file:
            yield file


def _is_result(place: Path, begins: str) -> bool:
    """Whether a file is empty or begins like a result."""
    expected = begins.encode()
    with open(place, "rb") as file:
        found = file.read(len(expected))
    return found in (b"", expected)
