"""A pool of threads that makes batches ahead of their use, in order; the two CPU decoders share it."""

import math
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import pairwise
from typing import Generic, NamedTuple, Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from data.decoders import BATCHES_AHEAD, View
from data.processors import processors

# More free buffers than this are left over from a consumer that kept many batches; the excess is released.
_BUFFERS_KEPT = 4 * BATCHES_AHEAD


class _OfImages(Protocol):
    """A request, or a decoder's own form of it."""

    @property
    def indices(self) -> NDArray[np.int64]: ...


_Asked = TypeVar("_Asked", bound=_OfImages)


_Result = TypeVar("_Result")


class Work(NamedTuple, Generic[_Result]):
    """A result that is complete when all futures are done."""

    result: _Result
    futures: Sequence[Future[None]]


def ahead(started: Iterable[Work[_Result]]) -> Iterator[_Result]:
    """Yields results in order, with up to BATCHES_AHEAD later ones already started; taking an item must start its work.

    Raises what the futures raise. When it ends early, work that has not begun is cancelled.
    """
    waiting: deque[Work[_Result]] = deque()
    try:
        for work in started:
            waiting.append(work)
            if len(waiting) > BATCHES_AHEAD:
                yield _done(waiting.popleft())
        while waiting:
            yield _done(waiting.popleft())
    finally:
        for work in waiting:
            for future in work.futures:
                future.cancel()


def _done(work: Work[_Result]) -> _Result:
    for future in work.futures:
        future.result()
    return work.result


class _Buffers:
    """Reuses memory of batches that no tensor refers to any more: new memory pages cost as much time as many crops."""

    def __init__(self):
        self._buffers: list[np.ndarray] = []
        # The reference count of a buffer that only the list refers to.
        lone = [np.empty(0)]
        self._free = sys.getrefcount(lone[0])

    def take(self, shape: tuple[int, ...]) -> torch.Tensor:
        """Returns an uninitialised uint8 tensor, whose memory is reused once it and all its views are deleted."""
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
    """Fills batches with `fill(request, first, last, outs)` on `threads` threads, one call per thread and batch.

    fill writes the crops of images first..last-1 of the request: copy k of image i to outs[view][k, i], where outs
    has a uint8 [copies, n, R, R, 3] tensor for each view. For speed it must release the GIL for most of its time.
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
        """Yields batches as `Decoder.decode`, copied to the device on the current stream. Raises what fill raises."""
        # Not a loop, whose variable would keep a batch's memory in use until the next.
        yield from map(self._delivered, ahead(map(self._start, requests)))

    def _delivered(self, outs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        return tuple(out.flatten(0, 1).to(self._device, non_blocking=True).permute(0, 3, 1, 2) for out in outs)

    def _start(self, request: _Asked) -> Work[tuple[torch.Tensor, ...]]:
        n = len(request.indices)
        shapes = [(view.copies, n, view.resolution, view.resolution, 3) for view in self._views]
        # The threads run outside a consumer's inference mode, and could not write to tensors created within it.
        with torch.inference_mode(False):
            if self._device.type == "cuda":
                # PyTorch's caching allocator reuses pinned memory, but only after the copy from it has finished.
                outs = tuple(torch.empty(shape, dtype=torch.uint8, pin_memory=True) for shape in shapes)
            else:
                outs = tuple(self._buffers.take(shape) for shape in shapes)
        # A thread that has finished its share starts on the next batch, so equal shares are good enough.
        parts = min(self._threads, n)
        bounds = [n * part // parts for part in range(parts + 1)]
        return Work(outs, [self._pool.submit(self._fill, request, *of, outs) for of in pairwise(bounds)])


def default_threads() -> int:
    """Returns the default number of decoding threads: one per processor that this process may use."""
    return processors()
