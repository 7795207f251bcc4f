"""Checks order and coverage for 512 ranks and ImageNet's number of images, and computes the load on a file system.

Ranks are simulated one after the other, with the functions that run on real ranks. The start of one rank is measured.
"""

import os
import statistics
import tempfile
import time
import tracemalloc
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from tqdm import tqdm

from bench import BenchError, images
from bench.process import CallFailed, Process
from bench.record import Record, Row
from bench.scale import common_order, touched
from bench.scale.common_order import GPUS, READ_AHEAD
from bench.scale.startup import start
from bench.scale.tables import EPOCHS, draw, sections
from bench.settings import Settings
from data import plan, tiles
from data.beton import Beton, Encoded, write_beton
from data.decoders.prefetch import default_threads
from data.plan import CropRule

_SEED = 0


@dataclass(frozen=True)
class Scale:
    """The simulated sizes.

    images: number of images in the set. worlds: numbers of ranks, each a divisor of the last, the largest. batch:
    images per step of each rank if there are worlds[-1].
    """

    images: int
    worlds: tuple[int, ...]
    batch: int

    @property
    def world(self) -> int:
        return self.worlds[-1]

    @property
    def step(self) -> int:
        """Images per global step, the same for any number of ranks."""
        return self.world * self.batch


# ImageNet's number of images.
_FULL = Scale(1_281_167, (1, 8, 64, 512), 32)
_QUICK = Scale(20_011, (1, 8, 64), 4)

_Touched = Callable[[Beton, int, NDArray[np.int32]], NDArray[np.int64]]
# What is read of a stored image, by storage and name; the first use of an image reads the whole image.
_WAYS: dict[tuple[str, str], _Touched] = {
    ("jpeg", "whole image"): touched.whole,
    ("jpeg", "tiles of the crop"): touched.tiles_read,
    ("blocks", "whole image"): touched.whole,
    ("blocks", "rows of blocks (GPU)"): touched.rows_of_blocks_read,
    ("blocks", "blocks of the crop (CPU)"): touched.blocks_read,
}
_STORAGES = {"jpeg": images.JPEG, "blocks": images.BLOCKS}


