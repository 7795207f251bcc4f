"""Kernels of convolutions and batch normalisation against their references, interpreted as in interpreted.py."""

from collections import Counter

import pytest
import torch
from torchvision.models.resnet import Bottleneck, ResNet

import models
import tests.kernels.repaired  # noqa: F401
from kernels import batch_statistics, depthwise, product
from models.fused_resnet import FusedResNet
from models.own_depthwise import OwnDepthwise, with_own_depthwise
from tests.kernels.cases import check_alike, check_product, norm, normalisation, pixels

# [B, C, H, W]: less than a tile, odd sizes, more than a tile of rows and of channels.
SHAPES = [(2, 3, 1, 1), (3, 32, 9, 7), (2, 80, 5, 5)]


@pytest.fixture(params=[256, 2])
def groups(request, monkeypatch):
    """Maximum numbers of groups; with few, each has several tiles."""
    monkeypatch.setattr(batch_statistics, "GROUPS", request.param)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.usefixtures("groups")
def test_statistics(shape):
    x = pixels(0, *shape, mean=1.0)
    behind = norm(1, shape[1])
    found = batch_statistics.launch_statistics(x, *behind)
    check_alike(found, batch_statistics._statistics(x, *behind))
    # In another memory format.
    assert torch.equal(batch_statistics.launch_statistics(x.contiguous(), *behind), found)


@pytest.mark.usefixtures("groups")
def test_statistics_far_from_0():
    """With a mean of 2,000 standard deviations, sums of squares in float32 would lose all digits of the variance."""
    noise = torch.randint(2, (4, 8, 9, 9), generator=torch.Generator().manual_seed(0))
    x = (1024 + noise).half()
    variance = x.double().var((0, 2, 3), correction=0)
    weight, bias = torch.ones(8), torch.zeros(8)
    scale, shift = batch_statistics.launch_statistics(x, weight, bias, 1e-12)
    torch.testing.assert_close(scale.double(), variance.rsqrt(), rtol=1e-5, atol=0)
    torch.testing.assert_close(shift, -scale * x.double().mean((0, 2, 3)).float(), rtol=1e-5, atol=0)
    # Also in a product.
    filters = torch.full((8, 32, 1, 1), 1 / 32).half()
    _, (scale, _) = product.launch(x[:, :1].expand(4, 32, 9, 9), filters, weight, bias, 1e-12, None, 1)
    torch.testing.assert_close(scale.double(), variance[:1].rsqrt().expand(8), rtol=1e-5, atol=0)


@pytest.mark.parametrize("shape", SHAPES)
def test_normalise(shape):
    channels = shape[1]
    x, affine, other = pixels(0, *shape), normalisation(1, channels), pixels(2, *shape)
    for more in ((None, None), (other, None), (other.contiguous(), normalisation(3, channels))):
        check_alike(batch_statistics.launch_normalise(x, affine, *more), batch_statistics._normalise(x, affine, *more))


@pytest.mark.parametrize("shape", SHAPES)
def test_normalise_and_pool(shape):
    x, affine = pixels(0, *shape), normalisation(1, shape[1])
    check_alike(batch_statistics.launch_pool(x, affine), batch_statistics._normalise_and_pool(x, affine))


@pytest.mark.parametrize(("inputs", "outputs", "most"), [(32, 16, 256), (64, 144, 1)])
def test_products(inputs, outputs, most, monkeypatch):
    monkeypatch.setattr(batch_statistics, "GROUPS", most)
    x, other, affine = pixels(0, 3, inputs, 9, 7), pixels(1, 3, inputs, 9, 7), normalisation(2, inputs)
    filters, behind = pixels(3, outputs, inputs, 1, 1) / 4, norm(4, outputs)
    for how in ((None, 1), (None, 2), (affine, 1)):
        given = x, filters, *behind, *how
        check_product(product.launch(*given), product._product(*given), *behind)
    for more in (None, normalisation(5, inputs)):
        added = x, affine, other, more, filters, *behind
        check_product(product.launch_sum(*added), product._sum_product(*added), *behind)


def test_unsupported_dtypes_and_channels():
    filters, behind = pixels(3, 8, 32, 1, 1), norm(4, 8)
    with pytest.raises(ValueError, match=r"torch.float32: this kernel takes bfloat16 and float16"):
        product.launch(pixels(0, 2, 32, 3, 3, dtype=torch.float32), filters, *behind, None, 1)
    with pytest.raises(ValueError, match="40 channels: the kernel takes multiples of 32"):
        product.launch(pixels(0, 2, 40, 3, 3), pixels(3, 8, 40, 1, 1), *behind, None, 1)


def test_nan_is_kept():
    x = pixels(0, 2, 32, 5, 5)
    x[1, 7, 2, 2] = torch.nan
    affine = batch_statistics.launch_statistics(x, *norm(1, 32))
    assert affine.isnan().any(dim=0).nonzero().flatten().tolist() == [7]
    for y in (batch_statistics.launch_normalise(x, affine, None, None), batch_statistics.launch_pool(x, affine)):
        assert y.isnan().any(dim=(0, 2, 3)).nonzero().flatten().tolist() == [7]
    y, _ = product.launch(x, pixels(2, 16, 32, 1, 1), *norm(3, 16), affine, 1)
    assert y.isnan().all()


def check_depthwise(shape, stride):
    """Checks forward and backward, with dtypes as under autocast."""
    x, weight = pixels(0, *shape), pixels(1, shape[1], 1, 3, 3, dtype=torch.float32)
    y = depthwise._depthwise(x, weight, stride)
    check_alike(depthwise.launch(x, weight, stride), y)
    gradient = pixels(2, *y.shape)
    of_x, of_weight = depthwise._depthwise_backward(gradient, x, weight, stride)
    found = depthwise.launch_backward(gradient, x, weight, stride)
    check_alike(found[0], of_x)
    # float32 sums in another order.
    torch.testing.assert_close(found[1], of_weight, rtol=1e-4, atol=1e-4)
    # Compilers rely on the layout that the operator's fake version gives.
    assert found[1].is_contiguous()


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize(("shape", "programs"), [((2, 3, 1, 1), 2048), ((2, 8, 5, 7), 2048), ((3, 72, 4, 5), 4)])
def test_depthwise(shape, programs, stride, monkeypatch):
    monkeypatch.setattr(depthwise, "_PROGRAMS", programs)
    check_depthwise(shape, stride)


def test_depthwise_in_another_memory_format():
    x, weight = pixels(0, 2, 8, 5, 7), pixels(1, 8, 1, 3, 3)
    assert torch.equal(depthwise.launch(x.contiguous(), weight, 1), depthwise.launch(x, weight, 1))
    gradient = pixels(2, 2, 8, 5, 7)
    found = depthwise.launch_backward(gradient.contiguous(), x, weight, 1)
    expected = depthwise.launch_backward(gradient, x, weight, 1)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    assert found[1].dtype == torch.bfloat16


@pytest.mark.slow
@pytest.mark.parametrize("width", ["", "0.75", "0.25"])
def test_every_depthwise_layer_of_mobilenet(width):
    """With its numbers of channels, at odd sizes."""
    network = with_own_depthwise(models.build(f"mobilenet{width}", 10)).eval()
    found = set()
    for layer in network.modules():
        if isinstance(layer, OwnDepthwise):
            layer.register_forward_pre_hook(lambda layer, given: found.add((given[0].shape, layer.stride)))
    with torch.no_grad():
        network(torch.zeros(1, 3, 40, 40))
    assert len(found) > 6
    for shape, stride in found:
        check_depthwise(tuple(shape), stride)


@pytest.mark.slow
def test_every_layer_of_resnet50(monkeypatch):
    """With its numbers of channels, at 72, 36, 18, 9, 5 and 3 pixels per side, without blocks that repeat others.

    The input of each layer is the output of the previous layer's reference.
    """
    followed: Counter[str] = Counter()
    for module, name, launch in (
        (batch_statistics, "_statistics", batch_statistics.launch_statistics),
        (batch_statistics, "_normalise", batch_statistics.launch_normalise),
        (batch_statistics, "_normalise_and_pool", batch_statistics.launch_pool),
        (product, "_product", product.launch),
        (product, "_sum_product", product.launch_sum),
    ):
        defined = getattr(module, name)

        def both(*given, name=name, launch=launch, defined=defined):
            followed[name] += 1
            expected = defined(*given)
            if "product" in name:
                at = next(place for place, value in enumerate(given) if isinstance(value, float))
                check_product(launch(*given), expected, *given[at - 2 : at + 1])
            else:
                check_alike(launch(*given), expected)
            return expected

        monkeypatch.setattr(module, name, both)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        FusedResNet(ResNet(Bottleneck, [2, 2, 2, 2]))(pixels(0, 2, 3, 72, 72))
    # The first block has no sum before it, and the last sum is a separate pass.
    assert followed["_sum_product"] == 7
    assert all(followed.values())
