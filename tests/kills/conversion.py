"""Conversion under kills: to tiles, to blocks, and replacing an outdated set."""

from collections import Counter
from pathlib import Path
from typing import Literal

from command import run_command
from data.convert import Storage, convert_source
from data.sets import ConvertedSet
from data.sources import open_source
from tests.kills.harness import once, survive
from tests.pictures import write_class_folders


def convert(data: str, storage: Literal["jpeg", "blocks"] = "jpeg") -> ConvertedSet:
    """Converts to `set` as a training does: an existing set is used if it fits."""
    return convert_source(open_source(data), Path("set"), storage=Storage(storage), processes=2, replace=True)


def kill(folder: Path, kills: int, seed: int) -> Counter[str]:
    """Returns the kills by kind, of all three together."""
    images = write_class_folders(folder / "images", 2, 60)
    others = write_class_folders(folder / "others", 2, 3, seed=9000)
    once(["tests.kills.conversion", "--data", str(others)], folder / "stale")
    counts: Counter[str] = Counter()
    for number, (storage, start) in enumerate([("jpeg", None), ("blocks", None), ("jpeg", folder / "stale")]):
        words = ["tests.kills.conversion", "--data", str(images), "--storage", storage]
        if share := (kills + number) // 3:
            counts += survive(words, folder / "run", compare=["set/*"], kills=share, seed=seed + number, start=start)
    return counts


if __name__ == "__main__":
    run_command(convert, prog="python -m tests.kills.conversion")
