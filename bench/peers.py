"""Decoders of other projects, measured if they are installed (the extra `peers` in setup.cfg).

All read the original files and cut the boxes of our plan. The GPU decoders have not been run on a GPU yet.
"""

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torchvision.transforms.v2 import functional as F

from bench import BenchError
from bench.task import Entry, Task
from data import plan
from data.decoders import BATCHES_AHEAD, Request, View, delivered
from data.decoders.prefetch import Prefetcher
from data.pixels import open_image

# Decodes the boxes, int32 [n, 4], of n encoded files on a GPU: uint8 [3, height, width] each, on the device.
DecodeBoxes = Callable[[list[bytes], NDArray[np.int32]], list[torch.Tensor]]


class Files:
    """The files of a task with the boxes of the plan. sizes: int64 [n, 2], height and width in pixels."""

    def __init__(self, task: Task):
        self.paths = task.files
        # Headers are read when the loader is built, which is not timed: a set is indexed once.
        headers = {path: _header(path) for path in dict.fromkeys(task.files)}
        self.sizes = np.array([headers[path][:2] for path in task.files])
        self.bytes_per_crop = float(np.mean([headers[path][2] for path in task.files]))
        self._task = task

    def requests(self, number: int) -> Iterator[Request]:
        """Yields the epoch's batches, with one box per image."""
        order = plan.epoch_order(len(self.paths), seed=0, epoch=number)
        for indices in order.reshape(-1, self._task.batch):
            boxes, flips = plan.random_boxes(indices, self.sizes[indices], seed=0, epoch=number)
            yield Request(indices, boxes[:, None], flips[:, None])


def _header(path: str) -> tuple[int, int, int]:
    """Returns height and width in pixels and the size in bytes of an image file."""
    with open_image(path) as image:
        return image.height, image.width, Path(path).stat().st_size


class TorchCodec:
    """TorchCodec on threads, which decodes whole images (it has no partial decoding); torchvision's v2 resize."""

    def __init__(self, task: Task):
        from torchcodec.decoders import decode_image

        self._decode = decode_image
        self._files = Files(task)
        self.bytes_per_crop = self._files.bytes_per_crop
        view = View(1, task.resolution)
        self._prefetcher = Prefetcher(self._fill, views=(view,), device=torch.device(task.device), threads=task.threads)

    def epoch(self, number: int) -> Iterator[torch.Tensor]:
        return (crops for (crops,) in self._prefetcher.batches(self._files.requests(number)))

    def _fill(self, request: Request, first: int, last: int, outs: tuple[torch.Tensor, ...]) -> None:
        (out,) = outs
        for i in range(first, last):
            image = self._decode(self._files.paths[request.indices[i]])
            box = _cut(image, request.boxes[i, 0])
            out[0, i] = _resized(box, request.flips[i, 0], out.shape[2]).permute(1, 2, 0)


class Spdl:
    """SPDL's pipeline: FFmpeg decodes whole images on its threads, and its filters crop, resize and flip."""

    def __init__(self, task: Task):
        from spdl import io, pipeline

        self._io, self._builder = io, pipeline.PipelineBuilder
        self._files = Files(task)
        self.bytes_per_crop = self._files.bytes_per_crop
        self._task = task

    def epoch(self, number: int) -> Iterator[torch.Tensor]:
        samples = (
            (index, *box, flip)
            for request in self._files.requests(number)
            for index, box, flip in zip(
                request.indices.tolist(), request.boxes[:, 0].tolist(), request.flips[:, 0].tolist(), strict=True
            )
        )
        pipeline = (
            self._builder()
            .add_source(samples)
            .pipe(lambda sample: self._frame(*sample), concurrency=self._task.threads)
            .aggregate(self._task.batch)
            .pipe(self._io.convert_frames)
            .add_sink(BATCHES_AHEAD)
            .build(num_threads=self._task.threads, max_failures=0)
        )
        with pipeline.auto_stop():
            for batch in pipeline:
                yield delivered(self._io.to_torch(batch).permute(0, 3, 1, 2), torch.device(self._task.device))

    def _frame(self, index: int, top: int, left: int, height: int, width: int, flip: bool):
        side = self._task.resolution
        steps = [
            f"crop={width}:{height}:{left}:{top}:exact=1",
            f"scale={side}:{side}:flags=bilinear",
            *(["hflip"] if flip else []),
            "format=pix_fmts=rgb24",
        ]
        # FFmpeg's lowres is not used: the filters are configured for the full size and would crash.
        packets = self._io.demux_image(self._files.paths[index])
        return self._io.decode_packets(packets, filter_desc=",".join(steps))


