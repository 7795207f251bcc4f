"""A fused ResNet compared with the same network unfused."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models import resnet50
from torchvision.models.resnet import Bottleneck, ResNet

import models
from models.fused_resnet import FusedResNet, is_fusable


def bottlenecks(network: ResNet | None = None) -> ResNet:
    """Returns a network, small by default, with parameters of normalisation that differ from their initial values."""
    torch.manual_seed(0)
    network = (network or ResNet(Bottleneck, [2, 1, 2, 1], num_classes=10)).requires_grad_(False)
    for name, module in network.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            # Blocks add little to their input, as in trained networks, so that they do not amplify rounding.
            nn.init.uniform_(module.weight, 0.5, 1.5).mul_(0.2 if name.endswith("bn3") else 1)
            nn.init.normal_(module.bias, std=0.1)
    nn.init.normal_(network.fc.weight, std=0.1)
    return network.to(memory_format=torch.channels_last)


def unfused(network: nn.Module) -> nn.Module:
    """Returns a copy that uses batch statistics in evaluation mode, as a refinery does."""
    network = copy.deepcopy(network).eval()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean = module.running_var = module.num_batches_tracked = None
            module.track_running_stats = False
    return network


def images(count: int, side: int) -> Tensor:
    """Returns images of low frequencies, as in photographs."""
    small = torch.randn(count, 3, 5, 5, generator=torch.Generator().manual_seed(1))
    return F.interpolate(small, size=(side, side), mode="bicubic").contiguous(memory_format=torch.channels_last)


def divergence(one: Tensor, other: Tensor) -> float:
    """Returns KL(one || other), mean in nats."""
    one, other = one.float().log_softmax(1), other.float().log_softmax(1)
    return float(F.kl_div(other, one, reduction="batchmean", log_target=True))


@pytest.mark.parametrize("add_in_product", [True, False])
@torch.no_grad()
def test_the_same_logits(add_in_product):
    network = bottlenecks()
    before = copy.deepcopy(network.state_dict())
    for side in (32, 75):
        expected = unfused(network)(images(4, side))
        found = FusedResNet(network, add_in_product=add_in_product)(images(4, side))
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))
    # Running statistics are not changed.
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


@torch.no_grad()
def labels_of(network: ResNet, crops: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns logits in float32, in bfloat16, and in bfloat16 fused."""
    exact = unfused(network)(crops)
    with torch.autocast("cpu", torch.bfloat16):
        return exact, unfused(network)(crops), FusedResNet(network)(crops)


def check_labels(network: ResNet, crops: Tensor, bound: float) -> None:
    exact, plain, fused = labels_of(network, crops)
    assert divergence(plain, fused) < bound
    # Neither is closer to float32: the difference is bfloat16's rounding.
    assert divergence(plain, fused) < 2 * divergence(exact, plain)
    assert divergence(exact, fused) < 2 * divergence(exact, plain)
    # Labels of different crops differ much more.
    assert divergence(exact, fused[torch.arange(len(crops)) - 1]) > 100 * bound


def test_the_same_labels_in_bfloat16():
    check_labels(bottlenecks(), images(8, 128), 1e-4)


@pytest.mark.slow
def test_the_same_labels_of_resnet50_at_its_size():
    """An untrained network amplifies rounding more than a trained one, for which the bound is 1e-4."""
    check_labels(bottlenecks(resnet50()), images(8, 224), 5e-4)


def test_other_networks_are_refused():
    for name in ("resnet18", "mobilenet0.25", "resnet50-xnor"):
        network = models.build(name, 10)
        assert not is_fusable(network)
        with pytest.raises(models.ModelError, match="only a torchvision ResNet of bottlenecks"):
            FusedResNet(network)
    assert is_fusable(models.build("resnet50", 10))
    assert not is_fusable(ResNet(Bottleneck, [1, 1, 1, 1], norm_layer=nn.InstanceNorm2d))


def test_one_compiled_graph():
    network = FusedResNet(bottlenecks())
    compiled = torch.compile(network, fullgraph=True, backend="aot_eager")
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert divergence(compiled(images(4, 64)), network(images(4, 64))) < 1e-3
