"""Each depthwise 3x3 convolution of a network by itself: PyTorch's and, on a GPU, our kernel's."""

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import models
from bench.limit import COPIES, with_shares
from bench.machine import Copy
from bench.pair import CLASSES
from bench.record import Column, Record, Row, step_columns
from bench.settings import Settings
from bench.turns import Contender, Runner, Work, in_turns
from kernels.depthwise import depthwise
from models.own_depthwise import is_depthwise
from train.recorded import Recorder

_NETWORK = "mobilenet"
# Passes in one CUDA graph, so that neither Python nor launches count.
_AT_ONCE = {"cpu": 1, "cuda": 50}


class Shape(NamedTuple):
    """Of a depthwise convolution's input, square and for one image, and its stride."""

    channels: int
    side: int
    stride: int

    def __str__(self) -> str:
        return f"{self.channels} x {self.side} x {self.side}, stride {self.stride}"

    def elements(self, *, backward: bool) -> int:
        """Values read and written for an image: input and output; backward also the output's gradient, the input and
        its gradient. Filters are too small to count.
        """
        size = self.channels * self.side**2
        output = self.channels * ((self.side - 1) // self.stride + 1) ** 2
        return size + output + (output + 2 * size if backward else 0)


class Convolving(Runner):
    """One convolution of a batch, forward or forward and backward."""

    def __init__(self, settings: Settings, shape: Shape, *, own: bool, backward: bool):
        self.device = settings.device
        # Fixed shapes: cuDNN tries its algorithms.
        torch.backends.cudnn.benchmark = True
        dtype = settings.autocast or torch.float32
        size = (settings.batch, shape.side, shape.side, shape.channels)
        self._x = torch.randn(size, device=self.device).to(dtype).permute(0, 3, 1, 2).requires_grad_(backward)
        self._weight = torch.randn(shape.channels, 1, 3, 3, device=self.device).to(dtype).requires_grad_(backward)
        convolve = depthwise if own else partial(F.conv2d, padding=1, groups=shape.channels)
        self._convolve = partial(convolve, stride=shape.stride)
        self._gradient = torch.randn_like(self._convolve(self._x, self._weight)) if backward else None
        self._amount = _AT_ONCE[self.device] * settings.batch
        self._recorder = Recorder(list, torch.device(self.device)) if self.device == "cuda" else None

    def run(self) -> Work:
        if self._recorder:
            self._recorder.run("passes", self._repeated)
        else:
            self._repeated()
        return Work(self._amount)

    def once(self) -> tuple[Tensor, ...]:
        """The output; with backward also the gradients of input and filters."""
        output = self._convolve(self._x, self._weight)
        if self._gradient is None:
            return (output,)
        return output, *torch.autograd.grad(output, (self._x, self._weight), self._gradient)

    def _repeated(self) -> None:
        for _ in range(_AT_ONCE[self.device]):
            self.once()


def shapes_of(name: str, resolution: int) -> list[Shape]:
    """The different depthwise 3x3 convolutions of a network, in its order, on crops of this side in pixels."""
    found: list[Shape] = []

    def note(layer: nn.Module, inputs: tuple[Tensor]) -> None:
        assert is_depthwise(layer)
        _, channels, side, _ = inputs[0].shape
        found.append(Shape(channels, side, layer.stride[0]))

    with torch.device("meta"):
        network = models.build(name, CLASSES)
        for layer in network.modules():
            if is_depthwise(layer):
                layer.register_forward_pre_hook(note)
        network(torch.empty(2, 3, resolution, resolution))
    return list(dict.fromkeys(found))


def measure(settings: Settings) -> Record:
    """Measures every shape of MobileNet's."""
    shapes = shapes_of(_NETWORK, settings.resolution)
    rows: list[Row] = []
    for shape in shapes:
        taken = in_turns(
            _contenders(settings, shape), **settings.pace, hurried=settings.on_gpu, title=f"depthwise {shape}"
        )
        rows += with_shares(taken)
    return Record(
        part="depthwise",
        settings=settings.of_networks | {"network": _NETWORK, "shapes": [list(shape) for shape in shapes]},
        notes=[
            f"The depthwise 3x3 convolutions of {_NETWORK} on crops of {settings.resolution} px in batches of "
            f"{settings.batch}, each by itself, {settings.precision}, channels-last, on a GPU {_AT_ONCE['cuda']} times "
            "in a CUDA graph with cudnn.benchmark. images/s of one device: median, lowest and highest of "
            f"{settings.turns} turns of {settings.seconds:g} s or more, in turns, after an untimed one each.",
            f"of copies: of the rate of `{COPIES}`, which copies the bytes of forward and backward where each tensor "
            "is read or written once. Tensors that fit into caches can exceed it.",
        ],
        rows=rows,
        identity=(Column("input", lambda row: row["group"]), Column("what", lambda row: row["name"])),
        figures=tuple(column for column in step_columns(settings.device) if column.head != "of products"),
    )


def _contenders(settings: Settings, shape: Shape) -> list[Contender]:
    width = (settings.autocast or torch.float32).itemsize

    def row(name: str, *, backward: bool) -> Row:
        size = shape.elements(backward=backward) * width
        known = {"flops": None, "bytes": size, "batch": settings.batch}
        return {"name": name, "group": str(shape), "unit": "images/s"} | known

    both = row(COPIES, backward=True)
    found = [Contender(partial(Copy, settings.device, from_host=False, size_of_one=both["bytes"]), both, beside=True)]
    for own in (False, True) if settings.on_gpu and settings.autocast else (False,):
        for backward in (False, True):
            name = f"{'own kernel' if own else 'PyTorch'}, {'forward and backward' if backward else 'forward'}"
            build = partial(Convolving, settings, shape, own=own, backward=backward)
            found.append(Contender(build, row(name, backward=backward)))
    return found
