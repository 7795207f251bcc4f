"""Crops of sets stored as blocks, sampled on the device (kernels/sample_blocks.py) without decoding.

A set that fits is kept in the device's memory, so the host only computes the boxes of each batch. For a larger set, the
host gathers the rows of blocks that the crops of each batch need.

Not measured on a GPU yet.
"""

import weakref
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numba import njit
from numpy.typing import NDArray

from data.beton import Beton
from data.blocks import BLOCK_BYTES, across
from data.decoders import Request, View, delivered, union
from data.decoders.prefetch import Work, ahead
from data.progress import images_bar
from kernels.sample_blocks import rows_read, sample_blocks

# Images gathered per task of a thread.
_IMAGES_AT_ONCE = 16
# Bytes uploaded to the device at a time.
_UPLOAD_BYTES = 256 << 20


class Decoder:
    """A decoder (see data.decoders.Decoder) of sets stored as blocks.

    resident: the largest share of the device's free memory, 0 to 1, that the set may occupy; if the set is larger, the
    host gathers blocks for each batch.
    """

    def __init__(
        self,
        beton: Beton,
        *,
        views: tuple[View, ...],
        device: torch.device,
        threads: int,
        max_batch: int,
        resident: float,
    ):
        self._beton, self._views, self._device = beton, views, device
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="gather")
        self._resident = _resident(beton, device, resident, self._pool)

    def decode(self, requests: Iterable[Request]) -> Iterator[tuple[torch.Tensor, ...]]:
        if self._resident:
            for request in requests:
                yield self._crops(request, self._resident.blocks, self._resident.offsets[request.indices])
            return
        started = (_gather(self._beton, request, self._device, self._pool) for request in requests)
        yield from map(self._sampled, ahead(started))

    def _sampled(self, gathered: "_Gathered") -> tuple[torch.Tensor, ...]:
        blocks = gathered.blocks.to(self._device, non_blocking=True)
        return self._crops(gathered.request, blocks, gathered.offsets)

    def _crops(self, request: Request, blocks: torch.Tensor, offsets: NDArray[np.int64]) -> tuple[torch.Tensor, ...]:
        made, first, sizes = [], 0, self._beton.sizes[request.indices]
        for copies, resolution in self._views:
            of_view = slice(first, first + copies)
            first += copies
            boxes = request.boxes[:, of_view].swapaxes(0, 1).reshape(-1, 4)
            flips = request.flips[:, of_view].T.reshape(-1, 1)
            columns: list[NDArray[Any]] = [np.tile(offsets, (copies, 1)), np.tile(sizes, (copies, 1)), boxes, flips]
            host = np.concatenate([column.astype(np.int64) for column in columns], axis=1)
            table = delivered(torch.from_numpy(host), self._device)
            places = table[:, :3], table[:, 3:5].int(), table[:, 5:9].int(), table[:, 9].bool()
            made.append(sample_blocks(blocks, *places, resolution))
        return tuple(made)


@dataclass(frozen=True)
class _Resident:
    """A set kept in the device's memory. blocks: int64 [N]. offsets: int64 [images, 3]; see sample_blocks."""

    blocks: torch.Tensor
    offsets: NDArray[np.int64]


# By file and device, so that loaders of the same set with different crop sizes share one copy.
_RESIDENT: dict[tuple[str, torch.device], "weakref.ref[_Resident]"] = {}


