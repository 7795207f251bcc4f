"""Adversarial jitter: its gradient, and what it does not change."""

import copy
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

import models
from data.loader import open_loader
from kernels.normalise import Normalise
from train.config import OptimizerConfig
from train.jitter import with_jittered
from train.labels.refinery import Refinery
from train.step import Step
from train.student import CROPS, LOSS, Student

IMAGENET = models.normalisation("resnet18")
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def batch(converted):
    return next(iter(open_loader(converted.beton("train"), resolution=32, batch_size=6, decoder="ffcv").epoch(0)))


@pytest.fixture(scope="module")
def networks():
    torch.manual_seed(0)
    return models.build("resnet18", 3), models.build("mobilenet0.25", 3).train()


def moved(batch, networks, *, eta=1.0, bn="running"):
    refinery, student = networks
    labels = Refinery(refinery, IMAGENET, bn=bn)
    return with_jittered(batch, labels, student, Normalise(IMAGENET), eta=eta, autocast=None).crops


def test_jitter_is_the_papers_equation(batch, networks):
    """Recomputed: X' = X + eta dL/dX, L through both networks, X the normalised crop, crop by crop."""
    refinery, student = (copy.deepcopy(network) for network in networks)
    refinery.eval()
    student.eval()  # running statistics, so that crops do not affect each other
    labels = Refinery(refinery, IMAGENET, bn="running")
    # The gradient of these networks is below 1e-3, which rounding of X would hide at eta = 1.
    eta = 1e4
    ours = with_jittered(batch, labels, student, Normalise(IMAGENET), eta=eta, autocast=None)
    for i in range(6):
        x = Normalise(IMAGENET)(batch.crops[i : i + 1]).requires_grad_()
        log_p, log_q = (F.log_softmax(network(x), dim=1) for network in (refinery, student))
        (log_p.exp() * (log_p - log_q)).sum().backward()
        found = (Normalise(IMAGENET)(ours.crops[6 + i : 7 + i]) - x.detach()) / eta
        largest = x.grad.abs().max().item()
        torch.testing.assert_close(found, x.grad, rtol=0, atol=0.01 * largest)
        # It is not the gradient through the student only.
        (own,) = torch.autograd.grad(-(log_p.detach().exp() * F.log_softmax(student(x), dim=1)).sum(), x)
        assert (found - own).abs().max() > 0.1 * largest


def test_clean_crops_come_first_and_nothing_else_changes(batch, networks):
    before = copy.deepcopy(networks[1].state_dict())
    crops = moved(batch, networks)
    assert crops.shape == (12, 3, 32, 32)
    assert torch.equal(crops[:6], batch.crops.float())
    assert torch.equal(moved(batch, networks, eta=0.0)[6:], batch.crops.float())
    for name, value in networks[1].state_dict().items():
        assert torch.equal(value, before[name]), name
    # The statistics are updated only by the step that follows.
    norms = [module for module in networks[1].modules() if isinstance(module, torch.nn.BatchNorm2d)]
    assert norms
    assert all(norm.track_running_stats for norm in norms)
    assert all(parameter.grad is None for network in networks for parameter in network.parameters())


def test_student_and_refinery_disagree_more_on_jittered_crops(batch, networks):
    refinery, student = networks
    labels = Refinery(refinery, IMAGENET, bn="running")
    crops = moved(batch, networks, eta=1e-3)
    with torch.no_grad():
        losses = [
            labels(replace(batch, crops=half)).loss(copy.deepcopy(student)(Normalise(IMAGENET)(half))).mean()
            for half in crops.chunk(2)
        ]
    assert losses[1] > losses[0]


def test_a_step_with_jitter_learns_from_clean_and_jittered_crops(batch, networks):
    """Its loss covers both, its accuracy only the clean ones."""
    refinery, start = networks
    labels = Refinery(refinery, IMAGENET)
    networks_after = []
    for jitter in (0.0, 1.0):
        network = copy.deepcopy(start)
        sgd = OptimizerConfig(lr=0.01, momentum=0.0)
        student = Student("student", network, sgd, normalisation=IMAGENET, device=CPU)
        both = with_jittered(batch, labels, network, Normalise(IMAGENET), eta=1.0, autocast=None) if jitter else batch
        Step([student], labels, jitter=jitter, device=CPU, autocast=None, compiled=False)(batch)
        logits = copy.deepcopy(start)(Normalise(IMAGENET)(both.crops))
        loss = labels(both).loss(logits)
        assert student.sums[CROPS] == 6
        torch.testing.assert_close(
            student.sums[LOSS] / 6, loss.mean().double(), rtol=1e-4, atol=1e-5, check_dtype=False
        )
        networks_after.append(network.classifier.weight.detach())
    assert not torch.equal(*networks_after)
