"""Measures this machine, and compares this project with the machine's limits and with other loaders.

python -m bench --only loaders,loop
make bench ONLY=loaders,loop
"""

import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

from bench import (
    BenchError,
    batches,
    cold,
    depthwise,
    devices,
    loaders,
    loop,
    machine,
    networks,
    pooling,
    refinery_cost,
)
from bench.record import table, write, writing
from bench.scale.measure import measure as measure_scale
from bench.settings import Settings, resolve
from bench.trace import trace
from command import run_command, with_flags
from train.device import Precision
from train.runs.environment import environment

_PARTS = {
    "machine": machine.measure,
    "loaders": loaders.measure,
    "cold": cold.measure,
    "networks": networks.measure,
    "loop": loop.measure,
    "batches": batches.measure,
    "devices": devices.measure,
    "refinery_cost": refinery_cost.measure,
    "pooling": pooling.measure,
    "depthwise": depthwise.measure,
    "scale": measure_scale,
}
# Takes minutes and 1.3 GB of disk: measured only if named.
_ON_REQUEST = ("scale",)
# Measured on a CPU only if named.
_ON_GPU = ("batches", "depthwise")
# With QUICK on a GPU: the parts that are measured, the most important first, and each part's share of the minutes.
# Loading libraries before and drawing charts after add half a minute.
_QUICK_ON_GPU = {"networks": 0.5, "loop": 0.3, "loaders": 0.2}
_QUICK_MINUTES = 3.5
_FLAGS = ("--quick", "--profile")


def run(
    only: str = "",
    quick: bool = False,
    profile: bool = False,
    data: str | None = None,
    resolution: int | None = None,
    batch: int | None = None,
    epochs: int | None = None,
    threads: str | None = None,
    crops: int | None = None,
    steps: int | None = None,
    contenders: str | None = None,
    pairs: str | None = None,
    refinery: str | None = None,
    device: str = "auto",
    gpus: int | None = None,
    precision: Precision = "auto",
    compile: Literal["always", "never"] | None = None,
    minutes: float | None = None,
    out: str = "bench/results",
) -> None:
    """Measures, prints tables, and writes them to `out` with charts and all figures as JSON.

    Args:
        only: the parts to measure, separated by commas: machine, loaders, cold, networks, loop, batches, devices,
            refinery_cost, pooling, depthwise, scale (default: all except scale, which takes minutes; batches and
            depthwise only on a GPU, devices only if there are several; with quick on a GPU: networks, loop, loaders)
        quick: measure small sizes, within three minutes on two cores; on a GPU three pairs at the usual size in fewer
            turns, with minutes=3.5; other options still apply
        profile: measure nothing; trace one step of the first pair and print its most expensive operators
        data: any folder of images, or a converted set (default: images drawn by code)
        resolution: side of a crop in pixels (default: 224)
        batch: crops per batch (default: 256 on a GPU, 64 on a CPU)
        epochs: timed turns of each contender (epochs of loaders and loops); work that takes less than a second is
            repeated within a turn (default: 5)
        threads: decoding threads: 4, or for loaders also 1,2,4 (default: all processors; loaders also with 2)
        crops: approximate number of crops in an epoch of a loader (default: 2048; cold: eight times as many); if there
            are more images, this many are used; if fewer, they are repeated
        steps: steps per epoch of the training loop (default: 40 on a GPU, 4 on a CPU)
        contenders: measure only loaders with these names, or with one of these texts in their names, separated by
            commas
        pairs: refineries and students, such as resnet50:mobilenet,resnet50:alexnet; networks measures all, other parts
            the first
        refinery: a trained refinery, for refinery_cost: a run folder, or NAME:FILE; data is then its converted set
        device: where batches are delivered and networks run: auto, cpu or cuda
        gpus: for devices, how many train together (default: all GPUs of the machine); on a CPU, processes that share it
        precision: precision of networks, as in training: auto, bf16, fp16, tf32 or fp32
        compile: whether networks run compiled: always or never (default: always on a GPU, never on a CPU)
        minutes: time limit for measuring; contenders without a turn by then are listed as not run
        out: the folder for the results
    """
    asked = [part.strip() for part in only.split(",")] if only else []
    unknown = [part for part in asked if part not in _PARTS]
    if unknown:
        raise BenchError(f"only={unknown[0]}: unknown; there are {', '.join(_PARTS)}")
    settings = resolve(
        quick=quick,
        device=device,
        precision=precision,
        data=data,
        refinery=refinery,
        resolution=resolution,
        batch=batch,
        epochs=epochs,
        threads=threads,
        crops=crops,
        steps=steps,
        contenders=contenders,
        pairs=pairs,
        compile=compile,
        gpus=gpus,
    )
    if minutes is not None and not minutes > 0:
        raise BenchError(f"minutes={minutes:g}: must be above 0")
    if minutes is None and settings.quick and settings.on_gpu:
        minutes = _QUICK_MINUTES
    parts = asked or _default_parts(settings)
    if "devices" in parts and devices.why_not(settings):
        if only:
            raise BenchError(f"only=devices: {devices.why_not(settings)}")
        parts.remove("devices")
        if not profile:
            print(f"devices: skipped; it {devices.why_not(settings)}", flush=True)
    with writing(Path(out)):
        found = environment(settings.device)
    if profile:
        print("written:", trace(settings, found, Path(out)))
        return
    ends = _deadlines(parts, minutes) if minutes is not None else {}
    for part in parts:
        record = _PARTS[part](replace(settings, deadline=ends.get(part)))
        print(f"\n{part}\n\n{table(record, found)}")
        print("written:", *write(record, found, Path(out)), flush=True)


def _default_parts(settings: Settings) -> list[str]:
    if settings.quick and settings.on_gpu:
        return list(_QUICK_ON_GPU)
    return [part for part in _PARTS if part not in _ON_REQUEST and (part not in _ON_GPU or settings.on_gpu)]


def _deadlines(parts: Sequence[str], minutes: float) -> dict[str, float]:
    """Returns each part's deadline, in seconds of time.monotonic(); a part may use the time left by earlier ones."""
    shares = [_QUICK_ON_GPU.get(part, 1 / len(_QUICK_ON_GPU)) for part in parts]
    second = 60 * minutes / sum(shares)
    now = time.monotonic()
    return {part: now + second * sum(shares[: place + 1]) for place, part in enumerate(parts)}


if __name__ == "__main__":
    run_command(run, prog="python -m bench", words=with_flags(sys.argv[1:], _FLAGS))
