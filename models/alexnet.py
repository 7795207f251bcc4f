"""AlexNet as in the Label Refinery paper (arXiv 1805.02641): the 2012 network with batch normalisation.

torchvision's AlexNet is the narrower one of "One weird trick" (arXiv 1404.5997).
"""

from collections import OrderedDict

from torch import Tensor, nn
from torch.nn import functional as F

from models.initialise import initialise


class AlexNet(nn.Module):
    """62,396,480 parameters at 1000 classes; float [B, 3, R, R], R >= 64, to logits [B, num_classes].

    Module names are those of the paper's published files. So are the biases before batch normalisation, which have no
    effect.
    """

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.conv1 = _conv(3, 96, kernel_size=11, stride=4, padding=2, pool=True)
        self.conv2 = _conv(96, 256, kernel_size=5, padding=2, pool=True)
        self.conv3 = _conv(256, 384, kernel_size=3, padding=1)
        self.conv4 = _conv(384, 384, kernel_size=3, padding=1)
        self.conv5 = _conv(384, 256, kernel_size=3, padding=1, pool=True)
        self.fc6 = _linear(256 * 6 * 6, 4096)
        self.fc7 = _linear(4096, 4096)
        self.fc8 = nn.Linear(4096, num_classes, bias=False)
        initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv5(self.conv4(self.conv3(self.conv2(self.conv1(x)))))
        # 224 px gives 6x6 already. The pool would then have no effect, but its gradient on a GPU is not allowed by
        # `torch.use_deterministic_algorithms`.
        if x.shape[-2:] != (6, 6):
            x = F.adaptive_avg_pool2d(x, 6)
        return self.fc8(self.fc7(self.fc6(x.flatten(1))))


def _conv(
    in_channels: int, out_channels: int, *, kernel_size: int, stride: int = 1, padding: int, pool: bool = False
) -> nn.Sequential:
    block: OrderedDict[str, nn.Module] = OrderedDict()
    block["conv"] = nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding)
    block["bn"] = nn.BatchNorm2d(out_channels)
    if pool:
        block["pool"] = nn.MaxPool2d(2)
    block["relu"] = nn.ReLU(inplace=True)
    return nn.Sequential(block)


def _linear(in_features: int, out_features: int) -> nn.Sequential:
    block: OrderedDict[str, nn.Module] = OrderedDict()
    block["linear"] = nn.Linear(in_features, out_features)
    block["bn"] = nn.BatchNorm1d(out_features)
    block["relu"] = nn.ReLU(inplace=True)
    return nn.Sequential(block)
