"""Training under kills between the start of a validation and the end of the checkpoints that follow it."""

from collections import Counter
from pathlib import Path

from tests.kills import training


def kill(folder: Path, kills: int, seed: int) -> Counter[str]:
    """Kills by kind."""
    return training.kill(folder, kills, seed, during="train.loop:Trainer.validate")
