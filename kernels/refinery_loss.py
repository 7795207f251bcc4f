"""The loss of label refinery: the distance between the student's output and the label of each crop.

One pass computes the loss and its gradient with respect to the student's logits, in their dtype; backward only scales
this gradient. The Triton version has not yet been measured on a GPU.

p is the label: softmax(refinery / T), or the probabilities of a label file. q is softmax(student / T).

    soft      KL(p || q) = sum p log(p / q)     Label Refinery, eq. 1; 0 where the student equals the label
    hard      -log q[argmax p]                  only the most likely class; the first if several are equal
    reversed  KL(q || p) = sum q log(q / p)     Label Refinery, table 7
    l2        sum (p - q)^2                     Label Refinery, table 7, which does not define it further

Each is multiplied by T^2, so that gradients keep their size (Hinton et al. 2015, arXiv 1503.02531, section 2).
Logarithms of p are clamped at that of float32's smallest normal number, -87.3: where p is 0, as it may be in a label
file, "reversed" would be infinite. Arithmetic is in float32 for any input dtype. Losses are differentiable once.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

KINDS = ("soft", "hard", "reversed", "l2")

_TINY = torch.finfo(torch.float32).tiny
_LOG_TINY = math.log(_TINY)
_FLOOR = tl.constexpr(_LOG_TINY)
_MOST_CLASSES = 65536


def refinery_loss(student: Tensor, refinery: Tensor, *, kind: str = "soft", temperature: float = 1.0) -> Tensor:
    """Returns the loss of each crop with a refinery's output as label, float32 [B].

    student, refinery: logits [B, C], float32, bfloat16 or float16. kind: one of KINDS. The gradient also flows to the
    refinery's logits if they require one (adversarial jitter: Label Refinery, section 3.1).
    Raises ValueError for other kinds, shapes that differ, T <= 0, and on a GPU for more than 65536 classes.
    """
    _check(student, refinery, kind, temperature)
    if refinery.requires_grad and torch.is_grad_enabled():
        return reference(student, refinery, kind=kind, temperature=temperature)
    return _refinery_loss(student, refinery, kind, temperature)[0]


def sparse_loss(
    student: Tensor, classes: Tensor, values: Tensor, rest: Tensor, *, kind: str = "soft", temperature: float = 1.0
) -> Tensor:
    """Returns the loss of each crop with a label that stores the probabilities of K classes, float32 [B].

    student: logits [B, C], float32, bfloat16 or float16. classes: int64 [B, K], distinct in a row, 0 to C - 1. values:
    their probabilities, [B, K]. rest: the probability of each of the other C - K classes, [B]. The temperature applies
    only to the student, and labels get no gradient. kind, temperature and errors are as in refinery_loss.
    """
    _check(student, None, kind, temperature)
    if classes.shape != values.shape or classes.shape[:1] != student.shape[:1] or rest.shape != student.shape[:1]:
        raise ValueError(
            f"classes {list(classes.shape)}, values {list(values.shape)} and rest {list(rest.shape)} "
            f"must be [B, K], [B, K] and [B] for a student's [B, C] {list(student.shape)}"
        )
    return _sparse_loss(student, classes, values, rest, kind, temperature)[0]


def probabilities_loss(
    student: Tensor, probabilities: Tensor, *, kind: str = "soft", temperature: float = 1.0
) -> Tensor:
    """Returns the loss of each crop with a label of probabilities of all classes, float32 [B], in plain PyTorch.

    student: logits [B, C]. probabilities: [B, C], rows sum to 1; treated as in sparse_loss. kind, temperature and
    errors are as in refinery_loss.
    """
    _check(student, probabilities, kind, temperature)
    p = _wide(probabilities)
    return _divergence(student, p, p.clamp(min=_TINY).log(), p, kind, temperature)


def _check(student: Tensor, label: Tensor | None, kind: str, temperature: float) -> None:
    if kind not in KINDS:
        raise ValueError(f"kind={kind}: there are {', '.join(KINDS)}")
    if not temperature > 0:
        raise ValueError(f"temperature={temperature}: must be above 0")
    if student.ndim != 2 or (label is not None and label.shape != student.shape):
        shapes = [list(x.shape) for x in (student, label) if x is not None]
        raise ValueError(f"student and label must be [B, C] alike, not {' and '.join(map(str, shapes))}")


# ---- the definitions of the operators


def reference(student: Tensor, refinery: Tensor, *, kind: str, temperature: float) -> Tensor:
    """The definition of refinery_loss in plain PyTorch; differentiable in both. Computes in float64 for float64."""
    log_p = F.log_softmax(_wide(refinery) / temperature, dim=1)
    return _divergence(student, log_p.exp(), log_p.clamp(min=_LOG_TINY), refinery, kind, temperature)


def sparse_reference(
    student: Tensor, classes: Tensor, values: Tensor, rest: Tensor, *, kind: str, temperature: float
) -> Tensor:
    """The definition of sparse_loss in plain PyTorch; differentiable in student, values and rest."""
    p = _dense(student, classes, values, rest)
    return _divergence(student, p, p.clamp(min=_TINY).log(), p, kind, temperature)


def _divergence(student: Tensor, p: Tensor, log_p: Tensor, ranks: Tensor, kind: str, temperature: float) -> Tensor:
    """Returns the loss of each crop. ranks: values in the order of p without rounding, for an exact argmax."""
    log_q = F.log_softmax(_wide(student) / temperature, dim=1)
    if kind == "soft":
        loss = (p * (log_p - log_q)).sum(1)
    elif kind == "hard":
        loss = F.nll_loss(log_q, ranks.argmax(1), reduction="none")
    elif kind == "reversed":
        loss = (log_q.exp() * (log_q - log_p)).sum(1)
    else:
        loss = (p - log_q.exp()).square().sum(1)
    return loss * temperature**2


def _dense(student: Tensor, classes: Tensor, values: Tensor, rest: Tensor) -> Tensor:
    return _wide(rest)[:, None].expand(student.shape).scatter(1, classes, _wide(values))


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


# ---- the operators, which return the loss, float32 [B], and its gradient, [B, C] in the student's dtype


@torch.library.custom_op("label_refinery::refinery_loss", mutates_args=(), device_types="cpu")
def _refinery_loss(student: Tensor, refinery: Tensor, kind: str, temperature: float) -> tuple[Tensor, Tensor]:
    log_p = F.log_softmax(refinery.float() / temperature, dim=1)
    return _closed_form(student, log_p.exp(), log_p.clamp(min=_LOG_TINY), refinery, kind, temperature)


@torch.library.custom_op("label_refinery::sparse_loss", mutates_args=(), device_types="cpu")
def _sparse_loss(
    student: Tensor, classes: Tensor, values: Tensor, rest: Tensor, kind: str, temperature: float
) -> tuple[Tensor, Tensor]:
    p = _dense(student, classes, values.float(), rest.float())
    return _closed_form(student, p, p.clamp(min=_TINY).log(), p, kind, temperature)


def _closed_form(
    student: Tensor, p: Tensor, log_p: Tensor, ranks: Tensor, kind: str, temperature: float
) -> tuple[Tensor, Tensor]:
    log_q = F.log_softmax(student.float() / temperature, dim=1)
    q = log_q.exp()
    if kind == "soft":
        loss = (p * (log_p - log_q)).sum(1)
        gradient = p.sum(1, keepdim=True) * q - p
    elif kind == "hard":
        likeliest = ranks.argmax(1, keepdim=True)
        loss = -log_q.gather(1, likeliest)[:, 0]
        gradient = q.scatter_add(1, likeliest, torch.full_like(q[:, :1], -1))
    elif kind == "reversed":
        ratio = log_q - log_p
        loss = (q * ratio).sum(1)
        gradient = q * (ratio - loss[:, None])
    else:
        gap = q - p
        loss = gap.square().sum(1)
        gradient = 2 * q * (gap - (q * gap).sum(1, keepdim=True))
    return loss * temperature**2, (gradient * temperature).to(student.dtype)


def _empty(student: Tensor) -> tuple[Tensor, Tensor]:
    loss = student.new_empty(student.shape[0], dtype=torch.float32)
    return loss, torch.empty_like(student, memory_format=torch.contiguous_format)


_refinery_loss.register_fake(lambda student, refinery, kind, temperature: _empty(student))
_sparse_loss.register_fake(lambda student, classes, values, rest, kind, temperature: _empty(student))


def _keep(ctx, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    gradient = output[1]
    ctx.mark_non_differentiable(gradient)
    ctx.save_for_backward(gradient)
    ctx.inputs = len(inputs)


@torch.autograd.function.once_differentiable
def _backward(ctx, incoming: Tensor, _: None) -> tuple[Tensor | None, ...]:
    (gradient,) = ctx.saved_tensors
    return (gradient * incoming[:, None]).to(gradient.dtype), *[None] * (ctx.inputs - 1)


_refinery_loss.register_autograd(_backward, setup_context=_keep)
_sparse_loss.register_autograd(_backward, setup_context=_keep)


# ---- their Triton version: one program per row, the whole row in registers


@_refinery_loss.register_kernel("cuda")
def launch(student: Tensor, refinery: Tensor, kind: str, temperature: float) -> tuple[Tensor, Tensor]:
    """The Triton version of the operator of `refinery_loss`."""
    rows, columns = student.shape
    block, warps = tile(columns)
    student, refinery = _packed_rows(student), _packed_rows(refinery)
    loss, gradient = _empty(student)
    if rows:
        with torch.cuda.device_of(student):
            _refinery_kernel[(rows,)](
                student,
                refinery,
                loss,
                gradient,
                student.stride(0),
                refinery.stride(0),
                columns,
                temperature,
                KIND=kind,
                BLOCK=block,
                num_warps=warps,
            )
    return loss, gradient


@_sparse_loss.register_kernel("cuda")
def launch_sparse(
    student: Tensor, classes: Tensor, values: Tensor, rest: Tensor, kind: str, temperature: float
) -> tuple[Tensor, Tensor]:
    """The Triton version of the operator of `sparse_loss`."""
    rows, columns = student.shape
    block, warps = tile(columns)
    student = _packed_rows(student)
    loss, gradient = _empty(student)
    if rows:
        with torch.cuda.device_of(student):
            _sparse_kernel[(rows,)](
                student,
                classes.contiguous(),
                values.contiguous(),
                rest.contiguous(),
                loss,
                gradient,
                student.stride(0),
                classes.shape[1],
                columns,
                temperature,
                KIND=kind,
                BLOCK=block,
                num_warps=warps,
            )
    return loss, gradient


def tile(classes: int) -> tuple[int, int]:
    """Returns block size and number of warps for a row of this many classes. Raises ValueError for too many."""
    if classes > _MOST_CLASSES:
        raise ValueError(f"{classes} classes: the kernels hold a row in registers and take at most {_MOST_CLASSES}")
    block = triton.next_power_of_2(classes)
    # 8 elements per thread, up to the maximum number of warps. Rows of more than 16384 do not fit in registers and
    # spill.
    return block, min(max(block // 256, 1), 32)


def _packed_rows(x: Tensor) -> Tensor:
    return x if x.stride(1) == 1 else x.contiguous()


@triton.jit
def _refinery_kernel(
    student_ptr,
    refinery_ptr,
    loss_ptr,
    gradient_ptr,
    student_stride,
    refinery_stride,
    columns,
    temperature,
    KIND: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    x = tl.load(refinery_ptr + row * refinery_stride + at, mask=at < columns, other=float("-inf")).to(tl.float32)
    likeliest = tl.argmax(x, 0)
    x /= temperature
    x -= tl.max(x, 0)
    exponentials = tl.exp(x)
    total = tl.sum(exponentials, 0)
    _compare(
        student_ptr + row * student_stride,
        loss_ptr + row,
        gradient_ptr + row * columns,
        exponentials / total,
        x - tl.log(total),
        likeliest,
        columns,
        temperature,
        KIND,
        BLOCK,
    )


@triton.jit
def _sparse_kernel(
    student_ptr,
    classes_ptr,
    values_ptr,
    rest_ptr,
    loss_ptr,
    gradient_ptr,
    student_stride,
    kept,
    columns,
    temperature,
    KIND: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    p = tl.where(at < columns, tl.load(rest_ptr + row).to(tl.float32), 0.0)
    for k in range(kept):
        class_id = tl.load(classes_ptr + row * kept + k)
        p = tl.where(at == class_id, tl.load(values_ptr + row * kept + k).to(tl.float32), p)
    _compare(
        student_ptr + row * student_stride,
        loss_ptr + row,
        gradient_ptr + row * columns,
        p,
        tl.log(p),
        tl.argmax(p, 0),
        columns,
        temperature,
        KIND,
        BLOCK,
    )


@triton.jit
def _compare(
    student_ptr,
    loss_ptr,
    gradient_ptr,
    p,
    log_p,
    likeliest,
    columns,
    temperature,
    KIND: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Stores the loss and the gradient of one row; beyond its columns p and q are 0."""
    at = tl.arange(0, BLOCK)
    x = tl.load(student_ptr + at, mask=at < columns, other=float("-inf")).to(tl.float32) / temperature
    x -= tl.max(x, 0)
    exponentials = tl.exp(x)
    total = tl.sum(exponentials, 0)
    q = exponentials / total
    log_q = x - tl.log(total)
    # Not tl.maximum, which drops NaN.
    log_p = tl.where(log_p < _FLOOR, _FLOOR, log_p)
    ratio = tl.where(at < columns, log_q - log_p, 0.0)
    if KIND == "soft":
        loss = -tl.sum(p * ratio, 0)
        gradient = tl.sum(p, 0) * q - p
    elif KIND == "hard":
        chosen = at == likeliest
        loss = -tl.sum(tl.where(chosen, log_q, 0.0), 0)
        gradient = q - tl.where(chosen, 1.0, 0.0)
    elif KIND == "reversed":
        loss = tl.sum(q * ratio, 0)
        gradient = q * (ratio - loss)
    else:
        gap = q - p
        loss = tl.sum(gap * gap, 0)
        gradient = 2 * q * (gap - tl.sum(q * gap, 0))
    tl.store(loss_ptr, loss * temperature * temperature)
    tl.store(gradient_ptr + at, gradient * temperature, mask=at < columns)
