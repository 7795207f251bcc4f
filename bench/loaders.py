"""Crops a second of the loaders, ours and others, on the same images, from the page cache."""

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

# FFCV's own writer does it in one process, to keep the order: no measure of what conversion takes.
_UNTIMED = {"raw"}
# Images of ImageNet's training set, which conversion is counted for.
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
    """Images as contenders read them. path: None where these are the files themselves.

    bytes_per_image: encoded, on average. minutes: what conversion would take of as many as ImageNet has; None where
    there is none, or where it was not timed.
    """

    path: Path | None
    bytes_per_image: float
    minutes: float | None


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
    """stored: what it reads, or why that could not be made."""
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
    """The images stored in these ways, or the reason why they could not be."""
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
    """Stores the files. Returns the seconds that converting one takes, on all cores, and its bytes, on average."""
    aside = path.with_name("aside.beton")
    distinct = list(dict.fromkeys(files))
    write(aside, distinct[:1])  # for the libraries it loads and the code it compiles
    started = time.perf_counter()
    write(aside, distinct)
    seconds = time.perf_counter() - started
    aside.unlink()
    write(path, files)
    return seconds / len(distinct), _bytes_per_image(path, len(files))


def _bytes_per_image(path: Path, count: int) -> float:
    """What an image takes, on average, in a file of so many."""
    try:
        return float(Beton(path).lengths.mean())
    except DataError:
        # FFCV's own raw file has images and no labels, which is no set of ours; pages and all, it is as large.
        return path.stat().st_size / count


def _figures(threads: tuple[int, ...]) -> tuple[Column, ...]:
    """The columns of figures; of several numbers of threads also what the others gain over the fewest."""
    if len(threads) == 1:
        return _FIGURES
    scaling = optional("scaling", "times_fewest", lambda times: f"{times:.2f}")
    return (*_FIGURES[:3], scaling, *_FIGURES[3:])


def _reads(name: str) -> str:
    kind = CONTENDERS[name].reads
    return _STORED[kind][1] if kind in _STORED else "files"


def _with_ratios(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows, each with its rate relative to others, where these were measured.

    times_ffcv: to stock FFCV's at the same number of threads. times_fewest: to its own with the fewest threads.
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
        f"Random crops of {images.described(settings.data, found)} to {settings.resolution} px, flipped at random, "
        f"uint8, in batches of {settings.batch}.",
        f"images/s: crops delivered a second; several crops of one image count each. Median, lowest and highest of "
        f"{settings.turns} epochs of {crops} crops (several where they take less than {settings.seconds:g} s), "
        "in turns, after an untimed one each; files in the page cache.",
        "cores: processor time of the process and its workers by the clock's. memory: their peak in the untimed turn, "
        "shared pages counted once, mapped files left out.",
        "kB read: encoded bytes read for a crop. kB stored: of an image. convert min: minutes that storing ImageNet's "
        f"{_IMAGENET:,} training images in this way would take, at the rate of these on all cores.",
        "files: the originals. Peers that are missing here come with `pip install -e '.[peers]'`.",
        *([f"scaling: of the rate, from {settings.threads[0]} threads on."] if len(settings.threads) > 1 else []),
    ]


def _shares_of_parts(rows: list[dict[str, Any]]) -> list[str]:
    """How near our CPU path comes to its parts done one after the other, where these were measured."""
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
                    f"ours ffcv{copies}, {threads} threads: {100 * ours / parts:.0f} % of {parts:.0f} images/s, which "
                    "decoding and resizing make one after the other, each measured alone."
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
