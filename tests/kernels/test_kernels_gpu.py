"""The operators on a GPU, where they run as Triton kernels."""

import pytest
import torch
from torchvision.models import resnet50

from kernels import batch_statistics, binarise, depthwise, pool_labels, product, refinery_loss, sample_blocks
from kernels.refinery_loss import KINDS
from models.fused_resnet import FusedResNet
from tests.kernels.cases import (
    activations,
    block_images,
    check,
    check_alike,
    check_product,
    defined,
    dense,
    norm,
    normalisation,
    pixels,
    sparse,
)

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("classes", [10, 37, 1000, 21841])
def test_losses_follow_their_references(classes, dtype, kind):
    student, refinery = (x.cuda() for x in dense(64, classes, dtype))
    expected = defined(refinery_loss.reference, student, refinery, kind=kind, temperature=2.0)
    check(refinery_loss._refinery_loss(student, refinery, kind, 2.0), expected, dtype)
    for kept in (1, 5):
        student, *label = (x.cuda() for x in sparse(64, classes, kept, dtype))
        expected = defined(refinery_loss.sparse_reference, student, *label, kind=kind, temperature=2.0)
        check(refinery_loss._sparse_loss(student, *label, kind, 2.0), expected, dtype)


def test_binarise_follows_its_reference():
    for x in activations("cuda"):
        ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
        signs = binarise.binarise(ours)
        assert torch.equal(signs, binarise.reference(theirs))
        weights = torch.randn_like(signs)
        signs.backward(weights)
        binarise.reference(theirs).backward(weights)
        assert torch.equal(ours.grad, theirs.grad)
    assert binarise.binarise(torch.tensor([torch.nan], device="cuda")).isnan().all()


def test_operators_pass_opcheck():
    student, refinery = (x.cuda() for x in dense(8, 37, torch.bfloat16))
    torch.library.opcheck(refinery_loss._refinery_loss, (student.requires_grad_(), refinery, "soft", 1.0))
    student, *label = (x.cuda() for x in sparse(8, 37, 5, torch.bfloat16))
    torch.library.opcheck(refinery_loss._sparse_loss, (student.requires_grad_(), *label, "reversed", 2.0))


def test_one_compiled_graph():
    student, refinery = (x.cuda() for x in dense(64, 1000, torch.bfloat16))

    def gradient(function) -> torch.Tensor:
        leaf = student.clone().requires_grad_()
        with torch.autocast("cuda", torch.bfloat16):
            function(leaf).backward()
        return leaf.grad

    def step(x: torch.Tensor) -> torch.Tensor:
        return refinery_loss.refinery_loss(x * binarise.binarise(x), refinery).mean()

    torch.testing.assert_close(gradient(torch.compile(step, fullgraph=True)), gradient(step))


@pytest.mark.parametrize("kind", pool_labels.KINDS)
@pytest.mark.parametrize("classes", [10, 1000])
def test_labels_are_pooled_as_on_the_cpu(classes, kind):
    logits = torch.randn(64, 15, 15, 5)
    ids = torch.rand(64, 15, 15, classes).topk(5, dim=3).indices
    corners = torch.rand(2, 64, 2)
    boxes = torch.cat([corners.amin(dim=0), corners.amax(dim=0)], dim=1)
    expected = pool_labels.reference(logits, ids, boxes, classes, kind=kind)
    found = pool_labels.pool_labels(logits.cuda(), ids.cuda(), boxes.cuda(), classes, kind=kind)
    torch.testing.assert_close(found.cpu(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("resolution", [1, 20, 64, 224])
def test_crops_of_blocks_follow_their_reference(resolution):
    images = block_images()
    crops = sample_blocks.sample_blocks(*(part.cuda() for part in images), resolution)
    off = (crops.cpu().int() - sample_blocks.reference(*images, resolution).int()).abs()
    assert off.max() <= 1
    assert off.float().mean() < 0.05
    torch.library.opcheck(sample_blocks._sample_blocks, (*(part.cuda() for part in images), resolution))


# Layers of ResNet-50 at 224 px, and an odd one: [inputs, outputs, side].
PRODUCTS = [(64, 64, 56), (64, 256, 56), (256, 128, 56), (512, 1024, 28), (1024, 256, 14), (512, 2048, 7), (32, 48, 9)]
# A GPU fuses multiplication and addition in one rounding, so that some inputs of a product are rounded differently.
_ABSOLUTE = 5e-3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("inputs", "outputs", "side"), PRODUCTS)
def test_products_follow_their_references(inputs, outputs, side, dtype):
    x, other, affine = (
        pixels(0, 8, inputs, side, side, dtype=dtype).cuda(),
        pixels(1, 8, inputs, side, side, dtype=dtype).cuda(),
        normalisation(2, inputs).cuda(),
    )
    filters = (pixels(3, outputs, inputs, 1, 1) / inputs**0.5).to(dtype).cuda()
    weight, bias, eps = norm(4, outputs)
    behind = weight.cuda(), bias.cuda(), eps
    for how in ((None, 1), (None, 2), (affine, 1)):
        found = product._product(x, filters, *behind, *how)
        expected = product._product(x.cpu(), filters.cpu(), *norm(4, outputs), _on_cpu(how[0]), how[1])
        check_product(_on_cpu(found), expected, *norm(4, outputs), absolute=_ABSOLUTE)
    for more in (None, normalisation(5, inputs).cuda()):
        found = product._sum_product(x, affine, other, more, filters, *behind)
        given = _on_cpu((x, affine, other, more, filters))
        expected = product._sum_product(*given, *norm(4, outputs))
        check_product(_on_cpu(found), expected, *norm(4, outputs), absolute=_ABSOLUTE)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("channels", "side"), [(64, 112), (64, 56), (512, 7), (48, 9), (3, 1)])
