"""Labels of crops from label maps, compared with torchvision's RoIAlign on the dense map."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kernels import pool_labels as kernel
from kernels.pool_labels import KINDS, pool_labels, reference


def label_map(batch: int, side: int, kept: int, classes: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(batch, side, side, kept, generator=generator) + 2
    ids = torch.rand(batch, side, side, classes, generator=generator).topk(kept, dim=3).indices
    return logits.half(), ids


def boxes(batch: int, seed: int = 0) -> Tensor:
    corners = torch.rand(2, batch, 2, generator=torch.Generator().manual_seed(seed))
    return torch.cat([corners.amin(dim=0), corners.amax(dim=0)], dim=1)


@pytest.mark.parametrize("kind", KINDS)
@given(
    side=st.integers(1, 15),
    classes=st.integers(1, 40),
    kept=st.integers(1, 5),
    seed=st.integers(0, 10_000),
)
def test_equals_roi_align_on_the_dense_map(kind, side, classes, kept, seed):
    logits, ids = label_map(8, side, min(kept, classes), classes, seed)
    found = pool_labels(logits, ids, boxes(8, seed), classes, kind=kind)
    torch.testing.assert_close(found, reference(logits, ids, boxes(8, seed), classes, kind=kind), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.sum(dim=1), torch.ones(8))


@pytest.mark.parametrize("kind", KINDS)
def test_boxes_at_the_edges(kind):
    edges = [
        (0, 0, 1, 1),
        (0, 0, 1e-4, 1e-4),
        (0.9999, 0.9999, 1, 1),
        (0, 0.99, 1, 1),
        (0.5, 0, 0.5001, 1),
        (0, 0, 1 / 15, 1),
    ]
    logits, ids = label_map(len(edges), 15, 5, 100)
    found = pool_labels(logits, ids, torch.tensor(edges), 100, kind=kind)
    torch.testing.assert_close(found, reference(logits, ids, torch.tensor(edges), 100, kind=kind), rtol=1e-4, atol=1e-6)


def test_rows_and_columns_are_not_swapped():
    """A map whose upper half has one class and whose right half another."""
    logits = torch.zeros(1, 4, 4, 2)
    logits[0, :2, :, 0] = 10  # above: class 0
    logits[0, :, 2:, 1] = 5  # to the right: class 1
    ids = torch.tensor([0, 1]).expand(1, 4, 4, 2)
    for box, likeliest in [((0, 0, 0.5, 0.5), 0), ((0.5, 0.5, 1, 1), 1), ((0, 0.5, 0.5, 1), 0)]:
        assert pool_labels(logits, ids, torch.tensor([box]), 3).argmax() == likeliest
    # The lower left part has no logits: all classes are equal.
    label = pool_labels(logits, ids, torch.tensor([(0.75, 0, 1.0, 0.25)]), 3)
    torch.testing.assert_close(label, torch.full((1, 3), 1 / 3))


def test_by_hand():
    """One sample half-way between two cells: the mean of their logits."""
    logits = torch.tensor([2.0, 4.0]).view(1, 1, 2, 1).expand(1, 2, 2, 1)
    ids = torch.tensor([0, 1]).view(1, 1, 2, 1).expand(1, 2, 2, 1)
    label = pool_labels(logits, ids, torch.tensor([(0.25, 0.25, 0.75, 0.75)]), 3)
    torch.testing.assert_close(label, torch.tensor([[1.0, 2.0, 0.0]]).softmax(dim=1))


def test_invalid_arguments():
    logits, ids = label_map(2, 3, 2, 5)
    with pytest.raises(ValueError, match="kind=max"):
        pool_labels(logits, ids, boxes(2), 5, kind="max")
    with pytest.raises(ValueError, match=r"\[B, S, S, K\] alike"):
        pool_labels(logits, ids[:, :2], boxes(2), 5)
    with pytest.raises(ValueError, match=r"boxes must be \[2, 4\]"):
        pool_labels(logits, ids, boxes(3), 5)


def test_the_operator_passes_opcheck():
    values, ids = torch.randn(3, 20), torch.randint(7, (3, 20))
    torch.library.opcheck(kernel._sum_by_class, (values, ids, 7))
