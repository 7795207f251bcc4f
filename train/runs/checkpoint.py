"""Everything needed to continue a run at its next step with the same bits."""

import os
from pathlib import Path
from typing import Any

import torch

from data.durable import reason, replacing, sync_folder
from models.weights import CHECKPOINT_FORMAT, check_sums
from train import TrainError

# The last checkpoint, the one before it, and that of the epoch with the highest top-1.
LAST, BEFORE, BEST = "last.pt", "last.before.pt", "best.pt"


def save(path: Path, state: dict[str, Any], *, keep: Path | None = None) -> None:
    """Writes a checkpoint; `path` holds the previous one until the new one is complete.

    keep: where the previous checkpoint is kept. Raises TrainError if the new one cannot be written (a full disk, for
    example); `path` is then unchanged.
    """
    try:
        with replacing(path, keep=keep) as file:
            torch.save({"format": CHECKPOINT_FORMAT} | state, file)
    except (OSError, RuntimeError) as error:
        kept = "; the previous checkpoint is kept" if path.with_name(LAST).is_file() else ""
        raise TrainError(f"{path}: the checkpoint could not be written ({reason(error, path)}){kept}") from None


def load(path: Path, *, mapped: bool = False) -> dict[str, Any]:
    """Reads the checkpoint of a run. mapped: map the file, so that tensors are read when they are used.

    Raises TrainError if it is damaged (its checksums are verified) or not a checkpoint of a run.
    """
    try:
        check_sums(path)
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:
        # A damaged file may raise any error, since its bytes control the unpickler.
        why = reason(error, path) if isinstance(error, OSError) else "it is damaged or cut short"
        raise _unreadable(path, why) from None
    progress = state.get("progress") if isinstance(state, dict) and state.get("format") == CHECKPOINT_FORMAT else None
    if not isinstance(progress, dict) or not all(isinstance(progress.get(name), int) for name in ("epoch", "step")):
        raise _unreadable(path, "it is no checkpoint of a run")
    return state


def latest(folder: Path, *, mapped: bool = False) -> tuple[Path, dict[str, Any]] | None:
    """Returns the checkpoint to continue a run from, with its file; None if there is none. mapped: as in `load`.

    This is last.pt or, if it is damaged or missing, the most advanced of the others. Raises TrainError if all are
    damaged.
    """
    damage = None
    found: list[tuple[Path, dict[str, Any]]] = []
    for name in (LAST, BEFORE, BEST):
        path = folder / name
        if path.is_file():
            try:
                found.append((path, load(path, mapped=mapped)))
            except TrainError as error:
                damage = damage or error
            else:
                if name == LAST:
                    break
    if not found and damage:
        raise damage
    return max(found, key=lambda each: _position(each[1]), default=None)


def position(folder: Path) -> tuple[int, int]:
    """Returns a run's finished epochs and finished steps in the next one; (0, 0) if there is no checkpoint.

    Raises TrainError as `latest` does.
    """
    # Mapped: tensors are read only for their checksums.
    found = latest(folder, mapped=True)
    return _position(found[1]) if found else (0, 0)


def standing(folder: Path) -> tuple[tuple[int, int], list[str] | None]:
    """Returns `position`, and the names of the networks that trained together so far (None without a checkpoint)."""
    found = latest(folder, mapped=True)
    # Checkpoints of earlier versions do not name them.
    return (_position(found[1]), found[1].get("together", [])) if found else ((0, 0), None)


def go_back(folder: Path, to: tuple[int, int]) -> bool:
    """Makes a run's previous checkpoint its last one if that is at position `to`; returns whether it was.

    If the run was saved only once, its start, (0, 0), counts as the previous checkpoint. to: as returned by `position`.
    Raises OSError.
    """
    last, before, best = (folder / name for name in (LAST, BEFORE, BEST))
    if before.is_file():
        try:
            there = _position(load(before, mapped=True)) == to
        except TrainError:
            return False
        if there:
            os.replace(before, last)
    else:
        there = to == (0, 0)
        if there:
            # In this order, since best.pt alone would be used as the last checkpoint.
            best.unlink(missing_ok=True)
            last.unlink(missing_ok=True)
    sync_folder(folder)
    return there


def _position(state: dict[str, Any]) -> tuple[int, int]:
    return state["progress"]["epoch"], state["progress"]["step"]


def _unreadable(path: Path, why: str) -> TrainError:
    return TrainError(
        f"{path}: not a readable checkpoint ({why}); put back a copy, or remove the run's checkpoints to start it again"
    )


def generator_states(device: torch.device) -> dict[str, torch.Tensor]:
    """Returns the states of the random generators that networks use (dropout): of the CPU, and of a GPU device."""
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def restore_generators(states: dict[str, torch.Tensor], device: torch.device) -> None:
    """Restores the states that `generator_states` returned."""
    torch.set_rng_state(states["cpu"])
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], device)
