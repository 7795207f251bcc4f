"""Decoding with NVIDIA DALI: on CPU threads, or on the GPU by nvJPEG (`mixed`), with resize and flip beside it."""

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from nvidia.dali import fn, pipeline_def, types

from data import DataError
from data.beton import Beton
from data.decoders import BATCHES_AHEAD, Request


class Decoder:
    def __init__(self, beton: Beton, *, resolution: int, device: torch.device, threads: int, max_batch: int):
        self._beton = beton
        self._device = device
        self._resolution = resolution
        self._pipeline_options = {
            "batch_size": max_batch,
            "num_threads": threads,
            "device_id": (device.index or 0) if device.type == "cuda" else None,
            "prefetch_queue_depth": BATCHES_AHEAD,
        }

    def decode(self, requests: Iterable[Request]) -> Iterator[torch.Tensor]:
        # A pipeline an epoch: it costs little, and an epoch left half-way leaves nothing behind in its queues.
        on_gpu = self._device.type == "cuda"
        pipeline = _crops(self._samples(requests), self._resolution, on_gpu, **self._pipeline_options)
        try:
            pipeline.build()
            while True:
                try:
                    (crops,) = pipeline.run()
                except StopIteration:
                    return
                dense = crops.as_tensor()
                if on_gpu:
                    # DALI takes its buffer back at the next run, so the batch is copied out on the consumer's stream.
                    batch = torch.from_dlpack(dense).clone()
                    torch.cuda.current_stream().synchronize()
                else:
                    batch = torch.from_numpy(np.array(dense))
                yield batch.permute(0, 3, 1, 2)
        except RuntimeError as error:
            raise self._undecodable(str(error)) from None

    def _samples(self, requests: Iterable[Request]) -> Iterator[tuple[list, list, list, list]]:
        for indices, boxes, flips in requests:
            encoded = [self._beton.encoded(int(index)) for index in indices]
            starts = [box[:2].astype(np.int32) for box in boxes]
            shapes = [box[2:].astype(np.int32) for box in boxes]
            yield encoded, starts, shapes, [np.array(flip, dtype=np.int32) for flip in flips]

    def _undecodable(self, message: str) -> DataError:
        lines = [line for line in message.splitlines() if line.strip()]
        return DataError(
            f"{self._beton.path}: DALI could not decode an image ({lines[-1] if lines else 'no reason given'})"
        )


@pipeline_def
def _crops(samples: Iterator[tuple[list, list, list, list]], resolution: int, on_gpu: bool):
    encoded, starts, shapes, flips = fn.external_source(
        source=samples,
        num_outputs=4,
        dtype=[types.UINT8, types.INT32, types.INT32, types.INT32],
        ndim=[1, 1, 1, 0],
    )
    images: Any = fn.decoders.image(encoded, device="mixed" if on_gpu else "cpu", output_type=types.RGB)
    # Cut first, then resize: resize's own region of interest would let the filter see beyond the box.
    images = fn.slice(images, starts, shapes, axes=[0, 1])
    images = fn.resize(
        images,
        resize_x=resolution,
        resize_y=resolution,
        interp_type=types.INTERP_TRIANGULAR,
        antialias=True,
        dtype=types.UINT8,
    )
    return fn.flip(images, horizontal=flips)
