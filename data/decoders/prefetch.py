"""Batches made ahead of their use by a pool of threads, in order: what the two CPU decoders share."""

import math
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import pairwise
from typing import Generic, Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from data.decoders import BATCHES_AHEAD, View
from data.processors import processors

# Free buffers beyond these were once kept by a consumer, and are given back.
_BUFFERS_KEPT = 4 * BATCHES_AHEAD


class _OfImages(Protocol):
    """A request, or what a decoder made of one."""

    @property
    def indices(self) -> NDArray[np.int64]: ...


_Asked = TypeVar("_Asked", bound=_OfImages)


class _Buffers:
    """Memory for batches: used again when no tensor holds it any more, for fresh pages cost as much as many a crop."""

    def __init__(self):
        self._buffers: list[np.ndarray] = []
        # What a buffer's reference count is while only the list holds it.
        lone = [np.empty(0)]
        self._free = sys.getrefcount(lone[0])

    def take(self, shape: tuple[int, ...]) -> torch.Tensor:
        """An uninitialised uint8 tensor; its memory comes back by itself when it and all its views are gone."""
        size = math.prod(shape)
        free = [i for i in range(len(self._buffers)) if sys.getrefcount(self._buffers[i]) == self._free]
        for i in reversed(free[_BUFFERS_KEPT:]):
            del self._buffers[i]
        for i in free[:_BUFFERS_KEPT]:
            if self._buffers[i].size == size:
                return torch.from_numpy(self._buffers[i]).view(shape)
        self._buffers.append(np.empty(size, np.uint8))
        return torch.from_numpy(self._buffers[-1]).view(shape)


class Prefetcher(Generic[_Asked]):
    """Fills batches by `fill(request, first, last, outs)` on `threads` threads, one call on each of them for a batch.

    fill makes the crops of images first..last-1 of the request, outside the interpreter lock for most of its time:
    copy k of image i goes to outs[view][k, i], where outs holds a uint8 [copies, n, R, R, 3] for each view.
    """

    def __init__(
        self,
        fill: Callable[[_Asked, int, int, tuple[torch.Tensor, ...]], None],
        *,
        views: tuple[View, ...],
        device: torch.device,
        threads: int,
    ):
        self._fill = fill
        self._views = views
        self._device = device
        self._threads = threads
        self._buffers = _Buffers()
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="decode")

    def batches(self, requests: Iterable[_Asked]) -> Iterator[tuple[torch.Tensor, ...]]:
        """The batches of `Decoder.decode`, copied to the device on the current stream; raises what fill raised."""
        waiting: deque[tuple[tuple[torch.Tensor, ...], list[Future]]] = deque()
        try:
            for request in requests:
                waiting.append(self._start(request))
                if len(waiting) > BATCHES_AHEAD:
                    yield self._ended(*waiting.popleft())
            while waiting:
                yield self._ended(*waiting.popleft())
        finally:
            for _, futures in waiting:
                for future in futures:
                    future.cancel()

    def _start(self, request: _Asked) -> tuple[tuple[torch.Tensor, ...], list[Future]]:
        n = len(request.indices)
        shapes = [(view.copies, n, view.resolution, view.resolution, 3) for view in self._views]
        # Tensors of a consumer's inference mode could not be written to by the threads, which are outside it.
        with torch.inference_mode(False):
            if self._device.type == "cuda":
                # PyTorch's caching allocator uses pinned memory again, and only after the copy from it has ended.
                outs = tuple(torch.empty(shape, dtype=torch.uint8, pin_memory=True) for shape in shapes)
            else:
                outs = tuple(self._buffers.take(shape) for shape in shapes)
        # A thread that is done with its share goes on with the next batch, so that equal shares are good enough.
        parts = min(self._threads, n)
        bounds = [n * part // parts for part in range(parts + 1)]
        return outs, [self._pool.submit(self._fill, request, *of, outs) for of in pairwise(bounds)]

    def _ended(self, outs: tuple[torch.Tensor, ...], futures: list[Future]) -> tuple[torch.Tensor, ...]:
        for future in futures:
            future.result()
        return tuple(out.flatten(0, 1).to(self._device, non_blocking=True).permute(0, 3, 1, 2) for out in outs)


def default_threads() -> int:
    """One per processor that this process may use."""
    return processors()
