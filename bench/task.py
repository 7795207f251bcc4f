"""The interface between the bench and the loaders that it measures."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch


@dataclass(frozen=True)
class Task:
    """The work of a loader.

    files: paths of image files, as many as an epoch has crops, with repeats. beton: the same images in the format that
    the loader reads, or None if it reads the files. resolution: side of a crop in pixels. batch: crops per batch.
    batches: full batches per epoch. threads: decoding threads, or worker processes. device: cpu or cuda.
    """

    files: list[str]
    beton: Path | None
    resolution: int
    batch: int
    batches: int
    threads: int
    device: str


class Loader(Protocol):
    """A loader that is measured. bytes_per_crop: mean encoded bytes read per crop."""

    bytes_per_crop: float

    def epoch(self, number: int) -> Iterator[torch.Tensor]:
        """Yields task.batches batches, uint8 [batch, 3, resolution, resolution] on the device. number: from 0."""
        ...


@dataclass(frozen=True)
class Entry:
    """An entry in the table of loaders.

    build: makes the loader. reads: `files`, or the name of a stored set (bench.loaders). about: a short description.
    needs_gpu: whether it can only deliver to a GPU.
    """

    build: Callable[[Task], Loader]
    reads: str
    about: str
    needs_gpu: bool = False
