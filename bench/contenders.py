"""All loaders that are measured, each set up by its best practice; all yield the same number of random crops per epoch.

Each contender runs in a separate process. It is built once, runs one epoch after the other, and is idle between them:
it prepares no batches of the next epoch.
"""

import os
from collections.abc import Callable, Iterable, Iterator
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray

from bench.ceilings import Copying, Decoding, Resizing
from bench.peers import PEERS
from bench.task import Entry, Loader, Task
from data import blocks, plan
from data.beton import Beton
from data.decoders import part_of, union
from data.pixels import open_image
from data.plan import CropRule

# The parameters of torchvision's RandomResizedCrop, for loaders with other defaults.
_SCALE, _RATIO = (0.08, 1.0), (3 / 4, 4 / 3)
# Batches that DALI prepares at a time; DALI's default.
_DALI_AHEAD = 2


class Workers:
    """PyTorch's DataLoader: worker processes read and crop image files by `load(path) -> uint8 [3, R, R]`."""

    def __init__(self, task: Task, load: Callable[[str], torch.Tensor]):
        self.bytes_per_crop = _mean_size(task.files)
        self._device = task.device
        self._loader = torch.utils.data.DataLoader(
            _Files(task.files, load),
            batch_size=task.batch,
            shuffle=True,
            num_workers=task.threads,
            pin_memory=task.device != "cpu",
            persistent_workers=True,
        )

    def epoch(self, number: int) -> Iterator[torch.Tensor]:
        return (batch.to(self._device, non_blocking=True) for batch in self._loader)


class _Files(torch.utils.data.Dataset):
    def __init__(self, files: list[str], load: Callable[[str], torch.Tensor]):
        self._files, self._load = files, load

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> torch.Tensor:
        return self._load(self._files[index])


def _pillow(task: Task) -> Loader:
    from torchvision.transforms import v2

    transform = v2.Compose([v2.RandomResizedCrop(task.resolution), v2.RandomHorizontalFlip(), v2.PILToTensor()])
    return Workers(task, lambda path: transform(open_image(path).convert("RGB")))


def _torchvision(task: Task) -> Loader:
    from torchvision.io import ImageReadMode, decode_image
    from torchvision.transforms import v2

    transform = v2.Compose([v2.RandomResizedCrop(task.resolution, antialias=True), v2.RandomHorizontalFlip()])
    # decode_image uses decode_jpeg for JPEGs, and also reads the few PNGs that large sets contain.
    return Workers(task, lambda path: transform(decode_image(path, ImageReadMode.RGB)))


class Dali:
    """DALI on image files: its decoder draws and cuts the crops (image_random_crop), by nvJPEG on a GPU."""

    def __init__(self, task: Task):
        from nvidia.dali import fn

        self.bytes_per_crop = _mean_size(task.files)
        self._batches = task.batches
        with _dali_pipeline(task) as pipeline:
            encoded, _ = fn.readers.file(files=task.files, random_shuffle=True)
            images = fn.decoders.image_random_crop(
                encoded,
                device="cpu" if task.device == "cpu" else "mixed",
                random_area=_SCALE,
                random_aspect_ratio=_RATIO,
                num_attempts=10,
            )
            pipeline.set_outputs(_dali_resize(images, task, fn.random.coin_flip()))
        self._run = DaliRun(pipeline, task.device)

    def epoch(self, number: int) -> Iterator[torch.Tensor]:
        return self._run.batches(self._batches)


