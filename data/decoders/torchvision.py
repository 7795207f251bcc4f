"""Decoding with torchvision: libjpeg-turbo on CPU threads, nvJPEG on a GPU."""

from collections.abc import Iterable, Iterator

import torch
from torchvision.io import ImageReadMode, decode_jpeg
from torchvision.transforms.v2 import functional as F

from data import DataError
from data.beton import Beton
from data.decoders import Request
from data.decoders.ahead import Ahead


class Decoder:
    def __init__(self, beton: Beton, *, resolution: int, device: torch.device, threads: int, max_batch: int):
        self._beton = beton
        self._resolution = resolution
        self._device = device
        self._ahead = Ahead(self._fill, resolution=resolution, device=device, threads=threads)

    def decode(self, requests: Iterable[Request]) -> Iterator[torch.Tensor]:
        if self._device.type == "cuda":
            return (self._on_gpu(request) for request in requests)
        return self._ahead.batches(requests)

    def _fill(self, request: Request, first: int, last: int, out: torch.Tensor) -> None:
        for i in range(first, last):
            image = self._decode(int(request.indices[i]))
            out[i - first] = self._crop(image, request, i).permute(1, 2, 0)

    def _decode(self, index: int) -> torch.Tensor:
        """The whole image on the CPU: uint8 [3, H, W]."""
        try:
            return decode_jpeg(torch.from_numpy(self._beton.encoded(index)), mode=ImageReadMode.RGB)
        except RuntimeError as error:
            raise self._undecodable(index, str(error)) from None

    def _on_gpu(self, request: Request) -> torch.Tensor:
        encoded = [torch.from_numpy(self._beton.encoded(int(index))) for index in request.indices]
        try:
            images = decode_jpeg(encoded, mode=ImageReadMode.RGB, device=self._device)
        except RuntimeError:
            # nvJPEG does not say which image it was; libjpeg-turbo finds it, or decodes what nvJPEG cannot.
            images = [self._decode(int(index)).to(self._device) for index in request.indices]
        crops = torch.stack([self._crop(image, request, i) for i, image in enumerate(images)])
        return crops.contiguous(memory_format=torch.channels_last)

    def _crop(self, image: torch.Tensor, request: Request, i: int) -> torch.Tensor:
        """Crop i of the request from its image uint8 [3, H, W]: uint8 [3, R, R]."""
        index = int(request.indices[i])
        height, width = map(int, self._beton.sizes[index])
        if image.shape[1:] != (height, width):
            found = f"is {image.shape[2]}x{image.shape[1]}, the index says {width}x{height}"
            raise self._undecodable(index, found)
        top, left, height, width = map(int, request.boxes[i])
        crop = F.resize(image[:, top : top + height, left : left + width], [self._resolution] * 2, antialias=True)
        return F.horizontal_flip(crop) if request.flips[i] else crop

    def _undecodable(self, index: int, why: str) -> DataError:
        why = why.splitlines()[0]
        return DataError(f"{self._beton.path}: image {index} cannot be decoded ({why}); convert the set again")
