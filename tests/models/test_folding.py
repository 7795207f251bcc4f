"""Folding does not change the output of a network."""

import copy

import pytest
import torch
from torch import nn

import models
from models.folding import fold


def trained(network: nn.Module) -> nn.Module:
    """Returns the network with statistics and weights of normalisation that differ from their initial values."""
    torch.manual_seed(1)
    for module in network.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.1)
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 2.0)
    return network.eval()


@pytest.mark.parametrize(
    ("name", "folded"),
    [("resnet18", 20), ("mobilenet0.25", 27), ("alexnet", 7), ("timm:convnext_atto", 0)],
)
@torch.no_grad()
def test_the_same_logits_without_normalisation(name, folded):
    torch.manual_seed(0)
    network = trained(models.build(name, 5))
    crops = torch.randn(2, 3, 64, 64)
    expected = copy.deepcopy(network)(crops)
    assert fold(network, 64) == folded
    torch.testing.assert_close(network(crops), expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))


def test_a_layer_whose_output_is_used_elsewhere_is_not_folded():
    class Forked(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)
            self.bn = nn.BatchNorm2d(4)

        def forward(self, x):
            x = self.conv(x)
            return (self.bn(x) + x).mean((2, 3))

    network = trained(Forked())
    before = copy.deepcopy(network.state_dict())
    assert fold(network, 16) == 0
    for name, value in network.state_dict().items():
        assert torch.equal(value, before[name])


def test_within_autocast_too():
    network = trained(models.build("mobilenet0.25", 5))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert fold(network, 64) == 27
