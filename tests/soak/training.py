"""The rounds: trainings on a small part of `scenes`, in each storage and with each decoder that reads it."""

import itertools
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

import models
from data import DataError, decoders
from data.convert import Storage, convert_source
from data.loader import open_loader
from data.sources import Split, open_source
from train.config import configure
from train.job import check, resolve
from train.label import label
from train.loop import Trainer
from train.train import train

_IMAGES = {"train": 96, "val": 32}
_STUDENT, _OTHER, _REFINERY = "mobilenet0.25", "mobilenet0.5", "mobilenet0.5"
_EPOCHS, _THREADS = 3, 2

Work = Callable[[], None]


@dataclass(frozen=True)
class Configuration:
    """refinery: learns from a refinery, else from ground truth. stored: from its labels, which are stored first."""

    storage: str
    decoder: str
    refinery: bool = False
    stored: bool = False
    options: dict[str, Any] = field(default_factory=dict)


_GROWING = {"resolution_from": 0.5}
_BOTH = {"model": f"{_STUDENT} {_OTHER}"}

_STANDING = Configuration("jpeg", "ffcv")
CONFIGURATIONS = {
    f"{each.storage}-{each.decoder}": each
    for each in (
        Configuration("jpeg", "ffcv", refinery=True, options=_GROWING),
        Configuration("jpeg", "torchvision", refinery=True, options=_BOTH),
        Configuration("jpeg", "dali", refinery=True, stored=True),
        Configuration("raw", "ffcv", options=_GROWING),
        Configuration("raw", "torchvision", options=_BOTH),
        Configuration("raw", "dali", refinery=True, options={"copies": 2}),
        Configuration("blocks", "ffcv", refinery=True, stored=True, options=_BOTH),
    )
}


def is_installed(name: str) -> bool:
    """Whether a configuration's decoder is; a notice is printed of one that is not."""
    try:
        decoders.choose(CONFIGURATIONS[name].decoder, torch.device("cpu"))
    except DataError as error:
        print(f"{name} is left out: {error}", flush=True)
        return False
    return True


def works(folder: Path, names: Iterable[str] = CONFIGURATIONS) -> dict[str, Work]:
    """What a round of each configuration does; the converted sets and the refinery are written to the folder first."""
    source = open_source("scenes")
    # A fingerprint of its own: a run on the whole of `scenes` ends with drawing many crops again for their truth.
    source = replace(source, train=_first(source.train, "train"), val=_first(source.val, "val"), fingerprint="soak")
    for storage in sorted({_STANDING.storage, *(CONFIGURATIONS[name].storage for name in names)}):
        convert_source(source, folder / storage, storage=Storage(storage), processes=2)
    torch.manual_seed(0)
    torch.save(models.build(_REFINERY, len(source.class_names)).state_dict(), folder / "refinery.pt")
    return {name: partial(_round, CONFIGURATIONS[name], folder) for name in names}


def _options(data: Path, decoder: str) -> dict[str, Any]:
    return {
        "model": _STUDENT,
        "data": str(data),
        "decoder": decoder,
        "resolution": 48,
        "batch": 32,
        "threads": _THREADS,
        "device": "cpu",
        "compile": "never",
    }


def _first(split: Split, name: str) -> Split:
    return Split(split.items[: _IMAGES[name]], split.labels[: _IMAGES[name]], split.read)


def _round(configuration: Configuration, inputs: Path) -> None:
    """A whole run, and an epoch of crops that is left half-way; what it wrote is removed."""
    folder, data = inputs / "round", inputs / configuration.storage
    options = _options(data, configuration.decoder) | configuration.options | {"epochs": _EPOCHS}
    refinery = {"refinery": f"{_REFINERY}:{inputs / 'refinery.pt'}"} if configuration.refinery else {}
    if configuration.stored:
        label(configure(options | refinery | {"model": _STUDENT, "out": str(folder / "labels")}))
        refinery = {"labels.stored": str(folder / "labels")}
    for run in train(configure(options | refinery | {"runs": str(folder / "runs")})):
        assert run.result
        assert run.result["epochs"] == _EPOCHS
    loader = open_loader(
        data / "train.beton", resolution=32, batch_size=8, decoder=configuration.decoder, threads=_THREADS
    )
    for _ in itertools.islice(loader.epoch(0), 2):
        pass
    shutil.rmtree(folder)


class Over(Exception):
    """The time is up."""


class Standing(Trainer):
    """A run with no end in sight: after each of its epochs, a call of `between`, which raises Over in the end."""

    def __init__(self, folder: Path, between: Work):
        # So many that none is the last.
        config = configure(
            _options(folder / _STANDING.storage, _STANDING.decoder)
            | {"epochs": 1_000_000, "out": str(folder / "standing")}
        )
        data, (labels,) = check([config])
        super().__init__([resolve(config, data, labels)])
        self._between = between

    def validate(self) -> None:
        super().validate()
        self._between()
