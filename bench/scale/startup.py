"""One rank's start, in a process of its own: a set is opened and the first batch delivered."""

import time
from pathlib import Path
from typing import Any

from data.loader import open_loader


def start(path: Path, *, rank: int, world: int, batch: int, resolution: int, device: str) -> dict[str, Any]:
    """Seconds and bytes of a start; to be called once, in a fresh process.

    open_seconds: until the loader is there. batch_seconds: from then to the first batch. memory_before: of the process,
    with all libraries; memory_peak: the most until then; memory_after: with the first batch. asked_bytes, disk_bytes:
    what was read by calls in open_seconds, and what the system has fetched for the process until the first batch.
    """
    before, read = _status(), _read()
    began = time.perf_counter()
    loader = open_loader(path, resolution=resolution, batch_size=batch, rank=rank, world=world, device=device)
    opened, asked = time.perf_counter(), _read()
    batches = loader.epoch(0)
    # Its ids come to the host last: then the batch is there.
    crops = len(next(batches).indices.tolist())
    ended = time.perf_counter()
    after = _status()
    assert crops == batch
    return {
        "open_seconds": opened - began,
        "batch_seconds": ended - opened,
        "memory_before": before["VmRSS"],
        "memory_after": after["VmRSS"],
        "memory_peak": after["VmHWM"],
        "asked_bytes": asked["rchar"] - read["rchar"],
        "disk_bytes": _read()["read_bytes"] - read["read_bytes"],
        "steps": loader.steps,
    }


def _status() -> dict[str, int]:
    """What the system says of this process's memory, in bytes."""
    lines = (line.split() for line in Path("/proc/self/status").read_text().splitlines())
    return {words[0].rstrip(":"): int(words[1]) << 10 for words in lines if words[-1] == "kB"}


def _read() -> dict[str, int]:
    lines = (line.split() for line in Path("/proc/self/io").read_text().splitlines())
    return {name.rstrip(":"): int(value) for name, value in lines}
