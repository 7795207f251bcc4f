"""The folder of an export: it exists completely or not at all, and replaces only earlier exports."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from data.described import read_json
from data.durable import (
    is_full,
    locked,
    make_folder,
    move_folder,
    partial_prefix,
    reason,
    remove_leftovers,
    sync_files,
)
from train import TrainError
from train.export.card import FORMAT

# All that an export writes.
FILES = (
    "config.json",
    "README.md",
    "model.onnx",
    "model.onnx.data",
    "model-int8.onnx",
    "model.safetensors",
    "network.py",
)


def check_place(out: Path) -> None:
    """Raises TrainError if `out` exists and is neither an earlier export nor an empty folder."""
    if not out.exists():
        return
    if not out.is_dir():
        raise TrainError(f"OUT={out}: is a file; give the name of a folder")
    others = sorted(path.name for path in out.iterdir() if path.name not in FILES)
    if others:
        raise TrainError(f"OUT={out}: holds {others[0]}, which no export writes; give another OUT, or move it away")
    if any(out.iterdir()) and not _is_export(out):
        raise TrainError(
            f"OUT={out}: is not an earlier export, and would be overwritten; give another OUT, or move it away"
        )


def _is_export(folder: Path) -> bool:
    try:
        said = read_json(folder / "config.json")
    except (OSError, ValueError):
        return False
    return isinstance(said, dict) and said.get("format") == FORMAT


@contextmanager
def placed(out: Path) -> Iterator[Path]:
    """Yields an empty folder to fill, which replaces `out` when the context ends without an error.

    An earlier export stays until then. One process at a time writes to a folder; others wait. Raises TrainError if it
    cannot be written, and as check_place does.
    """
    try:
        make_folder(out.parent)
        waiting = f"{out}: is being written by another process; waiting for it"
        with locked(out.with_name(f".{out.name}.lock"), waiting) as held:
            check_place(out)
            if held:
                remove_leftovers(out)
            with tempfile.TemporaryDirectory(
                prefix=partial_prefix(out), dir=out.parent, ignore_cleanup_errors=True
            ) as partial:
                made = Path(partial, "made")
                made.mkdir()
                yield made
                sync_files(made)
                # Files that the user has put there in the meantime must not be lost.
                check_place(out)
                move_folder(made, out, replaced=Path(partial, "replaced"))
    except OSError as error:
        why = reason(error, out) if is_full(error) else error.strerror or str(error)
        raise TrainError(f"OUT={out}: cannot be written ({why}); give another OUT") from None
