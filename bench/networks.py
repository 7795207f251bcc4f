"""Images a second of the networks of a step, each alone and all of them in the step of training.

The crops lie ready on the device. Weights are random: the time does not depend on them.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import models
from bench import BenchError
from bench.chart import by_time
from bench.compiler import CompilerNotes, compiler_note
from bench.device_time import busy_seconds
from bench.limit import demand_note, limit_notes, limits, with_shares
from bench.pair import CLASSES, Pair, batch, crops, refinery
from bench.record import Column, Record, Row, ran, step_columns
from bench.settings import Settings
from bench.turns import Contender, Runner, Work, in_turns
from kernels.normalise import Normalise
from models.fused_resnet import FusedResNet, is_fusable
from models.own_depthwise import has_depthwise, with_own_depthwise
from train.config import OptimizerConfig
from train.device import computing_in, on_device, set_tf32_and_allocator
from train.step import COMPILER_OPTIONS, Step
from train.student import Student

# Batches between two looks at the clock: a GPU works on while it is fed.
_AT_ONCE = {"cpu": 1, "cuda": 20}

REFINERY, STUDENT = "refinery forward", "student forward and backward"
FUSED, FUSED_APART = f"{REFINERY}, fused", f"{REFINERY}, fused, residuals added apart"
OWN_DEPTHWISE = f"{STUDENT}, own depthwise"
OPTIMIZER, BARE, STEP = "optimizer", "step without networks", "step"


class _Batches(Runner):
    """What the runners of a pair share: `step` for each batch."""

    def __init__(self, pair: Pair):
        self.pair = pair
        self.settings = pair.settings
        self.device = pair.settings.device
        set_tf32_and_allocator(torch.device(self.device), pair.settings.precision)
        torch.manual_seed(0)

    def run(self) -> Work:
        for _ in range(_AT_ONCE[self.device]):
            self.step()
        return Work(_AT_ONCE[self.device] * self.settings.batch)

    def step(self) -> None:
        raise NotImplementedError

    def facts(self) -> dict[str, Any]:
        """busy_seconds: on a GPU, for how long something runs on it for an image."""
        if self.device == "cpu":
            return {}
        busy = busy_seconds(self.run)
        return {"busy_seconds": busy and busy / (_AT_ONCE[self.device] * self.settings.batch)}

    def _forward_of(self, network: nn.Module) -> Callable[[Tensor], Tensor]:
        """The network as train.step.Step runs it: under autocast, and compiled if asked for."""
        device, autocast = torch.device(self.device), self.settings.autocast

        def forward(images: Tensor) -> Tensor:
            with computing_in(autocast, device):
                return network(images)

        if not self.settings.compiled:
            return forward
        return torch.compile(forward, fullgraph=True, dynamic=False, options=COMPILER_OPTIONS)

    def _images(self, name: str) -> Tensor:
        return Normalise(models.normalisation(name)).to(self.device)(crops(self.settings))


class RefineryForward(_Batches):
    """The refinery's network, from normalised images to logits. rewritten: what it is replaced by."""

    def __init__(self, pair: Pair, rewritten: Callable[[nn.Module], nn.Module] = lambda network: network):
        super().__init__(pair)
        self._forward = self._forward_of(rewritten(refinery(pair, models.build(pair.refinery, CLASSES)).network))
        self._ready = self._images(pair.refinery)

    def step(self) -> None:
        with torch.no_grad():
            self._forward(self._ready)


class StudentPass(_Batches):
    """The student's network, from normalised images to logits, and back from a gradient to those of the weights.

    rewritten: what it is replaced by, which computes the same.
    """

    def __init__(self, pair: Pair, rewritten: Callable[[nn.Module], nn.Module] = lambda network: network):
        super().__init__(pair)
        self._network = on_device(rewritten(models.build(pair.student, CLASSES)), torch.device(self.device))
        self._forward = self._forward_of(self._network)
        self._ready = self._images(pair.student)

    def step(self) -> None:
        logits = self._forward(self._ready)
        logits.backward(torch.full_like(logits, 1e-3))
        self._network.zero_grad(set_to_none=True)


class Optimizing(_Batches):
    """The student's weights moved by gradients that lie ready."""

    def __init__(self, pair: Pair):
        super().__init__(pair)
        student = student_of(pair, models.build(pair.student, CLASSES))
        self._optimizer = student.optimizer
        for weight in student.network.parameters():
            weight.grad = torch.full_like(weight, 1e-6)

    def step(self) -> None:
        self._optimizer.step()


class Stepping(_Batches):
    """train.step.Step on crops that lie ready; with `networks` false, on two that do next to nothing.

    cuda_graphs: replayed as CUDA graphs.
    """

    def __init__(self, pair: Pair, *, networks: bool, cuda_graphs: bool = False):
        super().__init__(pair)
        settings = self.settings
        self._compiler = CompilerNotes() if settings.compiled else None
        names = pair.refinery, pair.student
        built = [models.build(name, CLASSES) if networks else _Nothing(settings.resolution) for name in names]
        self._step = Step(
            [student_of(pair, built[1])],
            refinery(pair, built[0]),
            device=torch.device(self.device),
            autocast=settings.autocast,
            compiled=settings.compiled,
            strict=True,
            cuda_graphs=cuda_graphs,
        )
        self._batch, self._graphs = batch(settings), cuda_graphs

    def step(self) -> None:
        self._step(self._batch)

    def facts(self) -> dict[str, Any]:
        if self._graphs and not self._step.recorded:
            raise BenchError("the step could not be recorded as CUDA graphs")
        return super().facts() | ({"compiler": self._compiler.found()} if self._compiler else {})


