"""Label maps under kills."""

from collections import Counter
from pathlib import Path

from tests.kills.harness import survive
from tests.kills.runs import content
from tests.kills.training import SMALL, write_inputs


def kill(folder: Path, kills: int, seed: int) -> Counter[str]:
    """Kills by kind."""
    inputs = write_inputs(folder)
    words = [
        *("train.maps", "--data", inputs["SET"], *SMALL, "--refinery", inputs["REFINERY"]),
        *("--map_resolution", "96", "--out", "maps"),
    ]
    return survive(words, folder / "try", compare=["maps/*"], kills=kills, seed=seed, content=content)
