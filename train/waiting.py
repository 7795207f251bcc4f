"""How long the device of a training waits for its data."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Waiting:
    """Adds up the time in which the device was idle because the next batch was not ready yet.

    On a CPU that is the host's time. On a GPU, which works while the host fetches, it is the time between two events of
    its stream: the end of a step's work, and the point from which the next batch can be used.
    """

    def __init__(self, device: torch.device):
        self._device = device
        self._seconds = 0.0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def measured(self) -> Iterator[None]:
        """Context around fetching a batch. It does not wait for the device."""
        if self._device.type == "cuda":
            before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            stream = torch.cuda.current_stream(self._device)
            before.record(stream)
            yield
            after.record(stream)
            self._events.append((before, after))
        else:
            started = time.perf_counter()
            yield
            self._seconds += time.perf_counter() - started

    def taken(self) -> float:
        """The seconds since this was last called. On a GPU it waits for the events recorded so far."""
        for before, after in self._events:
            after.synchronize()
            self._seconds += before.elapsed_time(after) / 1000
        seconds, self._seconds = self._seconds, 0.0
        self._events.clear()
        return seconds
