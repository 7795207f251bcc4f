"""Storage formats of a crop's label: a row of bytes, of the same size for every crop.

exact   all logits, as the refinery computed them
packed the k most likely classes with their probabilities, and the total of all others

A packed row is k entries of class id and code, the most likely class first, packed from the lowest bit of the first
byte on. An entry takes the bits of a class id plus 6: 16 for up to 1,024 classes. With p1 >= p2 >= ... the
probabilities, the codes are

    entries 2 to k   0 if as likely as the first, else c for ln(p1 / p) in (c - 1, c] x 3/16, read as (c - 1/2) x 3/16;
                     63 also for anything less likely
    entry 1          the share r of all others, as arcsin(sqrt(r)) in steps of (pi/2) / 63

The logarithm is off by at most 3/32 down to ln(p1 / p) = 11.8. The second scale makes the cost of rounding equal for
all shares: the divergence of two shares is twice the squared difference of their arcsines, to first order.

The order of the classes is preserved, and a class that was strictly most likely is read as strictly most likely.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from train.labels.source import Targets

_CODE_BITS = 6
_LAST_CODE = 2**_CODE_BITS - 1
_LOG_STEP = 3 / 16
_ARC_STEP = math.pi / 2 / _LAST_CODE

# An entry begins at any bit of its first byte, and ends within this many bytes with up to 2**27 classes.
_ENTRY_BYTES = 5

# The dtypes of a network's output.
_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in (torch.float32, torch.bfloat16, torch.float16)}


class Rows(nn.Module):
    """A format of rows. width: bytes of a row. format, k, dtype: the arguments with which `build_rows` makes it."""

    width: int
    format: str
    k: int | None = None
    dtype: str | None = None

    def pack(self, logits: Tensor) -> Tensor:
        """A refinery's logits [B, C] as rows, uint8 [B, width], on the same device."""
        raise NotImplementedError

    def targets(self, rows: Tensor) -> Targets:
        """The labels of rows, uint8 [B, width]."""
        raise NotImplementedError


class Exact(Rows):
    """All logits, in the dtype that the refinery computed them in."""

    def __init__(self, classes: int, dtype: torch.dtype):
        super().__init__()
        self._dtype = dtype
        self.width = classes * dtype.itemsize
        self.format, self.dtype = "exact", str(dtype).removeprefix("torch.")

    def pack(self, logits: Tensor) -> Tensor:
        return logits.contiguous().view(torch.uint8)

    def targets(self, rows: Tensor) -> Targets:
        return Targets(logits=rows.view(self._dtype))


