"""Several networks answer in one pass, compiled into one graph for all batches."""

import pytest
import torch

import models
from data.loader import open_loader
from train.score import Answers, score, score_all

CPU = torch.device("cpu")
NAMES = ("mobilenet0.25", "resnet18")


def networks():
    made = []
    for number, name in enumerate(NAMES):
        torch.manual_seed(number)
        made.append((models.build(name, 3), models.normalisation(name)))
    return made


@pytest.fixture(scope="module")
def loader(converted):
    # The last batch has 7 of 15 images.
    return open_loader(converted.beton("val"), resolution=32, batch_size=8, decoder="ffcv", train=False)


def test_networks_scored_in_one_pass_score_as_alone(loader, monkeypatch):
    passes = []
    epoch = loader.epoch
    monkeypatch.setattr(loader, "epoch", lambda number: passes.append(number) or epoch(number))
    together = score_all(Answers(networks(), device=CPU, autocast=None), loader)
    assert passes == [0]
    for found, (network, normalisation) in zip(together, networks(), strict=True):
        alone = score(network, loader, normalisation, device=CPU, autocast=None)
        assert vars(found).keys() == vars(alone).keys()
        assert all(
            torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
            for a, b in zip(vars(found).values(), vars(alone).values(), strict=True)
        )
    assert together[0].loss != together[1].loss


def test_one_graph_for_all_batches_of_all_validations(loader, monkeypatch, capsys):
    graphs = []

    def counting(graph, inputs):
        graphs.append(graph)
        return graph

    compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, **options: compile(function, backend=counting, **options))
    torch._dynamo.reset()
    answer = Answers(networks(), device=CPU, autocast=torch.bfloat16, compiled=True)
    eager = Answers(networks(), device=CPU, autocast=torch.bfloat16)
    for _ in range(2):
        # Between two validations, students train.
        for network in answer.networks:
            network.train()
        for ours, theirs in zip(score_all(answer, loader), score_all(eager, loader), strict=True):
            assert ours.loss == pytest.approx(theirs.loss, rel=0.02)
            assert ours.images == theirs.images == 15
    torch._dynamo.reset()
    assert len(graphs) == 1
    assert not capsys.readouterr().out


def test_failed_compilation_prints_a_notice(loader, monkeypatch, capsys):
    def broken(graph, inputs):
        raise ValueError("no such kernel")

    compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, **options: compile(function, backend=broken, **options))
    torch._dynamo.reset()
    found = score_all(Answers(networks(), device=CPU, autocast=None, compiled=True), loader)
    torch._dynamo.reset()
    assert [each.loss for each in found] == [
        each.loss for each in score_all(Answers(networks(), device=CPU, autocast=None), loader)
    ]
    assert capsys.readouterr().out.count("validation cannot be compiled and runs uncompiled (") == 1
