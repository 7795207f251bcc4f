"""Measures crops per second from a file that is in the page cache, and from one that is not.

The latter stands for files much larger than memory, which are read from disk in every epoch.
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
# Number of images in the file, as a multiple of a loader's epoch: quasi-random order groups hundreds of megabytes.
_EPOCHS = 8
# Number of batches whose bytes are requested before they are decoded.
_READ_AHEAD = 8
# Largest share of a file that may still be cached after eviction; above it, eviction is taken to be impossible.
_MOST_CACHED = 0.05
# Pages with a pending read can be evicted only after it has completed.
_TRIES = 20

_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True)
class Reading:
    """How a file is read.

    order: random, quasi-random, or None to read all bytes in file order without decoding. cold: the file is evicted
    from the page cache before each epoch. ahead: the images of the next batches are requested from the system.
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
    """Measures our CPU path on cached and uncached files. Raises BenchError for images that cannot be used."""
    count = -(-settings.crops // settings.batch) * settings.batch * _EPOCHS
    threads = max(settings.threads)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        found = images.find(settings.data, Path(folder), most=count)
        files = images.spread(found, count)
        paths = {kind: Path(folder) / f"{kind}.beton" for kind in _STORAGES}
        failures = {kind: _stored(path, files, _STORAGES[kind]) for kind, path in paths.items()}
        sizes = {kind: path.stat().st_size for kind, path in paths.items() if not failures[kind]}
        # One group after the other: pages mapped by a warm contender could not be evicted.
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
    """Writes the images of the files to `path`. Returns why that failed, or ""."""
    try:
        with Process() as process:
            process.call(images.write_converted, path, files, storage)
    except CallFailed as error:
        return str(error)
    return ""


def _with_ratios(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Adds to cold rows their rate relative to the warm row of their order (of_warm) and to no read-ahead (gained)."""

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
        f"Random crops of {images.described(settings.data, found)}, resized to {settings.resolution} px, uint8, in "
        f"batches of {settings.batch}, by the ffcv decoder on {threads} threads. A file holds {count} images, repeated "
        f"if there are fewer: {stored}.",
        f"Median, lowest and highest of {settings.turns} epochs of the whole file, measured in turns, after one "
        "untimed epoch, in which all checksums are compared.",
        "cold: the file is evicted from the page cache before each epoch (posix_fadvise DONTNEED); caches of disks and "
        "hosts are not cleared. cached: the share of the file that is then in the page cache; parts of a file are "
        "never read. MB/s: counts whole images, although a crop needs only part of one.",
        f"read ahead: the images of {_READ_AHEAD} batches are requested before they are decoded (WILLNEED). gained: "
        "the ratio to the rate without. bytes alone: the file is read in order, without decoding.",
    ]
    small = [kind for kind, size in sizes.items() if size < 2 * group]
    if small:
        notes.append(
            f"Quasi-random order reads groups of {group / 1e6:.0f} MB. Files of fewer than two groups "
            f"({', '.join(small)}) are read almost as in random order; `--crops` makes larger files."
        )
    return notes


class _Epochs(Runner):
    """Reads a stored file in one way, an epoch per turn."""

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
        # A separate thread, since the call may block.
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
        """Returns cached, the share of the file in memory before a turn, and bytes_per_image, the mean encoded size."""
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
        """Reads the file's bytes in order. Returns its number of images."""
        room = bytearray(PAGE_SIZE)
        os.lseek(self._file, 0, os.SEEK_SET)
        while os.readv(self._file, [room]):
            pass
        return self._beton.num_samples

    def _forget(self) -> None:
        """Evicts the file from the page cache. Raises BenchError if its pages stay."""
        self._asking.submit(int).result()  # waits for the requests submitted before
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
        """Unmaps the pages that this process has mapped: only unmapped pages can be evicted."""
        _call(_libc.madvise, *_mapping(self._beton), mmap.MADV_DONTNEED)


def cached_share(beton: Beton) -> float:
    """Returns the share of the file's pages that are in memory, 0 to 1."""
    address, length = _mapping(beton)
    found = np.zeros(-(-beton.bytes.size // mmap.PAGESIZE), np.uint8)
    _call(_libc.mincore, address, length, ctypes.c_void_p(found.ctypes.data))
    return float((found & 1).mean())


def _mapping(beton: Beton) -> tuple[ctypes.c_void_p, ctypes.c_size_t]:
    return ctypes.c_void_p(beton.bytes.ctypes.data), ctypes.c_size_t(beton.bytes.size)


def _call(function: Any, *arguments: Any) -> None:
    if function(*arguments):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