def test_normalisation_follows_its_references(channels, side, dtype):
    x, other = (pixels(seed, 8, channels, side, side, mean=1.0, dtype=dtype) for seed in (0, 1))
    affine = normalisation(2, channels)
    weight, bias, eps = norm(3, channels)
    found = batch_statistics.statistics(x.cuda(), weight.cuda(), bias.cuda(), eps)
    check_alike(found.cpu(), batch_statistics.statistics(x, weight, bias, eps))
    for more in ((None, None), (other, None), (other, normalisation(4, channels))):
        found = batch_statistics.normalise(x.cuda(), affine.cuda(), *_on_cuda(more))
        check_alike(found.cpu(), batch_statistics.normalise(x, affine, *more))
    found = batch_statistics.normalise_and_pool(x.cuda(), affine.cuda())
    check_alike(found.cpu(), batch_statistics.normalise_and_pool(x, affine))


@pytest.mark.parametrize("add_in_product", [True, False])
def test_a_fused_resnet_gives_the_same_labels(add_in_product):
    """Compiled, as in the bench. Compares the KL divergence to the unfused network in bfloat16 and in float32."""
    torch.manual_seed(0)
    network = resnet50().eval().requires_grad_(False)
    for name, module in network.named_modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean = module.running_var = module.num_batches_tracked = None
            module.track_running_stats = False
            if name.endswith("bn3"):
                module.weight.fill_(0.2)
    torch.nn.init.normal_(network.fc.weight, std=0.1)
    network = network.cuda().to(memory_format=torch.channels_last)
    small = torch.randn(32, 3, 7, 7, device="cuda")
    images = torch.nn.functional.interpolate(small, size=(224, 224), mode="bicubic")
    images = images.contiguous(memory_format=torch.channels_last)
    fused = torch.compile(FusedResNet(network, add_in_product=add_in_product), fullgraph=True, dynamic=False)
    with torch.no_grad():
        exact = network(images)
        with torch.autocast("cuda", torch.bfloat16):
            plain, found = network(images), fused(images)

    def divergence(one: torch.Tensor, other: torch.Tensor) -> float:
        one, other = one.float().log_softmax(1), other.float().log_softmax(1)
        return float(torch.nn.functional.kl_div(other, one, reduction="batchmean", log_target=True))

    # An untrained network amplifies bfloat16's rounding more than a trained one, for which the bound is 1e-4.
    assert divergence(plain, found) < min(5e-4, 2 * divergence(exact, plain))
    assert divergence(exact, found) < 2 * divergence(exact, plain)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize(("channels", "side"), [(32, 112), (64, 112), (512, 14), (1024, 7), (8, 9), (3, 1)])
def test_depthwise_follows_its_reference(channels, side, stride):
    x, weight = pixels(0, 8, channels, side, side), pixels(1, channels, 1, 3, 3, dtype=torch.float32)
    y = depthwise._depthwise(x, weight, stride)
    found = depthwise._depthwise(x.cuda(), weight.cuda(), stride)
    check_alike(found.cpu(), y)
    gradient = pixels(2, *y.shape)
    of_x, of_weight = depthwise._depthwise_backward(gradient, x, weight, stride)
    back = depthwise._depthwise_backward(gradient.cuda(), x.cuda(), weight.cuda(), stride)
    check_alike(back[0].cpu(), of_x)
    torch.testing.assert_close(back[1].cpu(), of_weight, rtol=1e-3, atol=1e-3 * float(of_weight.abs().max()))
    assert back[1].is_contiguous()
    again = depthwise._depthwise_backward(gradient.cuda(), x.cuda(), weight.cuda(), stride)
    assert torch.equal(again[1], back[1])
    given = x.cuda().requires_grad_(), weight.cuda().requires_grad_(), stride
    torch.library.opcheck(depthwise._depthwise, given)


def _on_cpu(given):
    if isinstance(given, tuple):
        return tuple(map(_on_cpu, given))
    return given.cpu() if isinstance(given, torch.Tensor) else given


def _on_cuda(given: tuple) -> tuple:
    return tuple(value.cuda() if isinstance(value, torch.Tensor) else value for value in given)
