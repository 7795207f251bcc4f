"""The storage of a crop's label: contents, rounding, and the layout of bits."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from train.labels.rows import Exact, Packed, build_rows


def dense(packed: Packed, rows: torch.Tensor, classes: int) -> torch.Tensor:
    """The probabilities of all classes that rows encode, float64 [B, C]."""
    kept, values, others = packed.targets(rows).sparse
    return others.double()[:, None].expand(-1, classes).scatter(1, kept, values.double())


def unquantised(logits: torch.Tensor, k: int) -> torch.Tensor:
    """The likeliest k classes unrounded, the others' probability spread evenly: float64 [B, C]."""
    p = logits.double().softmax(dim=1)
    classes = p.shape[1]
    kept = p.argsort(dim=1, descending=True, stable=True)[:, :k]
    rest = 1 - p.gather(1, kept).sum(dim=1, keepdim=True)
    return (rest / max(classes - k, 1)).expand(-1, classes).scatter(1, kept, p.gather(1, kept))


def divergence(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    return torch.where(p > 0, p * (p.clamp(min=1e-300) / q).log(), 0.0).sum(dim=1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_exact_rows_give_back_every_bit(dtype):
    logits = torch.randn(5, 7).to(dtype)
    exact = Exact(7, dtype)
    rows = exact.pack(logits)
    assert (rows.dtype, tuple(rows.shape)) == (torch.uint8, (5, exact.width)) == (torch.uint8, (5, 7 * dtype.itemsize))
    assert torch.equal(exact.targets(rows).logits, logits)
    assert torch.equal(exact.pack(logits.t().contiguous().t()), rows)  # for any memory layout


@pytest.mark.parametrize(
    ("classes", "k", "width"),
    [
        (1000, 10, 20),
        (1024, 10, 20),
        (1000, 5, 10),
        (1025, 10, 22),
        (10, 5, 7),
        (10, 10, 13),
        (2, 5, 2),
        (21_841, 10, 27),
    ],
)
def test_bytes_of_a_packed_row(classes, k, width):
    packed = Packed(classes, k)
    assert packed.width == width
    assert packed.pack(torch.randn(3, classes)).shape == (3, width)


def test_bits_of_a_packed_row():
    """Decoded in the test: entries of 10 + 6 bits from the lowest bit on, the class above the code."""
    probabilities = torch.full((1, 1000), 0.1 / 997)
    probabilities[0, [700, 3, 999]] = torch.tensor([0.6, 0.2, 0.1])
    row = bytes(Packed(1000, 3).pack(probabilities.log())[0].tolist())
    number = int.from_bytes(row, "little")
    entries = [number >> 16 * place & 0xFFFF for place in range(3)]
    assert [entry >> 6 for entry in entries] == [700, 3, 999]
    steps = [math.asin(math.sqrt(0.1)) / (math.pi / 126), math.log(3) / 0.1875, math.log(6) / 0.1875]
    assert [entry & 63 for entry in entries] == [round(steps[0]), math.ceil(steps[1]), math.ceil(steps[2])]


@given(
    classes=st.integers(2, 60),
    k=st.integers(1, 12),
    spread=st.floats(0.01, 30),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 10_000),
)
def test_packed_rows_keep_order_and_probabilities(classes, k, spread, dtype, seed):
    logits = (spread * torch.randn(64, classes, generator=torch.Generator().manual_seed(seed))).to(dtype)
    packed = Packed(classes, k)
    rows = packed.pack(logits)
    kept, values, others = packed.targets(rows).sparse
    k = min(k, classes)
    # The kept classes are the likeliest ones, in their order, none twice.
    order = logits.float().argsort(dim=1, descending=True, stable=True)
    assert torch.equal(kept, order[:, :k])
    assert (values.diff(dim=1) <= 0).all()
    assert (values > 0).all()
    # A class that is not kept is not read as likelier than one that is.
    assert (others <= values[:, -1]).all()
    said = dense(packed, rows, classes)
    torch.testing.assert_close(said.sum(dim=1), torch.ones(64, dtype=torch.float64), rtol=0, atol=1e-6)
    # Strictly more likely stays strictly more likely; equal stays equal.
    top = logits.float().topk(2, dim=1).values
    ahead = top[:, 0] > top[:, 1]
    two = said.topk(2, dim=1).values
    assert torch.equal(two[:, 0] > two[:, 1], ahead) or k == 1
    assert (said.argmax(dim=1) == order[:, 0])[ahead].all()
    # A label loses at most half a step of each scale.
    lost = divergence(unquantised(logits.float(), k), said)
    assert lost.max() < 0.006
    assert lost.mean() < 0.002


@pytest.mark.parametrize("k", [1, 5, 10])
@pytest.mark.parametrize(
    "logits",
    [
        torch.zeros(1, 1000),  # all alike
        torch.zeros(1, 1000).index_fill(1, torch.tensor([999]), 1e-6),  # one a little ahead
        torch.zeros(1, 1000).index_fill(1, torch.tensor([4]), 1e4),  # only one
        torch.linspace(0, -1e4, 1000)[None],
    ],
    ids=["alike", "a little ahead", "alone", "far apart"],
)
def test_packed_rows_of_extreme_labels(logits, k):
    packed = Packed(1000, k)
    said = dense(packed, packed.pack(logits), 1000)
    assert said.isfinite().all()
    assert said.argmax() == logits.argmax()
    first, second = logits.topk(2).values[0]
    if first > second:
        assert (said == said.max()).sum() == 1
    assert divergence(unquantised(logits, k), said).item() < 0.006


def test_rows_are_read_in_a_compiled_graph():
    packed = Packed(1000, 10)
    rows = packed.pack(torch.randn(8, 1000))
    compiled = torch.compile(lambda rows: packed.targets(rows).sparse, fullgraph=True, backend="eager")
    for ours, theirs in zip(compiled(rows), packed.targets(rows).sparse, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    "described",
    [{"format": "zip"}, {"format": "packed"}, {"format": "packed", "k": 0}, {"format": "exact", "dtype": "int8"}],
)
def test_an_unknown_format_is_refused(described):
    with pytest.raises(ValueError, match="rows with k="):
        build_rows(classes=10, **described)
