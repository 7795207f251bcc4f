"""Finds a GPU's kernels and copies in the events of PyTorch's profiler, and the time in which the GPU was busy."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile


def on_device(events: Iterable[Any]) -> list[Any]:
    """Returns the kernels and copies among a profiler's events, or averages of events, each once.

    Operators on the host that launched them and named ranges include the same device time again and are left out.
    """
    return [event for event in events if _ran_there(event)]


def _ran_there(event: Any) -> bool:
    return event.device_type == DeviceType.CUDA and not getattr(event, "is_user_annotation", False)


def busy_seconds(work: Callable[[], Any]) -> float | None:
    """Runs `work`. Returns the seconds in which the GPU was busy, or None if the profiler recorded nothing on it."""
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        work()
        torch.cuda.synchronize()
    # In microseconds.
    spans = [(event.time_range.start, event.time_range.end) for event in on_device(profiler.events() or [])]
    return covered(spans) / 1e6 if spans else None


def covered(spans: Iterable[tuple[float, float]]) -> float:
    """Returns the total length that spans (start, end) cover; overlaps count once."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(spans):
        total += max(end - max(start, reached), 0.0)
        reached = max(reached, end)
    return total
