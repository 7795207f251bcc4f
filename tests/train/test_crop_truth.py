"""How often labels are correct for what crops of scenes show."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch

from data import scenes
from data.loader import CropBatch
from train.labels.source import Targets
from train.score.crop_truth import label_quality


class Crops:
    """Batches of 50 crops of 16 px of the first scenes; their image labels are correct for the first `right` seen."""

    num_samples = 150

    def __init__(self, right: int):
        rng = np.random.default_rng(1)
        corners = rng.integers(0, 16, (150, 2))
        self.boxes = np.concatenate([corners, np.full((150, 2), 16)], axis=1).astype(np.int32)
        self.indices = np.arange(150)
        self.truth = scenes.crop_truth("train", self.indices, self.boxes)
        self.labels = np.where(np.cumsum(self.truth >= 0) <= right, self.truth, (self.truth + 1) % 10)

    def epoch(self, number: int) -> Iterator[CropBatch]:
        assert number == 0
        for part in np.arange(150).reshape(3, 50):
            indices = torch.from_numpy(self.indices[part])
            yield CropBatch(
                crops=torch.zeros(50, 3, 16, 16, dtype=torch.uint8),
                labels=torch.from_numpy(self.labels[part]),
                indices=indices,
                copies=torch.zeros_like(indices),
                epoch=number,
                boxes=torch.from_numpy(self.boxes[part]),
                sizes=torch.full((50, 2), 32),
                flips=torch.zeros(50, dtype=torch.bool),
            )


def test_counts_only_crops_that_show_something():
    crops = Crops(right=20)
    seen = crops.truth >= 0
    assert 30 < seen.sum() < 150
    # The other labels are correct for every second image, seen or not.
    told = np.where(crops.indices % 2, crops.truth, (crops.truth + 1) % 10)

    def labels(batch: CropBatch) -> Targets:
        return Targets(ids=torch.from_numpy(told)[batch.indices])

    found = label_quality(crops, labels, device=torch.device("cpu"), autocast=None)
    assert found["crops"] == seen.sum()
    assert found["image_label_right"] == pytest.approx(100 * 20 / seen.sum())
    assert found["label_right"] == pytest.approx(100 * (seen & (crops.indices % 2 == 1)).sum() / seen.sum())
