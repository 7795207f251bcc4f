"""A resolved run: which options are part of its identity, and how it opens its loader."""

from dataclasses import asdict

import pytest

from train.config import Config, configure
from train.job import resolve
from train.labels.ground_truth import GroundTruthLabels

# Another value for each option: first those that determine a run's final weights, in the order of its configuration.
DECIDE = {
    "model": "resnet18",
    "data": None,  # another set: see below
    "epochs": 3,
    "resolution": 40,
    "batch": 12,
    "copies": 2,
    "order": "quasi-random",
    "seed": 1,
    "precision": "bf16",
    "replicas": 2,
    "optimizer.kind": "adamw",
    "optimizer.lr": 0.2,
    "optimizer.lr_batch": 128,
    "optimizer.momentum": 0.5,
    "optimizer.nesterov": True,
    "optimizer.weight_decay": 0.1,
    "schedule.kind": "cosine",
    "schedule.milestones": (0.5, 0.6),
    "schedule.gamma": 0.5,
    "schedule.warmup": 1.0,
    "labels.smoothing": 0.1,
    "loss.kind": "hard",
    "loss.temperature": 2.0,
    "loss.truth": 0.5,
    "loss.balance": 0.5,
    "ema": 0.9,
    "resolution_from": 0.5,
    "jitter": 1.0,
    "crop.scale": (0.2, 1.0),
    "crop.ratio": (1.0, 1.0),
    "crop.flip": False,
    "crop.center_ratio": 0.7,
    "augment.color_jitter": 0.4,
    "augment.lighting": 0.1,
    "augment.cutmix": 0.5,
    "augment.mixup": 0.5,
}
# Options that are part of the identity only together with another one.
WITH = {
    "augment.cutmix_beta": (2.0, {"augment.cutmix": 0.5}),
    "augment.mixup_beta": (2.0, {"augment.mixup": 0.5}),
    "augment.unmixed": (0.5, {"augment.mixup": 0.5}),
    "augment.refinery_sees": ("plain", {"augment.mixup": 0.5}),
    "reduce": ("bf16", {"replicas": 2}),
}
# A run's folder and speed.
LEAVE = {
    "recipe": "quick",
    "out": "here",
    "runs": "there",
    "save_minutes": 1.0,
    "device": "cpu",
    "decoder": "torchvision",
    "threads": 1,
    "resident": 0.1,
    "compile": "never",
    "cuda_graphs": True,
    "deterministic": True,
}
# Options of labels, which have their own identity, and initial weights, which have a digest.
ELSEWHERE = {"refinery", "pretrained", "labels.bn", "labels.resolution", "labels.per", "labels.taxonomy"}
ELSEWHERE |= {"labels.stored", "labels.pooled", "labels.cycle"}

USUAL = {"model": "mobilenet0.25", "batch": 16, "epochs": 2, "resolution": 32, "precision": "fp32", "device": "cpu"}


@pytest.fixture
def job(converted):
    def job(**options):
        config = configure(USUAL | {"data": str(converted.folder)} | options)
        return resolve(config, converted, GroundTruthLabels(3, config.labels.smoothing))

    return job


def test_every_option_is_listed_as_part_of_the_identity_or_not():
    def dotted(values, prefix=""):
        for name, value in values.items():
            yield from dotted(value, f"{prefix}{name}.") if isinstance(value, dict) else [f"{prefix}{name}"]

    assert set(dotted(asdict(Config()))) == {*DECIDE, *WITH, *LEAVE, *ELSEWHERE}


@pytest.mark.parametrize("option", [name for name, value in DECIDE.items() if value is not None])
def test_options_that_determine_the_weights_change_the_identity(job, option):
    usual, other = job(), job(**{option: DECIDE[option]})
    assert other.identity != usual.identity
    assert other.folder != usual.folder


@pytest.mark.parametrize("option", WITH)
def test_options_that_determine_the_weights_only_with_another_one(job, option):
    value, needed = WITH[option]
    assert job(**needed, **{option: value}).identity != job(**needed).identity
    assert job(**{option: value}).identity == job().identity


@pytest.mark.parametrize("option", LEAVE)
def test_options_of_speed_and_place_do_not_change_the_identity(job, option):
    usual = {"recipe": "label-refinery"} if option == "recipe" else {}
    given = {"optimizer.lr": 0.1, "optimizer.kind": "sgd", "schedule.kind": "step", "optimizer.weight_decay": 0.0}
    given |= {"optimizer.lr_batch": 256, "optimizer.momentum": 0.9, "schedule.warmup": 0.0, "optimizer.nesterov": False}
    given |= {"resolution_from": 1.0, "ema": 0.0}
    assert job(**given, **{option: LEAVE[option]}).identity == job(**given, **usual).identity


def test_copies_and_order_are_passed_to_the_loader(job):
    """And its seed, its crop rule and the resolution of the epoch."""
    usual = job(**{"crop.flip": False, "seed": 3})
    loader = usual.open_crops()
    assert (loader.steps, loader.copies, loader._order) == (3, 1, "random")
    batch = next(loader.epoch(0))
    assert not batch.flips.any()
    seeded = job(seed=4).open_crops()
    assert not next(seeded.epoch(0)).indices.equal(batch.indices)
    assert seeded._seed == job(seed=4).crop_seed != usual.crop_seed
    other = job(copies=2, order="quasi-random").open_crops(resolution=40)
    assert (other.steps, other.copies, other._order) == (6, 2, "quasi-random")
    assert next(other.epoch(0)).crops.shape[-1] == 40