class OnGpu:
    """Decodes whole batches on the GPU and resizes boxes there with torchvision; threads read files ahead."""

    def __init__(self, task: Task, *, build: Callable[[Task], DecodeBoxes]):
        self._decode = build(task)
        self._files = Files(task)
        self.bytes_per_crop = self._files.bytes_per_crop
        self._side = task.resolution
        self._pool = ThreadPoolExecutor(task.threads)

    def epoch(self, number: int) -> Iterator[torch.Tensor]:
        waiting: deque = deque()
        for request in self._files.requests(number):
            paths = [Path(self._files.paths[index]) for index in request.indices]
            waiting.append((request, [self._pool.submit(path.read_bytes) for path in paths]))
            if len(waiting) > BATCHES_AHEAD:
                yield self._crops(*waiting.popleft())
        while waiting:
            yield self._crops(*waiting.popleft())

    def _crops(self, request: Request, reads: list) -> torch.Tensor:
        boxes = self._decode([read.result() for read in reads], request.boxes[:, 0])
        crops = [_resized(box, flip, self._side) for box, flip in zip(boxes, request.flips[:, 0], strict=True)]
        return torch.stack(crops)


def _torchcodec_cuda(task: Task) -> DecodeBoxes:
    from torchcodec.decoders import decode_jpeg

    def decode(files: list[bytes], boxes: NDArray[np.int32]) -> list[torch.Tensor]:
        images = decode_jpeg(files, device=task.device)
        return [_cut(image, box) for image, box in zip(images, boxes, strict=True)]

    return decode


def _nvimagecodec(task: Task) -> DecodeBoxes:
    from nvidia import nvimgcodec

    decoder = nvimgcodec.Decoder(max_num_cpu_threads=task.threads)
    params = nvimgcodec.DecodeParams(apply_exif_orientation=False)

    def decode(files: list[bytes], boxes: NDArray[np.int32]) -> list[torch.Tensor]:
        wholes = [nvimgcodec.CodeStream(file) for file in files]
        regions = [
            nvimgcodec.Region(top, left, top + height, left + width) for top, left, height, width in boxes.tolist()
        ]
        parts = [whole.get_sub_code_stream(0, region) for whole, region in zip(wholes, regions, strict=True)]
        images = decoder.decode(parts, params=params, cuda_stream=torch.cuda.current_stream().cuda_stream)
        if any(image is None for image in images):
            raise BenchError("nvImageCodec: an image cannot be decoded")
        return [torch.from_dlpack(image).permute(2, 0, 1) for image in images]

    return decode


def _cut(image: torch.Tensor, box: NDArray[np.int32]) -> torch.Tensor:
    """Returns the box (top, left, height, width) of an image, uint8 [3, H, W], as a view."""
    top, left, height, width = box.tolist()
    return image[:, top : top + height, left : left + width]


def _resized(box: torch.Tensor, flip: bool, side: int) -> torch.Tensor:
    """Returns a crop, uint8 [3, side, side], resized from a box, uint8 [3, h, w]."""
    crop = F.resize(box, [side, side], antialias=True)
    return F.horizontal_flip(crop) if flip else crop


PEERS = {
    "torchcodec": Entry(TorchCodec, "files", "decode_image on threads, transforms v2"),
    "spdl": Entry(Spdl, "files", "its pipeline, FFmpeg's decoder and filters"),
    "torchcodec cuda": Entry(
        partial(OnGpu, build=_torchcodec_cuda),
        "files",
        "decode_jpeg of batches on the GPU, transforms v2",
        needs_gpu=True,
    ),
    "nvimagecodec": Entry(
        partial(OnGpu, build=_nvimagecodec),
        "files",
        "boxes of batches decoded on the GPU, transforms v2",
        needs_gpu=True,
    ),
}