class Packed(Rows):
    """The most likely k of `classes` classes, or all if there are fewer."""

    # For each entry: the bytes that hold it, and how many bits of the first byte belong to the previous entry.
    bytes_of: Tensor
    shift: Tensor
    place: Tensor  # the values of an entry's bytes

    def __init__(self, classes: int, k: int):
        super().__init__()
        self.format = "packed"
        self._classes = classes
        self.k = self._k = min(k, classes)
        bits = max(classes - 1, 1).bit_length() + _CODE_BITS
        self.width = -(-self._k * bits // 8)
        self._mask = 2**bits - 1
        starts = torch.arange(self._k) * bits
        self.register_buffer("bytes_of", (starts // 8)[:, None] + torch.arange(_ENTRY_BYTES), persistent=False)
        self.register_buffer("shift", starts % 8, persistent=False)
        self.register_buffer("place", 256 ** torch.arange(_ENTRY_BYTES), persistent=False)

    def pack(self, logits: Tensor) -> Tensor:
        logits = logits.float()
        # By logits, which unlike probabilities are equal only where classes are equally likely.
        order = logits.sort(dim=1, descending=True, stable=True).indices[:, : self._k]
        kept = logits.gather(1, order)
        others = 1 - logits.softmax(dim=1).gather(1, order).sum(dim=1).clamp(max=1)
        codes = ((kept[:, :1] - kept) / _LOG_STEP).ceil().clamp(max=_LAST_CODE).long()
        codes[:, 0] = (others.sqrt().asin() / _ARC_STEP).round().long()
        entries = ((order << _CODE_BITS) | codes) << self.shift
        parts = entries[:, :, None] // self.place & 0xFF
        # Entries that share a byte use different bits of it: their sum is their union.
        rows = parts.new_zeros(len(logits), self.width + _ENTRY_BYTES)
        rows = rows.index_add(1, self.bytes_of.flatten(), parts.flatten(1))
        return rows[:, : self.width].to(torch.uint8)

    def targets(self, rows: Tensor) -> Targets:
        parts = F.pad(rows, (0, _ENTRY_BYTES))[:, self.bytes_of].long()
        entries = (parts * self.place).sum(dim=2) >> self.shift & self._mask
        # A file of other people may hold any bits, and kernels trust an id.
        classes = (entries >> _CODE_BITS).clamp(max=self._classes - 1)
        codes = (entries & _LAST_CODE).float()
        weights = torch.where(codes > 0, torch.exp((0.5 - codes) * _LOG_STEP), 1.0)
        weights = torch.cat([torch.ones_like(weights[:, :1]), weights[:, 1:]], dim=1)
        if self._k == self._classes:
            other = torch.zeros_like(weights[:, 0])
        else:
            # Never exactly 0 or 1: both ends are read as the middle of their half steps.
            arc = codes[:, 0].clamp(0.25, _LAST_CODE - 0.25) * _ARC_STEP
            other = arc.tan().square() * weights.sum(dim=1) / (self._classes - self._k)
            # A dropped class is not read as more likely than a kept one, nor as equally likely as the only one.
            other = other.minimum(weights[:, -1] if self._k > 1 else weights[:, -1] * math.exp(-_LOG_STEP / 2))
        total = weights.sum(dim=1) + other * (self._classes - self._k)
        return Targets(sparse=(classes, weights / total[:, None], other / total))


class CellRows(nn.Module):
    """The label map of an image: of each of `side` x `side` cells the k most likely classes' logits and their ids.

    A row holds all logits, float16, cell by cell and rows of the image first, and then all ids, as uint8, uint16 or
    int32, whichever is the smallest that holds them. width: its bytes. k: at most the number of classes.
    """

    def __init__(self, classes: int, k: int, side: int):
        super().__init__()
        self.k = min(k, classes)
        self._classes = classes
        self._shape = (side, side, self.k)
        self._ids = torch.uint8 if classes <= 2**8 else torch.uint16 if classes <= 2**16 else torch.int32
        self._logit_bytes = side * side * self.k * torch.float16.itemsize
        self.width = self._logit_bytes + side * side * self.k * self._ids.itemsize

    def pack(self, cells: Tensor) -> Tensor:
        """The logits of every cell and class, [B, C, side, side], as rows, uint8 [B, width]."""
        top = cells.movedim(1, -1).float().topk(self.k, dim=3)
        return self.pack_kept(top.values, top.indices)

    def pack_kept(self, logits: Tensor, ids: Tensor) -> Tensor:
        """The logits of k classes of every cell and their ids, of any types [B, side, side, k], as rows."""
        parts = logits.half(), ids.to(self._ids)
        return torch.cat([part.flatten(1).contiguous().view(torch.uint8) for part in parts], dim=1)

    def unpack(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """logits float16 and ids int64, [B, side, side, k], of rows uint8 [B, width]."""
        logits, ids = rows[:, : self._logit_bytes], rows[:, self._logit_bytes :]
        shape = (len(rows), *self._shape)
        # Contiguous rows of bytes, as a view with a wider dtype requires.
        return (
            logits.reshape(-1).clone().view(torch.float16).view(shape),
            # A file of other people may hold any bits, and kernels trust an id.
            ids.reshape(-1).clone().view(self._ids).view(shape).long().clamp(0, self._classes - 1),
        )


def build_rows(format: str, classes: int, *, k: int | None = None, dtype: str | None = None) -> Rows:
    """The format of this name. k: classes of packed rows. dtype: of exact ones. Raises ValueError if unknown."""
    if format == "exact" and dtype in _DTYPES:
        return Exact(classes, _DTYPES[dtype])
    if format == "packed" and k is not None and k > 0:
        return Packed(classes, k)
    raise ValueError(f"{format} rows with k={k} and dtype={dtype}")
