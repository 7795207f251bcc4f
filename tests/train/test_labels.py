"""Label sources: ground truth and the online refinery."""

import copy

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import models
from data.loader import Pairing, open_loader
from kernels.normalise import Normalise
from train import TrainError
from train.labels.ground_truth import GroundTruth
from train.labels.refinery import Refinery
from train.labels.source import Targets

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


def test_smoothing_equals_pytorchs(batch):
    student = torch.randn(12, 3)
    smooth = GroundTruth(3, smoothing=0.1)(batch)
    torch.testing.assert_close(smooth.probabilities.sum(dim=1), torch.ones(12))
    theirs = nn.functional.cross_entropy(student, batch.labels, label_smoothing=0.1)
    entropy = torch.special.entr(smooth.probabilities).sum(dim=1).mean()
    torch.testing.assert_close(smooth.loss(student).mean(), theirs - entropy)


def test_averaged_statistics_are_the_mean_over_batches(converted, network):
    """Against each layer's statistics of every batch, computed in the test; only the first 16 batches are used."""
    loader = open_loader(converted.beton("train"), resolution=32, batch_size=12, decoder="ffcv")
    batches = [batch for epoch in range(6) for batch in loader.epoch(epoch)]
    assert len(batches) > 16
    reference = copy.deepcopy(network).eval()
    found: dict[nn.Module, list[tuple[torch.Tensor, torch.Tensor]]] = {}
    norms = [module for module in reference.modules() if isinstance(module, nn.BatchNorm2d)]

    def note(norm, inputs):
        (x,) = inputs
        found.setdefault(norm, []).append((x.mean((0, 2, 3)), x.var((0, 2, 3), unbiased=True)))
        norm.running_mean, norm.running_var = x.mean((0, 2, 3)), x.var((0, 2, 3), unbiased=False)

    hooks = [norm.register_forward_pre_hook(note) for norm in norms]
    with torch.no_grad():
        for each in batches[:16]:
            reference(Normalise(IMAGENET)(each.crops))
    for hook in hooks:
        hook.remove()
    for norm in norms:
        means, variances = zip(*found[norm], strict=True)
        norm.running_mean, norm.running_var = torch.stack(means).mean(0), torch.stack(variances).mean(0)

    refinery = Refinery(network, IMAGENET, bn="averaged", over=batches)
    single = next(iter(open_loader(converted.beton("train"), resolution=32, batch_size=1, decoder="ffcv").epoch(0)))
    for batch in (batches[-1], single):
        torch.testing.assert_close(
            refinery(batch).logits, reference(Normalise(IMAGENET)(batch.crops)), rtol=1e-3, atol=1e-4
        )
    # They are folded, as running statistics are; the original network does not change.
    assert not any(isinstance(module, nn.BatchNorm2d) for module in refinery.network.modules())
    running = Refinery(network, IMAGENET, bn="running")(single).logits
    assert not torch.allclose(refinery(single).logits, running, atol=1e-2)


