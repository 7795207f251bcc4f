"""From a folder of images or a named set to a converted set, in FFCV's format.

    python -m data.convert --data images/ --out converted/images
    make convert DATA=images/ OUT=converted/images

The format is described in data/sets.py.
"""

import contextlib
import hashlib
import json
import multiprocessing
import os
import resource
import signal
import sys
import tempfile
import threading
import time
import types
import warnings
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Literal

import numpy as np
import PIL
from numpy.typing import NDArray
from PIL import Image
from tqdm import tqdm

from command import first_line, printable, run_command
from data import DataError, blocks, tiles
from data.beton import PAGE_SIZE, Beton, Encoded, write_beton
from data.durable import is_full, locked, move_folder, partial_prefix, remove_leftovers, sync_files
from data.pixels import upright_rgb
from data.processors import processors
from data.progress import images_bar
from data.sets import ConvertedSet, Unconverted, is_converted, names_file, open_set, still_fitting
from data.sources import Source, Split, crops_for, open_source

# The most images that a process takes at a time, and the most bytes that they take as stored.
_CHUNK, _CHUNK_BYTES = 32, 4 << 20
# Chunks per process that are being encoded or waited for, which bounds the memory that they take.
_CHUNKS_AHEAD = 4
# Bytes: with much less, the processes cannot be started, and the pool that starts them waits forever.
_ADDRESS_SPACE = 700 << 20
_REJECTS_SHOWN = 5
# Raw images take three bytes per pixel: about three times as much at 256 pixels as a JPEG at 512.
_MAX_RESOLUTIONS = {"jpeg": 512, "blocks": 512, "raw": 256}


@dataclass(frozen=True)
class Storage:
    """How images are stored.

    kind: jpeg, blocks or raw. max_resolution: pixels, at most, of the longer side. quality: of JPEGs, 1 to 100.
    """

    kind: str = "jpeg"
    max_resolution: int = 512
    quality: int = 90


def ensure_converted(found: ConvertedSet | Unconverted) -> ConvertedSet:
    """Converts what find_set found, unless it is converted already. Raises DataError as convert_source does."""
    if isinstance(found, ConvertedSet):
        return found
    if found.stale:
        print(f"{found.folder}: its images or their crop rule have changed: converting again", flush=True)
    return convert_source(found.source, found.folder, replace=True)


def convert(
    data: str,
    out: str,
    storage: Literal["jpeg", "blocks", "raw"] = "jpeg",
    max_resolution: int | None = None,
    quality: int = 90,
    processes: int | None = None,
    max_pixels: int | None = None,
) -> None:
    """Converts a folder or archive of images or a named set to FFCV's format.

    Args:
        data: a folder of class folders (or train/ and val/ of them), a zip or tar of one, a .csv of file and class, a
            folder of ImageNet's tars or of Parquet files, or a set's name
        out: the folder to write; it must not exist yet
        storage: jpeg; or blocks, which a CPU reads several times as fast, for twice the bytes; or raw pixels for small
            images or a large memory: no decoding, about ten times the bytes
        max_resolution: larger images are reduced so that the longer side has this many pixels (default: 512; raw: 256)
        quality: JPEG quality, 1 to 100
        processes: how many encode at once (default: one per core)
        max_pixels: images with more are skipped, as they may be built to fill the memory (default: Pillow's limit,
            about 179 million); each process takes up to about 6 bytes per pixel
    """
    if max_resolution is None:
        max_resolution = _MAX_RESOLUTIONS[storage]
    if is_converted(data):
        raise DataError(f"{data}: is a converted set already; use it as DATA")
    if not 1 <= quality <= 100:
        raise DataError(f"quality={quality}: give 1 to 100")
    if not 16 <= max_resolution <= 65500:
        raise DataError(f"max_resolution={max_resolution}: give 16 to 65500 pixels")
    if max_pixels is not None and max_pixels < 1:
        raise DataError(f"max_pixels={max_pixels}: give 1 or more")
    if Path(out).exists():
        raise DataError(f"{out}: exists already; give another OUT or remove it first")
    stored_as = Storage(storage, max_resolution, quality)
    convert_source(open_source(data), Path(out), storage=stored_as, processes=processes, max_pixels=max_pixels)


