"""Initialisation of the hand-written networks (He et al. 2015, arXiv 1502.01852), for SGD at 0.01 to 0.1."""

import math

from torch import nn


def initialise(network: nn.Module) -> None:
    """Draws new weights in place from the global generator, as torchvision does for its VGG and MobileNetV2.

    Convolutions are normal with variance 2 / fan-out, linear layers normal with standard deviation 0.01, biases 0.
    Batch normalisation keeps PyTorch's scale 1 and shift 0.
    """
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            # An input reaches only the outputs of its group. `kaiming_normal_` counts all outputs, which would
            # make a depthwise filter smaller the more channels there are (1024: variance 2 / 9216, not 2 / 9).
            fan_out = math.prod(module.kernel_size) * module.out_channels // module.groups
            nn.init.normal_(module.weight, std=math.sqrt(2 / fan_out))
        elif isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.01)
        else:
            continue
        if module.bias is not None:
            nn.init.zeros_(module.bias)
