"""Make commands under kills: make train, and the set, refinery and labels that it needs."""

import sys
from collections import Counter
from pathlib import Path

from tests.kills.harness import survive
from tests.kills.runs import IGNORED, content, name
from tests.kills.training import COMPARED, SMALL, write_inputs
from tests.kills.tries import ROOT

_KINDS = [
    ["train", "OUT=RUN/run", "ARGS=--copies 2 --order quasi-random"],
    ["train", "REFINERY=REFINERY", "OUT=RUN/run", "ARGS=--ema 0.9 --augment.cutmix 0.5"],
    ["train", "MODEL=mobilenet0.25 torchvision:squeezenet1_1", "REFINERY=mobilenet0.25", "ARGS=--runs RUN/runs"],
    ["label", "REFINERY=REFINERY", "OUT=RUN/labels", "ARGS=--format exact"],
]


def kill(folder: Path, kills: int, seed: int) -> Counter[str]:
    """Returns the kills by kind, of all these commands together."""
    inputs = write_inputs(folder)
    counts: Counter[str] = Counter()
    small = " ".join(word for word in SMALL)
    for number, kind in enumerate(_KINDS):
        places = {"REFINERY=REFINERY": f"REFINERY={inputs['REFINERY']}"}
        asked = [places.get(word, word).replace("RUN/", f"{folder}/try/") for word in kind]
        asked = [f"ARGS={small} {word.removeprefix('ARGS=')}" if word.startswith("ARGS=") else word for word in asked]
        words = ["make", "-C", str(ROOT), f"PYTHON={sys.executable}", f"DATA={inputs['SET']}", *asked]
        if share := (kills + number) // len(_KINDS):
            counts += survive(
                words,
                folder / "try",
                compare=[*COMPARED, "labels/*"],
                kills=share,
                seed=seed + number,
                content=content,
                name=name,
                ignore=IGNORED,
            )
    return counts
