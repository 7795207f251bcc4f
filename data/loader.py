"""Loads crop batches of an epoch: the plan determines the crops, a decoder makes them, the loader delivers them."""

import sys
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from data import DataError, plan
from data.beton import Beton
from data.decoders import Request, View, build_decoder, choose, delivered, said_choice
from data.decoders.prefetch import default_threads
from data.feeder import fed
from data.plan import CropRule
from data.sets import is_converted, open_set

_ORDERS = ("random", "quasi-random", "sequential")

# Larger class ids mean that the file is damaged or that its labels are not class ids.
_MOST_CLASSES = 1_000_000

Fetch = Callable[[NDArray[np.int64], NDArray[np.int64], int], torch.Tensor | None]


@dataclass(frozen=True)
class Pairing:
    """An additional crop of each image, requested by a label source.

    box: "same" is the training crop, "center" the validation crop, "whole" the whole image squashed to a square; the
    last two are never flipped. resolution: pixels per side.
    """

    box: str
    resolution: int

    def __post_init__(self):
        if self.box not in ("same", "center", "whole"):
            raise ValueError(f"box={self.box}: choose same, center or whole")


@dataclass
class CropBatch:
    """A batch of crops on the device, already flipped.

    crops: uint8 [B, 3, R, R], channels-last. labels: int64 [B], the images' class ids. indices: int64 [B], the images'
    indices in the set. copies: int64 [B], which of an image's crops each one is. boxes: int32 [B, 4] (top, left,
    height, width) in pixels of the stored images. sizes: int32 [B, 2] (height, width) of the stored images. flips: bool
    [B], whether each crop is flipped. paired: for each requested pairing, uint8 [B, 3, r, r]. labels_on_disk: the
    tensor that the label source fetched, [B, ...], or None.

    Unpacks as `crops, labels = batch`, for training loops that need nothing else.
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
    labels_on_disk: torch.Tensor | None = None

    def __iter__(self) -> Iterator[torch.Tensor]:
        yield self.crops
        yield self.labels

    def first(self, count: int) -> "CropBatch":
        """Returns the first `count` crops as a batch, with all their fields."""
        return self._taken(slice(count))

    def part(self, number: int, parts: int) -> "CropBatch":
        """Returns one of `parts` interleaved parts as a batch: crops `number`, `number` + `parts` and so on."""
        return self if parts == 1 else self._taken(slice(number, None, parts))

    def _taken(self, places: slice) -> "CropBatch":
        parts: dict[str, Any] = {
            name: _laid_out(part[places]) for name, part in vars(self).items() if isinstance(part, torch.Tensor)
        }
        return replace(
            self, **parts, paired={pairing: _laid_out(crops[places]) for pairing, crops in self.paired.items()}
        )


def _laid_out(part: torch.Tensor) -> torch.Tensor:
    """Returns a contiguous copy where needed; crops stay channels-last."""
    return part.contiguous(memory_format=torch.channels_last if part.ndim == 4 else torch.contiguous_format)


class Loader:
    """Loads crop batches of a `.beton` file: random crops for training, otherwise central crops in file order.

    Can replace a DataLoader: each iteration over it is the next epoch, starting at 0 or at the epoch given to
    `set_epoch`; `len(loader)` is `steps`.

    resolution: pixels per side. batch_size: crops per batch. decoder: see data.decoders.choose; the one that `auto`
    selects is printed once, to standard error. train: random crops by the rule `crop`, in the given order, instead of
    validation crops in file order. order: random, quasi-random (random within groups of file pages, for files larger
    than memory) or sequential.
    seed: of order and crops. device: where batches are delivered. copies: crops of each image per epoch, from one
    decoding; they are in successive batches, and an epoch has that many times the steps. rank, world: this process's
    share of the images, and the number of shares. threads: decoding threads (default: one per processor). drop_last:
    drop an incomplete last batch (default: when training; every rank then has the same number of steps).
    paired: additional crops of the same images. fetch: the host part of a label source,
    `(indices int64 [B], copies int64 [B], epoch) -> a host tensor [B, ...] or None`; it is called in the loader's
    thread, and the tensor is copied to the device.
    resident: on a GPU, the share of its free memory that a set stored as blocks may take, 0 to 1.

    Attributes: num_samples: images in the file. num_classes, class_names: from the set's `set.json`; without that file,
    classes are counted and named by their numbers. blocks: blocks of `batch_size` images per epoch on this rank (the
    last may have fewer). steps: batches per epoch, `copies` for each block. decoder: the name of the decoder in use.

    Raises DataError if the file is not a `.beton`, for an unknown decoder or order, a decoder whose package is missing,
    numbers below 1, and a set with too few images.
    """

    def __init__(
        self,
        beton_path: str | Path,
        *,
        resolution: int,
        batch_size: int,
        decoder: str = "auto",
        train: bool = True,
        seed: int = 0,
        device: str | torch.device = "cpu",
        copies: int = 1,
        rank: int = 0,
        world: int = 1,
        threads: int | None = None,
        crop: CropRule = CropRule(),
        order: str = "random",
        drop_last: bool | None = None,
        paired: tuple[Pairing, ...] = (),
        fetch: Fetch | None = None,
        resident: float = 0.5,
    ):
        if order not in _ORDERS:
            raise DataError(f"order={order}: unknown; choose one of {', '.join(_ORDERS)}")
        numbers = {"resolution": resolution, "batch_size": batch_size, "copies": copies, "world": world}
        for name, value in (numbers | {"threads": threads}).items():
            if value is not None and value < 1:
                raise DataError(f"{name}={value}: must be at least 1")
        drop_last = train if drop_last is None else drop_last
        self._beton = beton = Beton(beton_path)
        self._train, self._seed, self._crop = train, seed, crop
        self._device = torch.device(device)
        # Images are decoded in blocks; each block gives `copies` batches.
        self.copies = copies if train else 1
        self.batch_size = batch_size
        self._rank, self._world = rank, world
        self._order = order if train else "sequential"
        self._paired, self._fetch = paired, fetch
        self._next_epoch = 0
        # One stream for all epochs: PyTorch caches the memory of each stream separately.
        self._stream = torch.cuda.Stream(self._device) if self._device.type == "cuda" else None
        self.num_samples = beton.num_samples
        self.class_names = _class_names(beton)
        self.num_classes = len(self.class_names)
        # When training, the smallest shard sets the number of steps, so that no rank waits for one that has finished.
        shard = self.num_samples // world if drop_last else len(range(rank, self.num_samples, world))
        self.blocks = shard // batch_size if drop_last else -(-shard // batch_size)
        self.steps = self.blocks * self.copies
        if not self.steps:
            raise DataError(
                f"{beton.path}: {self.num_samples} images make no batch of {batch_size} on each of {world} devices; "
                "take a smaller batch"
            )
        views = [View(self.copies, resolution)]
        views += [View(self.copies if pairing.box == "same" else 1, pairing.resolution) for pairing in paired]
        threads = threads or default_threads()
        self.decoder = choose(decoder, self._device, beton, threads=threads)
        if decoder == "auto" and rank == 0:
            _print_once(said_choice(self.decoder, self._device, beton, threads))
        self._decoder = build_decoder(
            self.decoder,
            beton,
            views=tuple(views),
            device=self._device,
            threads=threads,
            max_batch=batch_size,
            resident=resident,
        )

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[CropBatch]:
        epoch, self._next_epoch = self._next_epoch, self._next_epoch + 1
        return self.epoch(epoch)

    def set_epoch(self, epoch: int) -> None:
        """Sets the epoch (0, 1, ...) of the next iteration; later iterations continue from there.

        A continued run needs only one call, with its first remaining epoch; a call before every epoch does no harm.
        Raises DataError for a number below 0.
        """
        if epoch < 0:
            raise DataError(f"epoch={epoch}: must be at least 0")
        self._next_epoch = epoch

    @property
    def images_per_class(self) -> NDArray[np.int64]:
        """The number of images of each class in the file, over all ranks: int64 [C]."""
        return np.bincount(self._beton.labels, minlength=self.num_classes)

    def epoch(self, epoch: int, start_step: int = 0, blocks: Sequence[int] | None = None) -> Iterator[CropBatch]:
        """Yields the batches of one epoch from start_step on; skipping the batches before it is free.

        blocks: only these of the epoch's blocks of images, in this order; each gives `copies` batches.
        A separate thread makes batches ahead of their use, including the calls of `fetch`.
        Raises DataError if the file is damaged or was written to after it was opened; see data.beton.Beton.
        """
        return fed(self._batches(epoch, start_step, blocks), tensors=_tensors, stream=self._stream)

    def _batches(self, epoch: int, start_step: int, blocks: Sequence[int] | None) -> Generator[CropBatch, None, None]:
        first_block, first_copy = divmod(start_step, self.copies)
        numbers = (range(self.blocks) if blocks is None else blocks)[first_block:]
        # The decoder takes requests ahead of their use; they are kept here until their crops are made.
        planned: deque[Request] = deque()
        for views in self._decoder.decode(self._requests(epoch, numbers, planned)):
            block = planned.popleft()
            for copy in range(first_copy, self.copies):
                yield self._batch(block, copy, views, epoch)
            first_copy = 0

    def _requests(self, epoch: int, blocks: Sequence[int], planned: deque[Request]) -> Iterator[Request]:
        order = plan.epoch_order(
            self.num_samples,
            seed=self._seed,
            epoch=epoch,
            rank=self._rank,
            world=self._world,
            shuffle=self._order != "sequential",
            pages=self._beton.pages if self._order == "quasi-random" else None,
        )
        for block in blocks:
            self._beton.check_unchanged()
            indices = order[block * self.batch_size : (block + 1) * self.batch_size]
            request = self._request(indices, epoch)
            planned.append(request)
            yield request

    def _request(self, indices: NDArray[np.int64], epoch: int) -> Request:
        """Returns the request for all crops of a block: its copies, then the crops of each pairing."""
        sizes = self._beton.sizes[indices]
        central = self._crop.validation(sizes)
        if self._train:
            drawn = [
                self._crop.training(indices, sizes, seed=self._seed, epoch=epoch, copy=copy)
                for copy in range(self.copies)
            ]
        else:
            drawn = [central]
        crops = list(drawn)
        for pairing in self._paired:
            crops += (
                drawn if pairing.box == "same" else [central if pairing.box == "center" else plan.whole_boxes(sizes)]
            )
        boxes, flips = (np.ascontiguousarray(np.stack(parts, axis=1)) for parts in zip(*crops, strict=True))
        return Request(indices, boxes, flips)

    def _batch(self, block: Request, copy: int, views: tuple[torch.Tensor, ...], epoch: int) -> CropBatch:
        indices, n = block.indices, len(block.indices)
        rows = slice(copy * n, (copy + 1) * n)
        copies = np.full(n, copy)
        # One transfer to the device instead of six: all small fields are columns of one int64 table.
        boxes, flips, sizes = block.boxes[:, copy], block.flips[:, copy], self._beton.sizes[indices]
        columns = [self._beton.labels[indices], indices, copies, boxes, sizes, flips]
        table = delivered(
            torch.from_numpy(np.column_stack([column.astype(np.int64) for column in columns])), self._device
        )
        fetched = self._fetch(indices, copies, epoch) if self._fetch else None
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
                # Other boxes are the same for all copies.
                pairing: view[rows] if pairing.box == "same" else view
                for pairing, view in zip(self._paired, views[1:], strict=True)
            },
            labels_on_disk=None if fetched is None else delivered(fetched, self._device),
        )


def _tensors(batch: CropBatch) -> list[torch.Tensor]:
    return [*(part for part in vars(batch).values() if isinstance(part, torch.Tensor)), *batch.paired.values()]


@cache
def _print_once(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _class_names(beton: Beton) -> tuple[str, ...]:
    """Returns the class names in the set's `set.json`, or else numbers. Raises DataError for class ids out of range."""
    most = int(beton.labels.max(initial=-1)) + 1
    folder = beton.path.parent
    if is_converted(folder):
        names = open_set(folder).class_names
        if most > len(names):
            raise DataError(f"{beton.path}: holds class {most - 1}, but set.json names {len(names)} classes")
        return names
    if most > _MOST_CLASSES:
        raise DataError(f"{beton.path}: has a class {most - 1}; at most {_MOST_CLASSES} classes are supported")
    return tuple(map(str, range(most)))


# The public name; an alias, so that the options are defined in one place.
open_loader = Loader
