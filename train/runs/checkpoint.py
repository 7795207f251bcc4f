"""Everything needed to continue a run at its next step with the same bits."""

import os
from pathlib import Path
from typing import Any

import torch

from command import first_line
from models.weights import CHECKPOINT_FORMAT
from train import TrainError


def save(path: Path, state: dict[str, Any]) -> None:
    """Writes a checkpoint so that `path` always holds a whole one: the old until the new is complete.

    Raises TrainError when it cannot be written (a full disk); the old one then stays.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        with open(partial, "wb") as file:
            torch.save({"format": CHECKPOINT_FORMAT} | state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except (OSError, RuntimeError) as error:
        partial.unlink(missing_ok=True)
        reason = getattr(error, "strerror", None) or first_line(error)
        raise TrainError(f"{path}: the checkpoint could not be written ({reason}); the one before is kept") from None


def load(path: Path, *, mapped: bool = False) -> dict[str, Any]:
    """Reads a checkpoint of ours; mapped: each tensor only when it is used. Raises TrainError where it is damaged."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
        assert state["format"] == CHECKPOINT_FORMAT
    except Exception as error:
        raise TrainError(
            f"{path}: not a readable checkpoint ({type(error).__name__}); remove it to start again"
        ) from None
    return state


def position(path: Path) -> tuple[int, int]:
    """Epochs done and steps done in the next one, of the run whose checkpoint this is; (0, 0) where there is none."""
    if not path.is_file():
        return 0, 0
    # Mapped: of the tensors nothing is read.
    progress = load(path, mapped=True)["progress"]
    return progress["epoch"], progress["step"]


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
