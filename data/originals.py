"""Images read from their own files, for evaluation: nothing is converted first, and each keeps the name of its file."""

import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from tqdm import tqdm

from command import printable
from data import DataError
from data.decoders.prefetch import default_threads
from data.loader import CropBatch
from data.pixels import upright_rgb
from data.plan import center_boxes
from data.sources import Split

_BATCHES_AHEAD = 3

# What Pillow raises for images that it cannot read.
UNREADABLE = (OSError, ValueError, SyntaxError, Image.DecompressionBombError)


def central_crop(image: Image.Image, *, resolution: int, center_ratio: float) -> NDArray[np.uint8]:
    """The validation crop of an upright RGB picture: uint8 [R, R, 3]."""
    top, left, height, width = map(int, center_boxes([(image.height, image.width)], ratio=center_ratio)[0])
    # Cropped first: the filter of a resize within a box would also read pixels beyond it.
    crop = image.crop((left, top, left + width, top + height))
    return np.array(crop.resize((resolution, resolution), Image.Resampling.BILINEAR))


def _name_on_screen(item: Any, reason: str) -> None:
    tqdm.write(printable(f"left out: {item}: {reason}"), file=sys.stderr)


class Originals:
    """The central crop of each image of a split, once, in order, with the interface of data.loader.Loader; for
    evaluation.

    num_samples: images in the split; those that cannot be read are not in the batches.
    left_out: called with the item of each of these and the reason (default: prints them).
    num_classes, class_names: of the set. files: names of the images' files, without their folders.
    """

    def __init__(
        self,
        split: Split,
        class_names: Sequence[str],
        *,
        resolution: int,
        batch_size: int,
        center_ratio: float = 224 / 256,
        device: str | torch.device = "cpu",
        threads: int | None = None,
        left_out: Callable[[Any, str], None] = _name_on_screen,
    ):
        for name, value in {"resolution": resolution, "batch_size": batch_size, "threads": threads}.items():
            if value is not None and value < 1:
                raise DataError(f"{name}={value}: must be at least 1")
        self._split = split
        self._resolution, self._center_ratio = resolution, center_ratio
        self._batch_size = batch_size
        self._device = torch.device(device)
        self._threads = threads or default_threads()
        self._left_out = left_out
        self.class_names = tuple(class_names)
        self.num_classes = len(self.class_names)
        self.num_samples = len(split.items)
        # An item is a path, a member of an archive, or no file at all.
        paths = [item if isinstance(item, str) else getattr(item, "name", "") for item in split.items]
        self.files = tuple(path.rpartition("/")[2] for path in paths)

    def epoch(self, epoch: int = 0) -> Iterator[CropBatch]:
        """The batches; those of every epoch are the same."""
        ahead: deque[tuple[range, list[Future]]] = deque()
        with ThreadPoolExecutor(self._threads) as pool:
            try:
                for start in range(0, self.num_samples, self._batch_size):
                    indices = range(start, min(start + self._batch_size, self.num_samples))
                    ahead.append((indices, [pool.submit(self._crop, index) for index in indices]))
                    # Enough to keep the threads busy, but not the whole set.
                    if len(ahead) == _BATCHES_AHEAD:
                        yield from self._batch(*ahead.popleft(), epoch)
                while ahead:
                    yield from self._batch(*ahead.popleft(), epoch)
            finally:
                pool.shutdown(wait=True, cancel_futures=True)

    def _crop(self, index: int) -> tuple[NDArray[np.uint8], tuple[int, int]] | str:
        """The crop of an image and the image's size (height, width), or why it cannot be read."""
        try:
            image = upright_rgb(self._split.read(self._split.items[index]))
        except UNREADABLE as error:
            return str(error) or type(error).__name__
        crop = central_crop(image, resolution=self._resolution, center_ratio=self._center_ratio)
        return crop, (image.height, image.width)

    def _batch(self, indices: range, futures: list[Future], epoch: int) -> Iterator[CropBatch]:
        """The batch of these images, or none if none of them can be read."""
        read = []
        for index, future in zip(indices, futures, strict=True):
            result = future.result()
            if isinstance(result, str):
                self._left_out(self._split.items[index], result)
            else:
                read.append((index, *result))
        if not read:
            return
        kept = np.array([index for index, _, _ in read], dtype=np.int64)
        crops = torch.from_numpy(np.stack([crop for _, crop, _ in read])).permute(0, 3, 1, 2)
        sizes = np.array([size for _, _, size in read], dtype=np.int32)
        boxes = center_boxes(sizes, ratio=self._center_ratio)
        labels = self._split.labels[kept]
        yield CropBatch(
            crops=crops.to(self._device),
            labels=torch.from_numpy(labels).to(self._device),
            indices=torch.from_numpy(kept).to(self._device),
            copies=torch.zeros(len(kept), dtype=torch.int64, device=self._device),
            epoch=epoch,
            boxes=torch.from_numpy(boxes).to(self._device),
            sizes=torch.from_numpy(sizes).to(self._device),
            flips=torch.zeros(len(kept), dtype=torch.bool, device=self._device),
        )
