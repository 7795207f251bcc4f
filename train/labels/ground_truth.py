"""The image's label, for every crop of it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from data.loader import CropBatch
from train import TrainError
from train.labels.source import Asked, Crops, Labels, LabelSource, Targets


@dataclass(frozen=True)
class GroundTruthOptions:
    """Options of the images' own labels.

    Args:
        smoothing: without a refinery, the share of each label spread over all classes, 0 to 1
    """

    smoothing: float = 0.0


@dataclass(frozen=True)
class GroundTruthLabels(Labels):
    """The images' own labels. smoothing: see GroundTruth."""

    num_classes: int
    smoothing: float

    options = ("labels.smoothing",)
    elsewhere = "is for ground truth; other labels are soft already"

    @classmethod
    def asked(cls, given: GroundTruthOptions, config: Asked) -> bool:
        return True  # if nothing else is

    @classmethod
    def check(cls, given: GroundTruthOptions, config: Asked) -> None:
        if not 0 <= given.smoothing < 1:
            raise TrainError(f"labels.smoothing={given.smoothing}: give a share from 0 to below 1")

    @classmethod
    def find(cls, given: GroundTruthOptions, config: Asked, class_names: Sequence[str]) -> "GroundTruthLabels":
        return cls(len(class_names), given.smoothing)

    @classmethod
    def origin(cls, identity: dict[str, Any]) -> str:
        smoothing = identity["labels"]["smoothing"]
        return "ground truth" + (f", smoothed by {smoothing:g}" if smoothing else "")

    @property
    def identity(self) -> dict[str, Any]:
        return {"smoothing": self.smoothing}

    def describe(self) -> str:
        smoothed = f", smoothed by {self.smoothing:g}" if self.smoothing else ""
        return f"ground truth, the label of the whole image for every crop{smoothed}"

    def open(self, crops: Crops) -> LabelSource:
        return GroundTruth(self.num_classes, self.smoothing)


class GroundTruth(LabelSource):
    """The image's class id, or with smoothing e (0 <= e < 1) the share e of it spread evenly over all classes."""

    def __init__(self, num_classes: int, smoothing: float = 0.0):
        super().__init__()
        self.num_classes = num_classes
        self.smoothing = smoothing

    def forward(self, batch: CropBatch) -> Targets:
        if not self.smoothing:
            return Targets(ids=batch.labels)
        hard = torch.nn.functional.one_hot(batch.labels, self.num_classes).float()
        return Targets(probabilities=hard * (1 - self.smoothing) + self.smoothing / self.num_classes)
