"""Scoring, with more than five classes."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import models
from data.originals import Originals
from data.sources import open_source
from train.score import Said, answering, likeliest_five, score

IMAGENET = models.normalisation("resnet18")
CPU = torch.device("cpu")


class Counting(nn.Module):
    """Predicts class 0 first, then class 1 and so on, for any input; of `classes` classes."""

    def __init__(self, classes: int):
        super().__init__()
        self.classes = classes

    def forward(self, crops: torch.Tensor) -> torch.Tensor:
        return -torch.arange(float(self.classes)).repeat(len(crops), 1)


@pytest.fixture(scope="module")
def loader(tmp_path_factory):
    """Eight classes of 1, 2, ... 8 images, in batches of 5."""
    root = tmp_path_factory.mktemp("eight")
    for label in range(8):
        (root / str(label)).mkdir()
        for image in range(label + 1):
            Image.new("RGB", (8, 8), (30 * label, 20 * image, 0)).save(root / str(label) / f"{image}.png")
    source = open_source(str(root), whole=True)
    return Originals(source.val, source.class_names, resolution=8, batch_size=5)


def test_the_first_and_the_first_five_of_eight(loader):
    scores = score(Counting(8), loader, IMAGENET, device=CPU, autocast=None)
    assert (scores.images, scores.top1, scores.top5) == (36, pytest.approx(100 / 36), pytest.approx(1500 / 36))
    assert scores.per_class == [(1, 100.0), *((label + 1, 0.0) for label in range(1, 8))]
    assert scores.predicted.tolist() == [0] * 36
    own = -(-torch.arange(8.0)).log_softmax(dim=0)
    assert scores.loss == pytest.approx(sum((label + 1) * float(own[label]) for label in range(8)) / 36, rel=1e-6)


def test_answers_for_each_image(loader):
    """Also of a network that lacks two of the classes, whose images are not scored."""
    chances = (-torch.arange(8.0)).softmax(dim=0)
    for columns in (None, [7, 6, 5, -1, 3, 2, 1, -1]):
        said: list[Said] = []
        scores = score(Counting(8), loader, IMAGENET, device=CPU, autocast=None, columns=columns, each=said.append)
        known = range(8) if columns is None else [label for label in range(8) if columns[label] >= 0]
        assert scores.images == sum(label + 1 for label in known)
        labels = torch.cat([each.labels for each in said])
        assert labels.tolist() == [label for label in known for _ in range(label + 1)]
        assert torch.cat([each.indices for each in said]).unique().numel() == scores.images
        order = list(range(8)) if columns is None else [6, 5, 4, 2, 1, 0]
        assert all((each.likeliest == torch.tensor(order[:5])).all() for each in said)
        # The network's outputs in the order of `order`, and their probabilities.
        outputs = list(range(8)) if columns is None else [1, 2, 3, 5, 6, 7]
        among = chances[outputs] / chances[outputs].sum()
        for each in said:
            torch.testing.assert_close(each.probabilities, among[:5].expand(len(each.labels), 5))
            wanted = [among[order.index(label)].item() for label in each.labels.tolist()]
            torch.testing.assert_close(each.of_label, torch.tensor(wanted))
        assert scores.top1 == pytest.approx(100 * (order[0] + 1) / scores.images)
        assert scores.top5 == pytest.approx(100 * sum(label + 1 for label in order[:5]) / scores.images)


@pytest.mark.parametrize("classes", [2, 5, 6, 20])
def test_likeliest_five(classes):
    logits = torch.from_numpy(np.random.default_rng(0).permuted(np.arange(4.0 * classes).reshape(4, -1), axis=1))
    places, chances = likeliest_five(logits)
    assert places.tolist() == logits.argsort(dim=1, descending=True)[:, :5].tolist()
    torch.testing.assert_close(chances, logits.softmax(dim=1))


def test_an_answer_needs_no_gradient_and_no_statistics_of_its_batch():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Dropout(), nn.Flatten(), nn.Linear(288, 4))
    answer = answering(network.train(), IMAGENET, device=CPU, autocast=None)
    crops = torch.randint(0, 256, (5, 3, 8, 8), dtype=torch.uint8)
    said = answer(crops)
    assert not said.requires_grad
    for row in range(5):
        torch.testing.assert_close(answer(crops[row : row + 1])[0], said[row])
