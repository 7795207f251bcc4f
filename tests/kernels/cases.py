"""Inputs and checks for the tests of kernels on every device."""

import torch
from torch import Tensor

from kernels.batch_statistics import _statistics
from kernels.sample_blocks import rows_read

# Relative tolerance of gradients: one step between a dtype's numbers, since Triton's interpreter truncates.
ROUNDING = {torch.float32: 1e-5, torch.bfloat16: 2**-7, torch.float16: 2**-10}


def logits(seed: int, rows: int, classes: int, spread: float = 3.0) -> Tensor:
    return torch.randn(rows, classes, generator=torch.Generator().manual_seed(seed)) * spread


def dense(rows: int, classes: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Returns (student, refinery); the refinery's first row has classes at -inf, its second two equal maxima."""
    refinery = logits(1, rows, classes)
    refinery[0, 1:3] = -torch.inf
    refinery[1, [2, 5]] = 20
    return logits(0, rows, classes).to(dtype), refinery.to(dtype)


def sparse(rows: int, classes: int, kept: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns (student, classes, values, rest); the first row has rest 0, the last sums to less than 1."""
    generator = torch.Generator().manual_seed(2)
    ids = torch.stack([torch.randperm(classes, generator=generator)[:kept] for _ in range(rows)])
    values = torch.rand(rows, kept, generator=generator).softmax(1)
    rest = torch.full((rows,), 0.1 / (classes - kept))
    rest[0] = 0
    values *= (1 - rest * (classes - kept))[:, None]
    values[-1] *= 0.9
    return logits(0, rows, classes).to(dtype), ids, values, rest


def defined(reference, student: Tensor, *label: Tensor, kind: str, temperature: float) -> tuple[Tensor, Tensor]:
    """Returns a reference's loss and its gradient with respect to the student, in float32."""
    student = student.float().requires_grad_()
    loss = reference(student, *label, kind=kind, temperature=temperature)
    loss.sum().backward()
    return loss.detach(), student.grad


def check(done: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor], dtype: torch.dtype) -> None:
    """Asserts that an operator's (loss, gradient) for logits of a dtype is as expected."""
    (loss, gradient), (defined_loss, defined_gradient) = done, expected
    assert loss.dtype == torch.float32
    assert gradient.dtype == dtype
    torch.testing.assert_close(loss, defined_loss, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradient.float(), defined_gradient, rtol=ROUNDING[dtype], atol=ROUNDING[dtype] / 100)


def activations(device: str) -> list[Tensor]:
    """Returns tensors in the memory layouts that a network may produce."""
    x = logits(3, 40, 60, spread=1.0)
    x[0, ::2][:8] = torch.tensor([-1, -0.0, 0, 1, -torch.inf, torch.inf, 0.999, -0.999])
    x = x.to(device)
    return [
        x,
        x.bfloat16().view(4, 10, 6, 10).contiguous(memory_format=torch.channels_last),
        x.half().t(),
        x[:, ::2],
        x[:1].expand(3, 60),
        x[:0],
        x[0, 0],
    ]


def block_images() -> tuple[Tensor, ...]:
    """Returns arguments of sample_blocks without the resolution: odd image sizes, boxes at the edges, some flipped."""
    sizes = [(37, 50), (1, 1), (64, 64), (5, 90), (120, 77), (200, 111)]
    boxes = [(3, 5, 30, 41), (0, 0, 1, 1), (0, 0, 64, 64), (1, 80, 3, 10), (119, 0, 1, 77), (0, 0, 200, 111)]
    generator = torch.Generator().manual_seed(3)
    offsets, blocks = [], 2
    for height, width in sizes:
        whole, half = ((height + 3) // 4) * ((width + 3) // 4), ((height + 7) // 8) * ((width + 7) // 8)
        offsets.append((blocks, blocks + whole, blocks + whole + half))
        blocks += whole + 2 * half
    ends = torch.randint(0, 256, (2, blocks), generator=generator).sort(dim=0, descending=True).values
    codes = torch.randint(0, 2**24, (2, blocks), generator=generator)
    words = ends[0] | ends[1] << 8 | codes[0] << 16 | codes[1] << 40
    flips = torch.tensor([False, False, True, False, True, False])
    places = (torch.tensor(part, dtype=torch.int32) for part in (sizes, boxes))
    return words, torch.tensor(offsets), *places, flips


def read_blocks(blocks: Tensor, offsets: Tensor, sizes: Tensor, boxes: Tensor, flips: Tensor) -> Tensor:
    """Returns which blocks sample_blocks needs: bool [N]."""
    there = torch.zeros(len(blocks), dtype=torch.bool)
    firsts, lasts = rows_read(boxes.numpy())
    for starts, size, first, last in zip(offsets.tolist(), sizes.tolist(), firsts, lasts, strict=True):
        for plane, start in enumerate(starts):
            down, across = (-(-pixels // (8 if plane else 4)) for pixels in size)
            kind = min(plane, 1)
            there[start + first[kind] * across : start + min(last[kind], down) * across] = True
    return there


def pixels(seed: int, *shape: int, mean: float = 0.0, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Returns random activations, channels-last."""
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) + mean
    return values.to(dtype).contiguous(memory_format=torch.channels_last)


def normalisation(seed: int, channels: int) -> Tensor:
    """Returns a random affine with negative entries: float32 [2, C]."""
    return torch.randn(2, channels, generator=torch.Generator().manual_seed(seed))


def norm(seed: int, channels: int) -> tuple[Tensor, Tensor, float]:
    """Returns weight, bias and eps of a batch normalisation."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(channels, generator=generator) + 0.5, torch.randn(channels, generator=generator), 1e-5


def check_product(
    found: tuple[Tensor, ...],
    expected: tuple[Tensor, ...],
    weight: Tensor,
    bias: Tensor,
    eps: float,
    *,
    absolute: float = 1e-4,
) -> None:
    """Asserts that a product equals its reference, and that its affine is that of its own output."""
    check_alike(found[:-1], expected[:-1], absolute=absolute)
    check_alike(found[-1], _statistics(found[-2], weight, bias, eps))
    assert expected[-1].shape == found[-1].shape


def check_alike(
    found: Tensor | tuple[Tensor, ...], expected: Tensor | tuple[Tensor, ...], *, absolute: float = 1e-4
) -> None:
    """Asserts that a fused operator equals its reference within one rounding, with the same dtype and memory format."""
    pair = (found, expected) if isinstance(expected, tuple) else ((found,), (expected,))
    for ours, theirs in zip(*pair, strict=True):
        assert ours.dtype == theirs.dtype
        # Sums in another order may round to the other neighbour.
        rounding = 1e-4 if ours.dtype == torch.float32 else ROUNDING[ours.dtype]
        torch.testing.assert_close(ours.float(), theirs.float(), rtol=rounding, atol=absolute)
        if ours.ndim == 4:
            assert ours.is_contiguous(memory_format=torch.channels_last)
            assert theirs.is_contiguous(memory_format=torch.channels_last)
