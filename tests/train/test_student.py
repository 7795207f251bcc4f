"""A network in training: learning rate, normalisation, best epoch and checkpoint."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F

import models
from data.loader import open_loader
from kernels.normalise import Normalise
from tests.train.conftest import TINY
from train.config import OptimizerConfig, parse
from train.job import Job, check, resolve
from train.score import Answers, Scores, score_all
from train.student import Student

IMAGENET = models.normalisation("resnet18")
CPU = torch.device("cpu")


@pytest.fixture
def job_of(converted, tmp_path):
    def job_of(*words: str) -> Job:
        config = parse([*TINY, "--data", str(converted.folder), "--runs", str(tmp_path), *words])
        data, (labels,) = check([config])
        return resolve(config, data, labels)

    return job_of


def small(**options) -> Student:
    torch.manual_seed(0)
    network = models.build("mobilenet0.25", 3)
    options = {"normalisation": IMAGENET, "device": CPU} | options
    return Student("mobilenet0.25", network, OptimizerConfig(lr=0.1), **options)


def scores(top1: float) -> Scores:
    return Scores(top1, 100.0, 10, [(10, top1)], torch.zeros(10, dtype=torch.int64), 1.0)


@pytest.mark.parametrize("kind", ["sgd", "adamw", "adamp"])
def test_the_learning_rate_is_for_the_batch(job_of, kind):
    """In proportion to the batch, of all devices; the schedule multiplies it."""
    words = ["--optimizer.kind", kind, "--optimizer.lr", "0.08", "--optimizer.lr_batch", "64"]
    for batch, wanted in ((16, 0.02), (48, 0.06)):
        student = Student.of(job_of(*words, "--batch", str(batch)))
        assert student.lr == pytest.approx(wanted)
        student.set_rate(0.1)
        assert student.lr == pytest.approx(wanted / 10)


@pytest.mark.parametrize("model", ["mobilenet0.25", "timm:test_resnet"])
def test_a_student_is_scored_with_its_own_normalisation(job_of, converted, model):
    job = job_of("--model", model)
    student = Student.of(job)
    assert student.normalisation == models.normalisation(model)
    loader = open_loader(converted.beton("val"), resolution=32, batch_size=15, train=False)
    batch = next(iter(loader.epoch(0)))
    with torch.no_grad():
        # With its initial statistics, an untrained network has the same output for all images.
        for module in student.network.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.momentum = 1.0
        student.network.train()(Normalise(models.normalisation(model))(batch.crops))
        logits = student.network.eval()(Normalise(models.normalisation(model))(batch.crops))
    assert logits.std(dim=0).max() > 0.01
    answer = Answers([(student.scored, student.normalisation)], device=CPU, autocast=None)
    assert score_all(answer, loader)[0].loss == pytest.approx(F.cross_entropy(logits, batch.labels).item(), rel=1e-5)
    described = student.state()["network"]
    assert (tuple(described["mean"]), tuple(described["std"])) == models.normalisation(model)


def test_the_best_epoch_is_one_as_good_as_any_before():
    student = small()
    found = []
    for top1 in (0.0, 30.0, 50.0, 40.0, 50.0, 49.9, 60.0):
        student.count(scores(top1))
        found.append((student.is_best, student.best))
    assert found == [(True, 0), (True, 30), (True, 50), (False, 50), (True, 50), (False, 50), (True, 60)]


def test_restore_continues_from_state(job_of):
    """A new student takes over weights, average, momentum, loss scale, sums and best accuracy."""

    def made() -> Student:
        student = small(autocast=torch.float16, ema=0.5)
        student.job = SimpleNamespace(**vars(job_of()), resolution=32)
        return student

    first = made()
    for step in (100, 101):
        loss = first.network(torch.randn(4, 3, 32, 32)).square().sum()
        first.set_step(step)
        first.move(torch.autograd.grad(loss * first.scale, first.trained()))
        assert all(weight.grad is None for weight in first.network.parameters())
    first.scaler.update(2.0**7)
    first.sums += torch.tensor([1.0, 2.0, 3.0, 4.0])
    first.count(scores(70.0))
    state = first.state()
    second = made()
    second.restore(state)
    assert second.scaler.get_scale() == 2.0**7
    assert second.best == 70
    assert second.sums.tolist() == [1, 2, 3, 4]
    for one, other in ((first.network, second.network), (first.scored, second.scored)):
        for name, value in one.state_dict().items():
            assert torch.equal(value, other.state_dict()[name]), name
    assert not torch.equal(first.network.classifier.weight, first.scored.classifier.weight)
    for one, other in zip(first.network.parameters(), second.network.parameters(), strict=True):
        momentum = first.optimizer.state[one]["momentum_buffer"]
        assert momentum.any()
        assert torch.equal(momentum, second.optimizer.state[other]["momentum_buffer"])


def test_only_float16_has_a_scale(job_of):
    job = job_of()
    assert Student.of(job).scaler is None
    half = Student.of(replace(job, config=replace(job.config, precision="fp16")))
    assert half.scaler is not None
    assert half.scale == half.scaler.get_scale()
    assert Student.of(job).scale is None
