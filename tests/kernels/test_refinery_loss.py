"""The losses compared with independent formulas, and the operators with the references that define them."""

import re

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import special
from torch.nn import functional as F

from kernels import refinery_loss as module
from kernels.refinery_loss import KINDS, probabilities_loss, refinery_loss, sparse_loss
from tests.kernels.cases import check, defined, dense, logits, sparse

KIND = pytest.mark.parametrize("kind", KINDS)
kinds = st.sampled_from(KINDS)
temperatures = st.floats(0.5, 8)
seeds = st.integers(0, 10**6)


def independent(student, p, kind: str, temperature: float):
    """Returns the loss by the table in the module's docstring, with SciPy in float64. p: the label's probabilities."""
    q = special.softmax(student.double().numpy() / temperature, axis=1)
    p = np.asarray(p, dtype=np.float64)
    loss = {
        "soft": lambda: special.rel_entr(p, q).sum(1),
        "hard": lambda: -np.log(q[np.arange(len(p)), p.argmax(1)]),
        "reversed": lambda: special.rel_entr(q, np.maximum(p, np.finfo(np.float32).tiny)).sum(1),
        "l2": lambda: np.linalg.norm(p - q, axis=1) ** 2,
    }[kind]()
    return torch.from_numpy(loss * temperature**2).float()


@given(kind=kinds, temperature=temperatures, seed=seeds, classes=st.integers(2, 40), spread=st.floats(0.1, 20))
def test_definition(kind, temperature, seed, classes, spread):
    student, refinery = logits(seed, 3, classes, spread), logits(seed + 1, 3, classes, spread)
    p = special.softmax(refinery.double().numpy() / temperature, axis=1)
    for student_like in (student, student.clone().requires_grad_()):
        loss = refinery_loss(student_like, refinery, kind=kind, temperature=temperature)
        torch.testing.assert_close(
            loss.detach(), independent(student, p, kind, temperature), rtol=1e-4, atol=1e-4 * temperature**2
        )
    through_refinery = refinery_loss(student, refinery.requires_grad_(), kind=kind, temperature=temperature)
    torch.testing.assert_close(through_refinery.detach(), loss.detach(), rtol=1e-4, atol=1e-4 * temperature**2)


@KIND
def test_definition_of_given_probabilities(kind):
    student, ids, values, rest = sparse(4, 11, 3, torch.float32)
    p = np.repeat(rest[:, None].numpy(), 11, axis=1)
    for row, (row_ids, row_values) in enumerate(zip(ids, values, strict=True)):
        p[row, row_ids] = row_values
    expected = independent(student, p, kind, 2.0)
    torch.testing.assert_close(sparse_loss(student, ids, values, rest, kind=kind, temperature=2.0), expected)
    torch.testing.assert_close(
        probabilities_loss(student, torch.from_numpy(p), kind=kind, temperature=2.0).float(), expected
    )


@given(kind=kinds, temperature=temperatures, seed=seeds, shift=st.floats(-50, 50))
def test_properties(kind, temperature, seed, shift):
    student, refinery = logits(seed, 4, 9).requires_grad_(), logits(seed + 1, 4, 9)
    loss = refinery_loss(student, refinery, kind=kind, temperature=temperature)
    assert (loss > 0).all()
    (gradient,) = torch.autograd.grad(loss.sum(), student)
    # Only differences of logits matter.
    torch.testing.assert_close(gradient.sum(1), torch.zeros(4), rtol=0, atol=1e-5 * temperature)
    shifted = refinery_loss(student + shift, refinery - shift, kind=kind, temperature=temperature)
    torch.testing.assert_close(shifted, loss, rtol=1e-3, atol=1e-3)
    if kind != "hard":
        learned = refinery_loss(refinery.clone().requires_grad_(), refinery, kind=kind, temperature=temperature)
        torch.testing.assert_close(learned.detach(), torch.zeros(4), rtol=0, atol=1e-5 * temperature**2)


