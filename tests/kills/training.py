"""Training under kills: a few small runs with different kinds of state to continue from."""

import importlib
from collections import Counter
from pathlib import Path

from tests.kills.harness import once, survive
from tests.kills.runs import IGNORED, content, name
from tests.pictures import write_class_folders

# Checkpoints after nearly every step, in addition to those of epochs.
SMALL = [
    *("--resolution", "32", "--batch", "12", "--epochs", "2", "--recipe", "quick", "--device", "cpu"),
    *("--precision", "fp32", "--save_minutes", "0.0005", "--model", "mobilenet0.25"),
]
COMPARED = [f"**/{name}" for name in ("last.pt", "best.pt", "metrics.jsonl", "result.json", "identity.json")]

_DECODERS = ("data.decoders.ffcv", "data.decoders.torchvision")

# Dropout, in a network whose checkpoints are small.
_DROPOUT = "torchvision:squeezenet1_1"

# Without fp16 and its loss scaler, which need a CUDA device with tensor cores.
_KINDS = [
    ["--copies", "2", "--order", "quasi-random", "--precision", "auto", "--out", "run"],
    ["--ema", "0.9", "--resolution", "64", "--resolution_from", "0.5", "--epochs", "3", "--out", "run"],
    ["--model", f"mobilenet0.25 {_DROPOUT}", "--refinery", "REFINERY"],
    ["--model", _DROPOUT, "--decoder", "torchvision", "--out", "run"],
    ["--refinery", "REFINERY", "--augment.cutmix", "0.5", "--augment.color_jitter", "0.4", "--out", "run"],
    ["--refinery", "mobilenet0.25", "--epochs", "1", "--optimizer.kind", "sgd", "--replicas", "2"],
    ["--labels.stored", "LABELS", "--labels.cycle", "1", "--ema", "0.9", "--loss.kind", "hard", "--out", "run"],
]


def write_inputs(folder: Path) -> dict[str, str]:
    """Makes, in a folder, a converted set, a refinery on it and its labels of one epoch. Returns their paths."""
    # Imported before forking, since each fork would need seconds for it.
    for module in ("train.train", "train.label", "train.maps", "train.launch", "timm.utils", *_DECODERS):
        importlib.import_module(module)
    write_class_folders(folder / "images" / "train", 3, 24)
    write_class_folders(folder / "images" / "val", 3, 8, seed=1000)
    converted, refinery, labels = (str(folder / name) for name in ("set", "refinery", "labels"))
    once(["data.convert", "--data", str(folder / "images"), "--out", converted], folder / "first")
    once(["train", "--data", converted, *SMALL, "--model", "mobilenet0.5", "--out", refinery], folder / "first")
    labelling = ["--refinery", refinery, "--out", labels, "--epochs", "1"]
    once(["train.label", "--data", converted, *SMALL, *labelling], folder / "first")
    return {"SET": converted, "REFINERY": refinery, "LABELS": labels}


def kill(folder: Path, kills: int, seed: int, during: str | None = None) -> Counter[str]:
    """Returns the kills by kind, of all kinds of training together. during: as in harness.survive."""
    inputs = write_inputs(folder)
    counts: Counter[str] = Counter()
    for number, kind in enumerate(_KINDS):
        words = ["train", "--data", inputs["SET"], *SMALL, *(inputs.get(word, word) for word in kind)]
        if share := (kills + number) // len(_KINDS):
            counts += survive(
                words,
                folder / "try",
                compare=COMPARED,
                kills=share,
                seed=seed + number,
                content=content,
                name=name,
                ignore=IGNORED,
                during=during,
            )
    return counts
