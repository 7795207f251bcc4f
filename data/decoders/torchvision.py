"""Decoding with torchvision: libjpeg-turbo on CPU threads, nvJPEG on a GPU."""

from collections.abc import Iterable, Iterator

import torch
from torchvision.io import ImageReadMode, decode_jpeg
from torchvision.transforms.v2 import functional as F

from command import first_line
from data.beton import Beton
from data.decoders import Part, Request, View, parts_of, undecodable, union
from data.decoders.prefetch import Prefetcher


class Decoder:
    """See data.decoders.Decoder."""

    def __init__(self, beton: Beton, *, views: tuple[View, ...], device: torch.device, threads: int, max_batch: int):
        self._beton = beton
        self._views = views
        self._device = device
        self._prefetcher = Prefetcher(self._fill, views=views, device=device, threads=threads)

    def decode(self, requests: Iterable[Request]) -> Iterator[tuple[torch.Tensor, ...]]:
        if self._device.type == "cuda":
            return (self._on_gpu(request) for request in requests)
        return self._prefetcher.batches(requests)

    def _fill(self, request: Request, first: int, last: int, outs: tuple[torch.Tensor, ...]) -> None:
        indices = request.indices[first:last]
        parts = parts_of(self._beton, indices, union(request.boxes[first:last]))
        for i, index, part in zip(range(first, last), indices.tolist(), parts, strict=True):
            for view, copy, crop in self._crops(self._decode(index, part), part, request, i):
                outs[view][copy, i] = crop.permute(1, 2, 0)

    def _decode(self, index: int, part: Part) -> torch.Tensor:
        """Decodes a part on the CPU: uint8 [3, h, w]."""
        data = torch.from_numpy(part.data)
        if data.ndim == 3:
            return data.permute(2, 0, 1)
        try:
            return decode_jpeg(data, mode=ImageReadMode.RGB)
        except RuntimeError as error:
            raise undecodable(self._beton, index, first_line(error)) from None

    def _on_gpu(self, request: Request) -> tuple[torch.Tensor, ...]:
        indices = request.indices.tolist()
        parts = parts_of(self._beton, request.indices, union(request.boxes))
        try:
            encoded = [torch.from_numpy(part.data) for part in parts if part.data.ndim == 1]
            decoded = iter(decode_jpeg(encoded, mode=ImageReadMode.RGB, device=self._device) if encoded else ())
            images = [
                next(decoded) if part.data.ndim == 1 else self._decode(index, part).to(self._device)
                for index, part in zip(indices, parts, strict=True)
            ]
        except RuntimeError:
            # nvJPEG does not name the image that failed; libjpeg-turbo does, or decodes what nvJPEG cannot.
            images = [self._decode(index, part).to(self._device) for index, part in zip(indices, parts, strict=True)]
        outs = tuple(
            torch.empty(
                (view.copies, len(indices), view.resolution, view.resolution, 3), dtype=torch.uint8, device=self._device
            )
            for view in self._views
        )
        for i, (image, part) in enumerate(zip(images, parts, strict=True)):
            for view, copy, crop in self._crops(image, part, request, i):
                outs[view][copy, i] = crop.permute(1, 2, 0)
        return tuple(out.flatten(0, 1).permute(0, 3, 1, 2) for out in outs)

    def _crops(
        self, image: torch.Tensor, part: Part, request: Request, i: int
    ) -> Iterator[tuple[int, int, torch.Tensor]]:
        """Yields view, copy and crop, uint8 [3, R, R], for each crop of image i, from its part, uint8 [3, h, w]."""
        crop = 0
        for number, view in enumerate(self._views):
            for copy in range(view.copies):
                top, left, height, width = map(int, request.boxes[i, crop])
                top, left = top - part.top, left - part.left
                box = image[:, top : top + height, left : left + width]
                resized = F.resize(box, [view.resolution] * 2, antialias=True)
                yield number, copy, F.horizontal_flip(resized) if request.flips[i, crop] else resized
                crop += 1
