"""Measures crops per second of our loader and of others on the same images, from the page cache."""

import itertools
import os
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bench import BenchError, images
from bench.chart import by_storage
from bench.contenders import CONTENDERS, COPIES, REFERENCE
from bench.process import CallFailed, Process
from bench.record import MEMORY, Column, Record, figure, optional, rate_columns
from bench.settings import Settings
from bench.task import Task
from bench.turns import Contender, Runner, Work, in_turns
from data import DataError
from data.beton import Beton

# The stored sets that contenders read: the function that writes each, and its name in the table.
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

# FFCV's writer runs with one worker here, to keep the order, so its time is not representative.
_UNTIMED = {"raw"}
# Number of images in ImageNet's training set, for which conversion time is given.
_IMAGENET = 1_281_167

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
    Column("kB read", lambda row: f"{row['bytes_per_crop'] / 1e3:.1f}"),
    optional("kB stored", "stored_bytes", lambda value: f"{value / 1e3:.1f}"),
    optional("convert min", "conversion_minutes", figure),
)


@dataclass(frozen=True)
class Stored:
    """Images as contenders read them. path: the stored set, or None for the original files.

    bytes_per_image: mean encoded size. minutes: time that converting ImageNet's training set would take; None without
    conversion, or if it was not timed.
    """

    path: Path | None
    bytes_per_image: float
    minutes: float | None


