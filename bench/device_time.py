"""What a GPU does in a piece of work: its kernels and copies, and for how long it is busy, by PyTorch's profiler."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile


def on_device(events: Iterable[Any]) -> list[Any]:
    """Of a profiler's events, or averages of them, the kernels and copies: each once, with the time that it took.

    The operators on the host that started them have the same device time again, and so have ranges that were named.
    """
    return [event for event in events if _ran_there(event)]


def _ran_there(event: Any) -> bool:
    return event.device_type == DeviceType.CUDA and not getattr(event, "is_user_annotation", False)


def busy_seconds(work: Callable[[], Any]) -> float | None:
    """How long something ran on the GPU while the work was done; None where the profiler saw nothing of it."""
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        work()
        torch.cuda.synchronize()
    # In microseconds.
    spans = [(event.time_range.start, event.time_range.end) for event in on_device(profiler.events() or [])]
    return covered(spans) / 1e6 if spans else None


def covered(spans: Iterable[tuple[float, float]]) -> float:
    """The length that spans (start, end) cover together; what lies in several counts once."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(spans):
        total += max(end - max(start, reached), 0.0)
        reached = max(reached, end)
    return total
