"""The Triton kernels against the references, on the CPU: run by test_triton.py with Triton's interpreter."""

import pytest
import torch

import tests.kernels.repaired  # noqa: F401
from kernels import pool_labels, refinery_loss, sample_blocks
from kernels.refinery_loss import KINDS
from tests.kernels.cases import block_images, check, defined, dense, read_blocks, sparse

CASES = [(10, torch.float32, 1.0), (37, torch.bfloat16, 3.0), (1000, torch.float16, 2.0)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("classes", "dtype", "temperature"), CASES)
def test_refinery_loss(classes, dtype, temperature, kind):
    student, refinery = dense(3, classes, dtype)
    expected = defined(refinery_loss.reference, student, refinery, kind=kind, temperature=temperature)
    check(refinery_loss.launch(student, refinery, kind, temperature), expected, dtype)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("classes", "dtype", "temperature"), CASES)
def test_sparse_loss(classes, dtype, temperature, kind):
    student, *label = sparse(3, classes, 5, dtype)
    expected = defined(refinery_loss.sparse_reference, student, *label, kind=kind, temperature=temperature)
    check(refinery_loss.launch_sparse(student, *label, kind, temperature), expected, dtype)


def test_strided_rows_and_columns():
    student, refinery = dense(3, 10, torch.float32)
    expected = defined(refinery_loss.reference, student, refinery, kind="soft", temperature=1.0)
    wide = torch.full((3, 16), torch.nan)
    wide[:, :10] = refinery
    for layout in (wide[:, :10], refinery.t().contiguous().t()):
        check(refinery_loss.launch(student, layout, "soft", 1.0), expected, torch.float32)
        assert refinery_loss.launch(layout, layout, "soft", 1.0)[1].is_contiguous()


def test_no_rows():
    loss, gradient = refinery_loss.launch(torch.empty(0, 10), torch.empty(0, 10), "soft", 1.0)
    assert loss.shape == (0,)
    assert gradient.shape == (0, 10)


@pytest.mark.parametrize("kind", ["soft", "reversed", "l2"])
def test_nan_is_kept(kind):
    student, refinery = dense(3, 10, torch.float32)
    refinery[2, 4] = torch.nan
    student[1, 4] = torch.nan
    loss, _ = refinery_loss.launch(student, refinery, kind, 1.0)
    assert loss.isnan().tolist() == [False, True, True]


def test_sum_by_class():
    for entries, classes in ((1125, 1000), (45, 10), (3, 1)):
        values, ids = torch.randn(4, entries), torch.randint(classes, (4, entries))
        values[1, 16:] = 0
        values[2] = 0
        torch.testing.assert_close(
            pool_labels.launch(values, ids, classes), pool_labels._sum_by_class(values, ids, classes)
        )
    assert pool_labels.launch(torch.empty(0, 5), torch.empty(0, 5, dtype=torch.int64), 7).shape == (0, 7)


def test_sample_blocks():
    """Equal within rounding, which affects a few percent of the values of such noise."""
    images, resolution = block_images(), 37
    crops = sample_blocks.launch(*images, resolution)
    assert crops.is_contiguous(memory_format=torch.channels_last)
    off = (crops.int() - sample_blocks.reference(*images, resolution).int()).abs()
    assert off.max() <= 1
    assert off.float().mean() < 0.05
    # It reads exactly the blocks that are needed.
    broken = torch.where(read_blocks(*images), images[0], -1)
    assert torch.equal(sample_blocks.launch(broken, *images[1:], resolution), crops)
    assert sample_blocks.launch(images[0], *(part[:0] for part in images[1:]), 8).shape == (0, 3, 8, 8)
