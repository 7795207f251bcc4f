"""MobileNet, the first version (Howard et al. 2017, arXiv 1704.04861, Table 1)."""

from torch import Tensor, nn
from torchvision.ops import Conv2dNormActivation

from models.initialise import initialise

# Output channels at width 1 and stride of each depthwise separable convolution.
_BLOCKS = (
    (64, 1),
    (128, 2),
    (128, 1),
    (256, 2),
    (256, 1),
    (512, 2),
    *[(512, 1)] * 5,
    (1024, 2),
    (1024, 1),
)


class MobileNet(nn.Module):
    """4,231,976 parameters at 1000 classes; float [B, 3, R, R], R >= 32, to logits [B, num_classes].

    width: the paper's multiplier on the channels of every layer: 1, 0.75, 0.5 or 0.25.
    """

    def __init__(self, num_classes: int, *, width: float = 1.0) -> None:
        super().__init__()
        channels = int(32 * width)
        layers: list[nn.Module] = [Conv2dNormActivation(3, channels, stride=2)]
        for full_width, stride in _BLOCKS:
            out_channels = int(full_width * width)
            layers.append(_separable(channels, out_channels, stride))
            channels = out_channels
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(channels, num_classes)
        initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x).mean((2, 3)))


def _separable(in_channels: int, out_channels: int, stride: int) -> nn.Sequential:
    return nn.Sequential(
        Conv2dNormActivation(in_channels, in_channels, stride=stride, groups=in_channels),
        Conv2dNormActivation(in_channels, out_channels, kernel_size=1),
    )