class DaliSlice:
    """DALI on stored JPEGs: its decoder cuts the boxes of our plan (image_slice). Comparable to our DALI decoder."""

    def __init__(self, task: Task):
        from nvidia.dali import fn, types

        assert task.beton is not None
        self._beton = Beton(task.beton)
        self._task = task
        self.bytes_per_crop = float(self._beton.lengths.mean())
        self._samples: Iterator[tuple[list, list, list, list]] = iter(())
        with _dali_pipeline(task) as pipeline:
            encoded, starts, shapes, flips = fn.external_source(
                source=lambda: next(self._samples),
                num_outputs=4,
                dtype=[types.UINT8, types.INT32, types.INT32, types.INT32],
                ndim=[1, 1, 1, 0],
            )
            images = fn.decoders.image_slice(
                encoded, device="cpu" if task.device == "cpu" else "mixed", start=starts, shape=shapes, axes=[0, 1]
            )
            pipeline.set_outputs(_dali_resize(images, task, flips))
        self._run = DaliRun(pipeline, task.device)

    def epoch(self, number: int) -> Iterator[torch.Tensor]:
        order = plan.epoch_order(self._beton.num_samples, seed=0, epoch=number)
        self._samples = (self._sample(indices, number) for indices in order.reshape(-1, self._task.batch))
        return self._run.batches(self._task.batches)

    def _sample(self, indices: NDArray[np.int64], number: int) -> tuple[list, list, list, list]:
        boxes, flips = plan.random_boxes(indices, self._beton.sizes[indices], seed=0, epoch=number)
        encoded = [self._beton.encoded(int(index)) for index in indices]
        return encoded, list(boxes[:, :2]), list(boxes[:, 2:]), list(flips.astype(np.int32))


def _dali_pipeline(task: Task):
    from nvidia.dali import Pipeline

    return Pipeline(
        batch_size=task.batch,
        num_threads=task.threads,
        device_id=None if task.device == "cpu" else 0,
        prefetch_queue_depth=min(_DALI_AHEAD, task.batches),
    )


def _dali_resize(images, task: Task, flips):
    from nvidia.dali import fn, types

    side = task.resolution
    images = fn.resize(images, size=[side, side], interp_type=types.INTERP_TRIANGULAR, antialias=True)
    return fn.flip(images, horizontal=flips)


class DaliRun:
    """Runs a DALI pipeline for an exact number of batches; DALI's iterators would prepare batches of the next epoch."""

    def __init__(self, pipeline, device: str):
        self._pipeline = pipeline
        self._stream = None if device == "cpu" else torch.cuda.current_stream()
        self._started = False

    def batches(self, count: int) -> Iterator[torch.Tensor]:
        ahead = self._pipeline.prefetch_queue_depth
        scheduled = 0
        for made in range(count):
            while scheduled < min(made + ahead, count):
                # The first call schedules as many batches as the queue holds, each later call one batch.
                self._pipeline.schedule_run()
                scheduled += 1 if self._started else ahead
                self._started = True
            (crops,) = self._pipeline.outputs(self._stream)
            # DALI's dynamic executor frees a batch's memory when the last reference to it is gone.
            yield torch.from_dlpack(crops.as_tensor()).permute(0, 3, 1, 2)


class Ffcv:
    """Stock FFCV: its loader and decoder, which decodes whole images, with the page cache of the system (os_cache)."""

    def __init__(self, task: Task):
        from ffcv.fields.rgb_image import RandomResizedCropRGBImageDecoder
        from ffcv.loader import Loader as FfcvLoader
        from ffcv.loader import OrderOption
        from ffcv.reader import Reader
        from ffcv.transforms import RandomHorizontalFlip, ToDevice, ToTensor, ToTorchImage

        side = task.resolution
        image = [RandomResizedCropRGBImageDecoder((side, side)), RandomHorizontalFlip(), ToTensor()]
        if task.device != "cpu":
            image.append(ToDevice(torch.device(task.device), non_blocking=True))
        self._loader = FfcvLoader(
            str(task.beton),
            batch_size=task.batch,
            num_workers=task.threads,
            os_cache=True,
            order=OrderOption.RANDOM,
            # Labels are not read; their cost is not measurable.
            pipelines={"image": [*image, ToTorchImage()], "label": None},
        )
        self.bytes_per_crop = float(Reader(str(task.beton)).alloc_table["size"].mean())

    def epoch(self, number: int) -> Iterator[torch.Tensor]:
        return (batch for (batch,) in self._loader)


