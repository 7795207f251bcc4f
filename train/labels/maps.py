"""Label maps: a refinery's labels of each part of an image, pooled over each crop's box (ReLabel: Yun et al. 2021).

train/maps.py makes them, train/trees.py imports and exports them, kernels/pool_labels.py pools them over a crop's box.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from data.loader import CropBatch
from data.sets import ConvertedSet
from kernels.pool_labels import MOST_CLASSES, pool_labels
from train import TrainError
from train.labels.rows import CellRows
from train.labels.source import Asked, Crops, LabelSource, Targets
from train.labels.store import LabelsFromStore, Store, StoredOptions, existing_store, open_store


def open_maps(folder: str | Path) -> Store:
    """The finished label maps in a folder. Raises TrainError if there are none."""
    store = open_store(folder)
    if store.description.format != "map":
        raise TrainError(f"LABELS={folder}: holds {store.description.kind} labels of crops and no maps")
    store.check_sizes()
    if not store.epochs:
        raise TrainError(f"LABELS={folder}: its maps are not finished; make them with the same command")
    return store


def existing_maps(folder: Path) -> Store | None:
    """The maps, finished or not, in a folder that maps are written to.

    Raises TrainError if it holds anything else, or cannot be written.
    """
    store = existing_store(folder)
    if store and store.description.format != "map":
        raise TrainError(
            f"OUT={folder}: holds {store.description.kind} labels of crops and no maps; give another folder"
        )
    return store


def check_classes(data: ConvertedSet) -> None:
    """Raises TrainError for data with more classes than maps can be pooled for."""
    if len(data.class_names) > MOST_CLASSES:
        raise TrainError(
            f"{data.folder}: has {len(data.class_names)} classes; maps are pooled of {MOST_CLASSES} at most"
        )


@dataclass(frozen=True)
class MapLabels(LabelsFromStore):
    """Label maps: a refinery's labels of every part of each image, pooled over each crop's box (ReLabel)."""

    pooled: str

    options = ("labels.stored", "labels.pooled", "refinery", "loss.kind", "loss.truth")

    @classmethod
    def asked(cls, given: StoredOptions, config: Asked) -> bool:
        return False  # StoredLabels finds them, in the folder that it was given

    @classmethod
    def check(cls, given: StoredOptions, config: Asked) -> None:
        """StoredLabels checks everything that can be checked before the folder is read."""

    @classmethod
    def find(cls, given: StoredOptions, config: Asked, class_names: Sequence[str]) -> "MapLabels":
        store = open_maps(str(given.stored))
        if given.cycle is not None:
            raise TrainError(f"labels.cycle={given.cycle}: maps label the crops of any epoch; leave it out")
        if config.loss.temperature != 1:
            raise TrainError(
                f"loss.temperature={config.loss.temperature:g}: labels from maps are probabilities at temperature 1; "
                "leave it out"
            )
        return cls(store, given.pooled)

    @classmethod
    def origin(cls, identity: dict[str, Any]) -> str:
        return f"{identity['refinery']['network']}, maps"

    @property
    def identity(self) -> dict[str, Any]:
        made = self.store.description
        identity = {"store": made.key, "bn": made.refinery["bn"], "resolution": None}
        return identity | ({"pooled": self.pooled} if self.pooled != "logits" else {})

    def describe(self) -> str:
        made = self.store.description
        side = f" at {made.resolution} px" if made.resolution else ""
        size = f"{made.bytes_per_crop} bytes per image"
        pooled = f", {self.pooled} pooled" if self.pooled != "logits" else ""
        return f"{made.kind}, in {self.store.folder}: {made.refinery['network']}{side}, {size}{pooled}"

    def open(self, crops: Crops) -> LabelSource:
        return Maps(self.store, self.pooled)


class Maps(LabelSource):
    """The label maps of images, pooled over each crop's box. Raises TrainError for damage when first used.

    pooled: logits or probabilities; see kernels.pool_labels.
    """

    def __init__(self, store: Store, pooled: str = "logits"):
        super().__init__()
        self._pooled = pooled
        made = store.description
        assert made.k
        assert made.cells
        self._store = store
        self._classes = made.data["classes"]
        self._format = CellRows(self._classes, made.k, made.cells)
        self._rows: NDArray[np.uint8] | None = None

    def fetch(self, indices: NDArray[np.int64], copies: NDArray[np.int64], epoch: int) -> torch.Tensor:
        """The maps of these crops' images, uint8 [B, bytes of a map]."""
        if self._rows is None:
            self._rows = self._store.rows(0)
        return torch.from_numpy(self._rows[indices])

    def forward(self, batch: CropBatch) -> Targets:
        assert batch.labels_on_disk is not None
        logits, ids = self._format.unpack(batch.labels_on_disk)
        corners = torch.cat([batch.boxes[:, :2], batch.boxes[:, :2] + batch.boxes[:, 2:]], dim=1)
        shares = corners.float() / batch.sizes.repeat(1, 2)
        return Targets(probabilities=pool_labels(logits, ids, shares, self._classes, kind=self._pooled))
