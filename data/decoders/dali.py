"""Decoding, resizing and flipping with NVIDIA DALI: on CPU threads, or on the GPU (nvJPEG, DALI's `mixed` device)."""

import contextlib
import io
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import torch
from nvidia.dali import fn, pipeline_def, types
from nvidia.dali.plugin.pytorch import feed_ndarray

from data import DataError
from data.beton import Beton
from data.decoders import BATCHES_AHEAD, Request, View, parts_of, undecodable, union
from data.pixels import open_image

# With a GPU, DALI's host threads do the smaller part of the work, and other parts of a training need processors too.
_MOST_THREADS_BESIDE_GPU = 8

# Parts of DALI's and CUDA's messages when the host's or the device's memory is exhausted.
_OUT_OF_MEMORY = ("out of memory", "bad_alloc", "allocation failed", "memoryallocation", "allocator_failure")


class Decoder:
    """See data.decoders.Decoder. Raises DataError for a set with both raw images and JPEGs."""

    def __init__(self, beton: Beton, *, views: tuple[View, ...], device: torch.device, threads: int, max_batch: int):
        if beton.raw.any() != beton.raw.all():
            raise DataError(f"{beton.path}: holds both raw images and JPEGs, which DALI cannot mix; use decoder=ffcv")
        self._beton = beton
        self._device = device
        self._views = views
        on_gpu = device.type == "cuda"
        self._pipeline_options = {
            "batch_size": max_batch,
            "num_threads": max(min(threads // 2, _MOST_THREADS_BESIDE_GPU), 1) if on_gpu else threads,
            "device_id": (device.index or 0) if on_gpu else None,
            "prefetch_queue_depth": BATCHES_AHEAD,
            "set_affinity": False,
        }
        # Kept between epochs, since building a pipeline is slow. More than one is only needed when epochs overlap.
        self._idle: list[_Pipeline] = []

    def decode(self, requests: Iterable[Request]) -> Iterator[tuple[torch.Tensor, ...]]:
        pipeline = self._cleared() or self._built()
        try:
            yield from self._batches(pipeline, requests)
        except GeneratorExit:
            self._idle.append(pipeline)
            raise
        # A pipeline cannot be used after an error, so it is kept only here.
        self._idle.append(pipeline)

    def _cleared(self) -> "_Pipeline | None":
        while self._idle:
            pipeline = self._idle.pop()
            # Errors in images of discarded batches are ignored; only the pipeline is lost.
            with contextlib.suppress(RuntimeError, MemoryError):
                pipeline.clear()
                return pipeline
        return None

    def _built(self) -> "_Pipeline":
        sides = [view.resolution for view in self._views for _ in range(view.copies)]
        try:
            return _Pipeline(sides, bool(self._beton.raw.any()), self._device, self._pipeline_options)
        except (RuntimeError, MemoryError) as error:
            raise self._failed((), error) from None

    def _batches(self, pipeline: "_Pipeline", requests: Iterable[Request]) -> Iterator[tuple[torch.Tensor, ...]]:
        # A CUDA graph may be captured at the same time: nothing here may make the host wait for the device.
        stream = torch.cuda.current_stream(self._device) if self._device.type == "cuda" else None
        pipeline.begin((request, self._inputs(request)) for request in requests)
        while True:
            try:
                outputs = pipeline.run(stream)
            except (RuntimeError, MemoryError) as error:
                raise self._failed(pipeline.under_way, error) from None
            if outputs is None:
                return
            request = pipeline.under_way.popleft()
            yield self._crops(outputs, len(request.indices), stream)

    def _inputs(self, request: Request) -> tuple[Any, ...]:
        """Returns the images' bytes, then corners, shapes and flips for each crop."""
        parts = parts_of(self._beton, request.indices, union(request.boxes))
        corners = np.array([(part.top, part.left) for part in parts], dtype=np.int32)
        inputs: list[Any] = [[part.data for part in parts]]
        for crop in range(request.boxes.shape[1]):
            box = request.boxes[:, crop]
            flips = request.flips[:, crop].astype(np.int32)
            inputs += [np.ascontiguousarray(box[:, :2] - corners), np.ascontiguousarray(box[:, 2:]), flips]
        return tuple(inputs)

    def _crops(self, outputs: list[Any], n: int, stream: "torch.cuda.Stream | None") -> tuple[torch.Tensor, ...]:
        made = []
        for copies, side in self._views:
            of_view = [outputs.pop(0) for _ in range(copies)]
            if stream is None:
                # DALI frees the memory of a batch when nothing refers to it.
                taken = [torch.from_dlpack(output) for output in of_view]
                crops = taken[0] if copies == 1 else torch.cat(taken)
            else:
                # Copied: on a GPU, freeing DALI's memory while PyTorch holds it would wait for the device.
                crops = torch.empty((copies * n, side, side, 3), dtype=torch.uint8, device=self._device)
                for output, crop in zip(of_view, crops.split(n), strict=True):
                    feed_ndarray(output, crop, cuda_stream=stream)
            made.append(crops.permute(0, 3, 1, 2))
        return tuple(made)

    def _failed(self, requests: Iterable[Request], failure: Exception) -> DataError:
        """Returns an error that names the cause and, if there is one, the damaged image.

        DALI does not name the image, so all images of `requests`, which are in progress, are decoded again to find it.
        """
        lines = [line.strip() for line in str(failure).splitlines() if line.strip()]
        # The line after the one with the operator's name contains the cause.
        after = next((i for i, line in enumerate(lines[:-1], 1) if "encountered:" in line), 0)
        why = lines[after] if lines else type(failure).__name__
        if isinstance(failure, MemoryError) or any(said in str(failure).lower() for said in _OUT_OF_MEMORY):
            batch = self._pipeline_options["batch_size"]
            return DataError(
                f"decoder=dali: not enough memory on {self._device.type} for batches of {batch} images ({why}); "
                "take a smaller batch, or decoder=ffcv"
            )
        for index in (int(index) for request in requests for index in request.indices):
            try:
                if not self._beton.raw[index]:
                    open_image(io.BytesIO(self._beton.encoded(index).tobytes())).load()
            except DataError as error:
                return error
            except Exception as error:
                return undecodable(self._beton, index, str(error).split("\n")[0] or type(error).__name__)
        return DataError(f"{self._beton.path}: DALI could not decode an image ({why})")


class _Pipeline:
    """A DALI pipeline that is reused for each epoch. under_way: the requests in progress, in order."""

    def __init__(self, sides: list[int], raw: bool, device: torch.device, options: dict[str, Any]):
        self.under_way: deque[Request] = deque()
        self._inputs: Iterator[tuple[Request, tuple[Any, ...]]] = iter(())
        self._pipeline = _graph(self._next, sides, raw, device.type == "cuda", **options)
        self._pipeline.build()

    def clear(self) -> None:
        """Discards the requests in progress of an epoch that was abandoned."""
        self._inputs = iter(())
        while self.under_way:
            self.run(None)
            self.under_way.popleft()

    def begin(self, inputs: Iterable[tuple[Request, tuple[Any, ...]]]) -> None:
        """Starts on new inputs. No requests may be in progress."""
        self._pipeline.reset()
        self._inputs = iter(inputs)

    def run(self, stream: "torch.cuda.Stream | None") -> list[Any] | None:
        """Returns the crops of the first request in progress, one DALI tensor per copy; None after the last request.

        stream: the stream that will use the crops; later work on it waits for them, the host does not.
        """
        try:
            return [output.as_tensor() for output in self._pipeline.run(stream)]
        except StopIteration:
            return None

    def _next(self) -> tuple[Any, ...]:
        """The pipeline's source: DALI calls it within `run`, some batches ahead, and copies the result."""
        request, inputs = next(self._inputs)
        self.under_way.append(request)
        return inputs


@pipeline_def
def _graph(samples: Callable[[], tuple[Any, ...]], sides: list[int], raw: bool, on_gpu: bool):
    stored, *boxes = fn.external_source(
        source=samples,
        num_outputs=1 + 3 * len(sides),
        dtype=[types.UINT8, *[types.INT32] * 3 * len(sides)],
        ndim=[3 if raw else 1, *[1, 1, 0] * len(sides)],
    )
    crops = []
    # As the other decoders use libjpeg-turbo: smooth upsampling of chroma, the accurate DCT.
    options = {"device": "mixed" if on_gpu else "cpu", "output_type": types.RGB, "jpeg_fancy_upsampling": True}
    # Boxes refer to the stored pixels: like the other decoders, ignore the EXIF orientation.
    options["adjust_orientation"] = False
    if on_gpu:
        # Threads pinned to processors would compete with other threads that are scheduled there.
        options["affine"] = False
    images: Any = None
    if raw:
        images = stored.gpu() if on_gpu else stored
    elif len(sides) > 1:
        images = fn.decoders.image(stored, **options)
    for number, side in enumerate(sides):
        corner, shape, flip = boxes[number * 3 : number * 3 + 3]
        # Crop, then resize: with resize's own region of interest, the filter would read pixels outside the box.
        if images is None:
            crop = fn.decoders.image_slice(stored, corner, shape, axes=[0, 1], **options)
        else:
            crop = fn.slice(images, corner, shape, axes=[0, 1])
        crop = fn.resize(
            crop,
            resize_x=side,
            resize_y=side,
            interp_type=types.INTERP_TRIANGULAR,
            antialias=True,
            dtype=types.UINT8,
        )
        crops.append(fn.flip(crop, horizontal=flip))
    return tuple(crops)
