"""From a folder of images or a named set to a converted set, in FFCV's format.

    python -m data.convert --data images/ --out converted/images
    make convert DATA=images/ OUT=converted/images

A converted set is a folder: `train.beton` and `val.beton` (baseline 4:2:0 JPEGs with a restart grid, see data/tiles.py,
at most `max_resolution` pixels on the longer side; or raw pixels), `set.json` (class names in order, crop rule, how it
was made), `rejects.txt` (what could not be read).
"""

import contextlib
import hashlib
import json
import multiprocessing
import os
import shutil
import signal
import sys
import time
import warnings
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import PIL
from PIL import Image
from tqdm import tqdm

from data import DataError, archives, tiles
from data.beton import PAGE_SIZE, Beton, Encoded, write_beton
from data.command import run_command
from data.pixels import upright_rgb
from data.progress import images_bar
from data.sources import CropRule, Source, Split, crop_rule_for, open_source

_FORMAT = 2
_CHUNK = 32
_REJECTS_SHOWN = 5
# Three bytes a pixel add up: a raw image takes at 256 pixels what a JPEG takes at 512 or so, times three.
_MAX_RESOLUTIONS = {"jpeg": 512, "raw": 256}


@dataclass(frozen=True)
class Storage:
    """How images are stored.

    kind: jpeg or raw. max_resolution: pixels, at most, of the longer side. quality: of JPEGs, 1 to 100.
    """

    kind: str = "jpeg"
    max_resolution: int = 512
    quality: int = 90


@dataclass(frozen=True)
class ConvertedSet:
    """A converted set on disk, as `set.json` describes it.

    folder holds `train.beton` and `val.beton`. source: what it was made from (`scenes`, a set's name or a folder).
    """

    folder: Path
    name: str
    class_names: tuple[str, ...]
    crop: CropRule
    source_fingerprint: str
    made: dict[str, Any]

    def beton(self, split: str) -> Path:
        return self.folder / f"{split}.beton"

    def fingerprint(self) -> str:
        """Names the stored images and labels of both splits."""
        both = "".join(Beton(self.beton(split)).fingerprint for split in ("train", "val"))
        return hashlib.sha256(both.encode()).hexdigest()


def open_set(folder: str | Path) -> ConvertedSet:
    """Reads the `set.json` of a converted set. Raises DataError where it is missing or damaged."""
    folder = Path(folder)
    path = folder / "set.json"
    try:
        described = json.loads(path.read_text())
        if described["format"] != _FORMAT:
            raise DataError(f"{path}: written by another version; convert the set again")
        crop = described["crop"] | {key: tuple(described["crop"][key]) for key in ("scale", "ratio")}
        return ConvertedSet(
            folder=folder,
            name=described["name"],
            class_names=tuple(described["class_names"]),
            crop=CropRule(**crop),
            source_fingerprint=described["source_fingerprint"],
            made=described["made"],
        )
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); is {folder} a converted set?") from None
    except (json.JSONDecodeError, KeyError, TypeError, ValueError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path}: damaged; convert the set again") from None


def is_converted(data: str | Path) -> bool:
    return (Path(data) / "set.json").is_file()


@dataclass(frozen=True)
class Unconverted:
    """A source that has no converted set yet, or one that no longer fits; convert() makes it at `folder`."""

    source: Source
    folder: Path
    stale: bool

    @property
    def class_names(self) -> tuple[str, ...]:
        return self.source.class_names

    def convert(self) -> ConvertedSet:
        if self.stale:
            print(f"{self.folder}: its images or their crop rule have changed: converting again", flush=True)
        return convert_source(self.source, self.folder, replace=True)


def find_set(data: str, *, cache: str | Path = "converted") -> ConvertedSet | Unconverted:
    """The set for what the user gave as DATA: a converted set, or one converted earlier below `cache`, or still to be.

    Quick: nothing is decoded. Raises DataError as open_source and open_set do.
    """
    if is_converted(data):
        return open_set(data)
    path = Path(data)
    if path.is_file():
        # Asked before the archive is opened: a compressed tar would be unpacked for that.
        folder = _cache_folder(cache, archives.archive_name(path), str(path.resolve()))
        converted = _still_fitting(folder, archives.fingerprint(path), None)
        if converted:
            return converted
    source = open_source(data)
    folder = _cache_folder(cache, source.name, data if source.crop else str(path.resolve()))
    converted = _still_fitting(folder, source.fingerprint, source.crop)
    return converted or Unconverted(source, folder, stale=folder.exists())


