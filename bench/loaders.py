"""Crops a second of the loaders, ours and others, on the same images.

Every contender is built in a process of its own; then all take turns, an epoch each, so that a machine whose speed
drifts is unfair to none. One untimed turn each comes first. The images come from the page cache.
"""

import contextlib
import itertools
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from bench import BenchError, images
from bench.contenders import CONTENDERS, COPIES, REFERENCE
from bench.process import CallFailed, Process, cpu_seconds, memory_bytes
from bench.record import Record
from bench.task import Loader, Task
from data.decoders.ahead import default_threads

# How the stored sets that contenders read are made, and what the table calls them.
_STORED = {
    "plain": (images.write_plain, f"{images.MAX_RESOLUTION} px, q{images.QUALITY}"),
    "converted": (images.write_converted, f"{images.MAX_RESOLUTION} px, q{images.QUALITY}"),
    "raw": (images.write_raw, f"{images.RAW_RESOLUTION} px, raw"),
    "converted raw": (images.write_converted_raw, f"{images.RAW_RESOLUTION} px, raw"),
}
_SAMPLING_SECONDS = 0.05


# A turn lasts this long at least: one epoch, or several where they are short.
_TURN_SECONDS = 1.0


@dataclass(frozen=True)
class Turn:
    """One contender's turn as its process measured it.

    cpu_seconds: of the process and its workers. idle_cpu_seconds: what they used while others had their turns before.
    """

    crops: int
    seconds: float
    cpu_seconds: float
    idle_cpu_seconds: float