class _Nothing(nn.Module):
    """In the place of a network: takes images, so that they must be made, and looks at one pixel of each."""

    def __init__(self, resolution: int):
        super().__init__()
        self._pixel = nn.Conv2d(3, CLASSES, 1, stride=resolution)

    def forward(self, images: Tensor) -> Tensor:
        return self._pixel(images).flatten(1)


def student_of(pair: Pair, network: nn.Module) -> Student:
    """A student that trains as in the papers."""
    settings = pair.settings
    return Student(
        pair.student,
        network,
        OptimizerConfig(lr=1e-3),
        normalisation=models.normalisation(pair.student),
        device=torch.device(settings.device),
        autocast=settings.autocast,
    )


def measure(settings: Settings) -> Record:
    """Measures the networks of each pair; quickly on a GPU, their whole steps alone."""
    pairs = [Pair(*names, settings) for names in settings.pairs]
    rows: list[Row] = []
    notes: list[str] = []
    if settings.quick and settings.on_gpu:
        # Compiling takes most of the time, and is done for all of them at once.
        contenders = [each for pair in pairs for each in (*limits(pair), _stepping(pair))]
        measured = in_turns(contenders, **settings.pace, **settings.arrangement, title="networks")
    else:
        measured = [
            row
            for pair in pairs
            for row in in_turns(_contenders(pair), **settings.pace, **settings.arrangement, title=f"networks, {pair}")
        ]
    for pair in pairs:
        found = [row for row in measured if row["group"] == str(pair)]
        rows += with_shares(found)
        notes += _findings(str(pair), found)
    return Record(
        part="networks",
        settings=settings.of_networks | {"pairs": [list(names) for names in settings.pairs]},
        notes=[
            f"Batches of {settings.batch} crops of {settings.resolution} px that lie on the device, "
            f"{settings.computing}, random weights. images/s of one device: median, lowest and highest of "
            f"{settings.turns} turns of {settings.seconds:g} s or more, in turns, after an untimed one each.",
            *limit_notes(settings),
            *gpu_notes(settings),
            *notes,
        ],
        rows=rows,
        identity=(Column("pair", lambda row: row["group"]), Column("what", lambda row: row["name"])),
        figures=step_columns(settings.device),
        chart=by_time,
    )


def gpu_notes(settings: Settings) -> list[str]:
    """What the columns of record.GPU_COLUMNS say."""
    if not settings.on_gpu:
        return []
    return [
        "idle: of the time of a turn, the share in which nothing ran on the GPU: kernels and copies, whatever overlaps "
        "once, are timed by PyTorch's profiler in a piece of work of its own. MHz, W: the GPU's clock and power in the "
        "midst of the turns, by nvidia-smi."
    ]


def _stepping(pair: Pair) -> Contender:
    forward, training = pair.demands()
    return pair.contender(STEP, partial(Stepping, networks=True), forward.plus(training))


def _contenders(pair: Pair) -> list[Contender]:
    forward, training = pair.demands()
    return [
        *limits(pair),
        pair.contender(REFINERY, RefineryForward, forward),
        pair.contender(STUDENT, StudentPass, training),
        *_by_own_kernels(pair),
        pair.contender(OPTIMIZER, Optimizing),
        pair.contender(BARE, partial(Stepping, networks=False)),
        _stepping(pair),
    ]


def _by_own_kernels(pair: Pair) -> list[Contender]:
    """The networks by kernels that run on a GPU alone, and in no training yet, where they take these networks."""
    settings = pair.settings
    if not (settings.on_gpu and settings.autocast) or pair.why_not():
        return []
    with torch.device("meta"):
        refinery_network, student_network = (models.build(name, CLASSES) for name in (pair.refinery, pair.student))
    found = []
    if is_fusable(refinery_network):
        ways: dict[str, Callable[[nn.Module], nn.Module]] = {
            FUSED: FusedResNet,
            FUSED_APART: partial(FusedResNet, add_in_product=False),
        }
        for name, way in ways.items():
            demand = pair.demand_of(way, student=False)
            found.append(pair.contender(name, partial(RefineryForward, rewritten=way), demand))
    if has_depthwise(student_network):
        demand = pair.demand_of(with_own_depthwise, student=True)
        found.append(pair.contender(OWN_DEPTHWISE, partial(StudentPass, rewritten=with_own_depthwise), demand))
    return found


def _findings(title: str, rows: list[Row]) -> list[str]:
    """What follows from the rows of a pair: the limit in figures, the time outside networks, the compiler's words."""
    measured = ran(rows)
    notes = [f"{title}: {note}" for note in demand_note(measured)]
    if all(name in measured for name in (REFINERY, STUDENT, OPTIMIZER, BARE, STEP)):
        seconds = {name: row["batch"] / row["rate"]["median"] for name, row in measured.items()}
        step = seconds[STEP]
        alone = (seconds[OPTIMIZER] + seconds[BARE]) / step
        rest = 1 - (seconds[REFINERY] + seconds[STUDENT]) / step
        notes.append(
            f"{title}: bookkeeping, neither network's forward or backward, takes {100 * alone:.1f} % of a step, "
            f"measured alone (normalise, loss, metrics {1000 * seconds[BARE]:.3g} ms, optimizer "
            f"{1000 * seconds[OPTIMIZER]:.3g} ms of {1000 * step:.4g} ms); what the step takes beyond the two networks "
            f"measured alone is {100 * rest:.1f} %."
        )
    if STEP in measured and "compiler" in measured[STEP]:
        notes.append(f"{title}: {compiler_note(measured[STEP]['compiler'])}")
    return notes
