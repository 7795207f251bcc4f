"""Label sources: ground truth and the online refinery."""

import copy

import pytest
import torch
from torch import nn

import models
from data.loader import open_loader
from kernels.normalise import Normalise
from train import TrainError
from train.labels.ground_truth import GroundTruth
from train.labels.refinery import Refinery

IMAGENET = models.normalisation("resnet18")


@pytest.fixture(scope="module")
def batch(converted):
    return next(iter(open_loader(converted.beton("train"), resolution=32, batch_size=12, decoder="ffcv").epoch(0)))


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    network = models.build("resnet18", 3)
    network.train()
    with torch.no_grad():  # running statistics that differ from any batch's
        network(torch.randn(8, 3, 32, 32) * 2 + 1)
    return network


def test_ground_truth(batch):
    targets = GroundTruth(3)(batch)
    assert torch.equal(targets.ids, batch.labels)
    assert torch.equal(targets.classes(), batch.labels)


def test_smoothing_is_pytorchs(batch):
    student = torch.randn(12, 3)
    smooth = GroundTruth(3, smoothing=0.1)(batch)
    torch.testing.assert_close(smooth.probabilities.sum(dim=1), torch.ones(12))
    theirs = nn.functional.cross_entropy(student, batch.labels, label_smoothing=0.1)
    entropy = torch.special.entr(smooth.probabilities).sum(dim=1).mean()
    torch.testing.assert_close(smooth.loss(student), theirs - entropy)


def test_batch_statistics_are_those_of_the_batch(batch, network):
    """The labels are those of the network in training mode; of its own weights and buffers nothing moves."""
    before = copy.deepcopy(network.state_dict())
    refinery = Refinery(network, IMAGENET)
    ours = refinery(batch).logits
    reference = copy.deepcopy(network).train()(Normalise(IMAGENET)(batch.crops))
    torch.testing.assert_close(ours, reference, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(refinery(batch).logits, ours)
    for name, value in network.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_running_statistics_by_name(batch, network):
    refinery = Refinery(network, IMAGENET, bn="running")
    before = copy.deepcopy(refinery.state_dict())
    reference = copy.deepcopy(network).eval()(Normalise(IMAGENET)(batch.crops))
    torch.testing.assert_close(refinery(batch).logits, reference, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(refinery(batch).logits, Refinery(network, IMAGENET)(batch).logits, atol=1e-2)
    for name, value in refinery.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_timm_normalisation_layers_too(batch):
    """timm has batch normalisation layers of its own, with the activation inside."""
    torch.manual_seed(0)
    network = models.build("timm:mobilenetv3_small_050", 3)
    refinery = Refinery(network, IMAGENET)
    torch.manual_seed(1)
    reference = copy.deepcopy(network)
    for module in reference.modules():
        module.train(isinstance(module, nn.modules.batchnorm._BatchNorm))
    expected = reference(Normalise(IMAGENET)(batch.crops))
    torch.testing.assert_close(refinery(batch).logits, expected, rtol=1e-3, atol=1e-4)


def test_dropout_is_off(batch):
    network = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(3 * 32 * 32, 3))
    refinery = Refinery(network, IMAGENET)
    refinery.train()
    assert torch.equal(refinery(batch).logits, refinery(batch).logits)


def test_no_gradient_reaches_its_weights(batch, network):
    refinery = Refinery(network, IMAGENET)
    assert not refinery(batch).logits.requires_grad
    assert not any(parameter.requires_grad for parameter in refinery.parameters())


def test_a_batch_of_one_is_refused(converted, network):
    single = next(iter(open_loader(converted.beton("train"), resolution=32, batch_size=1, decoder="ffcv").epoch(0)))
    with pytest.raises(TrainError, match="batch=1"):
        Refinery(network, IMAGENET)(single)
    assert Refinery(network, IMAGENET, bn="running")(single).logits.shape == (1, 3)
