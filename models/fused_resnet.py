"""A ResNet's forward with batch statistics in fewer passes over memory, for refineries, which are not trained."""

from typing import Any

from torch import Tensor, nn
from torchvision.models.resnet import Bottleneck, ResNet

from kernels.batch_statistics import normalise, normalise_and_pool, statistics
from kernels.product import product, sum_product
from models import ModelError


class FusedResNet(nn.Module):
    """Computes the output of a torchvision ResNet of bottlenecks, with batch statistics in its batch normalisation.

    Float [B, 3, R, R], B >= 2, to logits [B, num_classes]. Running statistics are neither used nor updated, and there
    are no gradients. On a GPU, activations must be bfloat16 or float16 (autocast).
    network: its weights are shared, not copied. add_in_product: add residuals inside the product that reads the sum,
    not in a separate pass. Raises ModelError for other networks.
    """

    def __init__(self, network: nn.Module, *, add_in_product: bool = True):
        super().__init__()
        if not is_fusable(network):
            raise ModelError("only a torchvision ResNet of bottlenecks with batch normalisation can be fused")
        self.network: Any = network.requires_grad_(False)
        self.add_in_product = add_in_product

    def forward(self, images: Tensor) -> Tensor:
        network = self.network
        x = network.conv1(images)
        x = normalise_and_pool(x, statistics(x, *_of(network.bn1)))
        waiting: tuple[Tensor, Tensor, Tensor, Tensor | None] | None = None
        for stage in (network.layer1, network.layer2, network.layer3, network.layer4):
            for block in stage:
                if waiting:
                    x, y, affine = sum_product(*waiting, _filters(block.conv1, x), *_of(block.bn1))
                else:
                    y, affine = product(x, _filters(block.conv1, x), *_of(block.bn1))
                y = block.conv2(normalise(y, affine))
                affine = statistics(y, *_of(block.bn2))
                y, affine = product(y, _filters(block.conv3, y), *_of(block.bn3), affine=affine)
                other, other_affine = x, None
                if block.downsample:
                    layer, norm = block.downsample
                    other, other_affine = product(x, _filters(layer, x), *_of(norm), stride=layer.stride[0])
                waiting = y, affine, other, other_affine
                if not self.add_in_product:
                    x, waiting = normalise(*waiting), None
        if waiting:
            x = normalise(*waiting)
        return network.fc(x.mean((2, 3)))


def is_fusable(network: nn.Module) -> bool:
    """Whether FusedResNet supports a network."""
    if not isinstance(network, ResNet):
        return False
    norms = [module for name, module in network.named_modules() if name.rpartition(".")[2].startswith("bn")]
    blocks = [block for stage in (network.layer1, network.layer2, network.layer3, network.layer4) for block in stage]
    return all(isinstance(block, Bottleneck) for block in blocks) and all(
        isinstance(norm, nn.BatchNorm2d) and norm.affine for norm in norms
    )


def _of(norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor, float]:
    return norm.weight, norm.bias, norm.eps


def _filters(layer: nn.Conv2d, x: Tensor) -> Tensor:
    return layer.weight.to(x.dtype)
