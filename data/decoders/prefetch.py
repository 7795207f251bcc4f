"""Batches made ahead of their use by a pool of threads, in order: what the two CPU decoders share."""

import math
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch

from data.decoders import BATCHES_AHEAD, Request, View
from data.processors import processors

# Images that one thread takes at a time: few enough that all threads end a batch together.
_IMAGES_AT_ONCE = 16


# Free buffers beyond these were once kept by a consumer, and are given back.
_BUFFERS_KEPT = 4 * BATCHES_AHEAD


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


class Prefetcher:
    """Fills batches by `fill(request, first, last, outs)` on `threads` threads.

    fill makes the crops of images first..last-1 of the request, outside the interpreter lock for most of its time:
    copy k of image i goes to outs[view][k, i], where outs holds a uint8 [copies, n, R, R, 3] for each view.
    """

    def __init__(
        self,
        fill: Callable[[Request, int, int, tuple[torch.Tensor, ...]], None],
        *,
        views: tuple[View, ...],
        device: torch.device,
        threads: int,
    ):
        self._fill = fill
        self._views = views
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._buffers = _Buffers()
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="decode")

    def batches(self, requests: Iterable[Request]) -> Iterator[tuple[torch.Tensor, ...]]:
        """The batches of `Decoder.decode`; raises what fill raised."""
        waiting: deque[tuple[tuple[torch.Tensor, ...], list[Future]]] = deque()
        uploaded: deque[_Upload] = deque()
        try:
            for request in requests:
                waiting.append(self._start(request))
                if len(waiting) > BATCHES_AHEAD:
                    uploaded.append(_Upload(*waiting.popleft(), self._device, self._stream))
                # The next batch is on its way to the device while this one is used.
                if len(uploaded) > 1:
                    yield uploaded.popleft().crops()
            while waiting or uploaded:
                if waiting:
                    uploaded.append(_Upload(*waiting.popleft(), self._device, self._stream))
                yield uploaded.popleft().crops()
        finally:
            for _, futures in waiting:
                for future in futures:
                    future.cancel()

    def _start(self, request: Request) -> tuple[tuple[torch.Tensor, ...], list[Future]]:
        n = len(request.indices)
        shapes = [(view.copies, n, view.resolution, view.resolution, 3) for view in self._views]
        # Tensors of a consumer's inference mode could not be written to by the threads, which are outside it.
        with torch.inference_mode(False):
            if self._device.type == "cuda":
                # PyTorch's caching allocator uses pinned memory again, and only after the copy from it has ended.
                outs = tuple(torch.empty(shape, dtype=torch.uint8, pin_memory=True) for shape in shapes)
            else:
                outs = tuple(self._buffers.take(shape) for shape in shapes)
        ranges = ((first, min(first + _IMAGES_AT_ONCE, n)) for first in range(0, n, _IMAGES_AT_ONCE))
        return outs, [self._pool.submit(self._fill, request, first, last, outs) for first, last in ranges]


class _Upload:
    """A batch being copied to the device on a stream of its own, once its futures are done."""

    def __init__(self, outs, futures: list[Future], device: torch.device, stream: "torch.cuda.Stream | None"):
        for future in futures:
            future.result()
        self._stream = stream
        # On a CPU nothing is copied, and the context does nothing.
        with torch.cuda.stream(stream):
            self._outs = [out.flatten(0, 1).to(device, non_blocking=True).permute(0, 3, 1, 2) for out in outs]

    def crops(self) -> tuple[torch.Tensor, ...]:
        """The batch, for use on the current stream, which waits for the copy; the host does not."""
        if self._stream is not None:
            current = torch.cuda.current_stream(self._stream.device)
            current.wait_stream(self._stream)
            for out in self._outs:
                # Its memory must not be given away before what the current stream does with it has ended.
                out.record_stream(current)
        return tuple(self._outs)


def default_threads() -> int:
    """One per processor that this process may use."""
    return processors()
