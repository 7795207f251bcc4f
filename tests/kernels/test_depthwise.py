"""The definition of the depthwise operator, compared with PyTorch's convolution."""

import pytest
import torch
from torch.nn import functional as F

from kernels import depthwise as module
from kernels.depthwise import depthwise
from tests.kernels.cases import pixels


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("shape", [(2, 3, 5, 8), (1, 4, 1, 1)])
def test_convolution_and_gradients(shape, stride):
    x, weight = pixels(0, *shape).double(), pixels(1, shape[1], 1, 3, 3).double()
    ours, theirs = ([each.clone().requires_grad_() for each in (x, weight)] for _ in range(2))
    y = depthwise(*ours, stride=stride)
    expected = F.conv2d(*theirs, stride=stride, padding=1, groups=shape[1])
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(module.reference(x, weight, stride=stride), expected)
    gradient = torch.randn_like(y)
    y.backward(gradient)
    expected.backward(gradient)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one.grad, other.grad)


def test_weights_keep_their_precision():
    """As under autocast: bfloat16 activations, float32 weights and float32 gradients of the weights."""
    x, weight = pixels(0, 2, 3, 5, 8).requires_grad_(), pixels(1, 3, 1, 3, 3, dtype=torch.float32).requires_grad_()
    y = depthwise(x, weight, stride=2)
    y.sum().backward()
    assert (y.dtype, x.grad.dtype, weight.grad.dtype) == (torch.bfloat16, torch.bfloat16, torch.float32)
    assert y.is_contiguous(memory_format=torch.channels_last)


def test_invalid_arguments():
    x = pixels(0, 2, 3, 5, 8)
    with pytest.raises(ValueError, match="stride=3: must be 1 or 2"):
        depthwise(x, torch.zeros(3, 1, 3, 3), stride=3)
    with pytest.raises(ValueError, match=r"weight must be \[3, 1, 3, 3\], not \[3, 1, 5, 5\]"):
        depthwise(x, torch.zeros(3, 1, 5, 5))


def test_operators_pass_opcheck():
    x, weight = pixels(0, 2, 3, 5, 8), pixels(1, 3, 1, 3, 3, dtype=torch.float32)
    for stride in (1, 2):
        y = module.output_like(x, x.shape[1], stride)
        torch.library.opcheck(module._depthwise, (x.clone().requires_grad_(), weight.clone().requires_grad_(), stride))
        torch.library.opcheck(module._depthwise_backward, (torch.randn_like(y), x, weight, stride))
