"""Measures one rank's start in a separate process, from opening a set to the first batch."""

import time
from pathlib import Path
from typing import Any

from data.loader import open_loader


def start(path: Path, *, rank: int, world: int, batch: int, resolution: int, device: str) -> dict[str, Any]:
    """Returns the seconds and bytes of a start. Call it once, in a new process.

    open_seconds: time to open the loader. batch_seconds: time from then to the first batch. memory_before: resident
    memory of the process with all libraries; memory_peak: its peak up to the first batch; memory_after: with the first
    batch. asked_bytes: bytes read by system calls during open_seconds. disk_bytes: bytes that the system has fetched
    from disk up to the first batch. steps: steps per epoch.
    """
    before, read = _status(), _read()
    began = time.perf_counter()
    loader = open_loader(path, resolution=resolution, batch_size=batch, rank=rank, world=world, device=device)
    opened, asked = time.perf_counter(), _read()
    batches = loader.epoch(0)
    # Copying the indices to the host waits for the batch.
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
    """Returns the memory entries of /proc/self/status, in bytes."""
    lines = (line.split() for line in Path("/proc/self/status").read_text().splitlines())
    return {words[0].rstrip(":"): int(words[1]) << 10 for words in lines if words[-1] == "kB"}


def _read() -> dict[str, int]:
    lines = (line.split() for line in Path("/proc/self/io").read_text().splitlines())
    return {name.rstrip(":"): int(value) for name, value in lines}
