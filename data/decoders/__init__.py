"""Three ways from encoded bytes and boxes to crops: FFCV's libraries, DALI and torchvision. Same crops out.

Every decoder is built as `Decoder(beton, resolution=..., device=..., threads=..., max_batch=...)` and turns requests
into batches, in order, working some batches ahead. Pixels agree within the rounding of one resizer: crop to the box,
then the antialiased triangle filter (Pillow's BILINEAR).
"""

import importlib
import importlib.util
from collections.abc import Iterable, Iterator
from typing import NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from data import DataError
from data.beton import Beton

# Decoders look this many batches ahead of the one being used.
BATCHES_AHEAD = 3

# The package that each decoder needs, in the order in which `auto` tries them on a CPU.
_NEEDS = {"ffcv": "ffcv", "dali": "nvidia.dali", "torchvision": "torchvision"}
NAMES = ("auto", *_NEEDS)


class Request(NamedTuple):
    """Crops to be made: indices int64 [n], boxes int32 [n, 4] (top, left, height, width), flips bool [n]."""

    indices: NDArray[np.int64]
    boxes: NDArray[np.int32]
    flips: NDArray[np.bool_]


class Decoder(Protocol):
    def decode(self, requests: Iterable[Request]) -> Iterator[torch.Tensor]:
        """One uint8 [n, 3, R, R] batch, channels-last and on the device, for each request, in order.

        Raises DataError naming the file and the image that cannot be decoded.
        """
        ...


def choose(name: str, device: torch.device) -> str:
    """The decoder meant: `auto` is DALI on a GPU and FFCV on a CPU, or the next best that is installed.

    Raises DataError for an unknown name and for one whose package is missing.
    """
    if name not in NAMES:
        raise DataError(f"decoder={name}: unknown; choose one of {', '.join(NAMES)}")
    if name == "auto":
        order = ("dali", "ffcv", "torchvision") if device.type == "cuda" else tuple(_NEEDS)
        return next(candidate for candidate in order if _installed(candidate))
    if not _installed(name):
        raise DataError(f"decoder={name}: the package {_NEEDS[name]} is missing; run `make setup`, or use decoder=auto")
    return name


def build_decoder(
    name: str, beton: Beton, *, resolution: int, device: torch.device, threads: int, max_batch: int
) -> Decoder:
    """The decoder that `choose` names, for crops of resolution x resolution pixels."""
    module = importlib.import_module(f"data.decoders.{choose(name, device)}")
    return module.Decoder(beton, resolution=resolution, device=device, threads=threads, max_batch=max_batch)


def _installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(_NEEDS[name]) is not None
    except ModuleNotFoundError:  # of the package around it
        return False
