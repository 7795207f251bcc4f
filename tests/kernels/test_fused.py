"""The definitions of the operators of fused refineries, compared with PyTorch's layers in float32."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from kernels import batch_statistics, product
from kernels.batch_statistics import normalise, normalise_and_pool, statistics
from tests.kernels.cases import norm, normalisation, pixels


def normalised(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    return F.batch_norm(x, None, None, weight, bias, training=True, eps=eps)


def real(seed: int, *shape: int) -> Tensor:
    return pixels(seed, *shape, mean=0.5, dtype=torch.float32)


def test_statistics_are_those_of_batch_normalisation():
    x, other, first, second = real(0, 3, 5, 7, 4), real(1, 3, 5, 7, 4), norm(2, 5), norm(3, 5)
    affine, other_affine = statistics(x, *first), statistics(other, *second)
    expected = normalised(x, *first)
    torch.testing.assert_close(normalise(x, affine), expected.relu())
    torch.testing.assert_close(normalise(x, affine, other), (expected + other).relu())
    expected += normalised(other, *second)
    torch.testing.assert_close(normalise(x, affine, other, other_affine), expected.relu())


@pytest.mark.parametrize("side", [1, 4, 5])
def test_pooling_after_normalisation(side):
    x, behind = real(0, 3, 5, side, side + 1), norm(1, 5)
    expected = F.max_pool2d(normalised(x, *behind).relu(), 3, stride=2, padding=1)
    torch.testing.assert_close(normalise_and_pool(x, statistics(x, *behind)), expected)


def test_products_are_convolutions():
    x, other, affine, other_affine = real(0, 3, 6, 5, 4), real(1, 3, 6, 5, 4), normalisation(2, 6), normalisation(3, 6)
    filters, behind = real(4, 8, 6, 1, 1), norm(5, 8)
    for stride in (1, 2):
        y, found = product.product(x, filters, *behind, stride=stride)
        torch.testing.assert_close(y, F.conv2d(x, filters, stride=stride))
        torch.testing.assert_close(found, statistics(y, *behind))
    y, found = product.product(x, filters, *behind, affine=affine)
    torch.testing.assert_close(y, F.conv2d(normalise(x, affine), filters))
    torch.testing.assert_close(found, statistics(y, *behind))
    for more in (None, other_affine):
        total, y, found = product.sum_product(x, affine, other, more, filters, *behind)
        torch.testing.assert_close(total, normalise(x, affine, other, more))
        torch.testing.assert_close(y, F.conv2d(total, filters))
        torch.testing.assert_close(found, statistics(y, *behind))
    with pytest.raises(ValueError, match="stride=2: must be 1 for a product with an affine"):
        product.product(x, filters, *behind, affine=affine, stride=2)


def test_operators_pass_opcheck():
    x, affine, filters, behind = pixels(0, 3, 6, 5, 4), normalisation(1, 6), pixels(2, 8, 6, 1, 1), norm(3, 8)
    torch.library.opcheck(batch_statistics._statistics, (x, *norm(4, 6)))
    torch.library.opcheck(batch_statistics._normalise, (x, affine, x, affine))
    torch.library.opcheck(batch_statistics._normalise, (x, affine, None, None))
    torch.library.opcheck(batch_statistics._normalise_and_pool, (x, affine))
    torch.library.opcheck(product._product, (x, filters, *behind, None, 2))
    torch.library.opcheck(product._product, (x, filters, *behind, affine, 1))
    torch.library.opcheck(product._sum_product, (x, affine, x, None, filters, *behind))
