"""A file of results: its place is checked before anything slow, and it is there as a whole or not at all."""

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
    """Gives what writes text to a file that takes the place of `path` when the context ends without an error.

    An earlier result stays until then; so does the lock that lets one process at a time write to a place. Devices and
    pipes are written to as they are. begins: what such results begin with; another file is not overwritten.
    option: how the user names the file. Bytes of file names that are no text are written as they were.
    Raises TrainError if the file cannot be written.
    """

    def refusal(error: OSError) -> TrainError:
        why = reason(error, path) if is_full(error) else error.strerror or str(error)
        return TrainError(f"{option}={path}: cannot be written ({why}); name another file with {option}")

    # A link stays one.
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
            # Written through, and renamed.
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
                f"{option}={path}: is no earlier result of this command, and would be overwritten; give another "
                f"{option}, or move it away"
            )
        with replacing(place) as file:
            yield file


def _is_result(place: Path, begins: str) -> bool:
    """Whether a file is empty, or begins as a result does."""
    expected = begins.encode()
    with open(place, "rb") as file:
        found = file.read(len(expected))
    return found in (b"", expected)