def convert_source(
    source: Source,
    out: Path,
    *,
    storage: Storage = Storage(),
    processes: int | None = None,
    max_pixels: int | None = None,
    replace: bool = False,
) -> ConvertedSet:
    """Writes a source as a converted set; `out` appears only when it is complete.

    One process at a time converts to a folder; others wait. Files that a killed process left there are removed.
    max_pixels: images with more are skipped (default: Pillow's limit).
    replace: replaces the contents of `out`, which stay until the new set is complete; a set that another process has
    made from this source in the meantime is used instead.
    Raises DataError when `out` exists (without replace), a split has no readable image, the disk is full or a process
    dies, and KeyboardInterrupt after SIGTERM or SIGHUP.
    """
    allowed, _ = resource.getrlimit(resource.RLIMIT_AS)
    if resource.RLIM_INFINITY != allowed < _ADDRESS_SPACE:
        raise DataError(
            f"{out}: the address space is limited to {allowed >> 20} MB (ulimit -v), and a process that converts needs "
            f"{_ADDRESS_SPACE >> 20} MB; raise the limit"
        )
    for note in source.notes:
        print(printable(note), flush=True)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        waiting = f"{out}: is being converted by another process; waiting for it"
        with _stopping_on_signals(out), locked(out.with_name(f".{out.name}.lock"), waiting) as held:
            if held:
                remove_leftovers(out)
            if replace and (made := still_fitting(out, source.fingerprint, source)):
                return made
            if out.exists() and not replace:
                raise DataError(f"{out}: exists already; give another OUT or remove it first")
            with tempfile.TemporaryDirectory(
                prefix=partial_prefix(out), dir=out.parent, ignore_cleanup_errors=True
            ) as partial:
                encoding = _Encoding(storage, processes or processors(), max_pixels)
                rejects = _write_set(source, Path(partial, "set"), encoding)
                move_folder(Path(partial, "set"), out, replaced=Path(partial, "replaced"))
    except OSError as error:
        if is_full(error):
            raise DataError(f"{out}: the disk is full; free some space first (nothing was left half-done)") from None
        raise DataError(f"{out}: could not be written ({error.strerror}); nothing was left half-done") from None
    except BrokenProcessPool:
        raise DataError(f"{out}: a converting process died (out of memory?); try --processes 1") from None
    if rejects:
        print(f"{rejects} images could not be read and were left out: {out / 'rejects.txt'}", flush=True)
    return open_set(out)


@dataclass(frozen=True)
class _Encoding:
    """How images are encoded: storage, number of processes, and the most pixels of an image."""

    storage: Storage
    processes: int
    max_pixels: int | None


def _write_set(source: Source, folder: Path, encoding: _Encoding) -> int:
    """Makes the folder of a converted set and syncs it to disk; returns how many images could not be read."""
    folder.mkdir()
    storage = encoding.storage
    rejects, train_files = _convert_split(source.train, "train", folder, encoding)
    val_rejects, val_files = _convert_split(source.val, "val", folder, encoding)
    rejects += val_rejects
    _print_repeated(source.val, train_files, val_files)
    with open(folder / "rejects.txt", "w", errors="surrogateescape") as file:
        file.writelines(f"{line}\n" for line in rejects)
    if source.crop and source.resolution:
        resolution, crop = source.resolution, source.crop
    else:
        resolution, crop = crops_for(Beton(folder / "train.beton").sizes)
    made = {
        "storage": storage.kind,
        "max_resolution": storage.max_resolution,
        "quality": storage.quality,
        "pillow": PIL.__version__,
        "rejects": len(rejects),
    }
    ConvertedSet(folder, source.name, source.class_names, resolution, crop, source.fingerprint, made).write()
    sync_files(folder)
    return len(rejects)


def _print_repeated(val: Split, train_files: NDArray[np.uint64], val_files: NDArray[np.uint64]) -> None:
    """Prints how many images of val are also in train, if any, compared by the hashes of their files (0: no file)."""
    repeated = np.flatnonzero(np.isin(val_files, train_files) & (val_files != 0))
    if len(repeated):
        print(
            f"val: {len(repeated)} of its {len(val_files)} images are in train as well, byte for byte (first: "
            f"{printable(str(val.items[repeated[0]]))}); they make the accuracy look better than it is",
            flush=True,
        )


