"""A network with our depthwise convolutions computes the same outputs and gradients."""

import copy

import torch
from torch import nn

import models
from models.own_depthwise import OwnDepthwise, has_depthwise, with_own_depthwise


def test_the_same_outputs_and_gradients():
    torch.manual_seed(0)
    network = models.build("mobilenet0.25", 5).to(memory_format=torch.channels_last)
    own = with_own_depthwise(copy.deepcopy(network))
    assert sum(isinstance(module, OwnDepthwise) for module in own.modules()) == 13
    assert not has_depthwise(own)
    assert list(own.state_dict()) == list(network.state_dict())
    images = torch.randn(4, 3, 64, 64).contiguous(memory_format=torch.channels_last)
    found = []
    for each in (network, own):
        logits = each(images)
        logits.square().sum().backward()
        found.append([logits, *(parameter.grad for parameter in each.parameters())])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-3, atol=1e-4 * float(one.detach().abs().max()))


def test_other_convolutions_are_not_replaced():
    assert has_depthwise(models.build("mobilenet", 5))
    assert not has_depthwise(models.build("resnet50", 5))
    for layer in (
        nn.Conv2d(4, 4, 3, padding=1, groups=4),
        nn.Conv2d(4, 8, 3, padding=1, groups=4, bias=False),
        nn.Conv2d(4, 4, 3, groups=4, bias=False),
        nn.Conv2d(4, 4, 5, padding=1, groups=4, bias=False),
        nn.Conv2d(4, 4, 3, padding=1, groups=4, bias=False, stride=3),
        nn.Conv2d(4, 4, 3, padding=1, groups=4, bias=False, padding_mode="reflect"),
        nn.Conv2d(1, 1, 3, padding=1, bias=False),
    ):
        assert not has_depthwise(layer)
