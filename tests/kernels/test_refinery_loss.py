"""The loss against its definition and PyTorch's own kl_div."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from kernels.refinery_loss import kl_to_class_ids, kl_to_logits, kl_to_probabilities


def logits(seed: int, rows: int = 6, classes: int = 11, spread: float = 3.0) -> torch.Tensor:
    return torch.randn(rows, classes, generator=torch.Generator().manual_seed(seed)) * spread


@given(seed=st.integers(0, 10**6), rows=st.integers(1, 9), classes=st.integers(2, 40), spread=st.floats(0.01, 30))
def test_definition(seed, rows, classes, spread):
    """Label Refinery, eq. 1, term by term in float64."""
    student, refinery = logits(seed, rows, classes, spread), logits(seed + 1, rows, classes, spread)
    p, q = refinery.double().softmax(1), student.double().log_softmax(1)
    defined = (p * (refinery.double().log_softmax(1) - q)).sum(1).mean()
    assert kl_to_logits(student, refinery).item() == pytest.approx(defined.item(), rel=1e-4, abs=1e-5)
    assert kl_to_logits(student, refinery) >= -1e-5
    assert kl_to_logits(refinery, refinery).item() == pytest.approx(0, abs=1e-5)


def test_against_kl_div():
    student, refinery = logits(0), logits(1)
    theirs = F.kl_div(student.log_softmax(1), refinery.softmax(1), reduction="batchmean")
    torch.testing.assert_close(kl_to_logits(student, refinery), theirs)
    torch.testing.assert_close(kl_to_probabilities(student, refinery.softmax(1)), theirs)


def test_same_gradient_as_soft_cross_entropy():
    refinery = logits(1)
    ours, theirs = (logits(0).requires_grad_() for _ in range(2))
    kl_to_logits(ours, refinery).backward()
    F.cross_entropy(theirs, refinery.softmax(1)).backward()
    torch.testing.assert_close(ours.grad, theirs.grad)


def test_one_hot_labels_give_cross_entropy():
    student, ids = logits(0), torch.arange(6)
    ours = kl_to_class_ids(student, ids)
    torch.testing.assert_close(ours, F.cross_entropy(student, ids))
    torch.testing.assert_close(kl_to_probabilities(student, F.one_hot(ids, 11).float()), ours)


def test_bfloat16_logits_are_computed_in_float32():
    student, refinery = logits(0).bfloat16(), logits(1).bfloat16()
    loss = kl_to_logits(student, refinery)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, kl_to_logits(student.float(), refinery.float()))


def test_gradients_flow_to_the_refinery_too():
    """Adversarial jitter needs them (Label Refinery, section 3.1)."""
    refinery = logits(1).double().requires_grad_()
    kl_to_logits(logits(0), refinery).backward()
    assert refinery.grad is not None
    assert refinery.grad.abs().max() > 0
