"""Measures images per second of the networks of a training step, each alone, and of the whole step.

The crops are on the device before the measurement. Weights are random: the time does not depend on them.
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

# Batches per piece of timed work: on a GPU many, so that waiting for the end costs little.
_AT_ONCE = {"cpu": 1, "cuda": 20}

REFINERY, STUDENT = "refinery forward", "student forward and backward"
FUSED, FUSED_APART = f"{REFINERY}, fused", f"{REFINERY}, fused, residuals added apart"
OWN_DEPTHWISE = f"{STUDENT}, own depthwise"
OPTIMIZER, BARE, STEP = "optimizer", "step without networks", "step"


class _Batches(Runner):
    """Base class of a pair's runners: calls `step` once per batch."""

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
        """Returns busy_seconds, the time per image in which the GPU is busy; {} on a CPU."""
        if self.device == "cpu":
            return {}
        busy = busy_seconds(self.run)
        return {"busy_seconds": busy and busy / (_AT_ONCE[self.device] * self.settings.batch)}

    def _forward_of(self, network: nn.Module) -> Callable[[Tensor], Tensor]:
        """Returns the network as train.step.Step runs it: under autocast, and compiled if the settings say so."""
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
    """Runs the refinery's network, from normalised images to logits.

    rewritten: replaces the network by one that computes the same.
    """

    def __init__(self, pair: Pair, rewritten: Callable[[nn.Module], nn.Module] = lambda network: network):
        super().__init__(pair)
        self._forward = self._forward_of(rewritten(refinery(pair, models.build(pair.refinery, CLASSES)).network))
        self._ready = self._images(pair.refinery)

    def step(self) -> None:
        with torch.no_grad():
            self._forward(self._ready)


class StudentPass(_Batches):
    """Runs the student's network forward, from normalised images to logits, and backward to the weights' gradients.

    rewritten: replaces the network by one that computes the same.
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
    """Runs the optimizer on the student's weights with prepared gradients."""

    def __init__(self, pair: Pair):
        super().__init__(pair)
        student = student_of(pair, models.build(pair.student, CLASSES))
        self._optimizer = student.optimizer
        for weight in student.network.parameters():
            weight.grad = torch.full_like(weight, 1e-6)

    def step(self) -> None:
        self._optimizer.step()


class Stepping(_Batches):
    """Runs train.step.Step on prepared crops.

    networks: False replaces both networks by ones that do almost nothing. cuda_graphs: record and replay the step as a
    CUDA graph.
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
    """Replaces a network: reads one pixel of each image, so that the images still have to be computed."""

    def __init__(self, resolution: int):
        super().__init__()
        self._pixel = nn.Conv2d(3, CLASSES, 1, stride=resolution)

    def forward(self, images: Tensor) -> Tensor:
        return self._pixel(images).flatten(1)


def student_of(pair: Pair, network: nn.Module) -> Student:
    """Returns a student with the papers' optimizer."""
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
    """Measures the networks of each pair; with quick on a GPU only the whole steps."""
    pairs = [Pair(*names, settings) for names in settings.pairs]
    rows: list[Row] = []
    notes: list[str] = []
    if settings.quick and settings.on_gpu:
        # Compiling takes most of the time and runs for all pairs at once.
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
            f"Batches of {settings.batch} crops of {settings.resolution} px already on the device, "
            f"{settings.computing}, random weights. images/s of one device: median, lowest and highest of "
            f"{settings.turns} turns of {settings.seconds:g} s or more, taken alternately, after one untimed turn.",
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
    """Returns a note that explains record.GPU_COLUMNS; [] on a CPU."""
    if not settings.on_gpu:
        return []
    return [
        "idle: the share of a turn in which nothing ran on the GPU; kernels and copies, with overlaps counted once, "
        "are timed by PyTorch's profiler outside the turns. MHz, W: the GPU's clock and power in the middle of the "
        "turns, from nvidia-smi."
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
    """Returns contenders with our own kernels, for networks that these support; [] on a CPU and in float32.

    The kernels need a GPU and are not used in training yet.
    """
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
    """Returns notes on a pair: its limits, the time of a step outside networks, and the compiler's messages."""
    measured = ran(rows)
    notes = [f"{title}: {note}" for note in demand_note(measured)]
    if all(name in measured for name in (REFINERY, STUDENT, OPTIMIZER, BARE, STEP)):
        seconds = {name: row["batch"] / row["rate"]["median"] for name, row in measured.items()}
        step = seconds[STEP]
        alone = (seconds[OPTIMIZER] + seconds[BARE]) / step
        rest = 1 - (seconds[REFINERY] + seconds[STUDENT]) / step
        notes.append(
            f"{title}: work outside the networks takes {100 * alone:.1f} % of a step, measured alone (normalise, loss, "
            f"metrics {1000 * seconds[BARE]:.3g} ms, optimizer {1000 * seconds[OPTIMIZER]:.3g} ms of "
            f"{1000 * step:.4g} ms); the step's time beyond that of the two networks measured alone is "
            f"{100 * rest:.1f} %."
        )
    if STEP in measured and "compiler" in measured[STEP]:
        notes.append(f"{title}: {compiler_note(measured[STEP]['compiler'])}")
    return notes