@given(kind=kinds, temperature=temperatures, seed=seeds)
def test_all_forms_of_a_label_agree(kind, temperature, seed):
    student, refinery = logits(seed, 3, 7), logits(seed + 1, 3, 7)
    p = (refinery / temperature).softmax(1)
    order = torch.stack([torch.randperm(7, generator=torch.Generator().manual_seed(seed + row)) for row in range(3)])
    losses = [
        refinery_loss(student, refinery, kind=kind, temperature=temperature),
        probabilities_loss(student, p, kind=kind, temperature=temperature),
        sparse_loss(student, order, p.gather(1, order), torch.zeros(3), kind=kind, temperature=temperature),
    ]
    for loss in losses[1:]:
        torch.testing.assert_close(loss, losses[0], rtol=1e-4, atol=1e-5 * temperature**2)


def test_soft_is_cross_entropy_minus_the_labels_entropy():
    student, refinery = logits(0, 6, 11).requires_grad_(), logits(1, 6, 11)
    p = refinery.softmax(1)
    theirs = F.cross_entropy(student, p, reduction="none")
    entropy = torch.distributions.Categorical(p).entropy()
    ours = refinery_loss(student, refinery)
    torch.testing.assert_close(ours, theirs - entropy)
    torch.testing.assert_close(
        torch.autograd.grad(ours.sum(), student), torch.autograd.grad(theirs.sum(), student), rtol=1e-5, atol=1e-6
    )


def test_hard_takes_the_first_of_equal_classes():
    student = logits(0, 1, 4)
    expected = F.cross_entropy(student, torch.tensor([1]), reduction="none")
    torch.testing.assert_close(refinery_loss(student, torch.tensor([[0.0, 2, 2, 1]]), kind="hard"), expected)
    ids, values = torch.tensor([[2, 1]]), torch.tensor([[0.4, 0.4]])
    torch.testing.assert_close(sparse_loss(student, ids, values, torch.tensor([0.1]), kind="hard"), expected)
    # So close that the probabilities are equal but the logits are not.
    near = torch.tensor([[0.0, 1e-9, -1, -1]])
    torch.testing.assert_close(refinery_loss(student, near, kind="hard"), expected)


def test_gradients_keep_their_size_at_high_temperatures():
    """In the limit, gradients are the differences of the centred logits (Hinton et al. 2015, section 2.1)."""
    student, refinery = logits(0, 3, 8).requires_grad_(), logits(1, 3, 8)
    refinery_loss(student, refinery, temperature=2000.0).sum().backward()
    limit = (student - student.mean(1, keepdim=True) - refinery + refinery.mean(1, keepdim=True)) / 8
    torch.testing.assert_close(student.grad, limit.detach(), rtol=0.02, atol=2e-3)


@KIND
def test_classes_with_probability_zero(kind):
    refinery = torch.tensor([[1.0, -torch.inf, 0, 3]])
    student = torch.tensor([[0.5, 2, -1, 0]])
    expected = independent(student, refinery.softmax(1), kind, 1.0)
    for label in (refinery, refinery.clone().requires_grad_()):
        loss = refinery_loss(student.clone().requires_grad_(), label, kind=kind)
        torch.testing.assert_close(loss.detach(), expected)
        loss.backward()
    if kind != "hard":
        assert label.grad.isfinite().all()


@KIND
def test_gradients_of_the_references(kind):
    """By finite differences, with respect to student and label: adversarial jitter needs both."""
    student, refinery = (logits(seed, 3, 5).double().requires_grad_() for seed in (0, 1))
    torch.autograd.gradcheck(lambda s, r: module.reference(s, r, kind=kind, temperature=2.0), (student, refinery))
    _, ids, values, rest = sparse(3, 5, 2, torch.float32)
    label = [x.double().requires_grad_() for x in (values, rest + 0.01)]
    torch.autograd.gradcheck(
        lambda s, v, r: module.sparse_reference(s, ids, v, r, kind=kind, temperature=2.0), (student, *label)
    )


