"""The rounds: trainings on a small part of `scenes`, in each storage and with each decoder that reads it."""

import itertools
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import models
from data import DataError, decoders
from data.convert import Storage, convert_source
from data.loader import open_loader
from data.sources import Split, open_source
from tests.soak.verdict import Round
from train.config import Config, configure
from train.job import check, resolve
from train.label import label
from train.loop import Trainer
from train.train import train

_IMAGES = {"train": 128, "val": 64}
_STUDENT, _OTHER, _REFINERY = "mobilenet0.25", "mobilenet0.5", "mobilenet0.5"
_EPOCHS = 3

Work = Callable[[], None]


def works(folder: Path) -> dict[str, Work]:
    """What a round of each configuration does; the converted sets and the refinery are written to the folder first."""
    source = open_source("scenes")
    # Its own fingerprint: of the whole set, a run would end with drawing the truth of many crops again.
    source = replace(source, train=_first(source.train, "train"), val=_first(source.val, "val"), fingerprint="soak")
    for storage in ("jpeg", "raw", "blocks"):
        convert_source(source, folder / storage, storage=Storage(storage), processes=2)
    torch.manual_seed(0)
    torch.save(models.build(_REFINERY, len(source.class_names)).state_dict(), folder / "refinery.pt")

    refinery = {"refinery": f"{_REFINERY}:{folder / 'refinery.pt'}"}
    both = {"model": f"{_STUDENT} {_OTHER}"}
    grows = {"resolution_from": 0.5}
    asked: dict[tuple[str, str], tuple[dict[str, Any], bool]] = {
        # Options, and whether the refinery's labels are stored first and read.
        ("jpeg", "ffcv"): (refinery | grows, False),
        ("jpeg", "torchvision"): (refinery | both, False),
        ("jpeg", "dali"): (refinery, True),
        ("raw", "ffcv"): (grows, False),
        ("raw", "torchvision"): (both, False),
        ("raw", "dali"): (refinery | {"copies": 2}, False),
        ("blocks", "ffcv"): (refinery | both, True),
    }
    found: dict[str, Work] = {}
    for (storage, decoder), (options, stored) in asked.items():
        try:
            decoders.choose(decoder, torch.device("cpu"))
        except DataError as error:
            print(f"{storage}, {decoder} is left out: {error}", flush=True)
            continue
        options = _options(folder / storage, decoder) | {"epochs": _EPOCHS} | options
        found[f"{storage}, {decoder}"] = lambda options=options, stored=stored: _round(folder / "round", options, stored)
    return found


def _options(data: Path, decoder: str) -> dict[str, Any]:
    return {
        "model": _STUDENT,
        "data": str(data),
        "decoder": decoder,
        "resolution": 48,
        "batch": 32,
        "threads": 2,
        "device": "cpu",
        "compile": "never",
    }


def _first(split: Split, name: str) -> Split:
    return Split(split.items[: _IMAGES[name]], split.labels[: _IMAGES[name]], split.read)


def _round(folder: Path, options: dict[str, Any], stored: bool) -> None:
    """A whole run, stored labels first where asked for, and an epoch that is left half-way; the files are removed."""
    if stored:
        made = {name: value for name, value in options.items() if name != "model"}
        label(configure(made | {"out": str(folder / "labels")}))
        options = {name: value for name, value in options.items() if name != "refinery"}
        options |= {"labels.stored": str(folder / "labels")}
    runs = train(configure(options | {"runs": str(folder / "runs")}))
    assert all(run.result and run.result["epochs"] == _EPOCHS for run in runs)
    loader = open_loader(
        Path(options["data"], "train.beton"),
        resolution=options["resolution"],
        batch_size=8,
        decoder=options["decoder"],
        threads=2,
    )
    assert sum(1 for _ in itertools.islice(loader.epoch(0), 2)) == 2
    shutil.rmtree(folder)


class Over(Exception):
    """The time is up."""


class Standing(Trainer):
    """A run with no end in sight: after each of its epochs, a call of `between`, which raises Over in the end."""

    def __init__(self, folder: Path, between: Work):
        # So many that none is the last.
        config: Config = configure(
            _options(folder / "jpeg", "ffcv") | {"epochs": 1_000_000, "out": str(folder / "standing")}
        )
        data, (labels,) = check([config])
        super().__init__([resolve(config, data, labels)])
        self._between = between

    def validate(self) -> None:
        super().validate()
        self._between()


__all__ = ["Over", "Round", "Standing", "works"]
