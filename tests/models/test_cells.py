"""Logits of cells: the supported heads, and that the cells' mean is the network's output."""

import pytest
import torch
from torch import nn

import models
from models import ModelError
from models.cells import CellLogits


@pytest.mark.parametrize(
    ("name", "head"),
    [
        ("resnet18", "the mean of layer4, then fc"),
        ("mobilenet0.25", "the mean of features, then classifier"),
        ("darknet19", "the mean of classifier, which classifies every cell"),
        ("timm:resnet10t", "the mean of layer4, then fc"),
        ("timm:efficientnet_b0", "the mean of bn2, then classifier"),
        ("torchvision:resnet18", "the mean of layer4, then fc"),
    ],
)
def test_the_mean_of_the_cells_is_the_networks_output(name, head):
    torch.manual_seed(0)
    network = models.build(name, 7).eval()
    cells = CellLogits(network, name, 96).train()
    assert cells.head == head
    for side, count in ((96, 3), (160, 5)):
        pictures = torch.randn(2, 3, side, side)
        logits = cells(pictures)
        assert logits.shape == (2, 7, count, count)
        torch.testing.assert_close(logits.mean((2, 3)), network(pictures), rtol=1e-4, atol=1e-5)
    assert not logits.requires_grad


def test_a_cell_depends_on_its_part_of_the_image():
    """Changing the lower half of an image does not change the upper rows of cells."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 4, 8, stride=8), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5))
    cells = CellLogits(network, "patches", 32)
    picture = torch.randn(1, 3, 32, 32)
    below = picture.clone()
    below[:, :, 16:] += 1
    changed = (cells(picture) != cells(below)).any(dim=1)[0]
    assert changed.tolist() == [[False] * 4, [False] * 4, [True] * 4, [True] * 4]


def test_images_with_a_single_cell():
    """Every 1x1 feature map equals its mean, so the head is found with larger images."""
    cells = CellLogits(models.build("mobilenet0.25", 5), "mobilenet0.25", 32)
    assert cells.head == "the mean of features, then classifier"
    assert cells(torch.randn(1, 3, 32, 32)).shape == (1, 5, 1, 1)


@pytest.mark.parametrize("name", ["alexnet", "timm:vit_tiny_patch16_224", "timm:convnext_atto"])
def test_other_heads_are_refused(name):
    with pytest.raises(ModelError, match=f"{name}: its head is not the mean of a feature map and a linear layer"):
        CellLogits(models.build(name, 5), name, 224)