def measure(settings: Settings) -> Record:
    """Checks, simulates and measures. Raises BenchError if the ranks' images are not as they should be."""
    scale = _QUICK if settings.quick else _FULL
    with tempfile.TemporaryDirectory(prefix="bench-") as name:
        folder = Path(name)
        found = images.find(settings.data, folder, most=settings.crops)
        files = images.spread(found, min(len(found), settings.crops))
        stored = {}
        for kind, storage in _STORAGES.items():
            images.write_converted(folder / f"{kind}.beton", files, storage)
            stored[kind] = Beton(folder / f"{kind}.beton")
        reads = [row for kind, beton in stored.items() for row in _reads(kind, beton, settings.crops)]
        # Sizes (for the plan) and lengths (for the simulation) of scale.images images, sampled from the stored ones.
        drawn = np.random.default_rng(_SEED).integers(0, len(files), scale.images)
        lengths, sizes = stored["jpeg"].lengths[drawn], stored["jpeg"].sizes[drawn]
        del stored
        planned = _plan(scale, sizes)
        started = _starts(settings, scale, folder)
    if started[-1]["steps"] != planned[-1]["steps"]:
        raise BenchError(f"a loader has {started[-1]['steps']} steps per epoch instead of {planned[-1]['steps']}")
    machines = tuple(world // GPUS for world in scale.worlds if world >= GPUS)
    ordered = common_order.simulate(lengths, batch=scale.batch, machines=machines)
    return Record(
        part="scale",
        settings={
            "data": settings.source or f"{len(found)} drawn images",
            "images": scale.images,
            "ranks": scale.world,
            "batch": scale.batch,
            "resolution": settings.resolution,
            "turns": settings.turns,
            "crops": settings.crops,
            "device": settings.device,
        },
        notes=[
            f"{scale.images:,} images, {scale.world} ranks with {scale.batch} images per step each, {scale.step:,} in "
            f"total. Bytes are those of {images.described(settings.data, len(files))}, stored by data.convert.",
        ],
        rows=[*planned, *started, *reads, *_first_uses(scale, reads), *ordered],
        identity=(),
        figures=(),
        chart=draw,
        sections=sections(worlds=scale.worlds, batch=scale.batch, turns=settings.turns),
    )


def _plan(scale: Scale, sizes: NDArray[np.int32]) -> list[Row]:
    """Checks the coverage for each number of ranks. Returns a row for each, with the cost of the plan for one rank."""
    order = partial(plan.epoch_order, scale.images, seed=_SEED, epoch=0)
    common = order()
    rows = []
    bar = tqdm(total=sum(scale.worlds), desc="scale: ranks", unit=" ranks", leave=False)
    with ThreadPoolExecutor(default_threads()) as pool:
        for world in scale.worlds:
            parts = []
            for part in pool.map(lambda rank, world=world: order(rank=rank, world=world), range(world)):
                parts.append(part)
                bar.update()
            steps = check_coverage(scale.images, common, parts, scale.step)
            rank = world // 2
            rows.append(
                {
                    "name": f"{world} ranks",
                    "group": "plan",
                    "ranks": world,
                    "batch": scale.step // world,
                    "steps": steps,
                    "left_out": scale.images - steps * scale.step,
                    **_cost(partial(order, rank=rank, world=world), "order"),
                    **_cost(partial(_boxes, parts[rank], sizes, scale.step // world, steps), "boxes"),
                }
            )
    bar.close()
    return rows


def check_coverage(n: int, common: NDArray[np.int64], parts: list[NDArray[np.int64]], step: int) -> int:
    """Checks the ranks' parts of an epoch. Returns its number of full steps.

    n: number of images. common: int64 [n], the order of a single rank. parts: each rank's order. step: images per
    global step.
    Raises BenchError unless each image is in one part, once; all parts have as many full batches as a single rank has
    steps; and in each step all ranks together have the same images as a single rank.
    """
    world, batch = len(parts), step // len(parts)
    together = np.concatenate(parts)
    if len(together) != n or (np.bincount(together, minlength=n) != 1).any():
        raise BenchError(f"{world} ranks: their parts do not contain each of {n} images once")
    # The smallest part determines the number of steps, as in data.loader.
    steps = min(map(len, parts)) // batch
    if steps != n // step:
        raise BenchError(f"{world} ranks: {steps} full steps; a single rank has {n // step}")
    cut = np.stack([part[: steps * batch].reshape(steps, batch) for part in parts], axis=1).reshape(steps, step)
    if (np.sort(cut) != np.sort(common[: steps * step].reshape(steps, step))).any():
        raise BenchError(f"{world} ranks: a step has other images than with a single rank")
    return steps


def _boxes(part: NDArray[np.int64], sizes: NDArray[np.int32], batch: int, steps: int) -> None:
    """Draws the boxes of a rank's epoch, batch by batch, as data.loader does."""
    rule = CropRule()
    for at in range(0, steps * batch, batch):
        indices = part[at : at + batch]
        rule.training(indices, sizes[indices], seed=_SEED, epoch=0)


def _cost(work: Callable[[], object], name: str) -> dict[str, Any]:
    """Runs `work` twice. Returns its seconds, its peak bytes, and the bytes of its result, with `name` as prefix."""
    began = time.perf_counter()
    work()
    seconds = time.perf_counter() - began
    tracemalloc.start()
    try:
        kept = work()
        held, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    del kept
    return {f"{name}_seconds": seconds, f"{name}_peak_bytes": most, f"{name}_kept_bytes": held}


def _starts(settings: Settings, scale: Scale, folder: Path) -> list[Row]:
    """Returns rows for one rank's start with an eighth of the images, and with all, cached and not cached."""
    tiny = tiles.encode(images.draw(0).resize((32, 32), Image.Resampling.BICUBIC), images.JPEG.quality)
    rows: list[Row] = []
    for count, caches in ((scale.images // 8, ("cached",)), (scale.images, ("cached", "not cached"))):
        path = folder / f"{count}.beton"
        try:
            with tqdm(total=count, desc="scale: a set", unit=" images", leave=False) as bar:
                write_beton(path, (_counted(Encoded(tiny, 32, 32, i % 1000), bar) for i in range(count)), at_most=count)
        except OSError as error:
            raise BenchError(f"{path}: cannot be written ({error.strerror}); set TMPDIR to a larger disk") from None
        ask = partial(
            start,
            path,
            rank=7,
            world=scale.world,
            batch=min(scale.batch, count // scale.world),
            resolution=settings.resolution,
            device=settings.device,
        )
        _started(ask)  # compiles and fills caches
        for cache in caches:
            turns = [_started(ask, forget=path if cache == "not cached" else None) for _ in range(settings.turns)]
            rows.append(
                {
                    "name": f"{count} images, {cache}",
                    "group": "start",
                    "images": count,
                    "cache": cache,
                    "file_bytes": path.stat().st_size,
                    "turns": turns,
                    **{key: statistics.median(turn[key] for turn in turns) for key in turns[0]},
                }
            )
        path.unlink()
    small, large = rows[0], rows[1]
    for key in ("memory_after", "memory_peak"):
        grown = (large[key] - large["memory_before"]) - (small[key] - small["memory_before"])
        large[f"{key}_an_image"] = grown / (large["images"] - small["images"])
    return rows


def _counted(image: Encoded, bar: tqdm) -> Encoded:
    bar.update()
    return image


def _started(ask: Callable[[], dict[str, Any]], *, forget: Path | None = None) -> dict[str, Any]:
    """Starts a rank in a new process. Returns its result, with `seconds` from launch to first batch.

    forget: a file to evict from the page cache before.
    """
    if forget:
        with open(forget, "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    began = time.perf_counter()
    try:
        with Process() as process:
            answer = process.call(ask)
            return {"seconds": time.perf_counter() - began, **answer}
    except CallFailed as error:
        raise BenchError(f"a rank could not start: {error}") from None


def _reads(kind: str, beton: Beton, crops: int) -> list[Row]:
    """Returns rows with the mean bytes and reads per crop of real images, with the plan's boxes, for each of _WAYS."""
    ways = {name: read for (storage, name), read in _WAYS.items() if storage == kind}
    counted: dict[str, list[list[int]]] = {name: [] for name in ways}
    indices = np.arange(beton.num_samples)
    for epoch in range(-(-crops // beton.num_samples)):
        boxes, _ = CropRule().training(indices, beton.sizes, seed=_SEED, epoch=epoch)
        for name, read in ways.items():
            counted[name] += [_counts(read(beton, index, boxes[index])) for index in range(beton.num_samples)]
    return [
        {
            "name": f"{kind}, {name}",
            "group": "reads",
            "storage": kind,
            "what": name,
            "crops": len(counts),
            **dict(zip(("bytes", "bytes_4k", "bytes_ahead", "reads"), np.mean(counts, axis=0).tolist(), strict=True)),
        }
        for name, counts in counted.items()
    ]


def _counts(runs: NDArray[np.int64]) -> list[int]:
    """Returns the bytes of the runs, of the 4 KiB pages and READ_AHEAD units that contain them, and the reads."""
    pages = touched.units(runs, 4096)
    return [
        int((runs[:, 1] - runs[:, 0]).sum()),
        4096 * len(pages),
        READ_AHEAD * len(touched.units(runs, READ_AHEAD)),
        touched.reads(pages),
    ]


def _first_uses(scale: Scale, reads: list[Row]) -> list[Row]:
    """Returns rows with the mean bytes per crop over all epochs; an image's first use in a process reads all of it."""
    pages = {row["name"]: row["bytes_4k"] for row in reads}
    rows: list[Row] = []
    for storage, what in (("jpeg", "tiles of the crop"), ("blocks", "rows of blocks (GPU)")):
        whole, later = pages[f"{storage}, whole image"], pages[f"{storage}, {what}"]
        for ranks in scale.worlds[1:]:
            first = first_share(ranks, EPOCHS)
            rows.append(
                {
                    "name": f"{storage}, {ranks} ranks",
                    "group": "first uses",
                    "storage": storage,
                    "ranks": ranks,
                    "first": first,
                    "bytes_4k": first * whole + (1 - first) * later,
                }
            )
    return rows


def first_share(ranks: int, epochs: int) -> float:
    """Returns the expected share of first uses among all uses of images by a rank in this many epochs."""
    return (1 - (1 - 1 / ranks) ** epochs) / (epochs / ranks)
