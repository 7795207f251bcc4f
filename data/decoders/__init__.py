"""Three ways from encoded bytes and boxes to crops: FFCV's libraries, DALI and torchvision. Same crops out.

Every decoder is built as `Decoder(beton, views=..., device=..., threads=..., max_batch=...)` and turns requests into
batches, in order, working some batches ahead. An image is decoded once, and no more of it than its crops need. Pixels
agree within rounding: crop to the box, then the antialiased triangle filter (Pillow's BILINEAR).
"""

import importlib
import importlib.util
from collections.abc import Iterable, Iterator
from typing import NamedTuple, Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from data import DataError, tiles
from data.beton import Beton
from data.processors import processors

# Decoders work this many batches ahead, and one more is on its way to the device.
BATCHES_AHEAD = 3

# What can be wrong with a JPEG before it is decoded.
NO_JPEG = "no JPEG, or its headers are damaged"
BROKEN_TILES = "its tiles are not where its table says"

# The package that each decoder needs.
_NEEDS = {"ffcv": "ffcv", "dali": "nvidia.dali", "torchvision": "torchvision"}
NAMES = ("auto", *_NEEDS)
# Of sets stored as blocks alone, and on a GPU what `auto` means for these.
_OF_BLOCKS = "blocks"

# So many threads of the CPU path should keep up with one GPU's training on JPEGs, and leave the GPU to the networks:
# one makes 770 to 2,700 crops of 224 px a second, by processor. How fast a GPU decodes has not been measured yet.
_THREADS_WITHOUT_GPU = 8


_Int = TypeVar("_Int", bound=np.integer)


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


def choose(name: str, device: torch.device, beton: Beton | None = None, *, threads: int | None = None) -> str:
    """The decoder meant: `auto` is the fastest one installed for how the set is stored, the threads and the device.

    beton: the set; without it, JPEGs are assumed. threads: how many decode (default: one per processor).
    Blocks are sampled by a kernel on a GPU, and elsewhere by the CPU path, which is called FFCV. All else is decoded
    by FFCV, except JPEGs for a GPU with few processors beside it: by DALI. Where one is not installed, the next best.
    Raises DataError for an unknown name, for one whose package is missing and for one that cannot read blocks.
    """
    in_blocks = beton is not None and beton.in_blocks
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
        return next(filter(_installed, _fastest_first(device, beton, threads or processors())))
    if not _installed(name):
        raise DataError(f"decoder={name}: the package {_NEEDS[name]} is missing; install it, or use decoder=auto")
    return name


def _fastest_first(device: torch.device, beton: Beton | None, threads: int) -> tuple[str, ...]:
    """The decoders for JPEGs and raw images; of a CPU in the order of what was measured (bench/results, `loaders`)."""
    if device.type == "cpu":
        return "ffcv", "torchvision", "dali"
    raw = np.zeros(1, np.bool_) if beton is None else beton.raw
    if raw.any() != raw.all():
        return "ffcv", "torchvision"  # DALI cannot mix raw images and JPEGs
    if raw.any() or threads >= _THREADS_WITHOUT_GPU:
        return "ffcv", "dali", "torchvision"
    return "dali", "ffcv", "torchvision"


def said_choice(chosen: str, device: torch.device, beton: Beton, threads: int) -> str:
    """One line on what `auto` chose, and for what."""
    stored = "blocks" if beton.in_blocks else "raw images" if beton.raw.all() else "JPEGs"
    return f"decoder=auto: {chosen}, for {stored} on {device.type} with {threads} decoding threads"


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
    chosen = choose(name, device, beton, threads=threads)
    module = importlib.import_module(f".{chosen}", __package__)
    own = {"resident": resident} if chosen == _OF_BLOCKS else {}
    return module.Decoder(beton, views=views, device=device, threads=threads, max_batch=max_batch, **own)


def delivered(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A host tensor on the device; the host does not wait for it to arrive."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def union(boxes: NDArray[_Int]) -> NDArray[_Int]:
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
    failed, taken = tiles.take_all(
        beton.bytes, beton.starts[indices], lengths, sizes, raw, boxes.astype(np.int64), out, places
    )
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
