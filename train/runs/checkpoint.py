"""Everything needed to continue a run at its next step with the same bits."""

import os
from pathlib import Path
from typing import Any

import torch

from data.durable import reason, replacing, sync_folder
from models.weights import CHECKPOINT_FORMAT, check_sums
from train import TrainError

# The checkpoint of the last step that was saved, the one before it, and that of the epoch with the highest top-1.
LAST, BEFORE, BEST = "last.pt", "last.before.pt", "best.pt"


def save(path: Path, state: dict[str, Any], *, keep: Path | None = None) -> None:
    """Writes a checkpoint so that `path` always holds a whole one: the old until the new is complete.

    keep: where the old one stays. Raises TrainError when it cannot be written (a full disk); the old one then stays.
    """
    try:
        with replacing(path, keep=keep) as file:
            torch.save({"format": CHECKPOINT_FORMAT} | state, file)
    except (OSError, RuntimeError) as error:
        kept = "; the one before is kept" if path.with_name(LAST).is_file() else ""
        raise TrainError(f"{path}: the checkpoint could not be written ({reason(error, path)}){kept}") from None


def load(path: Path, *, mapped: bool = False) -> dict[str, Any]:
    """Reads a checkpoint of ours; mapped: each tensor only when it is used.

    Raises TrainError where it is damaged, which its checksums show, or no checkpoint of a run.
    """
    try:
        check_sums(path)
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:
        # A damaged file raises anything: its bytes steer the unpickler.
        why = reason(error, path) if isinstance(error, OSError) else "it is damaged or cut short"
        raise _unreadable(path, why) from None
    progress = state.get("progress") if isinstance(state, dict) and state.get("format") == CHECKPOINT_FORMAT else None
    if not isinstance(progress, dict) or not all(isinstance(progress.get(name), int) for name in ("epoch", "step")):
        raise _unreadable(path, "it is no checkpoint of a run")
    return state


def latest(folder: Path, *, mapped: bool = False) -> tuple[Path, dict[str, Any]] | None:
    """The checkpoint from which a run goes on, and its file; None where there is none. mapped: as in `load`.

    That is last.pt or, where it is damaged, the one of the others that is furthest. Raises TrainError where all are.
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
    """Epochs done and steps done in the next one, of the run in a folder; (0, 0) where there is no checkpoint.

    Raises TrainError as `latest`.
    """
    # Mapped: tensors are read for their checksums alone.
    found = latest(folder, mapped=True)
    return _position(found[1]) if found else (0, 0)


def standing(folder: Path) -> tuple[tuple[int, int], list[str] | None]:
    """As `position`, with the networks that trained together up to there; None where there is no checkpoint."""
    found = latest(folder, mapped=True)
    # Those of earlier versions do not say it.
    return (_position(found[1]), found[1].get("together", [])) if found else ((0, 0), None)


def go_back(folder: Path, to: tuple[int, int]) -> bool:
    """Takes a run one save back, if that is where it is to stand; to its start where it was saved once.

    to: as `position` gives it. Returns whether it stands there now. Raises OSError.
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
            # In this order: alone, it would be taken for the last.
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
    """The random generators that networks draw from (dropout)."""
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def restore_generators(states: dict[str, torch.Tensor], device: torch.device) -> None:
    torch.set_rng_state(states["cpu"])
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], device)