def measure(settings: Settings) -> Record:
    """Measures the loaders; those that cannot run are reported with the reason.

    Raises BenchError for images and options that cannot be used.
    """
    # A complete name selects that loader alone, even if other names contain it.
    names = [
        name
        for name in CONTENDERS
        if any(part == name if part in CONTENDERS else part in name for part in settings.contenders)
    ]
    if not names:
        asked = ",".join(settings.contenders)
        raise BenchError(f"contenders={asked}: no loader has this in its name; there are {', '.join(CONTENDERS)}")
    batch = settings.batch
    # A multiple of COPIES, so that no contender starts between the copies of an image.
    batches = -(-settings.crops // (batch * COPIES)) * COPIES
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        found = images.find(settings.data, Path(folder), most=batches * batch)
        files = images.spread(found, batches * batch)
        stored = _store({CONTENDERS[name].reads for name in names}, files, Path(folder))
        for threads in settings.threads:
            rows += in_turns(
                [_contender(name, files, stored[CONTENDERS[name].reads], batches, threads, settings) for name in names],
                **settings.pace,
                hurried=settings.on_gpu and settings.quick,
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
        notes=_notes(settings, min(len(found), len(files)), batches * batch) + _shares_of_parts(rows),
        rows=_with_ratios(rows),
        identity=_IDENTITY,
        figures=_figures(settings.threads),
        chart=by_storage,
    )


def _contender(
    name: str, files: list[str], stored: Stored | str, batches: int, threads: int, settings: Settings
) -> Contender:
    """Returns the contender. stored: the images that it reads, or the reason why they could not be stored."""
    entry = CONTENDERS[name]
    row: dict[str, Any] = {
        "name": name,
        "group": f"{threads} threads",
        "unit": "images/s",
        "about": entry.about,
        "kind": "ours" if name.startswith("ours") else "part" if " alone" in name else "peer",
        "reads": _reads(name),
        "threads": threads,
    }
    path, not_run = None, ""
    if isinstance(stored, Stored):
        path = stored.path
        row |= {"stored_bytes": stored.bytes_per_image, "conversion_minutes": stored.minutes}
    else:
        not_run = stored
    if entry.needs_gpu and settings.device == "cpu":
        not_run = "delivers to a GPU only"
    task = Task(files, path, settings.resolution, settings.batch, batches, threads, settings.device)
    return Contender(partial(_Epochs, name, task), row, not_run=not_run)


def _store(kinds: set[str], files: list[str], folder: Path) -> dict[str, Stored | str]:
    """Stores the images in each format. Returns each stored set, or the reason why it could not be written."""
    sizes = [os.path.getsize(file) for file in files]
    stored: dict[str, Stored | str] = {"files": Stored(None, sum(sizes) / len(files), None)}
    for kind in sorted(kinds - {"files"}):
        write, about = _STORED[kind]
        path = folder / f"{kind.replace(' ', '-')}.beton"
        try:
            with Process() as process:
                seconds, size = process.call(_write, write, path, files)
        except CallFailed as error:
            stored[kind] = str(error)
            continue
        stored[kind] = Stored(path, size, None if kind in _UNTIMED else seconds * _IMAGENET / 60)
        print(f"{kind}: {about}, {path.stat().st_size / 1e6:.0f} MB", flush=True)
    return stored


def _write(write: Callable[[Path, list[str]], None], path: Path, files: list[str]) -> tuple[float, float]:
    """Stores the files. Returns the mean seconds to convert an image on all cores, and its mean size in bytes."""
    aside = path.with_name("aside.beton")
    distinct = list(dict.fromkeys(files))
    write(aside, distinct[:1])  # loads libraries and compiles code before the timed call
    started = time.perf_counter()
    write(aside, distinct)
    seconds = time.perf_counter() - started
    aside.unlink()
    write(path, files)
    return seconds / len(distinct), _bytes_per_image(path, len(files))


def _bytes_per_image(path: Path, count: int) -> float:
    """Returns the mean size of an image in a file of `count` images."""
    try:
        return float(Beton(path).lengths.mean())
    except DataError:
        # Beton does not read FFCV's raw file, which has no labels; take the file's size, with its index and padding.
        return path.stat().st_size / count


def _figures(threads: tuple[int, ...]) -> tuple[Column, ...]:
    """Returns the columns of figures; for several numbers of threads, with `scaling` over the smallest."""
    if len(threads) == 1:
        return _FIGURES
    scaling = optional("scaling", "times_fewest", lambda times: f"{times:.2f}")
    return (*_FIGURES[:3], scaling, *_FIGURES[3:])


def _reads(name: str) -> str:
    kind = CONTENDERS[name].reads
    return _STORED[kind][1] if kind in _STORED else "files"


def _with_ratios(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Adds the ratios of each row's rate to others, if these were measured. Returns the rows.

    times_ffcv: to stock FFCV with the same number of threads. times_fewest: to the same loader with the fewest threads.
    """
    rates = {(row["name"], row["threads"]): row["rate"]["median"] for row in rows if "not_run" not in row}
    fewest = min(row["threads"] for row in rows)
    for row in rows:
        others = {"times_ffcv": (REFERENCE, row["threads"]), "times_fewest": (row["name"], fewest)}
        if "not_run" not in row:
            row |= {key: row["rate"]["median"] / rates[other] for key, other in others.items() if other in rates}
    return rows


def _notes(settings: Settings, found: int, crops: int) -> list[str]:
    return [
        f"Random crops of {images.described(settings.data, found)}, resized to {settings.resolution} px, flipped at "
        f"random, uint8, in batches of {settings.batch}.",
        f"images/s: crops delivered per second; several crops of one image count separately. Median, lowest and "
        f"highest of {settings.turns} epochs of {crops} crops (several epochs if they take less than "
        f"{settings.seconds:g} s), measured in turns, after one untimed turn; files in the page cache.",
        "cores: processor time of the process and its workers divided by elapsed time. memory: their peak in the "
        "untimed turn, with shared pages counted once and without mapped files.",
        "kB read: encoded bytes read per crop. kB stored: encoded bytes per image. convert min: minutes that storing "
        f"ImageNet's {_IMAGENET:,} training images would take on all cores, at the rate of these images.",
        "files: the original files. Loaders of other projects that are missing here are installed by "
        "`.venv/bin/python -m pip install '.[peers]'`.",
        *([f"scaling: the ratio to the rate with {settings.threads[0]} threads."] if len(settings.threads) > 1 else []),
    ]


def _shares_of_parts(rows: list[dict[str, Any]]) -> list[str]:
    """Returns notes that compare our CPU path with decoding then resizing, if these were measured."""
    rates = {(row["name"], row["threads"]): row["rate"]["median"] for row in rows if "not_run" not in row}
    lines = []
    for threads in sorted({threads for _, threads in rates}):
        for copies in ("", f" x{COPIES}"):
            ours, decode, resize = (
                rates.get((name, threads)) for name in (f"ours ffcv{copies}", f"decode alone{copies}", "resize alone")
            )
            if ours and decode and resize:
                parts = 1 / (1 / decode + 1 / resize)
                lines.append(
                    f"ours ffcv{copies}, {threads} threads: {100 * ours / parts:.0f} % of {parts:.0f} images/s, the "
                    "rate of decoding and resizing one after the other, each measured alone."
                )
    return lines


class _Epochs(Runner):
    """Runs a loader's epochs, one per turn."""

    def __init__(self, name: str, task: Task):
        # PyTorch's threads would come on top of `threads` (importing FFCV does the same).
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
    """Takes every batch, as training would. Returns the number of crops; raises BenchError for an unexpected batch."""
    crops = 0
    promised = (task.batch, 3, task.resolution, task.resolution)
    for batch in batches:
        if batch.shape != promised or batch.dtype != torch.uint8 or batch.device.type != task.device:
            raise BenchError(f"a batch is {batch.dtype} {list(batch.shape)} on {batch.device}")
        crops += len(batch)
    if crops != task.batch * task.batches:
        raise BenchError(f"an epoch had {crops} crops instead of {task.batch * task.batches}")
    return crops
