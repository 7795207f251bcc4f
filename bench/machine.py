"""Measures the machine's limits: matrix products, memory copies, and decoding on one core."""

import itertools
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bench import images
from bench.ceilings import Decoding
from bench.record import MEMORY, Column, Record, rate_columns
from bench.settings import Settings
from bench.task import Task
from bench.turns import Contender, Runner, Work, in_turns
from data.pixels import open_image
from train.device import autocast_type, precision_on, set_tf32_and_allocator

# Sides of the matrices, bytes per copy, and the number of products or copies per piece of timed work.
_SIDE = {"cpu": 2048, "cuda": 8192}
_BYTES = {"cpu": 1 << 28, "cuda": 1 << 30}
_AT_ONCE = {"cpu": 1, "cuda": 50}
_IMAGES = 32


class MatrixProduct(Runner):
    """Multiplies two square matrices in a precision of train.device; the amount is operations divided by `flops`."""

    def __init__(self, device: str, precision: str, flops: float):
        self.device = device
        set_tf32_and_allocator(torch.device(device), precision)
        side = _SIDE[device]
        kind = autocast_type(precision) or torch.float32
        self._one, self._other = (torch.randn(side, side, device=device).to(kind) for _ in range(2))
        self._product = torch.empty_like(self._one)
        self._amount = _AT_ONCE[device] * 2 * side**3 / flops

    def run(self) -> Work:
        for _ in range(_AT_ONCE[self.device]):
            torch.mm(self._one, self._other, out=self._product)
        return Work(self._amount)


class Copy(Runner):
    """Copies within the device's memory, counting bytes read and bytes written; or to it from pinned host memory.

    size_of_one: the amount is bytes divided by this.
    """

    def __init__(self, device: str, *, from_host: bool, size_of_one: float = 1e9):
        self.device = device
        size = _BYTES[device]
        self._to = torch.zeros(size, dtype=torch.uint8, device=device)
        self._from = torch.zeros(size, dtype=torch.uint8).pin_memory() if from_host else torch.zeros_like(self._to)
        self._amount = _AT_ONCE[device] * size * (1 if from_host else 2) / size_of_one

    def run(self) -> Work:
        for _ in range(_AT_ONCE[self.device]):
            self._to.copy_(self._from, non_blocking=True)
        return Work(self._amount)


class DecodeTiles(Runner):
    """Decodes the tiles of one random crop per image to planes, by our CPU path, without making crops."""

    def __init__(self, files: list[str]):
        torch.set_num_threads(1)
        self._folder = tempfile.TemporaryDirectory(prefix="bench-")
        beton = Path(self._folder.name) / "converted.beton"
        images.write_converted(beton, files)
        self._count = len(files)
        self._decoding = Decoding(Task(files, beton, 1, len(files), 1, 1, "cpu"), copies=1)
        self._numbers = itertools.count()

    def run(self) -> Work:
        for _ in self._decoding.epoch(next(self._numbers)):
            pass
        return Work(self._count)


class DecodeWhole(Runner):
    """Decodes whole image files with Pillow."""

    def __init__(self, files: list[str]):
        self._files = files

    def run(self) -> Work:
        for file in self._files:
            open_image(file).convert("RGB")
        return Work(len(self._files))


def measure(settings: Settings) -> Record:
    """Measures the machine's limits. Raises BenchError for images that cannot be used."""
    device = settings.device
    builds: dict[str, tuple[str, Callable[[], Runner]]] = {
        f"matrix product, {precision}": ("TFLOP/s", partial(MatrixProduct, device, precision, 1e12))
        for precision in (("bf16", "fp16", "tf32", "fp32") if device == "cuda" else ("bf16", "fp32"))
    }
    builds["memory copy"] = "GB/s", partial(Copy, device, from_host=False)
    if device == "cuda":
        builds["copy from the host"] = "GB/s", partial(Copy, device, from_host=True)
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        found = images.find(settings.data, Path(folder), most=_IMAGES)
        files = images.spread(found, _IMAGES)
        builds["decode, tiles, one core"] = "images/s", partial(DecodeTiles, files)
        builds["decode, Pillow, one core"] = "images/s", partial(DecodeWhole, files)
        rows: list[dict[str, Any]] = in_turns(
            [Contender(build, {"name": name, "group": "", "unit": unit}) for name, (unit, build) in builds.items()],
            **settings.pace,
            title="machine",
        )
    side = _SIDE[device]
    notes = [
        f"Median, lowest and highest of {settings.turns} turns of {settings.seconds:g} s or more, taken alternately, "
        "after one untimed turn.",
        f"matrix product: two matrices of {side} x {side}. memory copy: counts bytes read and bytes written.",
        f"decode: {images.described(settings.data, min(len(found), _IMAGES))}, from the page cache. tiles: the tiles "
        f"of one random crop per image, stored at {images.JPEG.max_resolution} px, quality {images.JPEG.quality}, "
        "decoded to planes by the ffcv decoder. Pillow: the whole file, decoded to RGB.",
    ]
    if device == "cpu" and precision_on(torch.device(device)) != "bf16":
        notes.append("This CPU has no bf16 units: bf16 is emulated.")
    return Record(
        part="machine",
        settings={"device": device, "turns": settings.turns, "data": settings.source},
        notes=notes,
        rows=rows,
        identity=(Column("what", lambda row: row["name"]), Column("unit", lambda row: row["unit"])),
        figures=(*rate_columns("rate"), Column("cores", lambda row: f"{row['cores']:.2f}"), MEMORY),
    )
