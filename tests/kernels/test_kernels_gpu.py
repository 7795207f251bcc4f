"""The operators on a GPU, where they are Triton kernels."""

import pytest
import torch

from kernels import binarise, pool_labels, refinery_loss, sample_blocks
from kernels.refinery_loss import KINDS
from tests.kernels.cases import activations, block_images, check, defined, dense, sparse

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


def test_the_operators_are_registered_well():
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