def _resident(beton: Beton, device: torch.device, share: float, pool: ThreadPoolExecutor) -> _Resident | None:
    """Copies the set to the device; if it needs more than this share of free memory, prints a notice, returns None."""
    key = (beton.fingerprint, device)
    known = _RESIDENT[key]() if key in _RESIDENT else None
    if known:
        return known
    size = int(beton.lengths.sum())
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 0
    if share and device.type == "cuda" and size > share * free:
        print(
            f"{beton.path}: takes {size / 1e9:.3g} GB, more than {100 * share:g} % of the {free / 1e9:.3g} GB that are "
            "free on the device; its blocks are gathered by the host (--resident)",
            flush=True,
        )
    if not share or (device.type == "cuda" and size > share * free):
        return None
    found = _Resident(torch.empty(size // BLOCK_BYTES, dtype=torch.int64, device=device), _plane_offsets(beton))
    ends = beton.lengths.cumsum()
    with images_bar(beton.num_samples, f"{beton.path.name} to the device", leave=False) as bar:
        first = 0
        while first < beton.num_samples:
            begin = int(ends[first - 1]) if first else 0
            last = max(int(np.searchsorted(ends, begin + _UPLOAD_BYTES, side="right")), first + 1)
            images = np.arange(first, last)
            staged = torch.empty(int(ends[last - 1]) - begin, dtype=torch.uint8)
            places = ends[first:last] - beton.lengths[first:last] - begin
            parts = [images[at : at + _IMAGES_AT_ONCE] for at in range(0, len(images), _IMAGES_AT_ONCE)]
            futures = [
                pool.submit(_copy, beton, part, beton.starts[part], beton.lengths[part], staged, places[part - first])
                for part in parts
            ]
            for future in futures:
                future.result()
            words = slice(begin // BLOCK_BYTES, int(ends[last - 1]) // BLOCK_BYTES)
            found.blocks[words].copy_(staged.view(torch.int64))
            bar.update(last - first)
            first = last
    _RESIDENT[key] = weakref.ref(found)
    return found


def _plane_offsets(beton: Beton) -> NDArray[np.int64]:
    """Returns the offsets of each image's planes, in blocks, with images stored consecutively: int64 [images, 3]."""
    starts = (beton.lengths.cumsum() - beton.lengths) // BLOCK_BYTES
    return starts[:, None] + _planes(beton.sizes.astype(np.int64))


def _planes(sizes: NDArray[np.int64]) -> NDArray[np.int64]:
    """Returns the offsets of each image's planes within the image, in blocks: int64 [n, 3]. sizes: int64 [n, 2]."""
    heights, widths = sizes.T
    luma, half = across(heights) * across(widths), across((heights + 1) // 2) * across((widths + 1) // 2)
    return np.stack([np.zeros_like(luma), luma, luma + half], axis=1)


class _Gathered(NamedTuple):
    """The rows of blocks that a batch's crops need, in host memory (pinned, if for a GPU).

    blocks: int64 [N]. offsets: int64 [n, 3]; see sample_blocks.
    """

    request: Request
    blocks: torch.Tensor
    offsets: NDArray[np.int64]


def _gather(beton: Beton, request: Request, device: torch.device, pool: ThreadPoolExecutor) -> Work[_Gathered]:
    """Starts gathering on the pool."""
    sizes = beton.sizes[request.indices].astype(np.int64)
    firsts, lasts = rows_read(union(request.boxes))
    halved = (sizes + 1) // 2
    planes = [0, 1, 1]  # luma and two chroma planes of equal size
    firsts, lasts = firsts[:, planes], lasts[:, planes]
    wide = across(np.stack([sizes[:, 1], halved[:, 1], halved[:, 1]], axis=1))
    lasts = np.minimum(lasts, across(np.stack([sizes[:, 0], halved[:, 0], halved[:, 0]], axis=1)))
    lengths = (lasts - firsts) * wide
    places = (lengths.cumsum() - lengths.ravel()).reshape(-1, 3)
    offsets = places - firsts * wide
    pinned = device.type == "cuda"
    with torch.inference_mode(False):
        blocks = torch.empty(int(lengths.sum()), dtype=torch.int64, pin_memory=pinned)
    starts = beton.starts[request.indices][:, None] + (_planes(sizes) + firsts * wide) * BLOCK_BYTES
    target = blocks.view(torch.uint8)
    futures = [
        pool.submit(
            _copy,
            beton,
            request.indices[part],
            starts[part].ravel(),
            lengths[part].ravel() * BLOCK_BYTES,
            target,
            places[part].ravel() * BLOCK_BYTES,
        )
        for part in (slice(at, at + _IMAGES_AT_ONCE) for at in range(0, len(sizes), _IMAGES_AT_ONCE))
    ]
    return Work(_Gathered(request, blocks, offsets), futures)


def _copy(
    beton: Beton,
    images: NDArray[np.int64],
    starts: NDArray[np.int64],
    lengths: NDArray[np.int64],
    target: torch.Tensor,
    places: NDArray[np.int64],
) -> None:
    """Copies byte ranges of these images from the file to the given places in target, uint8.

    Raises DataError if an image is damaged.
    """
    beton.check(images)
    _copy_runs(beton.bytes, starts, lengths, target.numpy(), places)


@njit(nogil=True, cache=True)
def _copy_runs(source, starts, lengths, target, places) -> None:
    for i in range(len(starts)):
        target[places[i] : places[i] + lengths[i]] = source[starts[i] : starts[i] + lengths[i]]
