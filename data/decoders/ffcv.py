"""CPU decoding on threads, with FFCV's libjpeg-turbo and a compiled resizer.

FFCV's own decoder always decodes whole images and rounds coarsely (fast DCT), so libjpeg-turbo is called directly: it
decodes only the tiles that the crops need, with the accurate DCT, to YCbCr planes, which are resized before they are
converted to RGB. Blocks are expanded to the same planes. One compiled call, which releases the GIL, does this for
several images.
"""

import ctypes
import hashlib
import importlib.util
import sys
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numpy.typing import NDArray

from data import DataError, blocks, lanes, tiles
from data.beton import Beton
from data.blocks import SIDE, around, expand_planes
from data.decoders import Request, View, resize, undecodable, union, wrong_with
from data.decoders.prefetch import Prefetcher
from data.decoders.resize import crop_resize, crop_resize_planes
from data.lanes import intrinsic
from data.tiles import Taken, take


def _libjpeg_turbo() -> ctypes.CDLL:
    """Loads libjpeg-turbo through FFCV's extension, which is linked with it."""
    # Importing the package would set PyTorch to a single thread, and halve the speed of training on a CPU.
    package = importlib.util.find_spec("ffcv")
    assert package is not None
    assert package.submodule_search_locations is not None
    (extension,) = Path(package.submodule_search_locations[0]).glob("_libffcv*.so")
    try:
        return ctypes.CDLL(str(extension))
    except OSError as error:
        raise DataError(f"decoder=ffcv: {error}; reinstall FFCV, or use decoder=torchvision") from None


_turbo = _libjpeg_turbo()
_turbo.tjInitDecompress.restype = ctypes.c_void_p
_turbo.tjDestroy.argtypes = [ctypes.c_void_p]
_turbo.tjGetErrorStr2.argtypes = [ctypes.c_void_p]
_turbo.tjGetErrorStr2.restype = ctypes.c_char_p
_RGB, _ACCURATE_DCT = 0, 4096

# A notice is printed when compiling takes longer than this.
_SILENT_SECONDS = 3.0

# An error that _fill returns in addition to those of data.tiles.take: libjpeg-turbo failed.
_UNDECODABLE = -1


class _Turbo(NamedTuple):
    """Addresses for compiled code, of a decompressor, tjDecompressToYUVPlanes and tjDecompress2."""

    handle: int
    to_planes: int
    to_rgb: int


def _address(function: Any) -> int:
    return ctypes.cast(function, ctypes.c_void_p).value or 0


class _Worker:
    """A thread's decompressor, and its buffers for a cut JPEG and for decoded pixels."""

    def __init__(self):
        self.turbo = _Turbo(
            _turbo.tjInitDecompress(), _address(_turbo.tjDecompressToYUVPlanes), _address(_turbo.tjDecompress2)
        )
        self.jpeg = np.empty(0, np.uint8)
        self.pixels = np.empty(0, np.uint8)

    def make_room(self, jpeg: int, pixels: int) -> None:
        if len(self.jpeg) < jpeg:
            self.jpeg = np.empty(jpeg, np.uint8)
        if len(self.pixels) < pixels:
            self.pixels = np.empty(pixels, np.uint8)

    def error(self) -> str:
        return _turbo.tjGetErrorStr2(self.turbo.handle).decode(errors="replace")

    def __del__(self):
        _turbo.tjDestroy(self.turbo.handle)


class _Batch(NamedTuple):
    """A request with the data of its n images that compiled code reads, gathered once for all threads; see _fill.

    jpeg, pixels: buffer sizes in bytes that a thread needs for the largest of the images.
    """

    indices: NDArray[np.int64]
    starts: NDArray[np.int64]
    lengths: NDArray[np.int64]
    sizes: NDArray[np.int32]
    raw: NDArray[np.bool_]
    unions: NDArray[np.int64]
    boxes: NDArray[np.int64]
    flips: NDArray[np.bool_]
    jpeg: int
    pixels: int


