"""Decoding with NVIDIA DALI: on CPU threads, or on the GPU by nvJPEG (`mixed`), with resize and flip beside it."""

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

# What DALI's host threads do for a GPU is the smaller part of the work, and processors are needed for all else.
_MOST_THREADS_BESIDE_GPU = 8

# What DALI's and CUDA's messages say where memory, of the host or of the device, is used up.
_OUT_OF_MEMORY = ("out of memory", "bad_alloc", "allocation failed", "memoryallocation", "allocator_failure")


class Decoder:
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
        # Kept over epochs, for building one takes long. Another is only built for an epoch begun during another.
        self._idle: list[_Pipeline] = []

    def decode(self, requests: Iterable[Request]) -> Iterator[tuple[torch.Tensor, ...]]:
        pipeline = self._cleared() or self._built()
        try:
            yield from self._batches(pipeline, requests)
        except GeneratorExit:
            self._idle.append(pipeline)
            raise
        # After an error a pipeline is of no use any more.
        self._idle.append(pipeline)

    def _cleared(self) -> "_Pipeline | None":
        while self._idle:
            pipeline = self._idle.pop()
            # What is wrong with images of batches that nobody takes any more costs no more than the pipeline.
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
        # A step's graph may be captured meanwhile: nothing here may make the host wait for the device.
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
        """The images' bytes, and for each crop of theirs corner, shape and flip."""
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
                # DALI frees the memory of a batch when nothing refers to it any more.
                taken = [torch.from_dlpack(output) for output in of_view]
                crops = taken[0] if copies == 1 else torch.cat(taken)
            else:
                # On a GPU, to free memory that PyTorch holds of DALI's would wait for the device.
                crops = torch.empty((copies * n, side, side, 3), dtype=torch.uint8, device=self._device)
                for output, crop in zip(of_view, crops.split(n), strict=True):
                    feed_ndarray(output, crop, cuda_stream=stream)
            made.append(crops.permute(0, 3, 1, 2))
        return tuple(made)

    def _failed(self, requests: Iterable[Request], failure: Exception) -> DataError:
        """What went wrong; with the image that did it, if one did: DALI does not name it, so those under way are tried.

        requests: those under way.
        """
        lines = [line.strip() for line in str(failure).splitlines() if line.strip()]
        # The cause follows the place in the pipeline where it was met.
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
    """A pipeline that one epoch after the other goes through. under_way: the requests that it works on, in order."""

    def __init__(self, sides: list[int], raw: bool, device: torch.device, options: dict[str, Any]):
        self.under_way: deque[Request] = deque()
        self._inputs: Iterator[tuple[Request, tuple[Any, ...]]] = iter(())
        self._pipeline = _graph(self._next, sides, raw, device.type == "cuda", **options)
        self._pipeline.build()

    def clear(self) -> None:
        """Throws away what is under way of an epoch that was left early."""
        self._inputs = iter(())
        while self.under_way:
            self.run(None)
            self.under_way.popleft()

    def begin(self, inputs: Iterable[tuple[Request, tuple[Any, ...]]]) -> None:
        """Starts on other inputs. Nothing may be under way."""
        self._pipeline.reset()
        self._inputs = iter(inputs)

    def run(self, stream: "torch.cuda.Stream | None") -> list[Any] | None:
        """The crops of the first request under way, of each copy a tensor of DALI's; None after the last one.

        stream: the one that uses them. They are ordered before what follows on it, without the host waiting.
        """
        try:
            return [output.as_tensor() for output in self._pipeline.run(stream)]
        except StopIteration:
            return None

    def _next(self) -> tuple[Any, ...]:
        """DALI calls it in `run`, some batches ahead, and copies what it returns."""
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
    # Like libjpeg-turbo everywhere else: chroma upsampled smoothly, the accurate DCT.
    options = {"device": "mixed" if on_gpu else "cpu", "output_type": types.RGB, "jpeg_fancy_upsampling": True}
    # Boxes are those of the pixels as they are stored: no other decoder turns a JPEG by its EXIF orientation.
    options["adjust_orientation"] = False
    if on_gpu:
        # Threads tied to processors would share these with whatever else the system puts there.
        options["affine"] = False
    images: Any = None
    if raw:
        images = stored.gpu() if on_gpu else stored
    elif len(sides) > 1:
        images = fn.decoders.image(stored, **options)
    for number, side in enumerate(sides):
        corner, shape, flip = boxes[number * 3 : number * 3 + 3]
        # Cut first, then resize: resize's own region of interest would let the filter see beyond the box.
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
