"""The step: what it computes, what it counts, and that it compiles into one graph, once."""

import copy

import pytest
import torch

import models
from data.loader import open_loader
from kernels.normalise import Normalise
from train.labels.ground_truth import GroundTruth
from train.labels.refinery import Refinery
from train.step import CROPS, LOSS, TOP1, TOP5, Step, correct

IMAGENET = models.normalisation("resnet18")
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def loader(converted):
    return open_loader(converted.beton("train"), resolution=32, batch_size=16, decoder="ffcv")


def step_of(labels, *, compiled=False, autocast=None, seed=0):
    torch.manual_seed(seed)
    student = models.build("mobilenet0.25", 3).to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.05, momentum=0.9)
    return Step(student, labels, optimizer, IMAGENET, device=CPU, autocast=autocast, compiled=compiled)


def refinery():
    torch.manual_seed(9)
    return Refinery(models.build("resnet18", 3), IMAGENET)


def test_is_the_plain_computation(loader):
    """Written out with PyTorch alone, a step gives the same weights (later ones amplify the rounding of the first)."""
    labels = refinery()
    step = step_of(labels)
    student = copy.deepcopy(step.student).train()
    optimizer = torch.optim.SGD(student.parameters(), lr=0.05, momentum=0.9)
    teacher = copy.deepcopy(labels.network)
    normalise = Normalise(IMAGENET)
    batch = next(iter(loader.epoch(0)))
    step(batch)
    with torch.no_grad():
        target = teacher(normalise(batch.crops)).softmax(dim=1)
    torch.nn.functional.cross_entropy(student(normalise(batch.crops)), target).backward()
    optimizer.step()
    for ours, theirs in zip(step.student.state_dict().values(), student.state_dict().values(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_sums(loader):
    step = step_of(GroundTruth(3))
    losses = []
    for batch in loader.epoch(0):
        student = copy.deepcopy(step.student).train()
        losses.append(torch.nn.functional.cross_entropy(student(Normalise(IMAGENET)(batch.crops)), batch.labels).item())
        step(batch)
    assert step.sums[CROPS] == 48
    assert step.sums[LOSS].item() == pytest.approx(16 * sum(losses), rel=1e-4)
    assert 0 <= step.sums[TOP1] <= step.sums[TOP5]
    assert step.sums[TOP5] == 48  # of three classes, the true one is always among the first five


def test_correct():
    logits = torch.tensor([[9.0, 8, 7, 6, 5, 4], [0, 1, 2, 3, 4, 5], [5, 0, 0, 0, 0, 9]])
    assert [int(n) for n in correct(logits, torch.tensor([0, 0, 5]))] == [2, 2]


def test_a_loss_that_is_not_finite_shows_in_the_sums(loader):
    step = step_of(GroundTruth(3))
    with torch.no_grad():
        next(step.student.parameters()).fill_(float("inf"))
    step(next(iter(loader.epoch(0))))
    assert not torch.isfinite(step.sums[LOSS])


def test_bfloat16_agrees(loader):
    sums = []
    for autocast in (None, torch.bfloat16):
        step = step_of(refinery(), autocast=autocast)
        for batch in loader.epoch(0):
            step(batch)
        sums.append(step.sums[LOSS].item())
    assert sums[1] == pytest.approx(sums[0], rel=0.1)


@pytest.mark.slow
def test_compiles_into_one_graph_once(loader):
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    eager, compiled = step_of(refinery()), step_of(refinery(), compiled=True)
    first = next(iter(loader.epoch(0)))
    eager(first)
    compiled(first)
    torch.testing.assert_close(compiled.sums, eager.sums, rtol=1e-4, atol=1e-3)
    for epoch in range(1, 3):
        for batch in loader.epoch(epoch):
            compiled(batch)
    assert counters["stats"]["unique_graphs"] == 1