def _cache_folder(cache: str | Path, name: str, place: str) -> Path:
    return Path(cache) / f"{name}-{hashlib.sha256(place.encode(errors='surrogateescape')).hexdigest()[:8]}"


def _still_fitting(folder: Path, fingerprint: str, crop: CropRule | None) -> ConvertedSet | None:
    """The set converted earlier, unless its images or their crop rule have changed, or it is damaged."""
    if is_converted(folder):
        with contextlib.suppress(DataError):
            converted = open_set(folder)
            if converted.source_fingerprint == fingerprint and crop in (None, converted.crop):
                return converted
    return None


def convert(
    data: str,
    out: str,
    storage: Literal["jpeg", "raw"] = "jpeg",
    max_resolution: int | None = None,
    quality: int = 90,
    processes: int | None = None,
) -> None:
    """Converts a folder or archive of images or a named set to FFCV's format.

    Args:
        data: a folder of class folders (or train/ and val/ of them), a zip or tar of one, or a set's name
        out: the folder to write; it must not exist yet
        storage: jpeg, or raw pixels for small images or a large memory: no decoding, some ten times the bytes
        max_resolution: larger images are reduced so that the longer side has this many pixels (default: 512; raw: 256)
        quality: JPEG quality, 1 to 100
        processes: how many encode at once (default: one a core)
    """
    if max_resolution is None:
        max_resolution = _MAX_RESOLUTIONS[storage]
    if is_converted(data):
        raise DataError(f"{data}: is a converted set already; use it as DATA")
    if not 1 <= quality <= 100:
        raise DataError(f"quality={quality}: give 1 to 100")
    if not 16 <= max_resolution <= 65500:
        raise DataError(f"max_resolution={max_resolution}: give 16 to 65500 pixels")
    if Path(out).exists():
        raise DataError(f"{out}: exists already; give another OUT or remove it first")
    stored_as = Storage(storage, max_resolution, quality)
    convert_source(open_source(data), Path(out), storage=stored_as, processes=processes)


def convert_source(
    source: Source,
    out: Path,
    *,
    storage: Storage = Storage(),
    processes: int | None = None,
    replace: bool = False,
) -> ConvertedSet:
    """Writes a source as a converted set; `out` appears only when it is complete.

    replace: take the place of what `out` holds; it stays until the new one is complete.
    Raises DataError when a split has no readable image, the disk is full or a process dies.
    """
    for note in source.notes:
        print(note, flush=True)
    processes = processes or len(os.sched_getaffinity(0))
    partial = out.with_name(f".{out.name}.partial-{os.getpid()}")
    try:
        partial.mkdir(parents=True)
        rejects = []
        for name, split in (("train", source.train), ("val", source.val)):
            rejects += _convert_split(split, name, partial, storage, processes)
        with open(partial / "rejects.txt", "w", errors="surrogateescape") as file:
            file.writelines(f"{line}\n" for line in rejects)
        sizes = Beton(partial / "train.beton").sizes
        described = {
            "format": _FORMAT,
            "name": source.name,
            "class_names": source.class_names,
            "crop": asdict(source.crop or crop_rule_for(sizes)),
            "source_fingerprint": source.fingerprint,
            "made": {
                "storage": storage.kind,
                "max_resolution": storage.max_resolution,
                "quality": storage.quality,
                "pillow": PIL.__version__,
                "rejects": len(rejects),
            },
        }
        (partial / "set.json").write_text(json.dumps(described, indent=1) + "\n")
        if replace and out.exists():
            shutil.rmtree(out)
        partial.rename(out)
    except OSError as error:
        raise DataError(f"{out}: could not be written ({error.strerror}); nothing was left half-done") from None
    except BrokenProcessPool:
        raise DataError(f"{out}: a converting process died (out of memory?); try --processes 1") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    if rejects:
        print(f"{len(rejects)} images could not be read and were left out: {out / 'rejects.txt'}", flush=True)
    return open_set(out)


