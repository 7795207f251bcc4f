"""Files larger than memory: crops a second from a file of which nothing is in the page cache, and from one that is.

A file much larger than memory is read as here with an empty cache, in every epoch.
"""

import ctypes
import itertools
import mmap
import os
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench import BenchError, images
from bench.chart import by_storage
from bench.process import CallFailed, Process
from bench.record import MEMORY, Column, Record, optional, rate_columns
from bench.settings import Settings
from bench.turns import Contender, Runner, Work, in_turns
from data import plan
from data.beton import PAGE_SIZE, Beton
from data.convert import Storage
from data.decoders import Request, View, build_decoder

_STORAGES = {"jpeg": images.JPEG, "blocks": images.BLOCKS}
# Images of the file, in epochs of a loader: quasi-random order takes hundreds of megabytes at a time.
_EPOCHS = 8
# Batches whose bytes are asked for before they are decoded.
_READ_AHEAD = 8
# Of a file whose pages were to leave the cache; more means that they cannot.
_MOST_CACHED = 0.05
# Pages that are being read stay until they have arrived.
_TRIES = 20

_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True)
class Reading:
    """How a file is read. order: random, quasi-random, or None for its bytes alone, in order. cold: nothing is cached.

    ahead: the system is asked for the images of the batches to come.
    """

    storage: str
    order: str | None
    cold: bool
    ahead: bool = False

    @property
    def row(self) -> dict[str, Any]:
        order = self.order or "bytes alone"
        return {
            "name": f"{self.storage}, {order}{', read ahead' if self.ahead else ''}",
            "group": "cold" if self.cold else "warm",
            "unit": "images/s",
            "kind": "ours" if self.order else "part",
            "reads": self.storage,
            "order": order,
            "ahead": self.ahead,
        }


_ORDERS = ("random", "quasi-random")
_WARM = [Reading(storage, order, cold=False) for storage in _STORAGES for order in _ORDERS]
_COLD = [
    reading
    for storage in _STORAGES
    for reading in (
        *(Reading(storage, order, True, ahead) for order in _ORDERS for ahead in (False, True)),
        Reading(storage, None, True),
    )
]


