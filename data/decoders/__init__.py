"""Decoders turn encoded images and boxes into crops: `ffcv`, `dali` and `torchvision`, and `blocks` for sets of blocks.

Every decoder is built as `Decoder(beton, views=..., device=..., threads=..., max_batch=...)` and turns requests into
batches, in order and some batches ahead. Each image is decoded once, and only the part that its crops need. All
decoders crop to the box and then resize with the antialiased triangle filter (Pillow's BILINEAR); their pixels agree
within rounding.
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

# Decoders work this many batches ahead; one more is being copied to the device.
BATCHES_AHEAD = 3

# Errors in a JPEG that are found before it is decoded.
NO_JPEG = "no JPEG, or its headers are damaged"
BROKEN_TILES = "its tiles are not where its table says"

# The package that each decoder needs.
_NEEDS = {"ffcv": "ffcv", "dali": "nvidia.dali", "torchvision": "torchvision"}
NAMES = ("auto", *_NEEDS)
# Only for sets stored as blocks; on a GPU, `auto` selects it for them.
_OF_BLOCKS = "blocks"

# With this many threads, the CPU path should keep up with one GPU training on JPEGs and leave the GPU to the networks:
# one thread makes 770 to 2,700 crops of 224 px per second, depending on the processor. A GPU's decoding speed has not
# been measured yet.
_THREADS_WITHOUT_GPU = 8


_Int = TypeVar("_Int", bound=np.integer)


class View(NamedTuple):
    """The crops made from every image: `copies` of them, of resolution x resolution pixels."""

    copies: int
    resolution: int


class Request(NamedTuple):
    """A request for m crops of each of n images, in the order of the views and their copies.

    indices: int64 [n]. boxes: int32 [n, m, 4] (top, left, height, width). flips: bool [n, m].
    """

    indices: NDArray[np.int64]
    boxes: NDArray[np.int32]
    flips: NDArray[np.bool_]


class Decoder(Protocol):
    def decode(self, requests: Iterable[Request]) -> Iterator[tuple[torch.Tensor, ...]]:
        """Yields the crops of each request, in order: uint8 [copies * n, 3, R, R] per view, channels-last.

        They are on the device; copy k of image i is at index k * n + i. Raises DataError that names the file and the
        image if an image cannot be decoded.
        """
        ...


def choose(name: str, device: torch.device, beton: Beton | None = None, *, threads: int | None = None) -> str:
    """Returns the decoder's name; for `auto`, the fastest installed decoder for the storage, threads and device.

    beton: the set; without it, JPEGs are assumed. threads: decoding threads (default: one per processor).
    `auto` selects `blocks` (a kernel) for blocks on a GPU and `ffcv` (the CPU path) for blocks on a CPU. It selects
    `ffcv` for everything else, except `dali` for JPEGs on a GPU with few processors. If that decoder is not installed,
    the next fastest is used.
    Raises DataError for an unknown name, a missing package, and a decoder that cannot read blocks.
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
    """Decoders for JPEGs and raw images, fastest first; the order on a CPU was measured (bench/results, `loaders`)."""
    if device.type == "cpu":
        return "ffcv", "torchvision", "dali"
    raw = np.zeros(1, np.bool_) if beton is None else beton.raw
    if raw.any() != raw.all():
        return "ffcv", "torchvision"  # DALI cannot mix raw images and JPEGs
    if raw.any() or threads >= _THREADS_WITHOUT_GPU:
        return "ffcv", "dali", "torchvision"
    return "dali", "ffcv", "torchvision"


def said_choice(chosen: str, device: torch.device, beton: Beton, threads: int) -> str:
    """Returns one line with the decoder that `auto` selected, and the storage, device and threads it is for."""
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
    """Builds the decoder that `choose` selects, for requests of at most max_batch images.

    resident: see data.decoders.blocks. Raises DataError like `choose`.
    """
    chosen = choose(name, device, beton, threads=threads)
    module = importlib.import_module(f".{chosen}", __package__)
    own = {"resident": resident} if chosen == _OF_BLOCKS else {}
    return module.Decoder(beton, views=views, device=device, threads=threads, max_batch=max_batch, **own)


def delivered(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copies a host tensor to the device; the host does not wait for the copy."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def union(boxes: NDArray[_Int]) -> NDArray[_Int]:
    """Returns the smallest boxes, int [n, 4], that enclose the m boxes of each image, int [n, m, 4]."""
    corner = boxes[:, :, :2].min(axis=1)
    return np.concatenate([corner, (boxes[:, :, :2] + boxes[:, :, 2:]).max(axis=1) - corner], axis=1)


class Part(NamedTuple):
    """The part of an image that its crops need.

    data: uint8 [n] (a JPEG) or [h, w, 3] (pixels). top, left: its position in the image, in pixels.
    """

    data: NDArray[np.uint8]
    top: int
    left: int


def parts_of(beton: Beton, indices: NDArray[np.int64], boxes: NDArray[np.integer]) -> list[Part]:
    """Returns the parts of n images that boxes, int [n, 4] (top, left, height, width), need; see part_of."""
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
    """Returns the part of an image that a box (top, left, height, width) needs: the JPEG of its tiles, or raw pixels.

    Raises DataError that names the file and the image if the image's bytes are damaged.
    """
    return parts_of(beton, np.array([index]), box[None])[0]


def wrong_with(beton: Beton, index: int, taken: tiles.Taken) -> str:
    """Describes the error that data.tiles.take found in an image."""
    if taken.wrong == tiles.OTHER_SIZE:
        return f"is {taken.width}x{taken.height}, the index says {beton.sizes[index][1]}x{beton.sizes[index][0]}"
    return BROKEN_TILES if taken.wrong == tiles.BROKEN_TILES else NO_JPEG


def undecodable(beton: Beton, index: int, why: str) -> DataError:
    return DataError(f"{beton.path}: image {index} cannot be decoded ({why}); convert the set again")


def _installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(_NEEDS[name]) is not None
    except ModuleNotFoundError:  # the parent package is missing
        return False