def measure(
    *,
    data: str | None,
    resolution: int,
    batch: int,
    epochs: int,
    threads: int | None,
    crops: int,
    device: str,
    contenders: str,
) -> Record:
    """Measures the contenders; those that cannot run here are reported with the reason. See bench.__main__.run.

    Raises BenchError for images and options that cannot be used.
    """
    names = [name for name in CONTENDERS if any(part.strip() in name for part in contenders.split(","))]
    if not names:
        raise BenchError(f"contenders={contenders}: none has this in its name; there are {', '.join(CONTENDERS)}")
    counts = sorted({min(2, default_threads()), default_threads()}) if threads is None else [threads]
    # A multiple of the copies, so that no contender starts between the copies of an image.
    batches = -(-crops // (batch * COPIES)) * COPIES
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        found = images.find(data, Path(folder))
        files = images.spread(found, batches * batch)
        stored, failures = _store({CONTENDERS[name].reads for name in names}, files, Path(folder))
        total = len(names) * len(counts) * (epochs + 2)
        # In a log file, a line every 30 s.
        interval = 0.1 if sys.stderr.isatty() else 30.0
        with tqdm(total=total, desc="loaders", unit=" turns", mininterval=interval, dynamic_ncols=True) as bar:
            for count in counts:
                tasks = {
                    name: Task(files, stored.get(CONTENDERS[name].reads), resolution, batch, batches, count, device)
                    for name in names
                }
                rows += _in_turns(tasks, dict(failures), epochs, bar)
    return Record(
        part="loaders",
        settings={
            "data": data or f"{len(found)} drawn images",
            "images": min(len(found), len(files)),
            "resolution": resolution,
            "batch": batch,
            "epochs": epochs,
            "crops": batches * batch,
            "threads": counts,
            "device": device,
        },
        notes=_notes(data, len(found), batches * batch, resolution, batch, epochs) + _shares_of_limit(rows),
        rows=_with_ratios(rows),
    )


def _store(kinds: set[str], files: list[str], folder: Path) -> tuple[dict[str, Path], dict[str, str]]:
    """The stored sets of these kinds, and the reasons why some could not be made."""
    stored, failures = {}, {}
    for kind in sorted(kinds - {"files"}):
        write, about = _STORED[kind]
        path = folder / f"{kind.replace(' ', '-')}.beton"
        started = time.perf_counter()
        try:
            with Process() as process:
                process.call(write, path, files)
        except CallFailed as error:
            failures[kind] = str(error)
            continue
        stored[kind] = path
        seconds = time.perf_counter() - started
        print(f"{kind}: {about}, {path.stat().st_size / 1e6:.0f} MB, written in {seconds:.0f} s", flush=True)
    return stored, failures


def _in_turns(tasks: dict[str, Task], not_stored: dict[str, str], epochs: int, bar: tqdm) -> list[dict[str, Any]]:
    """A row for each task, in their order, after all have had their turns."""
    failures = {name: not_stored[CONTENDERS[name].reads] for name in tasks if CONTENDERS[name].reads in not_stored}
    facts: dict[str, dict[str, Any]] = {name: {} for name in tasks}
    measured: dict[str, list[Turn]] = {name: [] for name in tasks}
    processes: dict[str, Process] = {}
    at_terminal = sys.stderr.isatty()
    with contextlib.ExitStack() as stack:

        def call(name: str, what: str, function, *arguments):
            """The function's answer from the contender's process, or None where that has failed, now or before."""
            answer = None
            if name not in failures:
                bar.set_postfix_str(f"{name}: {what}", refresh=at_terminal)
                try:
                    answer = processes[name].call(function, *arguments)
                except CallFailed as error:
                    failures[name] = str(error)
                    processes[name].close()
            bar.update()
            return answer

        for name, task in tasks.items():
            if name not in failures:
                processes[name] = stack.enter_context(Process())
            facts[name] |= call(name, "building", _build, name, task) or {}
        for name in tasks:
            facts[name] |= call(name, "first epoch", _warm_up) or {}
        for _, name in itertools.product(range(epochs), tasks):
            so_far = measured[name]
            rate = f"{so_far[-1].crops / so_far[-1].seconds:.0f} images/s" if so_far else "measuring"
            turn = call(name, rate, _turn)
            if turn:
                so_far.append(turn)
    rows = []
    for name, task in tasks.items():
        row = {"contender": name, "about": CONTENDERS[name].about, "reads": _reads(name), "threads": task.threads}
        rows.append(row | ({"not_run": failures[name]} if name in failures else facts[name] | _summary(measured[name])))
    return rows


def _reads(name: str) -> str:
    kind = CONTENDERS[name].reads
    return _STORED[kind][1] if kind in _STORED else "files"


def _summary(turns: list[Turn]) -> dict[str, Any]:
    rates = [turn.crops / turn.seconds for turn in turns]
    return {
        "images_per_second": {"median": statistics.median(rates), "min": min(rates), "max": max(rates)},
        "cores": sum(turn.cpu_seconds for turn in turns) / sum(turn.seconds for turn in turns),
        "turns": [asdict(turn) for turn in turns],
    }


def _with_ratios(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows, each with its rate relative to stock FFCV's at the same number of threads, where that was measured."""
    reference = {
        row["threads"]: row["images_per_second"]["median"]
        for row in rows
        if row["contender"] == REFERENCE and "not_run" not in row
    }
    for row in rows:
        if "not_run" not in row and row["threads"] in reference:
            row["times_ffcv"] = row["images_per_second"]["median"] / reference[row["threads"]]
    return rows


def _notes(data: str | None, found: int, crops: int, resolution: int, batch: int, epochs: int) -> list[str]:
    if data is None:
        origin = f"{found} drawn images of photographs' size and detail"
    else:
        origin = f"{min(found, crops)} images of {Path(data).resolve().name}"
    return [
        f"Random crops of {origin} to {resolution} px, flipped at random, uint8, in batches of {batch}.",
        f"images/s: crops delivered a second; several crops of one image count each. Median, lowest and highest of "
        f"{epochs} epochs of {crops} crops (several where they take less than a second), contenders in turns, after an "
        "untimed one each; files in the page cache.",
        "cores: processor time of the process and its workers by the clock's. memory: their peak in the untimed turn, "
        "shared pages counted once, mapped files left out. kB: encoded bytes read for a crop.",
    ]


def _shares_of_limit(rows: list[dict[str, Any]]) -> list[str]:
    """How near our CPU path comes to its parts done one after the other, where these were measured."""
    rates = {
        (row["contender"], row["threads"]): row["images_per_second"]["median"] for row in rows if "not_run" not in row
    }
    lines = []
    for threads in sorted({threads for _, threads in rates}):
        for copies in ("", f" x{COPIES}"):
            ours, decode, resize = (
                rates.get((name, threads)) for name in (f"ours ffcv{copies}", f"limit: decode{copies}", "limit: resize")
            )
            if ours and decode and resize:
                limit = 1 / (1 / decode + 1 / resize)
                lines.append(
                    f"ours ffcv{copies}, {threads} threads: {100 * ours / limit:.0f} % of {limit:.0f} images/s, which "
                    "decoding and resizing alone, one after the other, would allow."
                )
    return lines


# ---- what runs in a contender's process, one contender each

_loader: Loader
_task: Task
_epoch_numbers = itertools.count()
_cpu_at_end: float


def _build(name: str, task: Task) -> dict[str, Any]:
    global _loader, _task, _cpu_at_end
    # `threads` is to be all that decodes: PyTorch's own would come on top of it (importing FFCV does the same).
    torch.set_num_threads(1)
    _task = task
    _loader = CONTENDERS[name].build(task)
    _cpu_at_end = cpu_seconds()
    return {"bytes_per_crop": _loader.bytes_per_crop}


def _warm_up() -> dict[str, Any]:
    """A turn in which all is compiled and started that starts late; its peak memory."""
    peaks = [memory_bytes()]
    done = threading.Event()

    def sample() -> None:
        while not done.wait(_SAMPLING_SECONDS):
            peaks.append(memory_bytes())

    sampler = threading.Thread(target=sample)
    sampler.start()
    try:
        _turn()
    finally:
        done.set()
        sampler.join()
    return {"peak_memory_bytes": max((peak for peak in peaks if peak), default=None)}


def _turn() -> Turn:
    global _cpu_at_end
    started_cpu, started = cpu_seconds(), time.perf_counter()
    crops, seconds = 0, 0.0
    while seconds < _TURN_SECONDS:
        crops += _consume(_loader.epoch(next(_epoch_numbers)))
        if _task.device != "cpu":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - started
    ended_cpu = cpu_seconds()
    idle, _cpu_at_end = started_cpu - _cpu_at_end, ended_cpu
    return Turn(crops, seconds, ended_cpu - started_cpu, idle)


def _consume(batches: Iterable[torch.Tensor]) -> int:
    """Takes every batch, as training would, and counts its crops; a batch that is not as promised is an error."""
    crops = 0
    promised = (_task.batch, 3, _task.resolution, _task.resolution)
    for batch in batches:
        if batch.shape != promised or batch.dtype != torch.uint8 or batch.device.type != _task.device:
            raise BenchError(f"a batch is {batch.dtype} {list(batch.shape)} on {batch.device}")
        crops += len(batch)
    if crops != _task.batch * _task.batches:
        raise BenchError(f"an epoch had {crops} crops instead of {_task.batch * _task.batches}")
    return crops
