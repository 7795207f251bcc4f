"""The compiled step on a GPU: bfloat16, one graph, and no waiting for the host."""

import pytest
import torch

import models
from data.loader import open_loader
from train import TrainError
from train.config import OptimizerConfig, parse
from train.label import LabelOptions, label
from train.labels.refinery import Refinery
from train.step import Step
from train.student import LOSS, Student
from train.train import train

pytestmark = pytest.mark.gpu


def step_of(compiled: bool, autocast: torch.dtype = torch.bfloat16, cuda_graphs: bool = False) -> Step:
    normalisation = models.normalisation("resnet18")
    torch.manual_seed(0)
    device = torch.device("cuda")
    network = models.build("mobilenet0.25", 3)
    refinery = Refinery(models.build("resnet18", 3), normalisation, dtype=autocast)
    sgd = OptimizerConfig(lr=0.01)
    return Step(
        [Student("mobilenet0.25", network, sgd, normalisation=normalisation, device=device, autocast=autocast)],
        refinery.to(device).to(memory_format=torch.channels_last),
        device=device,
        autocast=autocast,
        compiled=compiled,
        strict=True,
        cuda_graphs=cuda_graphs,
    )


@pytest.mark.parametrize("cuda_graphs", [False, True])
def test_compiled_agrees_with_eager(converted, cuda_graphs):
    loader = open_loader(converted.beton("train"), resolution=64, batch_size=16, device="cuda")
    losses = []
    for compiled in (False, True):
        step = step_of(compiled, cuda_graphs=cuda_graphs and compiled)
        for epoch in range(3):
            for batch in loader.epoch(epoch):
                step(batch)
        losses.append(step.students[0].sums[LOSS].item())
    assert step.recorded == cuda_graphs
    assert losses[1] == pytest.approx(losses[0], rel=0.05)


@pytest.mark.parametrize("cuda_graphs", [False, True])
@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16])
def test_nothing_waits_for_the_device(converted, autocast, cuda_graphs):
    loader = open_loader(converted.beton("train"), resolution=64, batch_size=16, device="cuda")
    batches = list(loader.epoch(0))
    step = step_of(compiled=False, autocast=autocast, cuda_graphs=cuda_graphs)
    for batch in {batch.crops.shape: batch for batch in batches}.values():
        step(batch)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for batch in batches:
            step(batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.isfinite(step.students[0].sums[LOSS])


def test_too_large_a_batch_names_one_that_fits(converted, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ["--data", str(converted.folder), "--model", "resnet18", "--resolution", "224"]
    words += ["--epochs", "1", "--device", "cuda", "--compile", "never"]
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    train(parse([*words, "--batch", "4"]))
    most = 1.2 * torch.cuda.max_memory_reserved()
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(min(1.0, most / torch.cuda.get_device_properties(0).total_memory))
    try:
        with pytest.raises(TrainError, match=r"batch=48: a step at 224 px does not fit in .*; --batch \d+ fits"):
            train(parse([*words, "--batch", "48"]))
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


@pytest.mark.parametrize("format", ["exact", "packed"])
def test_labels_are_stored_and_learned_from(converted, tmp_path, monkeypatch, format):
    """Compiled; every crop's stored label is the refinery's, and nothing waits for rows."""
    monkeypatch.chdir(tmp_path)
    torch.save(models.build("resnet18", 3).state_dict(), "refinery.pt")
    words = ["--data", str(converted.folder), "--resolution", "64", "--batch", "16", "--epochs", "2"]
    words += ["--device", "cuda", "--precision", "fp32", "--compile", "always"]
    refinery = ["--refinery", "resnet18:refinery.pt", "--labels.bn", "running"]
    store = label(parse([*words, *refinery, "--out", "labels"]), LabelOptions(format))
    assert store.epochs == 2
    student = ["--model", "mobilenet0.25"]
    (stored,) = train(parse([*words, *student, "--labels.stored", "labels"]))
    (online,) = train(parse([*words, *student, *refinery]))
    losses = [[line["loss"] for line in run.metrics] for run in (stored, online)]
    assert losses[0] == pytest.approx(losses[1], rel=0.02, abs=0.002)