def test_batch_statistics_are_those_of_the_batch(batch, network):
    """The labels are those of the network in training mode; its weights and buffers do not change."""
    before = copy.deepcopy(network.state_dict())
    refinery = Refinery(network, IMAGENET)
    ours = refinery(batch).logits
    reference = copy.deepcopy(network).train()(Normalise(IMAGENET)(batch.crops))
    torch.testing.assert_close(ours, reference, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(refinery(batch).logits, ours)
    for name, value in network.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_running_statistics_are_folded(batch, network):
    refinery = Refinery(network, IMAGENET, bn="running")
    assert not any(isinstance(module, nn.BatchNorm2d) for module in refinery.modules())  # folded
    before = copy.deepcopy(refinery.state_dict())
    reference = copy.deepcopy(network).eval()(Normalise(IMAGENET)(batch.crops))
    torch.testing.assert_close(refinery(batch).logits, reference, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(refinery(batch).logits, Refinery(network, IMAGENET)(batch).logits, atol=1e-2)
    for name, value in refinery.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_batch_statistics_of_timms_layers(batch):
    """timm has its own batch normalisation layers, which include the activation."""
    torch.manual_seed(0)
    network = models.build("timm:mobilenetv3_small_050", 3)
    refinery = Refinery(network, IMAGENET)
    torch.manual_seed(1)
    reference = copy.deepcopy(network)
    for module in reference.modules():
        module.train(isinstance(module, nn.modules.batchnorm._BatchNorm))
    expected = reference(Normalise(IMAGENET)(batch.crops))
    torch.testing.assert_close(refinery(batch).logits, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("bn", ["batch", "running"])
def test_dropout_is_off(batch, bn):
    """At the start, and after the labels are put in training mode."""
    layers = [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.AdaptiveAvgPool2d(2), nn.Flatten()]
    network = nn.Sequential(*layers, nn.Dropout(0.5), nn.Linear(32, 3))
    refinery = Refinery(network.train(), IMAGENET, bn=bn)
    assert torch.equal(refinery(batch).logits, refinery(batch).logits)
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


def test_at_a_lower_resolution_crops_are_resized(batch, network):
    refinery = Refinery(network, IMAGENET, resolution=24)
    seen = []
    refinery.network.conv1.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    refinery(batch)
    (crops,) = seen
    assert crops.shape == (12, 3, 24, 24)
    pictures = [Image.fromarray(crop.permute(1, 2, 0).numpy()).resize((24, 24), 2) for crop in batch.crops]
    theirs = torch.stack([torch.from_numpy(np.array(picture)).permute(2, 0, 1) for picture in pictures])
    # Pillow rounds to whole values.
    assert (crops - Normalise(IMAGENET)(theirs)).abs().max() < 1 / 255 / 0.22


def test_weights_are_stored_in_the_dtype_of_autocast(batch, network):
    refinery = Refinery(network, IMAGENET, dtype=torch.bfloat16)
    stored = {name: value.dtype for name, value in refinery.network.named_parameters()}
    assert {dtype for name, dtype in stored.items() if "conv" in name or "fc" in name} == {torch.bfloat16}
    assert {dtype for name, dtype in stored.items() if "bn" in name} == {torch.float32}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours, plain = refinery(batch).logits, Refinery(network, IMAGENET)(batch).logits
    # Autocast would round the weights in the same way.
    assert torch.equal(ours, plain)


def test_sparse_targets():
    torch.manual_seed(0)
    student = torch.randn(3, 10)
    classes = torch.stack([torch.randperm(10)[:4] for _ in range(3)])
    values = torch.rand(3, 4) / 4
    rest = (1 - values.sum(dim=1)) / 6
    dense = rest[:, None].repeat(1, 10).scatter(1, classes, values)
    sparse = Targets(sparse=(classes, values, rest))
    for kind in ("soft", "hard", "reversed", "l2"):
        theirs = Targets(probabilities=dense).loss(student, kind=kind, temperature=3.0)
        torch.testing.assert_close(sparse.loss(student, kind=kind, temperature=3.0), theirs)
    assert torch.equal(sparse.distribution(10), dense)
    highest = Targets(sparse=(classes, torch.tensor([[0.1, 0.5, 0.2, 0.1]] * 3), torch.full((3,), 0.1 / 6)))
    assert torch.equal(highest.classes(), classes[:, 1])


def test_every_form_of_targets_has_a_distribution():
    logits = torch.randn(3, 4).bfloat16()
    p = torch.softmax(logits.float(), dim=1)
    for targets, wanted in (
        (Targets(ids=torch.tensor([2, 0, 3])), torch.eye(4)[[2, 0, 3]]),
        (Targets(logits=logits), p),
        (Targets(probabilities=p), p),
    ):
        torch.testing.assert_close(targets.distribution(4), wanted)


def test_the_label_of_the_image_is_that_of_its_central_crop(converted, network):
    center = Pairing("center", 32)
    loader = open_loader(converted.beton("train"), resolution=32, batch_size=12, decoder="ffcv", paired=(center,))
    batch = next(iter(loader.epoch(0)))
    refinery = Refinery(network, IMAGENET, bn="running", center=center)
    assert refinery.pairings == (center,)
    whole = open_loader(converted.beton("train"), resolution=32, batch_size=48, decoder="ffcv", train=False)
    said = Refinery(network, IMAGENET, bn="running")(next(iter(whole.epoch(0)))).logits
    torch.testing.assert_close(refinery(batch).logits, said[batch.indices], rtol=1e-4, atol=1e-4)


def test_a_refinery_of_more_classes_chooses_among_the_datas(batch):
    """Its label is the network's output given that the crop shows one of the data's classes."""
    torch.manual_seed(0)
    network = models.build("resnet18", 20)
    columns = [17, 3, 8]
    logits = Refinery(network, IMAGENET, columns=columns)(batch).logits
    whole = Refinery(network, IMAGENET)(batch).logits
    assert torch.equal(logits, whole[:, columns])
    chances = whole.softmax(dim=1)[:, columns]
    torch.testing.assert_close(logits.softmax(dim=1), chances / chances.sum(dim=1, keepdim=True))