@contextlib.contextmanager
def _stopping_on_signals(out: Path) -> Iterator[None]:
    """SIGTERM, and SIGHUP unless it is ignored, end a conversion cleanly, as Ctrl-C does."""

    def stop(number: int, frame: object) -> None:
        name = signal.Signals(number).name
        raise KeyboardInterrupt(f"{out}: conversion stopped by {name}; nothing was left half-done")

    # Python allows only the main thread to set signal handlers.
    asked = (signal.SIGTERM, signal.SIGHUP) if threading.current_thread() is threading.main_thread() else ()
    before = {number: signal.getsignal(number) for number in asked}
    before = {number: handler for number, handler in before.items() if handler != signal.SIG_IGN}
    for number in before:
        signal.signal(number, stop)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _convert_split(split: Split, name: str, folder: Path, encoding: _Encoding) -> tuple[list[str], NDArray[np.uint64]]:
    """Writes one split's .beton into the folder.

    Returns a line for each image that could not be read, and a hash of each image's file: uint64 [n], 0 for none.
    """
    storage = encoding.storage
    rejects: list[str] = []
    hashes = np.zeros(len(split.items), dtype=np.uint64)
    names: list[str] = []
    stored_bytes, tiled_area, tiles_cut = 0, 0, 0
    started = time.perf_counter()

    def images(bar: tqdm) -> Iterator[Encoded]:
        nonlocal stored_bytes, tiled_area, tiles_cut
        for number, (file_hash, result) in enumerate(_encode_ahead(split, encoding)):
            bar.update()
            hashes[number] = file_hash
            if isinstance(result, str):
                rejects.append(f"{split.items[number]}: {result}")
                if len(rejects) <= _REJECTS_SHOWN:
                    bar.write(f"left out: {printable(rejects[-1])}", file=sys.stderr)
                continue
            stored_bytes += len(result.data)
            grid = tiles.layout(np.frombuffer(result.data, np.uint8)).tiles if storage.kind == "jpeg" else 0
            tiles_cut += grid
            tiled_area += result.height * result.width if grid else 0
            if split.names is not None:
                names.append(split.names[number])
            yield result._replace(label=int(split.labels[number]))

    with images_bar(len(split.items), f"convert {name}") as bar:
        in_blocks = storage.kind == "blocks"
        count = write_beton(folder / f"{name}.beton", images(bar), at_most=len(split.items), in_blocks=in_blocks)
    if not count:
        raise DataError(f"{name}: none of its {len(split.items)} images could be read (first: {printable(rejects[0])})")
    if split.names is not None:
        names_file(folder, name).write_text(json.dumps(names, indent=0) + "\n")
    rate = count / (time.perf_counter() - started)
    print(
        f"{name}: {count} images at {rate:.0f} images/s, {stored_bytes / 1e6:.1f} MB "
        f"({stored_bytes / count / 1e3:.1f} kB per image), "
        + (f"mean tile {tiled_area / tiles_cut / tiles.MCU:.0f}x{tiles.MCU} pixels, " if tiles_cut else "")
        + f"{len(rejects)} left out",
        flush=True,
    )
    return rejects, hashes


# The hash of an image's file (0 if there is none), and the encoded image, or the reason why there is none.
_Result = tuple[int, Encoded | str]


def _encode_ahead(split: Split, encoding: _Encoding) -> Iterator[_Result]:
    """The result for each image, in order, encoded ahead by all processes."""
    storage, processes = encoding.storage, encoding.processes
    # A fresh server process, since forking a process that runs PyTorch's threads can deadlock. It imports once for all.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    chunk = _chunk(storage)
    stop_seen, stop = context.Pipe(duplex=False)
    arguments = (stop_seen, encoding.max_pixels)
    with _signals_held_back():
        pool = ProcessPoolExecutor(processes, mp_context=context, initializer=_begin_worker, initargs=arguments)
    with stop_seen, stop, pool:
        waiting: deque[Future[list[_Result]]] = deque()
        try:
            for start in range(0, len(split.items), chunk):
                items = [split.items[i] for i in range(start, min(start + chunk, len(split.items)))]
                # It may start a process.
                with _signals_held_back(), _main_left_out():
                    waiting.append(pool.submit(_encode_chunk, split.read, items, storage))
                if len(waiting) > _CHUNKS_AHEAD * processes:
                    yield from waiting.popleft().result()
            while waiting:
                yield from waiting.popleft().result()
        finally:
            # Wait for them: a worker whose parent is gone would print its own error after the one line of the command.
            stop.close()
            pool.shutdown(wait=True, cancel_futures=True)


