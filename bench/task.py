"""What a loader in the bench is asked to do, and what it is to the bench."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch


@dataclass(frozen=True)
class Task:
    """What every contender is to do.

    files: the image files, as many as an epoch has crops; some may be named several times. beton: the same images
    stored as the contender reads them, or None where it reads the files. batches: full batches an epoch.
    threads: decoding threads, or worker processes where a loader has these.
    """

    files: list[str]
    beton: Path | None
    resolution: int
    batch: int
    batches: int
    threads: int
    device: str


class Loader(Protocol):
    """bytes_per_crop: encoded bytes that are read for a crop, on average."""

    bytes_per_crop: float

    def epoch(self, number: int) -> Iterator[torch.Tensor]:
        """task.batches batches, uint8 [batch, 3, resolution, resolution] on the device."""
        ...


@dataclass(frozen=True)
class Entry:
    """build makes the loader. reads: `files`, or which of bench.images' stored sets. about: a few words for readers.

    needs_gpu: it cannot deliver to a CPU.
    """

    build: Callable[[Task], Loader]
    reads: str
    about: str
    needs_gpu: bool = False
