"""Darknet-19, the classifier of YOLOv2 (Redmon and Farhadi 2016, arXiv 1612.08242, Table 6)."""

from functools import partial

from torch import Tensor, nn
from torchvision.ops import Conv2dNormActivation

from models.initialise import initialise

# Output channels of alternating 3x3 and 1x1 convolutions; the resolution halves between stages.
_STAGES = (
    (32,),
    (64,),
    (128, 64, 128),
    (256, 128, 256),
    (512, 256, 512, 256, 512),
    (1024, 512, 1024, 512, 1024),
)


class Darknet19(nn.Module):
    """20,842,376 parameters at 1000 classes; float [B, 3, R, R], R >= 32, to logits [B, num_classes].

    The 19th convolution classifies every cell, and the cells' logits are averaged.
    """

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        channels = 3
        layers: list[nn.Module] = []
        for stage in _STAGES:
            if layers:
                layers.append(nn.MaxPool2d(2))
            for i, out_channels in enumerate(stage):
                layers.append(
                    Conv2dNormActivation(
                        channels, out_channels, kernel_size=(3, 1)[i % 2], activation_layer=partial(nn.LeakyReLU, 0.1)
                    )
                )
                channels = out_channels
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Conv2d(channels, num_classes, 1)
        initialise(self)
        # Initialised as a linear layer: with few classes, the variance of its fan-out would strongly favour some of
        # them.
        nn.init.normal_(self.classifier.weight, std=0.01)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x)).mean((2, 3))
