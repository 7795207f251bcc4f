"""Traces one training step with PyTorch's profiler and lists the kernels that take most of its time."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from bench.device_time import on_device
from bench.networks import Stepping
from bench.pair import Pair
from bench.record import aligned, place, writing
from bench.settings import Settings

_WARM_UP = 3
_SHOWN = 10


def trace(settings: Settings, found: dict[str, Any], folder: Path) -> Path:
    """Prints the operators, or on a GPU the kernels, that take most of the time of a step of the first pair.

    Writes DATE-step-DEVICE.trace.json.gz, for ui.perfetto.dev and chrome://tracing, into the folder. Returns its path.
    """
    pair = Pair(*settings.pairs[0], settings)
    stepping = Stepping(pair, networks=True)
    for _ in range(_WARM_UP):
        stepping.step()
    on_gpu = settings.device == "cuda"
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]) as profiler:
        stepping.step()
        if on_gpu:
            torch.cuda.synchronize()
    rows = most_expensive(profiler.key_averages(), on_gpu=on_gpu)
    print(f"A step of {pair}: {settings.batch} crops of {settings.resolution} px, {settings.computing}.")
    print(aligned(["kernel" if on_gpu else "operator", "calls", "ms", "share"], rows, left=1))
    stem = place(folder, "step", found)
    path = stem.with_name(f"{stem.name}.trace.json.gz")
    with writing(folder):
        profiler.export_chrome_trace(str(path))
    return path


def most_expensive(events: Iterable[Any], *, on_gpu: bool) -> list[list[str]]:
    """Returns [name, calls, milliseconds, share of the total] for the events with the longest self time.

    events: the profiler's key_averages(). on_gpu: only kernels and copies, since operators include their time again.
    """
    name = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    spent = sorted(
        ((getattr(event, name), event) for event in (on_device(events) if on_gpu else events)),
        key=lambda pair: pair[0],
        reverse=True,
    )
    total = sum(time for time, _ in spent)
    return [
        [event.key.split("(")[0][:80], str(event.count), f"{time / 1000:.2f}", f"{100 * time / total:.1f} %"]
        for time, event in spent[:_SHOWN]
    ]
