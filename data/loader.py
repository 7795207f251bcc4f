"""Crop batches, epoch after epoch: the plan decides, a decoder makes, the loader hands over."""

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from data import DataError, plan
from data.beton import Beton
from data.convert import is_converted, open_set
from data.decoders import Request, View, build_decoder, choose
from data.decoders.ahead import default_threads

ORDERS = ("random", "quasi-random", "sequential")

# Class ids beyond this are damage, or no class ids.
_MOST_CLASSES = 1_000_000

Fetch = Callable[[NDArray[np.int64], NDArray[np.int64], int], Any]


@dataclass(frozen=True)
class Pairing:
    """A further crop of each image that a label source asks for.

    box: "same" for the training crop again, "center" for the validation crop (not flipped). resolution: pixels a side.
    """

    box: str
    resolution: int

    def __post_init__(self):
        if self.box not in ("same", "center"):
            raise ValueError(f"box={self.box}: choose same or center")


@dataclass
class CropBatch:
    """A batch of crops on the device, as the networks see them (flipped already).

    crops: uint8 [B, 3, R, R], channels-last. labels, indices, copies: int64 [B]; the class id of the image, its place
    in the set, and which of its crops this is. boxes: int32 [B, 4] (top, left, height, width) in stored-image pixels.
    sizes: int32 [B, 2] (height, width) of the stored images. flips: bool [B].
    paired: for each pairing asked for, uint8 [B, 3, r, r]. labels_on_disk: what the label source fetched, or None.
    """

    crops: torch.Tensor
    labels: torch.Tensor
    indices: torch.Tensor
    copies: torch.Tensor
    epoch: int
    boxes: torch.Tensor
    sizes: torch.Tensor
    flips: torch.Tensor
    paired: dict[Pairing, torch.Tensor] = field(default_factory=dict)
    labels_on_disk: Any = None


