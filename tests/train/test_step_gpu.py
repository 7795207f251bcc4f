"""The compiled step on a GPU: bfloat16, one graph, and no waiting for the host."""

import pytest
import torch

import models
from data.loader import open_loader
from train.labels.refinery import Refinery
from train.step import LOSS, Step

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def step_of(compiled: bool) -> Step:
    normalisation = models.normalisation("resnet18")
    torch.manual_seed(0)
    student = models.build("mobilenet0.25", 3).cuda().to(memory_format=torch.channels_last)
    refinery = Refinery(models.build("resnet18", 3), normalisation).cuda().to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.01, momentum=0.9)
    device = torch.device("cuda")
    return Step(student, refinery, optimizer, normalisation, device=device, autocast=torch.bfloat16, compiled=compiled)


def test_compiled_agrees_with_eager(converted):
    loader = open_loader(converted.beton("train"), resolution=64, batch_size=16, device="cuda")
    batch = next(iter(loader.epoch(0)))
    losses = []
    for compiled in (False, True):
        step = step_of(compiled)
        step(batch)
        losses.append(step.sums[LOSS].item())
    assert losses[1] == pytest.approx(losses[0], rel=0.05)


def test_nothing_waits_for_the_device(converted):
    loader = open_loader(converted.beton("train"), resolution=64, batch_size=16, device="cuda")
    batches = list(loader.epoch(0))
    step = step_of(compiled=False)
    step(batches[0])
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for batch in batches[1:]:
            step(batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.isfinite(step.sums[LOSS])