class Ours:
    """This project's loader. With several crops per image, only the last 1/`copies` of its epoch's steps are run."""

    def __init__(self, task: Task, *, decoder: str = "auto", copies: int = 1):
        from data.loader import open_loader

        assert task.beton is not None
        self._open = partial(
            open_loader,
            task.beton,
            resolution=task.resolution,
            batch_size=task.batch,
            decoder=decoder,
            device=task.device,
            copies=copies,
            threads=task.threads,
            crop=CropRule(_SCALE, _RATIO),
        )
        self._loader = self._open()
        self._first_step = self._loader.steps - task.batches
        self.bytes_per_crop = _mean_part(Beton(task.beton), copies)

    def epoch(self, number: int) -> Iterator[torch.Tensor]:
        return (batch.crops for batch in self._loader.epoch(number, start_step=self._first_step))


class OursOpened(Ours):
    """Like Ours, but opened again for each epoch: every epoch is a first one, which verifies all checksums."""

    def epoch(self, number: int) -> Iterator[torch.Tensor]:
        self._loader = self._open()
        return super().epoch(number)


def _mean_size(files: Iterable[str]) -> float:
    return float(np.mean([os.path.getsize(file) for file in files]))


def _mean_part(beton: Beton, copies: int) -> float:
    """Returns the mean bytes read per crop in one epoch: the tiles, blocks or pixels around an image's crops."""
    indices = np.arange(beton.num_samples)
    boxes = [plan.random_boxes(indices, beton.sizes, seed=0, epoch=0, copy=copy)[0] for copy in range(copies)]
    around = union(np.stack(boxes, axis=1))
    return float(np.mean([_part_size(beton, index, around[index]) for index in range(beton.num_samples)])) / copies


def _part_size(beton: Beton, index: int, box: NDArray[np.int32]) -> int:
    if not beton.in_blocks:
        return part_of(beton, index, box).data.nbytes
    part = blocks.around(*map(int, beton.sizes[index]), *map(int, box))
    count = part.luma.rows * part.luma.columns + 2 * part.chroma.rows * part.chroma.columns
    return count * blocks.BLOCK_BYTES


# The largest number of crops per image; an epoch's number of batches is a multiple of it.
COPIES = 4

# In the order of the table. All rates are compared with that of `ffcv`.
REFERENCE = "ffcv"
CONTENDERS = {
    "pillow": Entry(_pillow, "files", "DataLoader, Pillow"),
    "torchvision": Entry(_torchvision, "files", "DataLoader, decode_jpeg, transforms v2"),
    **PEERS,
    "dali": Entry(Dali, "files", "readers.file, decoders.image_random_crop, resize"),
    "dali slice": Entry(DaliSlice, "plain", "decoders.image_slice with our boxes, resize"),
    "ffcv": Entry(Ffcv, "plain", "stock loader"),
    "ffcv raw": Entry(Ffcv, "raw", "stock loader"),
    **{
        f"ours {decoder}{' raw' if raw else ''}{f' x{copies}' if copies > 1 else ''}": Entry(
            partial(Ours, decoder=decoder, copies=copies),
            "converted raw" if raw else "converted",
            f"open_loader, {copies} crops per image",
        )
        for decoder in ("ffcv", "dali", "torchvision")
        for raw in (False, True)
        for copies in (1, COPIES)
    },
    "ours blocks": Entry(Ours, "converted blocks", "open_loader, 1 crops per image"),
    f"ours blocks x{COPIES}": Entry(
        partial(Ours, copies=COPIES), "converted blocks", f"open_loader, {COPIES} crops per image"
    ),
    "ours blocks first epoch": Entry(OursOpened, "converted blocks", "open_loader, all checksums compared"),
    **{
        f"{part} alone{f' x{copies}' if copies > 1 else ''}": Entry(
            partial(build, copies=copies), "converted", f"of what ours ffcv does, {part} alone"
        )
        for part, build, copies in (
            ("decode", Decoding, 1),
            ("decode", Decoding, COPIES),
            ("resize", Resizing, 1),
            ("copy", Copying, 1),
        )
    },
}