@pytest.mark.parametrize("temperature", [1.0, 3.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@KIND
def test_operators_follow_their_references(kind, dtype, temperature):
    student, refinery = dense(4, 37, dtype)
    expected = defined(module.reference, student, refinery, kind=kind, temperature=temperature)
    check(module._refinery_loss(student, refinery, kind, temperature), expected, dtype)
    student, *label = sparse(4, 37, 5, dtype)
    expected = defined(module.sparse_reference, student, *label, kind=kind, temperature=temperature)
    check(module._sparse_loss(student, *label, kind, temperature), expected, dtype)


@KIND
def test_weights_of_crops(kind):
    """The gradient of a weighted sum, such as a mean, against autograd through the reference."""
    student, refinery = dense(4, 9, torch.float32)
    weights = torch.tensor([0.25, 0, 2, -1])
    ours, theirs = student.clone().requires_grad_(), student.clone().requires_grad_()
    (refinery_loss(ours, refinery, kind=kind) * weights).sum().backward()
    (module.reference(theirs, refinery, kind=kind, temperature=1.0) * weights).sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-5, atol=1e-6)


def test_gradients_reach_the_refinery():
    student, refinery = (x.requires_grad_() for x in (logits(0, 3, 5), logits(1, 3, 5)))
    refinery_loss(student, refinery).sum().backward()
    # d KL(p || q) / d refinery = p (log p/q - KL)
    p, q = refinery.detach().softmax(1), student.detach().softmax(1)
    ratio = (p / q).log()
    torch.testing.assert_close(refinery.grad, p * (ratio - (p * ratio).sum(1, keepdim=True)))


def test_operators_pass_opcheck():
    student, refinery = dense(3, 7, torch.float32)
    torch.library.opcheck(module._refinery_loss, (student.requires_grad_(), refinery, "soft", 1.0))
    student, *label = sparse(3, 7, 2, torch.float32)
    torch.library.opcheck(module._sparse_loss, (student.requires_grad_(), *label, "reversed", 2.0))


def test_autocast_changes_nothing():
    student, refinery = dense(3, 7, torch.bfloat16)
    _, *label = sparse(3, 7, 2, torch.float32)
    p = logits(1, 3, 7).softmax(1)
    for loss, arguments in (
        (refinery_loss, (refinery,)),
        (refinery_loss, (refinery.clone().requires_grad_(),)),
        (sparse_loss, label),
        (probabilities_loss, (p,)),
    ):
        outside = loss(student, *arguments)
        with torch.autocast("cpu", torch.bfloat16):
            inside = loss(student, *arguments)
        assert inside.dtype == torch.float32
        assert torch.equal(inside, outside)


@pytest.mark.slow
def test_one_compiled_graph():
    student, refinery = logits(0, 4, 7), logits(1, 4, 7)
    _, *label = sparse(4, 7, 2, torch.float32)

    def gradient(loss) -> torch.Tensor:
        leaf = student.clone().requires_grad_()
        loss(leaf).backward()
        return leaf.grad

    def step(x: torch.Tensor) -> torch.Tensor:
        return (refinery_loss(x, refinery, kind="reversed") + sparse_loss(x, *label, temperature=2.0)).mean()

    torch.testing.assert_close(gradient(torch.compile(step, fullgraph=True)), gradient(step))


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda x: refinery_loss(x, x, kind="kl"), "kind=kl: there are soft, hard, reversed, l2"),
        (lambda x: refinery_loss(x, x, temperature=0), "temperature=0: must be above 0"),
        (lambda x: refinery_loss(x, x[:, 1:]), "[3, 5] and [3, 4]"),
        (lambda x: probabilities_loss(x, x[1:]), "[3, 5] and [2, 5]"),
        (lambda x: sparse_loss(x, x[:, :2].long(), x[:, :3], x[:, 0]), "must be [B, K], [B, K] and [B]"),
        (lambda x: module.launch(torch.zeros(1, 65537), torch.zeros(1, 65537), "soft", 1.0), "at most 65536"),
    ],
)
def test_invalid_arguments(call, says):
    with pytest.raises(ValueError, match=re.escape(says)):
        call(torch.zeros(3, 5))