def _convert_split(split: Split, name: str, folder: Path, storage: Storage, processes: int) -> list[str]:
    """Writes one split's .beton into the folder; returns a line for each image that could not be read."""
    rejects: list[str] = []
    stored_bytes, tiled_area, tiles_cut = 0, 0, 0
    started = time.perf_counter()

    def images(bar: tqdm) -> Iterator[Encoded]:
        nonlocal stored_bytes, tiled_area, tiles_cut
        for item, label, result in _encode_ahead(split, storage, processes):
            bar.update()
            if isinstance(result, str):
                rejects.append(f"{item}: {result}")
                if len(rejects) <= _REJECTS_SHOWN:
                    bar.write(f"left out: {_printable(rejects[-1])}", file=sys.stderr)
                continue
            stored_bytes += len(result.data)
            grid = 0 if storage.kind == "raw" else tiles.layout(np.frombuffer(result.data, np.uint8)).tiles
            tiles_cut += grid
            tiled_area += result.height * result.width if grid else 0
            yield result._replace(label=label)

    with images_bar(len(split.items), f"convert {name}") as bar:
        count = write_beton(folder / f"{name}.beton", images(bar), at_most=len(split.items))
    if not count:
        raise DataError(
            f"{name}: none of its {len(split.items)} images could be read (first: {_printable(rejects[0])})"
        )
    rate = count / (time.perf_counter() - started)
    print(
        f"{name}: {count} images at {rate:.0f} images/s, {stored_bytes / 1e6:.1f} MB "
        f"({stored_bytes / count / 1e3:.1f} kB an image), "
        + (f"mean tile {tiled_area / tiles_cut / tiles.MCU:.0f}x{tiles.MCU} pixels, " if tiles_cut else "")
        + f"{len(rejects)} left out",
        flush=True,
    )
    return rejects


def _printable(text: str) -> str:
    """File names may hold bytes that are no text; a terminal is shown a mark in their place."""
    return text.encode(errors="surrogateescape").decode(errors="replace")


def _encode_ahead(split: Split, storage: Storage, processes: int) -> Iterator[tuple[Any, int, Encoded | str]]:
    """Each item with its label and its encoding (or why it has none), in order, encoded by all processes ahead."""
    # A fresh server process: forking one that runs PyTorch's threads can deadlock. It imports once for all.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["data.tiles", "data.pixels"])
    with ProcessPoolExecutor(processes, mp_context=context, initializer=_ignore_interrupts) as pool:
        waiting: deque[tuple[int, Future]] = deque()
        try:
            for start in range(0, len(split.items), _CHUNK):
                chunk = [split.items[i] for i in range(start, min(start + _CHUNK, len(split.items)))]
                waiting.append((start, pool.submit(_encode_chunk, split.read, chunk, storage)))
                if len(waiting) > 4 * processes:
                    yield from _labelled(split, *waiting.popleft())
            while waiting:
                yield from _labelled(split, *waiting.popleft())
        finally:
            # Waited for: a worker whose parent is gone would have its own last words below the one line of an error.
            pool.shutdown(wait=True, cancel_futures=True)


def _labelled(split: Split, start: int, future: Future) -> Iterator[tuple[Any, int, Encoded | str]]:
    for i, result in enumerate(future.result(), start):
        yield split.items[i], int(split.labels[i]), result


def _ignore_interrupts() -> None:
    # Ctrl-C reaches every process of the terminal; the main one ends the others in order.
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _encode_chunk(read, items: list, storage: Storage) -> list[Encoded | str]:
    results: list[Encoded | str] = []
    for item in items:
        # Image readers meet anything on users' disks and raise as many kinds of errors: all mean an unreadable image.
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                results.append(encode(read(item), storage))
        except Exception as error:
            results.append(str(error).splitlines()[0] if str(error) else type(error).__name__)
    return results


def encode(image: Image.Image, storage: Storage) -> Encoded:
    """An image as stored: upright RGB, reduced to storage.max_resolution, as a restart-grid JPEG or raw; label 0."""
    image = upright_rgb(image)
    image.thumbnail((storage.max_resolution, storage.max_resolution), Image.Resampling.BICUBIC)
    raw = storage.kind == "raw"
    data = image.tobytes() if raw else tiles.encode(image, storage.quality)
    if len(data) > PAGE_SIZE:
        raise ValueError(f"{len(data)} bytes, more than the {PAGE_SIZE} that can be stored; use a lower max_resolution")
    return Encoded(data, image.height, image.width, 0, raw)


if __name__ == "__main__":
    run_command(convert, prog="python -m data.convert")
