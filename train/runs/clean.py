"""Lists runs that can be removed, and the space that this frees; with --yes removes them.

python -m train.runs.clean
make clean-runs
make clean-runs ARGS=--yes
"""

import contextlib
import os
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from command import UserError, run_command, with_flags
from data.durable import in_units, reason
from train import TrainError
from train.runs import Run, read_run, table_text
from train.runs.state import CHECKPOINTS, config_of, has_begun, has_checkpoint, in_use, state_of

# The files that a run writes into its folder; a folder with anything else is not removed.
_OWN = {
    *("identity.json", "config.yaml", "starts.jsonl", "metrics.jsonl", "result.json", "tensorboard", ".lock"),
    *CHECKPOINTS,
}


@dataclass(frozen=True)
class Leftover:
    """The folder of an unfinished run. kept: why it must not be removed; empty if it may be."""

    folder: Path
    state: str
    size: int
    kept: str


def clean(folder: str = "runs", stopped: bool = False, yes: bool = False) -> None:
    """Lists failed starts, damaged runs and stopped ones, with their sizes; removes them only with --yes.

    Never removed are finished runs, runs in progress, folders with other files than a run's, and runs that another run
    used as its refinery or started from.

    Args:
        folder: the folder of all runs
        stopped: also those with a checkpoint or metrics: stopped runs, which could be continued, and damaged ones
        yes: remove what is listed as removable
    """
    root = Path(folder)
    if not root.is_dir():
        raise TrainError(f"{folder}: no such folder; no run has been made here yet")
    found = list(leftovers(root, stopped=stopped))
    if not found:
        print(f"{folder}: no failed, damaged or stopped runs; nothing to remove")
        return
    rows = [("state", "size", "", "run")]
    rows += [(each.state, in_units(each.size), each.kept or "can be removed", str(each.folder)) for each in found]
    print(table_text(rows), end="")
    removable = [each for each in found if not each.kept]
    size = in_units(sum(each.size for each in removable))
    if not removable:
        print("nothing to remove")
    elif not yes:
        print(f"{_runs(len(removable))}, {size}, can be removed: type the same with ARGS=--yes")
    else:
        for each in removable:
            _remove(each)
        print(f"removed {_runs(len(removable))}, {size}", flush=True)


def leftovers(root: Path, *, stopped: bool) -> Iterator[Leftover]:
    """All unfinished runs below root, in the order of their paths. stopped: whether stopped ones may be removed too."""
    folders = sorted({path.parent for name in ("identity.json", ".lock") for path in root.rglob(name)})
    found = [(folder, *_state(folder)) for folder in folders if _is_of_a_run(folder)]
    runs = [run for _, _, run in found if run]
    for folder, state, run in found:
        if state == "finished":
            continue
        kept = _reason_to_keep(folder, run, runs, stopped=stopped)
        yield Leftover(folder, state, _size(folder), kept)


def _is_of_a_run(folder: Path) -> bool:
    """A folder with an identity, or one that holds only a lock: stored labels have locks too."""
    return (folder / "identity.json").is_file() or {path.name for path in folder.iterdir()} == {".lock"}


def _state(folder: Path) -> tuple[str, Run | None]:
    try:
        run = read_run(folder)
    except TrainError:
        return "damaged", None
    if run:
        return state_of(run), run
    return "training" if in_use(folder) else "failed start", None


def _reason_to_keep(folder: Path, run: Run | None, runs: list[Run], *, stopped: bool) -> str:
    if in_use(folder):
        return "kept: a process trains in it"
    others = sorted(path.name for path in folder.iterdir() if path.name not in _OWN and not _is_partial(path))
    if others:
        return f"kept: holds {others[0]}"
    user = _user_of(folder, [other for other in runs if other is not run])
    if user:
        return f"kept: {user.folder} learned from it"
    if has_begun(folder) and not stopped:
        return "kept: --stopped removes it too"
    return ""


def _user_of(folder: Path, others: list[Run]) -> Run | None:
    """A run that refers to the folder or a file in it, or whose refinery had the weights of one of its checkpoints."""
    there = folder.resolve()
    for other in others:
        config = config_of(other)
        for name in (config.get("refinery"), config.get("pretrained")):
            if isinstance(name, str):
                # As it was typed, if it is a path, or after a network's name.
                for text in {name, name.partition(":")[2]} - {""}:
                    path = Path(text).resolve()
                    if path == there or path.parent == there:
                        return other
    known: dict[str, Run] = {}
    for other in others:
        refinery, pretrained = other.identity["refinery"], other.identity.get("pretrained")
        known |= {digest: other for digest in ((refinery or {}).get("weights"), pretrained) if digest}
    if known and has_checkpoint(folder):
        # Imported here: most folders hold no checkpoint, and then PyTorch is not needed.
        from models.trained import digest_of

        for name in CHECKPOINTS:
            with contextlib.suppress(OSError, UserError):
                user = known.get(digest_of(folder / name))
                if user:
                    return user
    return None


def _is_partial(path: Path) -> bool:
    return path.name.startswith(".") and path.name.endswith(".partial")


def _size(folder: Path) -> int:
    return sum(path.lstat().st_size for path in folder.rglob("*") if path.is_file())


def _remove(each: Leftover) -> None:
    # Imported here, with PyTorch, which a list of runs does not need.
    from train.runs.record import locked

    try:
        # Under its lock, since a process may have begun to train in it; the lock is removed last.
        with locked(each.folder):
            for path in each.folder.iterdir():
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path)
                elif path.name != ".lock":
                    path.unlink()
            (each.folder / ".lock").unlink()
            each.folder.rmdir()
    except OSError as error:
        raise TrainError(f"{each.folder}: cannot be removed ({reason(error, each.folder)})") from None
    with contextlib.suppress(OSError):
        os.rmdir(each.folder.parent)  # the data's folder, if it is empty now


def _runs(count: int) -> str:
    return "1 run" if count == 1 else f"{count} runs"


if __name__ == "__main__":
    words = with_flags(sys.argv[1:], {"--yes", "--stopped"})
    run_command(clean, prog="python -m train.runs.clean", words=words)