def measure(settings: Settings) -> Record:
    """Measures our CPU path. Raises BenchError for images that cannot be used."""
    count = -(-settings.crops // settings.batch) * settings.batch * _EPOCHS
    threads = max(settings.threads)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        found = images.find(settings.data, Path(folder), most=count)
        files = images.spread(found, count)
        paths = {kind: Path(folder) / f"{kind}.beton" for kind in _STORAGES}
        failures = {kind: _stored(path, files, _STORAGES[kind]) for kind, path in paths.items()}
        sizes = {kind: path.stat().st_size for kind, path in paths.items() if not failures[kind]}
        # One after the other: pages that a warm one has mapped would never leave the cache.
        for title, readings in (("warm", _WARM), ("cold", _COLD)):
            contenders = [
                Contender(
                    partial(_Epochs, reading, paths[reading.storage], settings.resolution, settings.batch, threads),
                    reading.row,
                    not_run=failures[reading.storage],
                )
                for reading in readings
            ]
            rows += in_turns(contenders, **settings.pace, title=f"cold: {title}")
    return Record(
        part="cold",
        settings={
            "data": settings.source or f"{len(found)} drawn images",
            "images": min(len(found), count),
            "resolution": settings.resolution,
            "batch": settings.batch,
            "turns": settings.turns,
            "crops": count,
            "threads": threads,
        },
        notes=_notes(settings, min(len(found), count), count, sizes, threads),
        rows=_with_ratios(rows),
        identity=(
            Column("storage", lambda row: row["reads"]),
            Column("order", lambda row: row["order"]),
            Column("cache", lambda row: row["group"]),
            Column("read ahead", lambda row: "yes" if row["ahead"] else "no"),
        ),
        figures=(
            *rate_columns("images/s"),
            optional("of warm", "of_warm", lambda share: f"{100 * share:.0f} %"),
            optional("gained", "gained", lambda times: f"{times:.2f}"),
            Column("MB/s", lambda row: f"{row['rate']['median'] * row['bytes_per_image'] / 1e6:.0f}"),
            Column("cached", lambda row: f"{100 * row['cached']:.0f} %"),
            Column("cores", lambda row: f"{row['cores']:.2f}"),
            MEMORY,
        ),
        chart=by_storage,
    )


def _stored(path: Path, files: list[str], storage: Storage) -> str:
    """Stores the files. Returns why that failed, or ""."""
    try:
        with Process() as process:
            process.call(images.write_converted, path, files, storage)
    except CallFailed as error:
        return str(error)
    return ""


def _with_ratios(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows; cold ones relative to the warm one of their order (of_warm), and to not reading ahead (gained)."""

    def key(row: dict[str, Any], cache: str, ahead: bool) -> tuple[str, str, str, bool]:
        return row["reads"], row["order"], cache, ahead

    ran = [row for row in rows if "not_run" not in row]
    rates = {key(row, row["group"], row["ahead"]): row["rate"]["median"] for row in ran}
    for row in ran:
        warm, plain = rates.get(key(row, "warm", False)), rates.get(key(row, "cold", False))
        if row["group"] == "cold" and warm:
            row["of_warm"] = row["rate"]["median"] / warm
        if row["ahead"] and plain:
            row["gained"] = row["rate"]["median"] / plain
    return rows


def _notes(settings: Settings, found: int, count: int, sizes: dict[str, int], threads: int) -> list[str]:
    group = plan.PAGES_AT_ONCE * PAGE_SIZE
    stored = ", ".join(f"{kind} {size / 1e6:.0f} MB" for kind, size in sizes.items())
    notes = [
        f"Random crops of {images.described(settings.data, found)} to {settings.resolution} px, uint8, in batches of "
        f"{settings.batch}, by the ffcv path on {threads} threads. A file holds {count}, repeated where there are "
        f"fewer: {stored}.",
        f"Median, lowest and highest of {settings.turns} epochs of the whole file, in turns, after an untimed one "
        "each, in which all checksums are compared.",
        "cold: the file's pages leave the cache before each epoch (posix_fadvise DONTNEED); what disks and hosts keep "
        "in caches of their own stays there. cached: the share of the file that is then in the cache; some of it is "
        "never read. MB/s: of whole images, though a crop does not need all of one.",
        f"read ahead: the system is asked for the images of {_READ_AHEAD} batches before they are decoded (WILLNEED); "
        "gained: times the rate without. bytes alone: the file is read in order, and nothing decoded.",
    ]
    small = [kind for kind, size in sizes.items() if size < 2 * group]
    if small:
        notes.append(
            f"Quasi-random order takes {group / 1e6:.0f} MB at a time: of files of less than two such parts "
            f"({', '.join(small)}) it is nearly the random one; `--crops` makes larger ones."
        )
    return notes


class _Epochs(Runner):
    """Epochs of a stored file, read in one way."""

    def __init__(self, reading: Reading, path: Path, resolution: int, batch: int, threads: int):
        torch.set_num_threads(1)
        self._reading, self._batch = reading, batch
        self._beton = Beton(path)
        self._file = os.open(path, os.O_RDONLY)
        self._decoder = build_decoder(
            "ffcv",
            self._beton,
            views=(View(1, resolution),),
            device=torch.device("cpu"),
            threads=threads,
            max_batch=batch,
        )
        self._numbers = itertools.count()
        # A thread of its own: the system may let a caller wait.
        self._asking = ThreadPoolExecutor(1)

    def run(self) -> Work:
        started = time.perf_counter()
        if self._reading.cold:
            self._forget()
        untimed = time.perf_counter() - started
        if self._reading.order is None:
            crops = self._read()
        else:
            crops = sum(len(batch) for (batch,) in self._decoder.decode(self._requests(next(self._numbers))))
        if self._reading.cold:
            self._unmap()
        return Work(crops, untimed_seconds=untimed)

    def facts(self) -> dict[str, Any]:
        """cached: the share of the file that is in memory before a turn. bytes_per_image: on average."""
        if self._reading.cold:
            self._forget()
        return {"cached": cached_share(self._beton), "bytes_per_image": float(self._beton.lengths.mean())}

    def _requests(self, number: int) -> Iterator[Request]:
        beton, batch = self._beton, self._batch
        pages = beton.pages if self._reading.order == "quasi-random" else None
        order = plan.epoch_order(beton.num_samples, seed=0, epoch=number, pages=pages)
        asked = 0
        for start in range(0, len(order), batch):
            if self._reading.ahead:
                wanted = start + _READ_AHEAD * batch
                self._asking.submit(self._ask_for, order[asked:wanted])
                asked = wanted
            indices = order[start : start + batch]
            boxes, flips = plan.random_boxes(indices, beton.sizes[indices], seed=0, epoch=number)
            yield Request(indices, boxes[:, None], flips[:, None])

    def _ask_for(self, indices: np.ndarray) -> None:
        for start, length in zip(
            self._beton.starts[indices].tolist(), self._beton.lengths[indices].tolist(), strict=True
        ):
            os.posix_fadvise(self._file, start, length, os.POSIX_FADV_WILLNEED)

    def _read(self) -> int:
        """The file's bytes, in order; returns its images."""
        room = bytearray(PAGE_SIZE)
        os.lseek(self._file, 0, os.SEEK_SET)
        while os.readv(self._file, [room]):
            pass
        return self._beton.num_samples

    def _forget(self) -> None:
        """The file's pages leave the cache. Raises BenchError where they stay."""
        self._asking.submit(int).result()  # begun after all that was asked for
        share = 1.0
        for _ in range(_TRIES):
            self._unmap()
            os.posix_fadvise(self._file, 0, 0, os.POSIX_FADV_DONTNEED)
            share = cached_share(self._beton)
            if share <= _MOST_CACHED:
                return
            time.sleep(0.05)
        raise BenchError(f"{100 * share:.0f} % of {self._beton.path} stay in memory: set TMPDIR to a folder on a disk")

    def _unmap(self) -> None:
        """Gives back the pages that this process has mapped: only what nobody has mapped can leave the cache."""
        _call(_libc.madvise, *_mapping(self._beton), mmap.MADV_DONTNEED)


def cached_share(beton: Beton) -> float:
    """The share of the file's pages that are in memory, 0 to 1."""
    address, length = _mapping(beton)
    found = np.zeros(-(-beton.bytes.size // mmap.PAGESIZE), np.uint8)
    _call(_libc.mincore, address, length, ctypes.c_void_p(found.ctypes.data))
    return float((found & 1).mean())


def _mapping(beton: Beton) -> tuple[ctypes.c_void_p, ctypes.c_size_t]:
    return ctypes.c_void_p(beton.bytes.ctypes.data), ctypes.c_size_t(beton.bytes.size)


def _call(function: Any, *arguments: Any) -> None:
    if function(*arguments):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
