"""Measures the speed of cheaper ways to run a refinery, and how much they change its labels.

For a trained refinery, on training crops of its data: averaged or running statistics instead of batch statistics, lower
resolutions, and several students from one pass.
"""

import itertools
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

import models
from bench import BenchError
from bench.networks import student_of
from bench.pair import Pair
from bench.process import CallFailed, Process
from bench.record import BATCH_TIME, DEVICE_MEMORY, MEMORY, Column, Record, Row, optional, rate_columns
from bench.settings import Settings
from bench.turns import Contender, Runner, Work, in_turns
from command import UserError
from data.loader import CropBatch, Loader, open_loader
from data.sets import ConvertedSet, find_set
from models.fused_resnet import FusedResNet, is_fusable
from models.trained import Trained, load_trained
from train.device import computing_in, on_device, set_tf32_and_allocator
from train.labels.refinery import Refinery
from train.step import Step

# Statistics of batch normalisation, and the share of the crops' side. The others are compared with the first.
_OPTIONS = tuple((bn, share) for share in (1.0, 0.71, 0.5) for bn in ("batch", "averaged", "running"))
# Batch statistics by kernels fused with the convolutions (models.fused_resnet); on a GPU, for networks they support.
_FUSED = ("fused", 1.0)
_STUDENTS = 3
_AT_ONCE = {"cpu": 1, "cuda": 20}


def _side(resolution: int, share: float) -> int:
    """Returns the share of a resolution, rounded to 8 px if it is below 1."""
    return max(round(resolution * share / 8) * 8, 8) if share < 1 else resolution


def _opened(settings: Settings) -> tuple[Trained, ConvertedSet, int]:
    """Returns the refinery, its data, and the resolution of crops. Raises BenchError, DataError or ModelError."""
    if not settings.refinery:
        raise BenchError("needs a trained refinery: REFINERY=run folder or NAME:FILE, with DATA=its converted set")
    data = find_set(settings.data or "scenes")
    if not isinstance(data, ConvertedSet):
        raise BenchError(f"DATA={settings.data or 'scenes'}: is not converted yet; make convert DATA=... OUT=...")
    trained = load_trained(settings.refinery, class_names=data.class_names)
    return trained, data, trained.resolution or data.resolution


def _loader(settings: Settings, data: ConvertedSet, resolution: int) -> Loader:
    return open_loader(
        data.beton("train"),
        resolution=resolution,
        batch_size=settings.batch,
        device=settings.device,
        crop=data.crop,
    )


def _refinery(settings: Settings, trained: Trained, bn: str, resolution: int, loader: Loader) -> Refinery:
    """Returns the refinery at a resolution; averaged statistics are taken over another epoch than the labelled one."""
    device = torch.device(settings.device)
    with computing_in(settings.autocast, device):
        source = Refinery(
            trained.network,
            trained.normalisation,
            bn="batch" if bn == "fused" else bn,
            over=loader.epoch(1) if bn == "averaged" else (),
            resolution=resolution,
            dtype=settings.autocast or torch.float32,
        )
    if bn == "fused":
        source.network = FusedResNet(source.network)
    return on_device(source, device)


class Labelling(Runner):
    """Labels a prepared batch."""

    def __init__(self, settings: Settings, bn: str, share: float):
        self.device = settings.device
        self._settings = settings
        set_tf32_and_allocator(torch.device(settings.device), settings.precision)
        trained, data, resolution = _opened(settings)
        loader = _loader(settings, data, resolution)
        self._labels = _refinery(settings, trained, bn, _side(resolution, share), loader)
        (self._batch,) = itertools.islice(loader.epoch(0), 1)
        self._forward: Callable[[CropBatch], Any] = (
            torch.compile(self._logits, fullgraph=True, dynamic=False) if settings.compiled else self._logits
        )

    def run(self) -> Work:
        with torch.no_grad():
            for _ in range(_AT_ONCE[self.device]):
                self._forward(self._batch)
        return Work(_AT_ONCE[self.device] * self._settings.batch)

    def _logits(self, batch: CropBatch) -> torch.Tensor | None:
        with computing_in(self._settings.autocast, torch.device(self.device)):
            return self._labels(batch).logits


class Teaching(Runner):
    """Trains several students in one step, or in a step each; a crop counts once for all students."""

    def __init__(self, settings: Settings, together: bool):
        self.device = settings.device
        self._settings = settings
        set_tf32_and_allocator(torch.device(settings.device), settings.precision)
        trained, data, resolution = _opened(settings)
        loader = _loader(settings, data, resolution)
        labels = _refinery(settings, trained, "batch", resolution, loader)
        pair = Pair(*settings.pairs[0], settings)
        classes = len(trained.class_names)
        students = [student_of(pair, models.build(pair.student, classes)) for _ in range(_STUDENTS)]
        self._steps = [
            Step(
                group,
                labels,
                device=torch.device(self.device),
                autocast=settings.autocast,
                compiled=settings.compiled,
                strict=True,
            )
            for group in ([students] if together else [[student] for student in students])
        ]
        (self._batch,) = itertools.islice(loader.epoch(0), 1)

    def run(self) -> Work:
        for _ in range(_AT_ONCE[self.device]):
            for step in self._steps:
                step(self._batch)
        return Work(_AT_ONCE[self.device] * self._settings.batch)


