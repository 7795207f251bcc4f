"""Soft labels of crops from label maps of images (ReLabel: Yun et al. 2021, arXiv 2101.05022, section 3.1).

A label map contains the logits of the K most likely classes for each of S x S cells of the image; all others are 0. It
is pooled over the crop's box as by RoIAlign (He et al. 2017; 1x1, aligned=False, adaptive sampling). RoIAlign's weights
are the product of a vector for rows and one for columns, so only the sum over the S x S x K stored logits is computed,
without the dense map of S x S x C.

The Triton version has not yet been measured on a GPU.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torchvision.ops import roi_align

KINDS = ("logits", "probabilities")

MOST_CLASSES = 65536
# Stored logits that a program of the kernel processes at a time.
ENTRIES = 16


def pool_labels(logits: Tensor, ids: Tensor, boxes: Tensor, num_classes: int, *, kind: str = "logits") -> Tensor:
    """Returns the soft label of each crop: float32 [B, C], rows sum to 1.

    logits: logits of the cells' most likely classes, float16 or float32 [B, S, S, K], indexed by row first. ids: ids of
    these classes, any integer dtype [B, S, S, K], distinct within a cell, 0 to C - 1. boxes: float32 [B, 4], the crops'
    top, left, bottom and right as shares of the image's height and width, 0 to 1. Flips do not change a label.
    kind: "logits" pools logits and takes the softmax of the result (as in the paper); "probabilities" pools each cell's
    softmax.
    Raises ValueError for other kinds and for shapes that do not match.
    """
    _check(logits, ids, boxes, kind)
    side, kept = logits.shape[2:]
    rows = pooling_weights(boxes[:, 0], boxes[:, 2], side)
    columns = pooling_weights(boxes[:, 1], boxes[:, 3], side)
    weights = (rows[:, :, None] * columns[:, None, :])[..., None]
    logits, ids = logits.float(), ids.flatten(1).long()
    if kind == "logits":
        return _sum_by_class((weights * logits).flatten(1), ids, num_classes).softmax(dim=1)
    # A cell's softmax, with exp(0) for each absent class, scaled so that the largest exponential is 1.
    top = logits.amax(dim=3, keepdim=True)
    if kept < num_classes:
        top = top.clamp(min=0)
        absent = (-top).exp()
    else:
        absent = torch.zeros_like(top)
    present = (logits - top).exp()
    share = weights / (present.sum(dim=3, keepdim=True) + (num_classes - kept) * absent)
    pooled = _sum_by_class((share * (present - absent)).flatten(1), ids, num_classes)
    return pooled + (share * absent).sum(dim=(1, 2))


def pooling_weights(starts: Tensor, ends: Tensor, side: int) -> Tensor:
    """Returns the weight of each of `side` cells along one axis: float32 [B, side].

    starts, ends: bounds of the boxes, as shares of the image, [B]. RoIAlign extends lengths to at least one cell, takes
    ceil(length) equidistant samples, and interpolates between the two nearest cells, or uses the outermost cell beyond
    the centres.
    """
    starts, ends = starts.float() * side - 0.5, ends.float() * side - 0.5
    lengths = (ends - starts).clamp(min=1)
    samples = lengths.ceil()
    number = torch.arange(side + 1, device=starts.device)
    places = starts[:, None] + (number + 0.5) * (lengths / samples)[:, None]
    counts = (number < samples[:, None]) & (places >= -1) & (places <= side)
    places = places.clamp(0, side - 1)
    # A cell's weight in a sample decreases to 0 at its neighbours' centres.
    shares = (1 - (places[:, :, None] - torch.arange(side, device=starts.device)).abs()).clamp(min=0)
    return (shares * counts[:, :, None]).sum(dim=1) / samples[:, None]


def reference(logits: Tensor, ids: Tensor, boxes: Tensor, num_classes: int, *, kind: str = "logits") -> Tensor:
    """The definition of pool_labels: torchvision's roi_align on the dense map."""
    batch, side = logits.shape[:2]
    dense = logits.new_zeros(batch, side, side, num_classes, dtype=torch.float32)
    dense = dense.scatter(3, ids.long(), logits.float()).permute(0, 3, 1, 2)
    if kind == "probabilities":
        dense = dense.softmax(dim=1)
    top, left, bottom, right = (boxes.float() * side - 0.5).unbind(1)
    # roi_align takes x before y.
    places = torch.stack([torch.arange(batch, device=boxes.device), left, top, right, bottom], dim=1)
    pooled = roi_align(dense, places, output_size=1, aligned=False)[:, :, 0, 0]
    return pooled.softmax(dim=1) if kind == "logits" else pooled


def _check(logits: Tensor, ids: Tensor, boxes: Tensor, kind: str) -> None:
    if kind not in KINDS:
        raise ValueError(f"kind={kind}: there are {', '.join(KINDS)}")
    if logits.ndim != 4 or logits.shape[1] != logits.shape[2] or ids.shape != logits.shape:
        raise ValueError(f"logits and ids must be [B, S, S, K] alike, not {list(logits.shape)} and {list(ids.shape)}")
    if boxes.shape != (len(logits), 4):
        raise ValueError(f"boxes must be [{len(logits)}, 4], not {list(boxes.shape)}")


@torch.library.custom_op("label_refinery::sum_by_class", mutates_args=(), device_types="cpu")
def _sum_by_class(values: Tensor, ids: Tensor, num_classes: int) -> Tensor:
    """Returns the sum of the values of each class: float32 [B, C]. values: float32 [B, N]. ids: int64 [B, N]."""
    return values.new_zeros(len(values), num_classes).scatter_add(1, ids, values)


@_sum_by_class.register_fake
def _(values: Tensor, ids: Tensor, num_classes: int) -> Tensor:
    return values.new_empty(len(values), num_classes)


@_sum_by_class.register_kernel("cuda")
def launch(values: Tensor, ids: Tensor, num_classes: int) -> Tensor:
    """The Triton version of the operator; deterministic, without atomic additions."""
    sums = values.new_empty(len(values), num_classes)
    if sums.numel():
        block, warps = tile(num_classes)
        with torch.cuda.device_of(values):
            _sum_kernel[(len(values),)](
                values.contiguous(),
                ids.contiguous(),
                sums,
                values.shape[1],
                num_classes,
                ENTRIES=ENTRIES,
                BLOCK=block,
                num_warps=warps,
            )
    return sums


def tile(classes: int) -> tuple[int, int]:
    """Returns block size and number of warps for a row of this many classes. Raises ValueError for too many."""
    if classes > MOST_CLASSES:
        raise ValueError(f"{classes} classes: the kernel holds a row in registers and takes at most {MOST_CLASSES}")
    block = triton.next_power_of_2(classes)
    return block, min(max(block // 256, 1), 32)


@triton.jit
def _sum_kernel(values_ptr, ids_ptr, sums_ptr, entries, columns, ENTRIES: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    sums = tl.zeros((BLOCK,), dtype=tl.float32)
    for start in range(0, entries, ENTRIES):
        entry = start + tl.arange(0, ENTRIES)
        value = tl.load(values_ptr + row * entries + entry, mask=entry < entries, other=0.0)
        # Cells outside the crop have weight 0 and are contiguous.
        if tl.max(tl.abs(value), 0) > 0:
            class_id = tl.load(ids_ptr + row * entries + entry, mask=entry < entries, other=-1).to(tl.int32)
            sums += tl.sum(tl.where(class_id[:, None] == at[None, :], value[:, None], 0.0), 0)
    tl.store(sums_ptr + row * columns + at, sums, mask=at < columns)
