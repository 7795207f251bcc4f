"""Crops a second of the loaders, ours and others, on the same images, from the page cache."""

import itertools
import tempfile
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bench import BenchError, images
from bench.contenders import CONTENDERS, COPIES, REFERENCE
from bench.process import CallFailed, Process
from bench.record import MEMORY, Column, Record, optional, rate_columns
from bench.settings import Settings
from bench.task import Task
from bench.turns import Contender, Runner, Work, in_turns

# How the stored sets that contenders read are made, and what the table calls them.
_STORED: dict[str, tuple[Callable[[Path, list[str]], None], str]] = {
    "plain": (images.write_plain, f"{images.JPEG.max_resolution} px, q{images.JPEG.quality}"),
    "converted": (images.write_converted, f"{images.JPEG.max_resolution} px, q{images.JPEG.quality}"),
    "raw": (images.write_raw, f"{images.RAW.max_resolution} px, raw"),
    "converted blocks": (
        partial(images.write_converted, storage=images.BLOCKS),
        f"{images.BLOCKS.max_resolution} px, blocks",
    ),
    "converted raw": (partial(images.write_converted, storage=images.RAW), f"{images.RAW.max_resolution} px, raw"),
}

_IDENTITY = (
    Column("loader", lambda row: row["name"]),
    Column("reads", lambda row: row["reads"]),
    Column("threads", lambda row: str(row["threads"])),
)
_FIGURES = (
    *rate_columns("images/s"),
    optional("× ffcv", "times_ffcv", lambda times: f"{times:.2f}"),
    Column("cores", lambda row: f"{row['cores']:.2f}"),
    MEMORY,
    Column("kB", lambda row: f"{row['bytes_per_crop'] / 1e3:.1f}"),
)


def measure(settings: Settings) -> Record:
    """Measures the loaders; those that cannot run here are reported with the reason.

    Raises BenchError for images and options that cannot be used.
    """
    # A whole name means that one alone, though it be part of others.
    names = [
        name
        for name in CONTENDERS
        if any(part == name if part in CONTENDERS else part in name for part in settings.contenders)
    ]
    if not names:
        asked = ",".join(settings.contenders)
        raise BenchError(f"contenders={asked}: none has this in its name; there are {', '.join(CONTENDERS)}")
    batch = settings.batch
    # A multiple of the copies, so that no contender starts between the copies of an image.
    batches = -(-settings.crops // (batch * COPIES)) * COPIES
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        found = images.find(settings.data, Path(folder), most=batches * batch)
        files = images.spread(found, batches * batch)
        stored, failures = _store({CONTENDERS[name].reads for name in names}, files, Path(folder))
        for threads in settings.threads:
            rows += in_turns(
                [
                    Contender(
                        partial(
                            _Epochs,
                            name,
                            Task(
                                files,
                                stored.get(CONTENDERS[name].reads),
                                settings.resolution,
                                batch,
                                batches,
                                threads,
                                settings.device,
                            ),
                        ),
                        {
                            "name": name,
                            "group": f"{threads} threads",
                            "unit": "images/s",
                            "about": CONTENDERS[name].about,
                            "reads": _reads(name),
                            "threads": threads,
                        },
                        not_run=failures.get(CONTENDERS[name].reads, ""),
                    )
                    for name in names
                ],
                turns=settings.turns,
                seconds=settings.seconds,
                title=f"loaders, {threads} threads",
            )
    return Record(
        part="loaders",
        settings={
            "data": settings.source or f"{len(found)} drawn images",
            "images": min(len(found), len(files)),
            "resolution": settings.resolution,
            "batch": batch,
            "turns": settings.turns,
            "crops": batches * batch,
            "threads": settings.threads,
            "device": settings.device,
        },
        notes=_notes(settings, min(len(found), len(files)), batches * batch) + _shares_of_limit(rows),
        rows=_with_ratios(rows),
        identity=_IDENTITY,
        figures=_FIGURES,
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


def _reads(name: str) -> str:
    kind = CONTENDERS[name].reads
    return _STORED[kind][1] if kind in _STORED else "files"


def _with_ratios(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows, each with its rate relative to stock FFCV's at the same number of threads, where that was measured."""
    reference = {
        row["threads"]: row["rate"]["median"] for row in rows if row["name"] == REFERENCE and "not_run" not in row
    }
    for row in rows:
        if "not_run" not in row and row["threads"] in reference:
            row["times_ffcv"] = row["rate"]["median"] / reference[row["threads"]]
    return rows


def _notes(settings: Settings, found: int, crops: int) -> list[str]:
    return [
        f"Random crops of {images.described(settings.data, found)} to {settings.resolution} px, flipped at random, "
        f"uint8, in batches of {settings.batch}.",
        f"images/s: crops delivered a second; several crops of one image count each. Median, lowest and highest of "
        f"{settings.turns} epochs of {crops} crops (several where they take less than {settings.seconds:g} s), "
        "in turns, after an untimed one each; files in the page cache.",
        "cores: processor time of the process and its workers by the clock's. memory: their peak in the untimed turn, "
        "shared pages counted once, mapped files left out. kB: encoded bytes read for a crop.",
    ]


def _shares_of_limit(rows: list[dict[str, Any]]) -> list[str]:
    """How near our CPU path comes to its parts done one after the other, where these were measured."""
    rates = {(row["name"], row["threads"]): row["rate"]["median"] for row in rows if "not_run" not in row}
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


class _Epochs(Runner):
    """A loader's epochs, one after the other."""

    def __init__(self, name: str, task: Task):
        # `threads` is to be all that decodes: PyTorch's own would come on top of it (importing FFCV does the same).
        torch.set_num_threads(1)
        self.device = task.device
        self._task = task
        self._loader = CONTENDERS[name].build(task)
        self._numbers = itertools.count()

    def run(self) -> Work:
        return Work(_consume(self._loader.epoch(next(self._numbers)), self._task))

    def facts(self) -> dict[str, Any]:
        return {"bytes_per_crop": self._loader.bytes_per_crop}


def _consume(batches: Iterable[torch.Tensor], task: Task) -> int:
    """Takes every batch, as training would, and counts its crops; a batch that is not as promised is an error."""
    crops = 0
    promised = (task.batch, 3, task.resolution, task.resolution)
    for batch in batches:
        if batch.shape != promised or batch.dtype != torch.uint8 or batch.device.type != task.device:
            raise BenchError(f"a batch is {batch.dtype} {list(batch.shape)} on {batch.device}")
        crops += len(batch)
    if crops != task.batch * task.batches:
        raise BenchError(f"an epoch had {crops} crops instead of {task.batch * task.batches}")
    return crops
