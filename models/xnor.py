"""ResNet-50 with binary convolutions (XNOR-Net, Rastegari et al. 2016, arXiv 1603.05279, section 3).

The paper has no bottleneck blocks; this applies its order of layers to them:

- Each inner convolution is BN -> sign -> binary convolution, without a ReLU after it. The paper's optional ReLU would
  only move the threshold of the next sign and block the gradient of half its inputs.
- A block adds the shortcut to its third convolution's output without a further operation, so that real values pass from
  block to block and no sign blocks their gradient (He et al. 2016, arXiv 1603.05027).
- If a block changes the shape, its shortcut is a binary 1x1 convolution of the same signs as its first convolution's.
- The first and the last layer are real: convolution -> BN -> ReLU -> max-pool, pooled before any sign; BN -> ReLU ->
  mean -> linear, as in the authors' AlexNet.
- Inputs of binary convolutions are signs, without the paper's factors K, which the authors' code also omits. Padding is
  0.
"""

from typing import Any

import torch
from torch import Tensor, nn

from kernels.binarise import binarise
from models.initialise import initialise

# Width, blocks and stride of each stage.
_STAGES = ((64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2))


class XnorResNet50(nn.Module):
    """25,549,480 parameters at 1000 classes; float [B, 3, R, R], R >= 32, to logits [B, num_classes].

    Module names are those of torchvision's ResNet-50, plus `bn2` before the last ReLU. Batch normalisation is before a
    convolution, not after it, and so has that convolution's input channels.
    """

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        channels = 64
        stages = []
        for width, blocks, stride in _STAGES:
            stage = [_Bottleneck(channels, width, stride)]
            channels = 4 * width
            stage += [_Bottleneck(channels, width, 1) for _ in range(1, blocks)]
            stages.append(nn.Sequential(*stage))
        self.layer1, self.layer2, self.layer3, self.layer4 = stages
        self.bn2 = nn.BatchNorm2d(channels)
        self.fc = nn.Linear(channels, num_classes)
        initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(self.relu(self.bn2(x)).mean((2, 3)))


class _Bottleneck(nn.Module):
    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        out_channels = 4 * width
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv1 = _BinaryConv2d(channels, width, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv2 = _BinaryConv2d(width, width, 3, stride=stride, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(width)
        self.conv3 = _BinaryConv2d(width, out_channels, 1, bias=False)
        self.downsample = (
            nn.Sequential(_BinaryConv2d(channels, out_channels, 1, stride=stride, bias=False))
            if channels != out_channels
            else None
        )

    def forward(self, x: Tensor) -> Tensor:
        signs = binarise(self.bn1(x))
        shortcut = x if self.downsample is None else self.downsample(signs)
        y = self.conv1(signs)
        y = self.conv2(binarise(self.bn2(y)))
        y = self.conv3(binarise(self.bn3(y)))
        return y + shortcut


class _BinaryConv2d(nn.Conv2d):
    """A convolution with `binary_weights` of its real weights; the input is not binarised."""

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, binary_weights(self.weight), self.bias)


def binary_weights(weights: Tensor) -> Tensor:
    """Returns sign(W) × mean |W| for each filter, the closest scaled sign to W (section 3.1); sign(0) is +1.

    weights: float [out, in, h, w]; the result has the same shape and dtype. The gradient passes unchanged, as if W were
    used, so that learning rates of real networks work. The paper's gradient (section 3.1) is this times 1/n + mean |W|
    for n weights in a filter, 7 to 60 times smaller at the start.
    """
    return _BinaryWeights.apply(weights)


class _BinaryWeights(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weights: Tensor) -> Tensor:
        scale = weights.abs().mean((1, 2, 3), keepdim=True)
        return torch.where(weights < 0, -scale, scale)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient
