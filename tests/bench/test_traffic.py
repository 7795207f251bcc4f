"""The bytes that networks move, compared with counts by hand and with PyTorch's compiler's count for its kernels."""

import logging
from functools import partial

import pytest
import torch
from torch import nn

import models
from bench.traffic import ADDED, BACKWARD, POINTWISE, POOLING, PRODUCTS, STATISTICS, traffic
from kernels.normalise import Normalise
from models.fused_resnet import FusedResNet
from models.own_depthwise import with_own_depthwise

BATCH, SIDE = 4, 64


def moved(name: str, *, backward: bool = False, batch: int = BATCH, side: int = SIDE, **how) -> dict[str, int]:
    return traffic(name, backward=backward, batch=batch, resolution=side, **how).by_pass


def shapes(name: str) -> list[tuple[nn.Module, int, int]]:
    """Returns each layer of a network with its numbers of input and output values."""
    network = models.build(name, 1000)
    found: list[tuple[nn.Module, int, int]] = []
    for layer in network.modules():
        if not list(layer.children()):
            layer.register_forward_hook(lambda layer, given, out: found.append((layer, given[0].numel(), out.numel())))
    network(torch.zeros(BATCH, 3, SIDE, SIDE))
    return found


def weights_of(layers: list[nn.Module]) -> int:
    return sum(layer.weight.numel() for layer in layers)


def test_a_chain_of_layers_by_hand():
    layers = shapes("mobilenet0.25")
    products = [(layer, given, out) for layer, given, out in layers if isinstance(layer, nn.Conv2d | nn.Linear)]
    normalised = sum(out for layer, _, out in layers if isinstance(layer, nn.BatchNorm2d))
    channels = sum(layer.num_features for layer, *_ in layers if isinstance(layer, nn.BatchNorm2d))
    averaged = [out for *_, out in layers][-2]
    weights = weights_of([layer for layer, *_ in products])
    image = BATCH * 3 * SIDE * SIDE
    # float32 weights are converted to bfloat16 in a separate pass, and so are uint8 crops.
    prepared = 6 * weights + 3 * image
    forward = {
        PRODUCTS: 2 * sum(given + out for _, given, out in products) + 2 * weights,
        # Two float32 per channel are written; the mean of the last feature maps is also a reduction.
        STATISTICS: 2 * normalised + 8 * channels + 2 * averaged,
        # The last feature maps are not written: their mean is fused. Ten float32 per channel: two running statistics
        # are updated, and normalising needs the statistics, weight and bias.
        POINTWISE: 4 * (normalised - averaged) + 40 * channels + prepared,
    }
    found = moved("mobilenet0.25")
    for name, size in forward.items():
        assert found[name] == pytest.approx(size, rel=0.01), name
    assert found.get(ADDED, 0) < 0.001 * sum(found.values())
    # Backward: both gradients of a product read its output's gradient; each normalisation reads its input and its
    # output's gradient once for sums and once for its input's gradient, and recomputes the ReLU's sign from the input.
    found = moved("mobilenet0.25", backward=True)
    first = products[0][1]
    assert found[PRODUCTS + BACKWARD] == pytest.approx(
        2 * sum(2 * given + 2 * out for _, given, out in products) - 2 * first + 4 * weights, rel=0.03
    )
    assert found[STATISTICS + BACKWARD] == pytest.approx(2 * 2 * normalised, rel=0.1)
    assert found[POINTWISE + BACKWARD] == pytest.approx(3 * 2 * normalised + 6 * weights, rel=0.05)


def test_residuals_are_read_in_the_pass_that_adds_them():
    layers = shapes("resnet18")
    outputs = [out for layer, _, out in layers if isinstance(layer, nn.ReLU)]
    # In each block, the second ReLU follows the addition; the last block's is fused with the mean.
    assert moved("resnet18")[ADDED] == 2 * sum(outputs[2::2][:-1])
    pooled = next((given, out) for layer, given, out in layers if isinstance(layer, nn.MaxPool2d))
    # Only backward needs the positions of the maxima, one byte each.
    assert moved("resnet18")[POOLING] == 2 * sum(pooled)
    assert moved("resnet18", backward=True)[POOLING] == 2 * sum(pooled) + pooled[1]


def test_float32_moves_about_twice_as_much():
    narrow, wide = (sum(moved("resnet18", batch=256, autocast=kind).values()) for kind in (torch.bfloat16, None))
    # Both read uint8 crops, and float32 weights need no conversion.
    assert 1.7 * narrow < wide < 2 * narrow


def test_images_count_and_weights_are_shared():
    one, two = (traffic("mobilenet0.25", backward=True, batch=batch, resolution=SIDE) for batch in (8, 16))
    weights = sum(weight.numel() for weight in models.build("mobilenet0.25", 1000).parameters())
    saved = one.bytes_per_image - two.bytes_per_image
    assert 8 * weights / 16 < saved < 32 * weights / 16


@pytest.mark.parametrize(
    ("name", "backward", "low", "high"),
    # MB per image at 224 px: the range of counts by hand, which differ in their assumptions about fusion.
    [("resnet50", False, 117, 123), ("mobilenet", True, 139, 143), ("resnet50", True, 340, 370)],
)
def test_published_networks(name, backward, low, high):
    counted = traffic(name, backward=backward, batch=64, resolution=224)
    assert low < counted.bytes_per_image / 1e6 < high


@pytest.mark.parametrize("add_in_product", [True, False])
def test_a_fused_forward_by_hand(add_in_product):
    layers = shapes("resnet50")
    products = [(layer, given, out) for layer, given, out in layers if isinstance(layer, nn.Conv2d | nn.Linear)]
    convolutions = [each for each in products if isinstance(each[0], nn.Conv2d)]
    pixelwise = [each for each in convolutions if each[0].kernel_size == (1, 1)]
    others = [each for each in convolutions if each not in pixelwise]
    # The blocks' outputs: the last of three ReLUs in each block.
    sums = [out for layer, _, out in layers if isinstance(layer, nn.ReLU)][3::3]
    assert (len(pixelwise), len(others), len(sums)) == (36, 17, 16)
    weights = weights_of([layer for layer, *_ in products])
    pooled = next((given, out) for layer, given, out in layers if isinstance(layer, nn.MaxPool2d))
    # Two float32 per channel and group of pixels; groups have 128 pixels in products and 64 otherwise.
    groups = [
        (layer.out_channels, -(-out // layer.out_channels // (128 if layer.kernel_size == (1, 1) else 64)))
        for layer, _, out in convolutions
    ]
    if add_in_product:
        # The first product of the next block reads the residual and writes the sum, except after the last block.
        added, passes = 2 * sum(sums[:-1]) + sums[-1], [2 * sums[-1]]
    else:
        added, passes = sum(sums), [2 * out for out in sums]
    expected = {
        # Only the pixels that a stride selects are read.
        PRODUCTS: 2 * weights
        + 2 * sum(given // layer.stride[0] ** 2 + out for layer, given, out in pixelwise)
        + 2 * sum(given + out for layer, given, out in [*others, products[-1]]),
        # Four float32 per channel are parameters and results; the mean of the last feature maps is also a reduction.
        STATISTICS: 2 * sum(out for *_, out in others)
        + sum(16 * channels * number for channels, number in groups)
        + 16 * sum(layer.out_channels for layer, *_ in others)
        + 2 * (sums[-1] + BATCH * 2048),
        # Inputs of convolutions that are not products, and the crops; weights are converted to bfloat16.
        POINTWISE: 2 * sum(2 * given for _, given, _ in others[1:])
        + 2 * sum(passes)
        + 6 * weights
        + 3 * BATCH * 3 * SIDE**2,
        ADDED: 2 * added,
        POOLING: 2 * sum(pooled),
    }
    found = moved("resnet50", rewritten=partial(FusedResNet, add_in_product=add_in_product))
    for name, size in expected.items():
        assert found[name] == pytest.approx(size, rel=0.01), name
    assert sum(found.values()) == pytest.approx(sum(expected.values()), rel=0.005)


@pytest.mark.parametrize(("add_in_product", "most"), [(False, 95), (True, 85)])
def test_a_fused_forward_at_its_size(add_in_product, most):
    """MB per image; the unfused forward moves 117 to 123."""
    rewritten = partial(FusedResNet, add_in_product=add_in_product)
    counted = traffic("resnet50", backward=False, batch=64, resolution=224, rewritten=rewritten)
    assert most - 6 < counted.bytes_per_image / 1e6 < most


def test_both_gradients_of_a_depthwise_convolution_are_one_pass():
    """The output's gradient is read once instead of twice; weights and their gradients are float32, not bfloat16."""
    depthwise = [
        (layer, given, out)
        for layer, given, out in shapes("mobilenet0.25")
        if isinstance(layer, nn.Conv2d) and layer.groups > 1
    ]
    assert len(depthwise) == 13
    usual, own = (moved("mobilenet0.25", backward=True, rewritten=way) for way in (lambda n: n, with_own_depthwise))
    assert own[PRODUCTS] == pytest.approx(usual[PRODUCTS], rel=0.01)
    weights = weights_of([layer for layer, *_ in depthwise])
    saved = 2 * sum(out for *_, out in depthwise) - 4 * weights
    assert usual[PRODUCTS + BACKWARD] - own[PRODUCTS + BACKWARD] == pytest.approx(saved, rel=0.01)
    counted = traffic("mobilenet", backward=True, batch=64, resolution=224, rewritten=with_own_depthwise)
    assert counted.bytes_per_image / 1e6 == pytest.approx(138, abs=1)


@pytest.mark.slow
def test_the_compiler_counts_the_same_bytes_for_its_kernels():
    import torch._inductor.compile_fx as compiler
    import torch._inductor.config
    from torch._inductor import metrics

    network = models.build("mobilenet0.25", 1000).to(memory_format=torch.channels_last).train()
    normalise = Normalise(models.normalisation("mobilenet0.25"))

    @torch.compile(fullgraph=True, dynamic=False)
    def forward(crops: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return network(normalise(crops))

    before = compiler.inductor_metrics_log.level
    compiler.inductor_metrics_log.setLevel(logging.INFO)
    try:
        with torch._inductor.config.patch(force_disable_caches=True), torch.no_grad():
            metrics.reset()
            torch._dynamo.reset()
            forward(torch.zeros(16, SIDE, SIDE, 3, dtype=torch.uint8).permute(0, 3, 1, 2))
    finally:
        compiler.inductor_metrics_log.setLevel(before)
    ours = sum(moved("mobilenet0.25", batch=16).values())
    assert metrics.num_bytes_accessed == pytest.approx(ours, rel=0.02)
