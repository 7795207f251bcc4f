"""Decoding with NVIDIA DALI: on CPU threads, or on the GPU by nvJPEG (`mixed`), with resize and flip beside it."""

import io
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from nvidia.dali import fn, pipeline_def, types

from data import DataError
from data.beton import Beton
from data.decoders import BATCHES_AHEAD, Request, View, part_of, undecodable, union
from data.pixels import open_image


class Decoder:
    def __init__(self, beton: Beton, *, views: tuple[View, ...], device: torch.device, threads: int, max_batch: int):
        if beton.raw.any() != beton.raw.all():
            raise DataError(f"{beton.path}: holds both raw images and JPEGs, which DALI cannot mix; use decoder=ffcv")
        self._beton = beton
        self._device = device
        self._views = views
        self._pipeline_options = {
            "batch_size": max_batch,
            "num_threads": threads,
            "device_id": (device.index or 0) if device.type == "cuda" else None,
            "prefetch_queue_depth": BATCHES_AHEAD,
        }

    def decode(self, requests: Iterable[Request]) -> Iterator[tuple[torch.Tensor, ...]]:
        # A pipeline an epoch: it costs little, and an epoch left half-way leaves nothing behind in its queues.
        on_gpu = self._device.type == "cuda"
        under_way: list[Request] = []
        sides = [view.resolution for view in self._views for _ in range(view.copies)]
        samples = self._samples(requests, under_way)
        pipeline = _crops(samples, sides, bool(self._beton.raw.any()), on_gpu, **self._pipeline_options)
        pipeline.build()
        while True:
            try:
                # On the stream that uses them: ordered before what follows, without the host waiting.
                outputs = pipeline.run(torch.cuda.current_stream(self._device)) if on_gpu else pipeline.run()
            except StopIteration:
                return
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                raise self._undecodable(under_way, str(error)) from None
            # DALI's dynamic executor frees the memory of a batch when nothing refers to it.
            crops = [torch.from_dlpack(output.as_tensor()) for output in outputs]
            under_way.pop(0)
            yield tuple(
                (taken[0] if len(taken) == 1 else torch.cat(taken)).permute(0, 3, 1, 2)
                for view in self._views
                for taken in [[crops.pop(0) for _ in range(view.copies)]]
            )

    def _samples(self, requests: Iterable[Request], under_way: list[Request]) -> Iterator[tuple[Any, ...]]:
        """For each request the images' bytes, and for each crop of theirs corner, shape and flip."""
        for request in requests:
            under_way.append(request)
            indices = request.indices.tolist()
            parts = [part_of(self._beton, index, box) for index, box in zip(indices, union(request.boxes), strict=True)]
            corners = np.array([(part.top, part.left) for part in parts], dtype=np.int32)
            batch: list[Any] = [[part.data for part in parts]]
            for crop in range(request.boxes.shape[1]):
                box = request.boxes[:, crop]
                flips = request.flips[:, crop].astype(np.int32)
                batch += [np.ascontiguousarray(box[:, :2] - corners), np.ascontiguousarray(box[:, 2:]), flips]
            yield tuple(batch)

    def _undecodable(self, requests: list[Request], message: str) -> DataError:
        """What went wrong, with the image that did: DALI does not name it, so the images under way are tried."""
        lines = [line.strip() for line in message.splitlines() if line.strip()]
        # The cause follows the place in the pipeline where it was met.
        after = next((i for i, line in enumerate(lines[:-1], 1) if "encountered:" in line), 0)
        why = lines[after] if lines else "no reason given"
        for index in (int(index) for request in requests for index in request.indices):
            try:
                if not self._beton.raw[index]:
                    open_image(io.BytesIO(self._beton.encoded(index).tobytes())).load()
            except DataError as error:
                return error
            except Exception as error:
                return undecodable(self._beton, index, str(error).split("\n")[0] or type(error).__name__)
        return DataError(f"{self._beton.path}: DALI could not decode an image ({why})")


@pipeline_def
def _crops(samples: Iterator[tuple[Any, ...]], sides: list[int], raw: bool, on_gpu: bool):
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
