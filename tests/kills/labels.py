"""Label writing under kills: packed and exact labels of several epochs."""

from collections import Counter
from pathlib import Path

from tests.kills.harness import survive
from tests.kills.runs import content
from tests.kills.training import SMALL, write_inputs


def kill(folder: Path, kills: int, seed: int) -> Counter[str]:
    """Returns the kills by kind, of both formats together."""
    inputs = write_inputs(folder)
    counts: Counter[str] = Counter()
    for number, kind in enumerate([["packed", "--copies", "2"], ["exact", "--order", "quasi-random"]]):
        words = [
            *("train.label", "--data", inputs["SET"], *SMALL, "--refinery", inputs["REFINERY"]),
            *("--epochs", "4", "--out", "labels", "--format", *kind),
        ]
        if share := (kills + number) // 2:
            counts += survive(
                words, folder / "try", compare=["labels/*"], kills=share, seed=seed + number, content=content
            )
    return counts