class Decoder:
    """See data.decoders.Decoder. Compiles for this machine when it is first used, and prints a notice."""

    def __init__(self, beton: Beton, *, views: tuple[View, ...], device: torch.device, threads: int, max_batch: int):
        self._beton = beton
        self._thread = threading.local()
        self._copies = np.array([view.copies for view in views])
        self._prefetcher = Prefetcher(self._fill, views=views, device=device, threads=threads)
        self._compile(views)

    def _compile(self, views: tuple[View, ...]) -> None:
        """Loads the compiled code, or compiles it and prints a notice, by running it for zero images."""
        crops = max(sum(view.copies for view in views), 1)
        none = Request(np.empty(0, np.int64), np.empty((0, crops, 4), np.int32), np.empty((0, crops), np.bool_))
        outs = tuple(torch.empty((view.copies, 0, 1, 1, 3), dtype=torch.uint8) for view in views)
        notice = threading.Timer(
            _SILENT_SECONDS,
            lambda: print("decoder=ffcv: compiling for this machine, once", file=sys.stderr, flush=True),
        )
        notice.start()
        try:
            self._fill(self._batch(none), 0, 0, outs)
        finally:
            notice.cancel()

    def decode(self, requests: Iterable[Request]) -> Iterator[tuple[torch.Tensor, ...]]:
        return self._prefetcher.batches(map(self._batch, requests))

    def _batch(self, request: Request) -> _Batch:
        beton, indices = self._beton, request.indices
        boxes = request.boxes.astype(np.int64)
        lengths, sizes = beton.lengths[indices], beton.sizes[indices]
        # Planes are padded, at most to whole blocks.
        areas = (sizes + blocks.PADDING).prod(axis=1, dtype=np.int64)
        return _Batch(
            indices,
            beton.starts[indices],
            lengths,
            sizes,
            beton.raw[indices],
            union(boxes),
            boxes,
            request.flips,
            jpeg=0 if beton.in_blocks else int(lengths.max(initial=0)),
            pixels=int(areas.max(initial=0)) * 3,
        )

    def _fill(self, batch: _Batch, first: int, last: int, outs: tuple[torch.Tensor, ...]) -> None:
        if not hasattr(self._thread, "worker"):
            self._thread.worker = _Worker()
        worker: _Worker = self._thread.worker
        beton = self._beton
        beton.check(batch.indices[first:last])
        try:
            worker.make_room(batch.jpeg, batch.pixels)
        except MemoryError:
            largest = int(batch.indices[batch.sizes.prod(axis=1, dtype=np.int64).argmax()])
            raise undecodable(beton, largest, "no memory for an image of the size that the index says") from None
        failed, taken = _fill(
            beton.bytes,
            batch.starts,
            batch.lengths,
            batch.sizes,
            batch.raw,
            beton.in_blocks,
            batch.unions,
            batch.boxes,
            batch.flips,
            self._copies,
            tuple(out.numpy() for out in outs),
            first,
            last,
            worker.turbo,
            worker.jpeg,
            worker.pixels,
        )
        if failed >= 0:
            index = int(batch.indices[failed])
            found = taken.wrong == _UNDECODABLE
            raise undecodable(beton, index, worker.error() if found else wrong_with(beton, index, taken))


@intrinsic
def _call(typingctx, address, arguments):
    """Calls the C function at an address with integers and pointers, all passed as int64; returns its int result."""

    def generate(context, builder, signature, values):
        long = ir.IntType(64)
        kind = ir.FunctionType(ir.IntType(32), [long] * len(arguments))
        function = builder.inttoptr(values[0], kind.as_pointer())
        # The calling conventions of 64-bit Linux pass an int in the lower half of a 64-bit register.
        return builder.call(function, cgutils.unpack_tuple(builder, values[1], len(arguments)))

    return types.int32(types.int64, types.UniTuple(types.int64, len(arguments))), generate


