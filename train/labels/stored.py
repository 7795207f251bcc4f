"""Labels that a refinery gave to planned crops earlier, read from files (train/label.py writes them).

A crop is a function of seed, epoch, image and copy, so these are enough to find a stored label.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from data.loader import CropBatch
from train import TrainError
from train.labels.maps import MapLabels
from train.labels.source import Asked, Crops, Labels, LabelSource, Plan, Targets
from train.labels.store import LabelsFromStore, Store, StoredOptions, open_store


@dataclass(frozen=True)
class StoredLabels(LabelsFromStore):
    """A refinery's stored labels of planned crops. epochs: how many different ones the run sees."""

    epochs: int

    options = (
        *("labels.stored", "labels.cycle", "labels.pooled"),
        *("refinery", "loss.kind", "loss.temperature", "loss.truth"),
    )

    @classmethod
    def asked(cls, given: StoredOptions, config: Asked) -> bool:
        return bool(given.stored)

    @classmethod
    def check(cls, given: StoredOptions, config: Asked) -> None:
        if given.cycle is not None and given.cycle < 1:
            raise TrainError(f"labels.cycle={given.cycle}: must be at least 1")
        if config.jitter:
            raise TrainError("jitter moves crops, and stored labels are of crops as planned; name a refinery instead")
        for option in config.changed:
            if option.startswith("labels.") and option not in cls.options:
                raise TrainError(f"{option} has no effect with labels.stored, which were made beforehand; leave it out")

    @classmethod
    def find(cls, given: StoredOptions, config: Asked, class_names: Sequence[str]) -> Labels:
        store = open_store(str(given.stored))
        made, epochs = store.description, store.epochs
        if config.refinery:
            store.check_refinery(config.refinery, class_names)
        if made.format == "map":
            return MapLabels.find(given, config, class_names)
        if given.pooled != "logits":
            raise TrainError(
                f"labels.pooled={given.pooled}: is for maps, and LABELS={store.folder} holds labels of crops"
            )
        if config.loss.temperature != 1 and made.format == "packed":
            raise TrainError(
                f"loss.temperature={config.loss.temperature:g}: packed labels hold probabilities at temperature 1; "
                "label with --format exact, or leave it out"
            )
        if config.copies > made.copies:
            raise TrainError(
                f"copies={config.copies}: LABELS={store.folder} holds labels of {made.copies} of an image's crops"
            )
        for name in ("scale", "ratio", "flip"):
            asked, there = getattr(config.crop, name), getattr(made.crop, name)
            if asked not in (None, there):
                raise TrainError(
                    f"crop.{name}={_listed(asked)}: LABELS={store.folder} are of crops with {_listed(there)}; leave it "
                    "out, or label again"
                )
        store.check_sizes()
        if not epochs:
            raise TrainError(f"LABELS={store.folder}: no epoch is finished yet; label some with python -m train.label")
        taken = min(given.cycle or config.epochs, config.epochs)
        if taken > epochs:
            asked = f"labels.cycle={given.cycle}" if given.cycle else f"epochs={config.epochs}"
            raise TrainError(
                f"{asked}: LABELS={store.folder} holds {epochs} epochs; label more with the same command, train for "
                f"{epochs}, or repeat them with --labels.cycle {epochs}"
            )
        return cls(store, taken)

    @classmethod
    def origin(cls, identity: dict[str, Any]) -> str:
        return f"{identity['refinery']['network']}, stored"

    @property
    def plan(self) -> Plan:
        made = self.store.description
        assert made.resolution
        return Plan(made.seed, made.crop, made.copies, made.resolution, self.epochs)

    @property
    def identity(self) -> dict[str, Any]:
        made = self.store.description
        how = {name: made.refinery[name] for name in ("bn", "resolution")}
        return how | {"store": made.key, "crop_seed": made.seed, "epochs": self.epochs}

    def describe(self) -> str:
        made = self.store.description
        return (
            f"stored in {self.store.folder}: {made.refinery['network']}, with {made.refinery['bn']} statistics, "
            f"{made.kind}, {made.bytes_per_crop} bytes per crop, {self.epochs} epochs"
        )

    def open(self, crops: Crops) -> LabelSource:
        for notice in self._notices(crops):
            print(f"labels: {notice}", flush=True)
        return Stored(self.store)

    def _notices(self, crops: Crops) -> list[str]:
        """How the run differs from the making of its labels, in ways that would change the refinery's labels."""
        made, config = self.store.description, crops.config
        notices = []
        if made.refinery["bn"] == "batch" and (config.batch, config.order) != (made.batch, made.order):
            notices.append(
                f"made with the statistics of batches of {made.batch} in {made.order} order; this run takes batches of "
                f"{config.batch} in {config.order} order"
            )
        if config.precision != made.precision:
            notices.append(f"made in {made.precision}; this run computes in {config.precision}")
        others = [side for side in crops.resolutions if side != made.resolution]
        if others:
            notices.append(
                f"made of crops of {made.resolution} px; those of {', '.join(map(str, others))} px have the same boxes "
                "but other pixels, for which the refinery might give other labels"
            )
        return notices


def _listed(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


class Stored(LabelSource):
    """The stored labels of a plan's crops. Raises TrainError when a damaged epoch is first used."""

    def __init__(self, store: Store):
        super().__init__()
        self._store = store
        self._copies = store.description.copies
        self._format = store.description.build_rows()
        self._epoch, self._rows = -1, np.empty((0, 0), np.uint8)

    def fetch(self, indices: NDArray[np.int64], copies: NDArray[np.int64], epoch: int) -> torch.Tensor:
        """The rows of these crops, uint8 [B, bytes_per_crop]."""
        if epoch != self._epoch:
            self._epoch, self._rows = epoch, self._store.rows(epoch)
        return torch.from_numpy(self._rows[indices * self._copies + copies])

    def forward(self, batch: CropBatch) -> Targets:
        assert batch.labels_on_disk is not None
        targets: Targets = self._format.targets(batch.labels_on_disk)
        return targets
