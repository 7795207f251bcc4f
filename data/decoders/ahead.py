"""Batches made ahead of their use by a pool of threads, in order: what the two CPU decoders share."""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import torch

from data.decoders import BATCHES_AHEAD, Request

# Images that one thread takes at a time: few enough that all threads end a batch together.
_IMAGES_AT_ONCE = 8


class Ahead:
    """Fills batches of [n, R, R, 3] bytes by `fill(request, first, last, out)` on `threads` threads.

    fill writes images first..last-1 of the request into out uint8 [last - first, R, R, 3], outside the interpreter
    lock for most of its time.
    """

    def __init__(
        self,
        fill: Callable[[Request, int, int, torch.Tensor], None],
        *,
        resolution: int,
        device: torch.device,
        threads: int,
    ):
        self._fill = fill
        self._resolution = resolution
        self._device = device
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="decode")

    def batches(self, requests: Iterable[Request]) -> Iterator[torch.Tensor]:
        """A uint8 [n, 3, R, R] channels-last batch on the device for each request; raises what fill raised."""
        waiting: deque[tuple[torch.Tensor, list[Future]]] = deque()
        try:
            for request in requests:
                waiting.append(self._start(request))
                if len(waiting) > BATCHES_AHEAD:
                    yield self._finish(*waiting.popleft())
            while waiting:
                yield self._finish(*waiting.popleft())
        finally:
            for _, futures in waiting:
                for future in futures:
                    future.cancel()

    def _start(self, request: Request) -> tuple[torch.Tensor, list[Future]]:
        n = len(request.indices)
        # Pinned memory comes from PyTorch's caching allocator, which reuses it only after the copy has ended.
        pinned = self._device.type == "cuda"
        out = torch.empty((n, self._resolution, self._resolution, 3), dtype=torch.uint8, pin_memory=pinned)
        ranges = ((first, min(first + _IMAGES_AT_ONCE, n)) for first in range(0, n, _IMAGES_AT_ONCE))
        return out, [self._pool.submit(self._fill, request, first, last, out[first:last]) for first, last in ranges]

    def _finish(self, out: torch.Tensor, futures: list[Future]) -> torch.Tensor:
        for future in futures:
            future.result()
        return out.to(self._device, non_blocking=True).permute(0, 3, 1, 2)


def default_threads() -> int:
    """The processors this process may use."""
    return len(os.sched_getaffinity(0))
