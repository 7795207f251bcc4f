"""The picture of labelled crops: the crops and labels of the run's first step."""

import io

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from data.loader import open_loader
from train.labels.source import Targets
from train.loop import Trainer
from train.runs import crops
from train.runs.crops import labelled_crops

NAMES = ("cat", "dog", "a very long name of a class that does not fit below its crop")


@pytest.fixture
def batch(converted):
    loader = open_loader(converted.beton("train"), resolution=128, batch_size=20, decoder="ffcv")
    return next(iter(loader.epoch(0)))


@pytest.fixture
def texts(monkeypatch):
    """The lines that are written, with their colours."""
    found = []
    original = crops.ImageDraw.ImageDraw.text

    def text(self, place, words, fill, **options):
        found.append((words, fill))
        original(self, place, words, fill=fill, **options)

    monkeypatch.setattr(crops.ImageDraw.ImageDraw, "text", text)
    return found


def test_crops_and_both_labels(batch, texts):
    own = batch.labels.tolist()
    p = torch.nn.functional.one_hot((batch.labels + torch.arange(20) % 2) % 3, 3) * 0.7 + 0.1
    picture = labelled_crops(batch, Targets(probabilities=p), NAMES, labelled_by="refinery")
    assert picture.size == (4 * 134 + 6, 4 * 162 + 6)
    pixels = np.asarray(picture)
    for number in range(16):
        left, top = 6 + number % 4 * 134, 6 + number // 4 * 162
        shown = pixels[top : top + 128, left : left + 128]
        assert np.array_equal(shown, batch.crops[number].permute(1, 2, 0).numpy())
    assert len(texts) == 32
    for number in range(16):
        (image, black), (label, colour) = texts[2 * number : 2 * number + 2]
        said = (own[number] + number % 2) % 3
        assert image.startswith(f"image: {NAMES[own[number]]}"[:20])
        assert label.startswith(f"refinery: {NAMES[said]}"[:18])
        assert label.endswith(" 80 %")
        assert black == "black"
        # If they differ, the colour shows it.
        assert colour == ("firebrick" if number % 2 else "black")


def test_labels_of_images_have_one_line(batch, texts):
    picture = labelled_crops(batch.first(3), Targets(ids=batch.labels[:3]), NAMES, labelled_by=None)
    assert picture.size == (2 * 134 + 6, 2 * 148 + 6)
    assert len(texts) == 3


def test_a_run_shows_the_crops_of_its_first_step(run, refinery, monkeypatch):
    batches = []
    original = Trainer.train_on

    def train_on(self, batch, *where):
        batches.append((batch, self.labels(batch)))
        original(self, batch, *where)

    shown = run("--refinery", str(refinery), "--epochs", "1", "--out", "shown")
    monkeypatch.setattr(Trainer, "_show", lambda self, batch: 0.0)
    monkeypatch.setattr(Trainer, "train_on", train_on)
    plain = run("--refinery", str(refinery), "--epochs", "1", "--out", "plain")
    (image,) = EventAccumulator(str(shown.folder / "tensorboard")).Reload().Images("train/crops")
    first, targets = batches[0]
    wanted = labelled_crops(first, targets, ("class0", "class1", "class2"), labelled_by="refinery")
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(image.encoded_image_string))), np.asarray(wanted))
    # Showing them does not change the training.
    one, other = (torch.load(each.weights, weights_only=True)["model"] for each in (shown, plain))
    assert all(torch.equal(one[name], other[name]) for name in one)
