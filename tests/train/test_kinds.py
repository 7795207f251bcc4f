"""The kinds of labels: how options select one, their options, and what adding a kind takes."""

from dataclasses import dataclass

import pytest
import torch

from train import TrainError, labels
from train.config import configure
from train.labels import KINDS
from train.labels.source import Labels, LabelSource, Targets


@pytest.mark.parametrize(
    ("options", "kind"),
    [
        ({}, "ground_truth"),
        ({"labels.smoothing": 0.1}, "ground_truth"),
        ({"refinery": "resnet18"}, "refinery"),
        ({"refinery": "resnet18", "labels.per": "image"}, "refinery"),
        ({"refinery": "resnet18", "labels.per": "category", "labels.bn": "running"}, "category"),
        ({"labels.taxonomy": "is_a.txt"}, "taxonomy"),
        ({"labels.taxonomy": "is_a.txt", "loss.kind": "hard"}, "taxonomy"),
    ],
)
def test_options_select_the_kind_of_labels(options, kind):
    config = configure(options)
    labels.check(config)
    assert labels.kind_of(config) is KINDS[kind]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"refinery": "resnet18", "labels.smoothing": 0.1}, "labels.smoothing is for ground truth"),
        ({"labels.taxonomy": "is_a.txt", "labels.bn": "running"}, "labels.bn is for a refinery's labels"),
        ({"loss.temperature": 2.0}, "loss.temperature is for a refinery's labels"),
        ({"refinery": "resnet18", "labels.resolution": 0}, "labels.resolution=0: must be at least 1"),
    ],
)
def test_contradictory_options_are_refused(options, says):
    with pytest.raises(TrainError, match=f"^{says}"):
        labels.check(configure(options))


def test_every_option_of_labels_belongs_to_a_kind():
    """An option that belonged to none would be accepted without an effect."""
    belonging = {option for kind in KINDS.values() for option in kind.options}
    config = configure({})
    for group in ("labels", "loss"):
        assert {f"{group}.{name}" for name in vars(getattr(config, group))} - {"loss.balance"} <= belonging
    # The classes of the images can be balanced with any labels.
    assert "loss.balance" not in belonging
    assert {"refinery", "jitter"} <= belonging


class Uniform(LabelSource):
    def forward(self, batch):
        return Targets(probabilities=torch.full((len(batch.labels), 3), 1 / 3, device=batch.crops.device))


@dataclass(frozen=True)
class UniformLabels(Labels):
    """All classes equally likely: a kind only for this test, selected by a taxonomy of this name."""

    options = ("labels.taxonomy",)
    elsewhere = "is for nobody"

    @classmethod
    def asked(cls, given, config):
        return given.taxonomy == "uniform"

    @classmethod
    def check(cls, given, config):
        pass

    @classmethod
    def find(cls, given, config, class_names):
        return cls()

    @classmethod
    def origin(cls, identity):
        return "no knowledge"

    @property
    def identity(self):
        return {"uniform": True}

    def describe(self):
        return "the same for all"

    def open(self, crops):
        return Uniform()


def test_a_new_kind_needs_only_a_class_and_an_entry(run, monkeypatch, capsys):
    monkeypatch.setattr(labels, "KINDS", {"uniform": UniformLabels, **KINDS})
    finished = run("--labels.taxonomy", "uniform", "--epochs", "1")
    assert finished.identity["labels"] == {"kind": "uniform", "uniform": True}
    assert finished.identity["refinery"] is None
    assert "labels  the same for all" in capsys.readouterr().out
    assert labels.origin_of(finished.identity) == "no knowledge"
    assert finished.metrics[0]["loss"] < 0.1  # the KL of an untrained network, whose output is nearly uniform too
    with pytest.raises(TrainError, match="jitter is for a refinery's labels"):
        run("--labels.taxonomy", "uniform", "--jitter", "1")
