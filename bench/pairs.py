"""A refinery and a student as the bench runs them, the limit of their step, and the table of what was measured."""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import models
from bench.machine import MatrixProduct
from bench.record import BATCH_TIME, DEVICE_MEMORY, MEMORY, Column, Row, optional, rate_columns
from bench.settings import Settings
from bench.turns import Contender, Runner
from data.loader import CropBatch
from train.labels.refinery import Refinery

CLASSES = 1000
LIMIT = "limit: matrix products"


@dataclass(frozen=True)
class Pair:
    """A refinery and a student, by name, and how they are to run."""

    refinery: str
    student: str
    settings: Settings

    def __str__(self) -> str:
        return f"{self.refinery} → {self.student}"

    def why_not(self) -> str:
        """Why the networks cannot take crops of this resolution, or ""."""
        try:
            for name in (self.refinery, self.student):
                models.check_resolution(name, self.settings.resolution)
        except models.ModelError as error:
            return str(error)
        return ""

    def flops(self) -> tuple[float, float]:
        """Operations of an image in products and convolutions: refinery forward; student forward and backward.

        Zeros where the networks cannot take the crops.
        """
        if self.why_not():
            return 0.0, 0.0
        return self._flops(self.refinery, backward=False), self._flops(self.student, backward=True)

    def _flops(self, name: str, *, backward: bool) -> float:
        images, side = 2, self.settings.resolution  # batch normalisation in training refuses a single value a channel
        with torch.device("meta"), FlopCounterMode(display=False) as counter:
            logits = models.build(name, CLASSES)(torch.empty(images, 3, side, side))
            if backward:
                logits.sum().backward()
        return counter.get_total_flops() / images

    def contender(self, name: str, build: Callable[["Pair"], Runner], flops: float | None = None) -> Contender:
        """One of the pair's; build takes the pair. flops: an image's, of its matrix products and convolutions."""
        row = {
            "name": name,
            "group": str(self),
            "unit": "images/s",
            "batch": self.settings.batch,
            "flops": flops,
        }
        return Contender(partial(build, self), row, self.why_not())

    def limit(self) -> Contender:
        """Large matrix products, counted in images by the operations of a step."""
        return self.contender(LIMIT, Products, sum(self.flops()))


class Products(MatrixProduct):
    def __init__(self, pair: Pair):
        super().__init__(pair.settings.device, pair.settings.precision, sum(pair.flops()))


def crops(settings: Settings) -> Tensor:
    """Random pixels: uint8 [batch, 3, resolution, resolution], channels-last, on the device."""
    shape = (settings.batch, settings.resolution, settings.resolution, 3)
    return torch.randint(256, shape, dtype=torch.uint8, device=settings.device).permute(0, 3, 1, 2)


def batch(settings: Settings) -> CropBatch:
    """A batch that lies ready."""
    ids = torch.arange(settings.batch, device=settings.device)
    boxes = torch.zeros(settings.batch, 4, dtype=torch.int32, device=settings.device)
    return CropBatch(
        crops=crops(settings),
        labels=ids % CLASSES,
        indices=ids,
        copies=torch.zeros_like(ids),
        epoch=0,
        boxes=boxes,
        sizes=boxes[:, 2:],
        flips=boxes[:, 0].bool(),
    )


def refinery(pair: Pair, network: nn.Module) -> Refinery:
    """The network as label source, with batch statistics, on the device."""
    dtype = pair.settings.autocast or torch.float32
    return on_device(Refinery(network, models.normalisation(pair.refinery), dtype=dtype), pair.settings)


def on_device(module: Any, settings: Settings) -> Any:
    return module.to(settings.device).to(memory_format=torch.channels_last)


def figures(settings: Settings, *more: Column) -> tuple[Column, ...]:
    """The columns of rows that are steps, or parts of steps."""
    share = optional("of limit", "share_of_limit", lambda share: f"{100 * share:.0f} %")
    common = (*rate_columns("images/s"), BATCH_TIME, share, *more, MEMORY)
    return (*common, DEVICE_MEMORY) if settings.device == "cuda" else common


def described(settings: Settings) -> dict[str, Any]:
    """What the record says of the settings of parts that run networks."""
    return {
        "resolution": settings.resolution,
        "batch": settings.batch,
        "turns": settings.turns,
        "device": settings.device,
        "precision": settings.precision,
        "compiled": settings.compiled,
    }


def limit_note(settings: Settings) -> str:
    return (
        "of limit: of the rate at which this device, in turns with the rest, does the row's matrix products and "
        f"convolutions (counted by torch.utils.flop_counter) as products of large {settings.precision} matrices."
    )


def with_shares(rows: list[Row]) -> list[Row]:
    """The rows of a pair, those with products each with its share of the limit, where that was measured."""
    reached = next((row for row in rows if row["name"] == LIMIT and "not_run" not in row), None)
    for row in rows:
        if reached and row is not reached and row["flops"] and "not_run" not in row:
            limit = reached["rate"]["median"] * reached["flops"]
            row["share_of_limit"] = row["rate"]["median"] * row["flops"] / limit
    return rows


def measured(rows: list[Row]) -> dict[str, Row]:
    """The rows of a pair that ran, by name."""
    return {row["name"]: row for row in rows if "not_run" not in row}


class CompilerNotes:
    """What the compiler left undone, from now on: its counters of it, and its words about it."""

    def __init__(self):
        self._said: list[str] = []
        # Layouts that were left alone are told at the lowest level only.
        handler = _Listener(self._said)
        logging.getLogger("torch._inductor").addHandler(handler)
        graph = logging.getLogger("torch._inductor.graph")
        graph.setLevel(logging.DEBUG)
        graph.addHandler(handler)

    def found(self) -> dict[str, Any]:
        """graph_breaks, cudagraph_skips: how many. said: lines, each once."""
        from torch._dynamo.utils import counters

        return {
            "graph_breaks": sum(counters["graph_break"].values()),
            "cudagraph_skips": counters["inductor"]["cudagraph_skips"],
            "said": list(dict.fromkeys(self._said)),
        }


class _Listener(logging.Handler):
    def __init__(self, said: list[str]):
        super().__init__()
        self._said = said

    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage()
        if record.levelno >= logging.WARNING or message.lower().startswith("skip"):
            self._said.append(message.splitlines()[0])


def compiler_note(found: dict[str, Any]) -> str:
    said = f"; it said: {'; '.join(found['said'])}" if found["said"] else ""
    return (
        f"the compiler left {found['graph_breaks']} breaks in the step's graph and skipped CUDA graphs "
        f"{found['cudagraph_skips']} times{said}."
    )