@contextlib.contextmanager
def _signals_held_back() -> Iterator[None]:
    """Delays signals that end a conversion until the end of the context, in which processes are started.

    A process whose start was interrupted would not be tracked, and would print its own traceback.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    asked: list[int] = []
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    handlers = {number: handler for number, handler in handlers.items() if handler not in (signal.SIG_IGN, None)}
    for number in handlers:
        signal.signal(number, lambda number, _: asked.append(number))
    # Signals that reach every process of a terminal: signals blocked here are blocked in processes that start now.
    signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGHUP,))
    # ensure_running unblocks SIGINT.
    resource_tracker.ensure_running()
    signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT,))
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGINT, signal.SIGHUP))
        for number, handler in handlers.items():
            signal.signal(number, handler)
        if asked:
            signal.raise_signal(asked[0])


@contextlib.contextmanager
def _main_left_out() -> Iterator[None]:
    """Processes that are started in this context do not run the program's script again, as they otherwise would.

    They do not need it, and a script without `if __name__ == "__main__"` would start a conversion in each of them.
    """
    main = sys.modules["__main__"]
    sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


def _chunk(storage: Storage) -> int:
    """Images that a process takes at a time, 1 to _CHUNK: as many as surely fit in _CHUNK_BYTES as stored."""
    largest = min(storage.max_resolution**2 * (3 if storage.kind == "raw" else 1), PAGE_SIZE)
    return min(max(_CHUNK_BYTES // largest, 1), _CHUNK)


# In a worker: set when its results are no longer needed.
_unwanted = threading.Event()


def _begin_worker(stop: Connection, max_pixels: int | None) -> None:
    if max_pixels is not None:
        # Pillow refuses images with more than twice this many pixels; for an odd limit, it allows one pixel more.
        Image.MAX_IMAGE_PIXELS = -(-max_pixels // 2)
    # Ctrl-C and a closed terminal reach all its processes; the main one stops the others cleanly.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, args=(stop,), daemon=True).start()


def _end_with_parent(stop: Connection) -> None:
    """Waits until the main process has closed its end of the pipe, then until it has ended, whether killed or not."""
    stop.poll(None)
    _unwanted.set()
    parent = multiprocessing.parent_process()
    assert parent
    parent.join()
    os._exit(1)


def _encode_chunk(read, items: list, storage: Storage) -> list[_Result]:
    results: list[_Result] = []
    for item in items:
        if _unwanted.is_set():
            break
        # Image readers raise many kinds of errors for the files on users' disks: all mean an unreadable image.
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                image = read(item)
                file_hash = _file_hash(image)
                results.append((file_hash, encode(image, storage)))
        except Image.DecompressionBombError as error:
            results.append((0, f"{first_line(error)} Convert with a larger --max_pixels to allow it."))
        except Exception as error:
            results.append((0, first_line(error)))
    return results


def _file_hash(image: Image.Image) -> int:
    """A 64-bit hash of the file that an image was opened from and not yet read; 0 if it came from no file."""
    file = getattr(image, "fp", None)
    if file is None:
        return 0
    place = file.tell()
    file.seek(0)
    digest = hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=8))
    file.seek(place)
    return int.from_bytes(digest.digest(), "little")


def encode(image: Image.Image, storage: Storage) -> Encoded:
    """Encodes an image: upright RGB, reduced to storage.max_resolution, as restart-grid JPEG, blocks or raw; label 0.

    Raises ValueError if the result is larger than a page of the file.
    """
    image = upright_rgb(image)
    image.thumbnail((storage.max_resolution, storage.max_resolution), Image.Resampling.BICUBIC)
    if storage.kind == "jpeg":
        data = tiles.encode(image, storage.quality)
    else:
        data = blocks.encode(image) if storage.kind == "blocks" else image.tobytes()
    if len(data) > PAGE_SIZE:
        raise ValueError(
            f"{len(data)} bytes, more than the {PAGE_SIZE} that can be stored; use a lower --max_resolution"
        )
    return Encoded(data, image.height, image.width, 0, storage.kind == "raw")


if __name__ == "__main__":
    # Not this copy of the module, since worker processes could not import it by name.
    from data.convert import convert as command

    run_command(command, prog="python -m data.convert")
