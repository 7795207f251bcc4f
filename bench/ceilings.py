"""The stages of our CPU path, each measured alone on the same number of threads: decoding, resizing, copying.

Their batches hold no meaningful images; only the time of the stage matters. Batches are copied to a GPU as those of our
loader, except for decoding alone, which yields one batch that is on the device from the start.
"""

from collections.abc import Iterator

import numpy as np
import torch

from bench.task import Loader, Task
from data import plan
from data.beton import Beton
from data.decoders import Request, View, build_decoder
from data.decoders.prefetch import Prefetcher

_CPU = torch.device("cpu")


def _requests(task: Task, beton: Beton, copies: int, number: int) -> Iterator[Request]:
    """Yields the requests of the epoch's last batches, as our loader makes them."""
    order = plan.epoch_order(beton.num_samples, seed=0, epoch=number)
    for indices in order[-task.batch * task.batches // copies :].reshape(-1, task.batch):
        sizes = beton.sizes[indices]
        drawn = [plan.random_boxes(indices, sizes, seed=0, epoch=number, copy=copy) for copy in range(copies)]
        yield Request(
            indices, np.stack([box for box, _ in drawn], axis=1), np.stack([flip for _, flip in drawn], axis=1)
        )


class Decoding(Loader):
    """Cuts tiles and decodes them to planes, without making crops."""

    bytes_per_crop = 0.0

    def __init__(self, task: Task, *, copies: int):
        assert task.beton is not None
        self._task, self._copies = task, copies
        self._beton = Beton(task.beton)
        self._decoder = build_decoder(
            "ffcv", self._beton, views=(View(0, 1),), device=_CPU, threads=task.threads, max_batch=task.batch
        )
        shape = task.batch, 3, task.resolution, task.resolution
        self._blank = torch.zeros(shape, dtype=torch.uint8, device=task.device)

    def epoch(self, number: int) -> Iterator[torch.Tensor]:
        for _ in self._decoder.decode(_requests(self._task, self._beton, self._copies, number)):
            yield from [self._blank] * self._copies


class _Filling(Loader):
    """Fills batches on threads as our loader does; a subclass defines how, in `_fill`."""

    bytes_per_crop = 0.0

    def __init__(self, task: Task, *, copies: int):
        assert task.beton is not None
        self._task, self._copies = task, copies
        self._beton = Beton(task.beton)
        views, device = (View(copies, task.resolution),), torch.device(task.device)
        self._prefetcher = Prefetcher(self._fill, views=views, device=device, threads=task.threads)

    def epoch(self, number: int) -> Iterator[torch.Tensor]:
        for (crops,) in self._prefetcher.batches(_requests(self._task, self._beton, self._copies, number)):
            yield from crops.split(self._task.batch)

    def _fill(self, request: Request, first: int, last: int, outs: tuple[torch.Tensor, ...]) -> None:
        raise NotImplementedError


class Resizing(_Filling):
    """Resizes crops from prepared planes, the same for every image."""

    def __init__(self, task: Task, *, copies: int):
        from numba import njit

        from data.decoders.resize import crop_resize_planes

        @njit(nogil=True)
        def resize(planes, sizes, boxes, flips, out, first):
            for i in range(len(sizes)):
                height, width = int(sizes[i, 0]), int(sizes[i, 1])
                half_height, half_width = (height + 1) // 2, (width + 1) // 2
                half = half_height * half_width
                luma = planes[0, : half * 4].reshape(half_height * 2, half_width * 2)
                cb = planes[1, :half].reshape(half_height, half_width)
                cr = planes[2, :half].reshape(half_height, half_width)
                for k in range(boxes.shape[1]):
                    top, left, box_height, box_width = boxes[i, k]
                    crop = out[k, first + i]
                    crop_resize_planes(
                        luma,
                        cb,
                        cr,
                        0,
                        0,
                        height,
                        width,
                        top,
                        left,
                        box_height,
                        box_width,
                        flips[i, k],
                        crop,
                    )

        super().__init__(task, copies=copies)
        self._resize = resize
        area = int((self._beton.sizes + 1).prod(axis=1).max())
        self._planes = np.random.default_rng(0).integers(0, 256, (3, area), dtype=np.uint8)

    def _fill(self, request: Request, first: int, last: int, outs: tuple[torch.Tensor, ...]) -> None:
        sizes = self._beton.sizes[request.indices[first:last]]
        boxes = request.boxes[first:last].astype(np.int64)
        self._resize(self._planes, sizes, boxes, request.flips[first:last], outs[0].numpy(), first)


class Copying(_Filling):
    """Copies finished crops into batches."""

    def __init__(self, task: Task, *, copies: int):
        super().__init__(task, copies=copies)
        self._ready = torch.zeros(task.batch, task.resolution, task.resolution, 3, dtype=torch.uint8)

    def _fill(self, request: Request, first: int, last: int, outs: tuple[torch.Tensor, ...]) -> None:
        outs[0][:, first:last] = self._ready[first:last]
