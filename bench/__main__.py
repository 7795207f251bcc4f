"""Measures this machine, and this project against its limits and its peers.

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
# Takes minutes, and 1.3 GB of disk: measured where it is asked for.
_ON_REQUEST = ("scale",)
# Of interest on a GPU only.
_ON_GPU = ("batches", "depthwise")
# With QUICK on a GPU: what is measured, the most valuable first, and each part's share of the minutes. Python loads its
# libraries before, and charts are drawn after: 4 minutes in all.
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
    """Measures, prints tables, and writes them with charts and all figures to `out`.

    Args:
        only: the parts to measure, with commas between them: machine, loaders, cold, networks, loop, batches, devices,
            refinery_cost, pooling, depthwise, scale (default: all of them except scale, which takes minutes; batches
            and depthwise only on a GPU, devices only where there are several; quickly on a GPU: networks, loop and
            loaders)
        quick: all in small, within three minutes on two cores; on a GPU three pairs at the usual size in fewer turns,
            with minutes=3.5; other options still count
        profile: nothing is measured, but one step of the first pair traced, and its costliest operators shown
        data: any folder of images, or a converted set (default: images drawn by code)
        resolution: side of a crop in pixels (default: 224)
        batch: crops a batch (default: 256 on a GPU, 64 on a CPU)
        epochs: timed turns of each contender, epochs of loaders and loops; work that is over in less than a second is
            repeated within a turn (default: 5)
        threads: decoding threads, as in 4 or, for loaders, 1,2,4 (default: all processors; loaders also with 2)
        crops: crops an epoch of a loader, about (default: 2048; cold: eight times as many); of more images, as many
            are taken, and fewer are repeated
        steps: steps an epoch of the training loop (default: 40 on a GPU, 4 on a CPU)
        contenders: only the loaders of these names, with commas between them, or with such a text in their names
        pairs: refineries and students, as in resnet50:mobilenet,resnet50:alexnet; networks takes all, the others the
            first
        refinery: a trained one, for refinery_cost: a run folder, or NAME:FILE; data is then its converted set
        device: where batches are delivered and networks run: auto, cpu or cuda
        gpus: for devices, how many train together (default: all GPUs of the machine); on a CPU, processes that share it
        precision: of networks, as in training: auto, bf16, fp16, tf32 or fp32
        compile: run networks compiled (default: on a GPU)
        minutes: when measuring is to end; who had no turn by then is listed as not run
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
            print(f"devices: left out; it {devices.why_not(settings)}", flush=True)
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
    """When each part is to end, of time.monotonic(); what one leaves over is the next one's."""
    shares = [_QUICK_ON_GPU.get(part, 1 / len(_QUICK_ON_GPU)) for part in parts]
    second = 60 * minutes / sum(shares)
    now = time.monotonic()
    return {part: now + second * sum(shares[: place + 1]) for place, part in enumerate(parts)}


if __name__ == "__main__":
    run_command(run, prog="python -m bench", words=with_flags(sys.argv[1:], _FLAGS))