def measure(settings: Settings) -> Record:
    """Measures the options of settings.refinery; if it cannot be opened, a row has the reason."""
    try:
        trained, data, resolution = _opened(settings)
        rows, notes = _rows(settings, trained, resolution), _notes(settings, trained, data, resolution)
    except UserError as error:
        rows, notes = [{"name": "all options", "group": "", "unit": "images/s", "not_run": str(error)}], []
    return Record(
        part="refinery_cost",
        settings=settings.of_networks
        | {
            "refinery": Path(settings.refinery).name if settings.refinery else None,
            "data": settings.source,
            "crops": settings.crops,
        },
        notes=notes,
        rows=rows,
        identity=(Column("part", lambda row: row["group"]), Column("what", lambda row: row["name"])),
        figures=(
            *rate_columns("images/s"),
            BATCH_TIME,
            optional("gain", "gain", lambda gain: f"{gain:.2f}"),
            optional("agrees", "agreement", lambda share: f"{100 * share:.1f} %"),
            optional("KL", "divergence", lambda nats: f"{nats:.3g}"),
            DEVICE_MEMORY if settings.device == "cuda" else MEMORY,
        ),
    )


def _rows(settings: Settings, trained: Trained, resolution: int) -> list[Row]:
    options = _options(settings, trained)
    labelling = [
        _contender(settings, "labels", _named(option, resolution), partial(Labelling, settings, *option))
        for option in options
    ]
    teaching = [
        _contender(
            settings, "students", f"{_STUDENTS} x {settings.pairs[0][1]}, {how}", partial(Teaching, settings, one)
        )
        for how, one in (("a step each", False), ("one step", True))
    ]
    rows: list[Row] = []
    for members in (labelling, teaching):
        title = f"refinery cost, {members[0].row['group']}"
        found = in_turns(members, **settings.pace, apart=settings.on_gpu, title=title)
        # The others are compared with the first of each group.
        if "not_run" not in found[0]:
            for row in found:
                if "not_run" not in row:
                    row["gain"] = row["rate"]["median"] / found[0]["rate"]["median"]
        rows += found
    _compare_labels(settings, rows[: len(labelling)], options)
    return rows


def _options(settings: Settings, trained: Trained) -> list[tuple[str, float]]:
    fusable = settings.on_gpu and settings.autocast and is_fusable(trained.network)
    return [*_OPTIONS, *([_FUSED] if fusable else [])]


def _named(option: tuple[str, float], resolution: int) -> str:
    bn = "batch, fused" if option == _FUSED else option[0]
    return f"bn={bn}, {_side(resolution, option[1])} px"


def _contender(settings: Settings, group: str, name: str, build: Callable[[], Runner]) -> Contender:
    return Contender(build, {"name": name, "group": group, "unit": "images/s", "batch": settings.batch})


def _notes(settings: Settings, trained: Trained, data: ConvertedSet, resolution: int) -> list[str]:
    reference = _named(_OPTIONS[0], resolution)
    return [
        f"{trained.name} on training crops of {data.name} at {resolution} px, in batches of {settings.batch}, "
        f"{settings.computing}. images/s of one device: median, lowest and highest of {settings.turns} turns of "
        f"{settings.seconds:g} s or more, taken alternately, after one untimed turn. labels: the refinery's pass "
        "alone. students: whole steps; a crop counts once.",
        f"gain: the ratio to the rate of {reference}, or of a step each. agrees: how often the most likely class is "
        f"that of {reference}. KL: KL({reference} || option) of the labels, mean in nats. Both on "
        f"{_label_batches(settings) * settings.batch} crops, or on one epoch if it has fewer.",
    ]


def _label_batches(settings: Settings) -> int:
    return -(-settings.crops // settings.batch)


# ---- differences of labels, computed in one process


def _compare_labels(settings: Settings, rows: list[Row], options: list[tuple[str, float]]) -> None:
    """Adds `agreement` and `divergence` to the rows that ran. rows, options: in the same order."""
    with Process() as process:
        for row, option in zip(rows, options, strict=True):
            if "not_run" not in row:
                try:
                    row |= process.call(_differences, settings, *option)
                except CallFailed as error:
                    row["not_run"] = str(error)
            if "not_run" in rows[0]:
                return


_reference: list[torch.Tensor] = []


@torch.inference_mode()
def _differences(settings: Settings, bn: str, share: float) -> dict[str, float]:
    """Returns agreement, 0 to 1, and divergence, KL in nats, of the option's labels with those of the first call."""
    set_tf32_and_allocator(torch.device(settings.device), settings.precision)
    trained, data, resolution = _opened(settings)
    loader = _loader(settings, data, resolution)
    labels = _refinery(settings, trained, bn, _side(resolution, share), loader)
    first = not _reference
    same, divergence, count = 0, 0.0, 0
    batches = itertools.islice(loader.epoch(0), _label_batches(settings))
    for number, batch in enumerate(batches):
        with computing_in(settings.autocast, torch.device(settings.device)):
            logits = labels(batch).logits
        assert logits is not None
        found = F.log_softmax(logits.float(), dim=1)
        if first:
            _reference.append(found)
        expected = _reference[number]
        same += int((found.argmax(dim=1) == expected.argmax(dim=1)).sum())
        divergence += float(F.kl_div(found, expected, reduction="sum", log_target=True))
        count += len(found)
    return {"agreement": same / count, "divergence": divergence / count}