def _compiled(sources: str):
    """Returns the function that makes crops, cached on disk until `sources` or this file changes.

    Numba recompiles a cached function when its own file changes, but not when a file of a function that it calls does.
    Its cache key includes the values of closure variables, so the function refers to `sources`, a digest of those
    files. A closure over another compiled function would not work: its key differs in each process.
    """

    @njit(nogil=True, cache=True)
    def fill(
        file,
        starts,
        lengths,
        sizes,
        raw,
        in_blocks,
        unions,
        boxes,
        flips,
        copies,
        outs,
        first,
        last,
        turbo: _Turbo,
        jpeg_room,
        pixel_room,
    ):
        """Writes the crops of images first..last-1 of a batch to outs.

        Returns the index of the first damaged image and its error; -1 if there is none.
        """
        sources  # noqa: B018
        pointers = np.empty(3, np.int64)
        strides = np.empty(3, np.int32)
        taken = Taken(0, 0, 0, 0, 0, 0, False)
        for i in range(first, last):
            stored = file[starts[i] : starts[i] + lengths[i]]
            height, width = int(sizes[i, 0]), int(sizes[i, 1])
            luma, cb, cr = pixel_room[:0].reshape(0, 0), pixel_room[:0].reshape(0, 0), pixel_room[:0].reshape(0, 0)
            image = pixel_room[:0].reshape(0, 0, 3)
            top, left = 0, 0
            planes = in_blocks
            if raw[i]:
                image = stored.reshape(height, width, 3)
            elif in_blocks:
                part = around(height, width, unions[i, 0], unions[i, 1], unions[i, 2], unions[i, 3])
                top, left = part.luma.row * SIDE, part.luma.column * SIDE
                luma, cb, cr = expand_planes(stored, height, width, part, pixel_room)
            else:
                taken = take(stored, sizes[i], unions[i], jpeg_room)
                if taken.wrong:
                    return i, taken
                planes, top, left = taken.subsampled, taken.top, taken.left
                data = jpeg_room[: taken.size]
                if planes:
                    half_height, half_width = (taken.height + 1) // 2, (taken.width + 1) // 2
                    half = half_height * half_width
                    luma = pixel_room[: half * 4].reshape(half_height * 2, half_width * 2)
                    cb = pixel_room[half * 4 : half * 5].reshape(half_height, half_width)
                    cr = pixel_room[half * 5 : half * 6].reshape(half_height, half_width)
                    pointers[0], pointers[1], pointers[2] = luma.ctypes.data, cb.ctypes.data, cr.ctypes.data
                    strides[0], strides[1], strides[2] = half_width * 2, half_width, half_width
                    failed = _call(
                        turbo.to_planes,
                        (
                            turbo.handle,
                            np.int64(data.ctypes.data),
                            len(data),
                            np.int64(pointers.ctypes.data),
                            taken.width,
                            np.int64(strides.ctypes.data),
                            taken.height,
                            _ACCURATE_DCT,
                        ),
                    )
                else:
                    image = pixel_room[: height * width * 3].reshape(height, width, 3)
                    failed = _call(
                        turbo.to_rgb,
                        (
                            turbo.handle,
                            np.int64(data.ctypes.data),
                            len(data),
                            np.int64(image.ctypes.data),
                            width,
                            0,
                            height,
                            _RGB,
                            _ACCURATE_DCT,
                        ),
                    )
                if failed:
                    return i, Taken(_UNDECODABLE, 0, 0, 0, 0, 0, False)
            crop = 0
            for view in range(len(copies)):
                for copy in range(copies[view]):
                    box_top, box_left = int(boxes[i, crop, 0]), int(boxes[i, crop, 1])
                    box_height, box_width = int(boxes[i, crop, 2]), int(boxes[i, crop, 3])
                    flip = flips[i, crop]
                    out = outs[view][copy, i]
                    if planes:
                        crop_resize_planes(
                            luma, cb, cr, top, left, height, width, box_top, box_left, box_height, box_width, flip, out
                        )
                    else:
                        crop_resize(image, box_top, box_left, box_height, box_width, flip, out)
                    crop += 1
        return -1, taken

    return fill


_fill = _compiled(
    hashlib.sha256(
        b"".join(Path(str(module.__file__)).read_bytes() for module in (tiles, blocks, lanes, resize))
    ).hexdigest()
)
