"""The label of the whole image, for every crop of it."""

import torch

from data.loader import CropBatch
from train.labels import LabelSource, Targets


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