def open_loader(
    beton_path: str | Path,
    *,
    resolution: int,
    batch_size: int,
    decoder: str = "auto",
    train: bool = True,
    seed: int = 0,
    device: str | torch.device = "cpu",
    copies: int = 1,
    spread: bool = True,
    rank: int = 0,
    world: int = 1,
    threads: int | None = None,
    scale: tuple[float, float] = (0.08, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
    flip: bool = True,
    center_ratio: float = 224 / 256,
    order: str = "random",
    drop_last: bool | None = None,
    paired: tuple[Pairing, ...] = (),
    fetch: Fetch | None = None,
) -> "Loader":
    """Opens a `.beton` for training (random crops in random order) or evaluation (central crops in file order).

    copies: crops of each image an epoch, which is decoded once for all of them; an epoch then has that many times the
    steps. spread: the copies of an image come in successive batches; else they share a batch, as in repeated
    augmentation (Hoffer et al. 2020), which takes a copies-th of the memory. order: random, quasi-random (random within
    groups of file pages, for files larger than memory) or sequential. threads: decoding threads (default: all
    processors). drop_last: leave out a last batch that is not full (default: in training, where every rank then has
    the same number of steps).
    fetch: the host half of a label source, `(indices int64 [B], copies int64 [B], epoch) -> host tensors or None`.

    Raises DataError for a file that is no `.beton`, an unknown decoder or order, and a set with too few images.
    """
    if order not in ORDERS:
        raise DataError(f"order={order}: unknown; choose one of {', '.join(ORDERS)}")
    numbers = {"resolution": resolution, "batch_size": batch_size, "copies": copies, "world": world, "threads": threads}
    for name, value in numbers.items():
        if value is not None and value < 1:
            raise DataError(f"{name}={value}: must be at least 1")
    if train and not spread and batch_size % copies:
        raise DataError(f"batch_size={batch_size}: must be a multiple of copies={copies} when these share a batch")
    return Loader(
        Beton(beton_path),
        resolution=resolution,
        batch_size=batch_size,
        decoder=decoder,
        train=train,
        seed=seed,
        device=torch.device(device),
        copies=copies if train else 1,
        spread=spread,
        rank=rank,
        world=world,
        threads=threads or default_threads(),
        boxes_of=_BoxRule(seed=seed, train=train, scale=scale, ratio=ratio, flip=flip, center_ratio=center_ratio),
        order=order if train else "sequential",
        drop_last=train if drop_last is None else drop_last,
        paired=paired,
        fetch=fetch,
    )


@dataclass(frozen=True)
class _BoxRule:
    """Where the crops of an epoch lie: the plan's random boxes in training, central ones in evaluation."""

    seed: int
    train: bool
    scale: tuple[float, float]
    ratio: tuple[float, float]
    flip: bool
    center_ratio: float

    def __call__(self, indices, sizes, copies, epoch: int) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
        if not self.train:
            return self.center(sizes)
        boxes, flips = plan.random_boxes(
            indices, sizes, seed=self.seed, epoch=epoch, copy=copies, scale=self.scale, ratio=self.ratio
        )
        return boxes, flips & self.flip

    def center(self, sizes) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
        return plan.center_boxes(sizes, ratio=self.center_ratio), np.zeros(len(sizes), dtype=bool)


class Loader:
    """Batches of one split; see open_loader.

    num_samples: images in the file. num_classes and class_names: from the set's `set.json`, else counted and numbered.
    steps: batches an epoch on this rank. decoder: the name of the decoder at work.
    """

    def __init__(
        self,
        beton: Beton,
        *,
        resolution: int,
        batch_size: int,
        decoder: str,
        train: bool,
        seed: int,
        device: torch.device,
        copies: int,
        spread: bool,
        rank: int,
        world: int,
        threads: int,
        boxes_of: _BoxRule,
        order: str,
        drop_last: bool,
        paired: tuple[Pairing, ...],
        fetch: Fetch | None,
    ):
        self._beton = beton
        self._seed = seed
        self._device = device
        self._copies = copies
        # Images are decoded in blocks, from which come one batch, or with spread copies as many as there are copies.
        self._spread = spread
        self._block_size = batch_size if spread else batch_size // copies
        self._rank, self._world = rank, world
        self._boxes_of = boxes_of
        self._order = order
        self._paired = paired
        self._fetch = fetch
        self.num_samples = beton.num_samples
        folder = beton.path.parent
        if is_converted(folder):
            self.class_names = open_set(folder).class_names
        else:
            most = int(beton.labels.max(initial=-1)) + 1
            if most > _MOST_CLASSES:
                raise DataError(f"{beton.path}: has a class {most - 1}; at most {_MOST_CLASSES} classes are taken")
            self.class_names = tuple(map(str, range(most)))
        self.num_classes = len(self.class_names)
        if self.num_samples and beton.labels.max() >= self.num_classes:
            raise DataError(
                f"{beton.path}: holds class {beton.labels.max()}, but set.json names {self.num_classes} classes"
            )
        # Training: the smallest shard sets the steps of all, so that no rank waits for a partner that has ended.
        shard = self.num_samples // world if drop_last else len(range(rank, self.num_samples, world))
        self._blocks = shard // self._block_size if drop_last else -(-shard // self._block_size)
        self.steps = self._blocks * (copies if spread else 1)
        if not self.steps:
            raise DataError(
                f"{beton.path}: {self.num_samples} images make no batch of {batch_size} on each of {world} devices; "
                "take a smaller batch"
            )
        views = [View(copies, resolution)]
        views += [View(copies if pairing.box == "same" else 1, pairing.resolution) for pairing in paired]
        self._decoder = build_decoder(
            decoder, beton, views=tuple(views), device=device, threads=threads, max_batch=self._block_size
        )
        self.decoder = choose(decoder, device)

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[CropBatch]:
        """The batches of one epoch from start_step on; those before it cost nothing."""
        batches_a_block = self._copies if self._spread else 1
        first_block, done = divmod(start_step, batches_a_block)
        # The decoder asks for blocks ahead of their use; the boxes that it got wait here for their crops.
        planned: deque[Request] = deque()
        for views in self._decoder.decode(self._requests(epoch, first_block, planned)):
            block = planned.popleft()
            for number in range(done, batches_a_block):
                copies = range(number, number + 1) if self._spread else range(self._copies)
                yield self._batch(block, copies, views, epoch)
            done = 0

    def _requests(self, epoch: int, first_block: int, planned: deque[Request]) -> Iterator[Request]:
        order = plan.epoch_order(
            self.num_samples,
            seed=self._seed,
            epoch=epoch,
            rank=self._rank,
            world=self._world,
            shuffle=self._order != "sequential",
            pages=self._beton.pages if self._order == "quasi-random" else None,
        )
        for block in range(first_block, self._blocks):
            indices = order[block * self._block_size : (block + 1) * self._block_size]
            request = self._request(indices, epoch)
            planned.append(request)
            yield request

    def _request(self, indices: NDArray[np.int64], epoch: int) -> Request:
        """All crops of a block: its copies, then those of each pairing."""
        n, sizes = len(indices), self._beton.sizes[indices]
        copies = np.repeat(np.arange(self._copies), n)
        tiled = np.tile(indices, self._copies), np.tile(sizes, (self._copies, 1))
        drawn = self._boxes_of(*tiled, copies, epoch)
        boxes, flips = drawn[0].reshape(self._copies, n, 4), drawn[1].reshape(self._copies, n)
        all_boxes, all_flips = [boxes], [flips]
        for pairing in self._paired:
            if pairing.box == "center":
                central, unflipped = self._boxes_of.center(sizes)
                all_boxes.append(central[None])
                all_flips.append(unflipped[None])
            else:
                all_boxes.append(boxes)
                all_flips.append(flips)
        return Request(
            indices,
            np.ascontiguousarray(np.concatenate(all_boxes).swapaxes(0, 1)),
            np.ascontiguousarray(np.concatenate(all_flips).T),
        )

    def _batch(self, block: Request, copies: range, views: tuple[torch.Tensor, ...], epoch: int) -> CropBatch:
        n = len(block.indices)
        rows = slice(copies.start * n, copies.stop * n)
        indices = np.tile(block.indices, len(copies))
        copy_numbers = np.repeat(np.arange(copies.start, copies.stop), n)
        boxes = block.boxes[:, copies.start : copies.stop].swapaxes(0, 1).reshape(-1, 4)
        flips = block.flips[:, copies.start : copies.stop].T.reshape(-1)
        sizes = self._beton.sizes[indices]
        # One copy to the device instead of six: everything small travels as the columns of one int64 table.
        columns = [self._beton.labels[indices], indices, copy_numbers, boxes, sizes, flips]
        table = torch.from_numpy(np.column_stack([column.astype(np.int64) for column in columns]))
        if self._device.type == "cuda":
            table = table.pin_memory().to(self._device, non_blocking=True)
        return CropBatch(
            crops=views[0][rows],
            labels=table[:, 0].contiguous(),
            indices=table[:, 1].contiguous(),
            copies=table[:, 2].contiguous(),
            epoch=epoch,
            boxes=table[:, 3:7].int(),
            sizes=table[:, 7:9].int(),
            flips=table[:, 9].bool(),
            paired={
                # The central crop is the same for all copies.
                pairing: view[rows] if pairing.box == "same" else _repeated(view, len(copies))
                for pairing, view in zip(self._paired, views[1:], strict=True)
            },
            labels_on_disk=self._fetch(indices, copy_numbers, epoch) if self._fetch else None,
        )


def _repeated(crops: torch.Tensor, times: int) -> torch.Tensor:
    return crops if times == 1 else torch.cat([crops] * times)
