"""Colour jitter and lighting, compared with torchvision's operations in any order and with AlexNet's formula."""

import itertools

import numpy as np
import pytest
import torch
from torchvision.transforms.v2 import functional as F

from kernels.colour import change_colours


def crops(n=2):
    """Returns crops with values in the middle of the range, so that torchvision does not clip."""
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(90, 150, (n, 3, 9, 9), generator=generator, dtype=torch.uint8)
    return drawn.contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_equals_torchvision_in_any_order(order):
    factors = torch.tensor([[1.1, 0.8, 1.3], [0.7, 1.2, 0.6]])
    ops = [F.adjust_brightness, F.adjust_contrast, F.adjust_saturation]
    pictures = crops()
    found = change_colours(pictures, factors, torch.zeros(2, 3))
    assert found.is_contiguous(memory_format=torch.channels_last)
    for picture, each, ours in zip(pictures, factors, found, strict=True):
        theirs = picture / 255
        for number in order:
            theirs = ops[number](theirs, float(each[number]))
        # torchvision's gray has rounded weights.
        torch.testing.assert_close(ours, 255 * theirs, rtol=1e-4, atol=0.05)


def test_lighting_is_alexnets():
    shifts = torch.tensor([[0.1, -0.2, 0.3], [-1.0, 0.0, 0.0]])
    found = change_colours(crops(), torch.ones(2, 3), shifts) - crops().float()
    values = np.array([0.2175, 0.0188, 0.0045])
    vectors = np.array([[-0.5675, 0.7192, 0.4009], [-0.5808, -0.0045, -0.8140], [-0.5836, -0.6948, 0.4203]])
    # The columns are the components, which are orthonormal.
    np.testing.assert_allclose(vectors.T @ vectors, np.eye(3), atol=1e-3)
    for each, shift in zip(found, shifts.numpy(), strict=True):
        wanted = 255 * vectors @ (values * shift)
        np.testing.assert_allclose(each.numpy(), np.broadcast_to(wanted[:, None, None], each.shape), atol=1e-3)


def test_nothing_changes_with_factors_of_one():
    assert torch.equal(change_colours(crops(), torch.ones(2, 3), torch.zeros(2, 3)), crops().float())
