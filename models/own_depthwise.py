"""Replaces the depthwise 3x3 convolutions of a network by our kernels."""

from typing import TypeGuard

from torch import Tensor, nn

from kernels.depthwise import depthwise


class OwnDepthwise(nn.Module):
    """Computes a depthwise 3x3 convolution with kernels.depthwise, in the input's dtype. Shares the layer's weight."""

    def __init__(self, layer: nn.Conv2d):
        super().__init__()
        self.weight = layer.weight
        self.stride = layer.stride[0]

    def forward(self, x: Tensor) -> Tensor:
        return depthwise(x, self.weight, stride=self.stride)


def with_own_depthwise(network: nn.Module) -> nn.Module:
    """Replaces each depthwise 3x3 convolution of a network in place and returns it; its parameters' names stay."""
    for parent in list(network.modules()):
        for name, layer in parent.named_children():
            if is_depthwise(layer):
                setattr(parent, name, OwnDepthwise(layer))
    return network


def has_depthwise(network: nn.Module) -> bool:
    """Whether with_own_depthwise would replace any layer."""
    return any(map(is_depthwise, network.modules()))


def is_depthwise(layer: nn.Module) -> TypeGuard[nn.Conv2d]:
    """Whether it is a depthwise 3x3 convolution that kernels.depthwise computes."""
    return (
        isinstance(layer, nn.Conv2d)
        and layer.groups == layer.in_channels == layer.out_channels > 1
        and layer.kernel_size == (3, 3)
        and layer.padding == (1, 1)
        and layer.dilation == (1, 1)
        and layer.stride in ((1, 1), (2, 2))
        and layer.bias is None
        and layer.padding_mode == "zeros"
    )
