"""Three ways from encoded bytes and boxes to crops: FFCV's libraries, DALI and torchvision. Same crops out.

Every decoder is built as `Decoder(beton, views=..., device=..., threads=..., max_batch=...)` and turns requests into
batches, in order, working some batches ahead. An image is decoded once, and no more of it than its crops need. Pixels
agree within rounding: crop to the box, then the antialiased triangle filter (Pillow's BILINEAR).
"""

import importlib
import importlib.util
from collections.abc import Iterable, Iterator
from typing import NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from data import DataError, tiles
from data.beton import Beton

# Decoders work this many batches ahead, and one more is on its way to the device.
BATCHES_AHEAD = 3

# What can be wrong with a JPEG before it is decoded.
NO_JPEG = "no JPEG, or its headers are damaged"
BROKEN_TILES = "its tiles are not where its table says"

# The package that each decoder needs, in the order in which `auto` tries them on a CPU.
_NEEDS = {"ffcv": "ffcv", "dali": "nvidia.dali", "torchvision": "torchvision"}
NAMES = ("auto", *_NEEDS)
# Of sets stored as blocks alone, and on a GPU what `auto` means for these.
_OF_BLOCKS = "blocks"


class View(NamedTuple):
    """What is made of every image: `copies` crops of resolution x resolution pixels."""

    copies: int
    resolution: int


class Request(NamedTuple):
    """Crops to be made of n images, m of each, the copies of the first view first.

    indices: int64 [n]. boxes: int32 [n, m, 4] (top, left, height, width). flips: bool [n, m].
    """

    indices: NDArray[np.int64]
    boxes: NDArray[np.int32]
    flips: NDArray[np.bool_]


class Decoder(Protocol):
    def decode(self, requests: Iterable[Request]) -> Iterator[tuple[torch.Tensor, ...]]:
        """For each request, in order, a uint8 [copies * n, 3, R, R] for each view, channels-last and on the device.

        Copy k of image i is at k * n + i. Raises DataError naming the file and the image that cannot be decoded.
        """
        ...


def choose(name: str, device: torch.device, *, in_blocks: bool = False) -> str:
    """The decoder meant: `auto` is DALI on a GPU and FFCV on a CPU, or the next best that is installed.

    in_blocks: the set is stored as blocks, for which `auto` is a kernel on a GPU, and on a CPU what is called FFCV.
    Raises DataError for an unknown name, for one whose package is missing and for one that cannot read blocks.
    """
    if in_blocks and name == _OF_BLOCKS:
        return name
    if name not in NAMES:
        raise DataError(f"decoder={name}: unknown; choose one of {', '.join(NAMES)}")
    if in_blocks and name == "auto":
        if device.type == "cuda":
            return _OF_BLOCKS
        name = "ffcv"
    if in_blocks and name != "ffcv":
        raise DataError(f"decoder={name}: cannot read a set stored as blocks; use decoder=auto")
    if name == "auto":
        order = ("dali", "ffcv", "torchvision") if device.type == "cuda" else tuple(_NEEDS)
        return next(candidate for candidate in order if _installed(candidate))
    if not _installed(name):
        raise DataError(f"decoder={name}: the package {_NEEDS[name]} is missing; install it, or use decoder=auto")
    return name


def build_decoder(
    name: str,
    beton: Beton,
    *,
    views: tuple[View, ...],
    device: torch.device,
    threads: int,
    max_batch: int,
    resident: float = 0.0,
) -> Decoder:
    """The decoder that `choose` names, for requests of at most max_batch images. resident: see data.decoders.blocks."""
    chosen = choose(name, device, in_blocks=beton.in_blocks)
    module = importlib.import_module(f".{chosen}", __package__)
    own = {"resident": resident} if chosen == _OF_BLOCKS else {}
    return module.Decoder(beton, views=views, device=device, threads=threads, max_batch=max_batch, **own)


def delivered(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A host tensor on the device; the host does not wait for it to arrive."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def union(boxes: NDArray[np.integer]) -> NDArray[np.integer]:
    """The smallest boxes int [n, 4] around the m boxes of each image, int [n, m, 4]."""
    corner = boxes[:, :, :2].min(axis=1)
    return np.concatenate([corner, (boxes[:, :, :2] + boxes[:, :, 2:]).max(axis=1) - corner], axis=1)


class Part(NamedTuple):
    """What of an image is needed for its crops. data: uint8 [n], a JPEG, or [h, w, 3], pixels; top, left: its place."""

    data: NDArray[np.uint8]
    top: int
    left: int


def parts_of(beton: Beton, indices: NDArray[np.int64], boxes: NDArray[np.integer]) -> list[Part]:
    """The parts of n images that boxes int [n, 4] (top, left, height, width) need; see part_of."""
    beton.check(indices)
    sizes, lengths, raw = beton.sizes[indices], beton.lengths[indices], beton.raw[indices]
    out, places = np.empty(lengths.sum(), np.uint8), np.empty((len(indices), 4), np.int64)
    failed, taken = tiles.take_all(beton.bytes, beton.starts[indices], lengths, sizes, raw, boxes, out, places)
    if failed >= 0:
        raise undecodable(beton, int(indices[failed]), wrong_with(beton, int(indices[failed]), taken))
    return [
        Part(out[begin:end].reshape(*boxes[i, 2:], 3) if raw[i] else out[begin:end], top, left)
        for i, (begin, end, top, left) in enumerate(places.tolist())
    ]


def part_of(beton: Beton, index: int, box: NDArray[np.integer]) -> Part:
    """The part of an image that a box (top, left, height, width) needs: the JPEG of its tiles, or its raw pixels.

    Raises DataError naming the file and the image where its bytes are damaged.
    """
    return parts_of(beton, np.array([index]), box[None])[0]


def wrong_with(beton: Beton, index: int, taken: tiles.Taken) -> str:
    """What data.tiles.take found wrong with an image."""
    if taken.wrong == tiles.OTHER_SIZE:
        return f"is {taken.width}x{taken.height}, the index says {beton.sizes[index][1]}x{beton.sizes[index][0]}"
    return BROKEN_TILES if taken.wrong == tiles.BROKEN_TILES else NO_JPEG


def undecodable(beton: Beton, index: int, why: str) -> DataError:
    return DataError(f"{beton.path}: image {index} cannot be decoded ({why}); convert the set again")


def _installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(_NEEDS[name]) is not None
    except ModuleNotFoundError:  # of the package around it
        return False
