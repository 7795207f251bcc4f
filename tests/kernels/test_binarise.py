import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func

from kernels.binarise import binarise, reference
from tests.kernels.cases import activations


@pytest.mark.parametrize("function", [binarise, reference])
def test_definition(function):
    x = torch.tensor([-torch.inf, -1.5, -1, -0.5, -0.0, 0, 1e-30, 0.999, 1, 2, torch.inf, torch.nan]).requires_grad_()
    signs = function(x)
    expected = torch.tensor([-1.0, -1, -1, -1, 1, 1, 1, 1, 1, 1, 1, torch.nan])
    torch.testing.assert_close(signs.detach(), expected, rtol=0, atol=0, equal_nan=True)
    signs.backward(torch.arange(1.0, 13))
    assert x.grad.tolist() == [0, 0, 0, 4, 5, 6, 7, 8, 0, 0, 0, 0]


@given(st.lists(st.floats(width=32, allow_nan=False), min_size=1), st.sampled_from(["float32", "bfloat16", "float16"]))
def test_signs(values, dtype):
    x = torch.tensor(values).to(getattr(torch, dtype))
    signs = binarise(x)
    assert signs.dtype == x.dtype
    assert signs.tolist() == [1 if value >= 0 else -1 for value in x.tolist()]
    assert torch.equal(binarise(signs), signs)


def test_follows_its_reference():
    for x in activations("cpu"):
        ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
        signs = binarise(ours)
        assert torch.equal(signs, reference(theirs))
        assert signs.stride() == torch.empty_like(x).stride()
        weights = torch.randn_like(signs)
        signs.backward(weights)
        reference(theirs).backward(weights)
        assert torch.equal(ours.grad, theirs.grad)


def test_one_compiled_graph():
    def gradient(function) -> torch.Tensor:
        x = torch.linspace(-2, 2, 60).view(3, 20).requires_grad_()
        function(x).backward()
        return x.grad

    def layer(x: torch.Tensor) -> torch.Tensor:
        return (binarise(2 * x) * torch.arange(20)).sum()

    assert torch.equal(gradient(torch.compile(layer, fullgraph=True, backend="aot_eager")), gradient(layer))


def test_the_compiler_can_fuse_it():
    """Its graphs contain no custom operator, which would be opaque to it."""
    seen: list[str] = []

    def noted(graph, inputs):
        seen.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return make_boxed_func(graph)

    x = torch.linspace(-2, 2, 60).requires_grad_()
    torch._dynamo.reset()
    torch.compile(lambda x: binarise(2 * x).sum(), fullgraph=True, backend=aot_autograd(fw_compiler=noted))(
        x
    ).backward()
    torch._dynamo.reset()
    assert any("where" in target for target in seen)
    assert all(target.startswith("aten.") for target in seen)
