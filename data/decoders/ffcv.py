"""CPU decoding with the libjpeg-turbo that FFCV is built on, and a compiled resizer, on threads.

FFCV's own decoder rounds coarsely (its fast DCT), so its library is used below that: libjpeg-turbo with the accurate
DCT, which agrees with Pillow, torchvision and DALI.
"""

import ctypes
import importlib.util
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch

from data import DataError
from data.beton import Beton
from data.decoders import Request
from data.decoders.ahead import Ahead
from data.decoders.resize import crop_resize


def _libjpeg_turbo() -> ctypes.CDLL:
    """libjpeg-turbo, through FFCV's extension, which is linked with it wherever it lies."""
    # The package itself is not imported: that would set PyTorch to a single thread, and halve a CPU's training.
    package = importlib.util.find_spec("ffcv")
    assert package is not None
    assert package.submodule_search_locations is not None
    (extension,) = Path(package.submodule_search_locations[0]).glob("_libffcv*.so")
    try:
        return ctypes.CDLL(str(extension))
    except OSError as error:
        raise DataError(f"decoder=ffcv: {error}; run `make setup`, or use decoder=torchvision") from None


_turbo = _libjpeg_turbo()
_turbo.tjInitDecompress.restype = ctypes.c_void_p
_turbo.tjDecompress2.argtypes = [
    ctypes.c_void_p,
    ctypes.c_void_p,
    ctypes.c_ulong,
    ctypes.c_void_p,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int,
]
_turbo.tjDecompressHeader3.argtypes = [
    ctypes.c_void_p,
    ctypes.c_void_p,
    ctypes.c_ulong,
    *[ctypes.POINTER(ctypes.c_int)] * 4,
]
_turbo.tjGetErrorStr2.argtypes = [ctypes.c_void_p]
_turbo.tjGetErrorStr2.restype = ctypes.c_char_p
_RGB, _ACCURATE_DCT = 0, 4096


class Decoder:
    def __init__(self, beton: Beton, *, resolution: int, device: torch.device, threads: int, max_batch: int):
        self._beton = beton
        self._thread = threading.local()
        self._ahead = Ahead(self._fill, resolution=resolution, device=device, threads=threads)

    def decode(self, requests: Iterable[Request]) -> Iterator[torch.Tensor]:
        return self._ahead.batches(requests)

    def _fill(self, request: Request, first: int, last: int, out: torch.Tensor) -> None:
        crops = out.numpy()
        for i in range(first, last):
            image = self._image(int(request.indices[i]))
            top, left, height, width = map(int, request.boxes[i])
            crop_resize(image, top, left, height, width, bool(request.flips[i]), crops[i - first])

    def _image(self, index: int) -> np.ndarray:
        """The whole image, uint8 [H, W, 3], in a buffer that this thread's next call overwrites."""
        thread = self._thread
        if not hasattr(thread, "handle"):
            thread.handle = _turbo.tjInitDecompress()
            thread.buffer = np.empty(0, np.uint8)
        encoded = self._beton.encoded(index)
        height, width = map(int, self._beton.sizes[index])
        found_width, found_height, sampling, colours = (ctypes.c_int() for _ in range(4))
        refs = [ctypes.byref(value) for value in (found_width, found_height, sampling, colours)]
        failed = _turbo.tjDecompressHeader3(thread.handle, encoded.ctypes.data, encoded.size, *refs)
        if not failed and (found_height.value, found_width.value) != (height, width):
            raise self._undecodable(
                index, f"is {found_width.value}x{found_height.value}, the index says {width}x{height}"
            )
        if thread.buffer.size < height * width * 3:
            thread.buffer = np.empty(height * width * 3, np.uint8)
        image = thread.buffer[: height * width * 3].reshape(height, width, 3)
        failed = failed or _turbo.tjDecompress2(
            thread.handle,
            encoded.ctypes.data,
            encoded.size,
            image.ctypes.data,
            width,
            0,
            height,
            _RGB,
            _ACCURATE_DCT,
        )
        if failed:
            raise self._undecodable(index, _turbo.tjGetErrorStr2(thread.handle).decode(errors="replace"))
        return image

    def _undecodable(self, index: int, why: str) -> DataError:
        return DataError(f"{self._beton.path}: image {index} cannot be decoded ({why}); convert the set again")
