"""A refinery and a student as the bench runs them, and their input."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import models
from bench.settings import Settings
from bench.traffic import traffic
from bench.turns import Contender, Runner
from data.loader import CropBatch
from train.device import on_device
from train.labels.refinery import Refinery

CLASSES = 1000


class Demand(NamedTuple):
    """The work per image.

    flops: operations of matrix products and convolutions (torch.utils.flop_counter). bytes: bytes read and written in
    the device's memory (bench.traffic), including an image's share of the bytes of weights.
    """

    flops: float
    bytes: float

    def plus(self, other: "Demand") -> "Demand":
        return Demand(self.flops + other.flops, self.bytes + other.bytes)


@dataclass(frozen=True)
class Pair:
    """A refinery and a student, by name, and the settings that they run with."""

    refinery: str
    student: str
    settings: Settings

    def __str__(self) -> str:
        return f"{self.refinery} → {self.student}"

    def why_not(self) -> str:
        """Returns why the networks cannot take crops of this resolution, or ""."""
        try:
            for name in (self.refinery, self.student):
                models.check_resolution(name, self.settings.resolution)
        except models.ModelError as error:
            return str(error)
        return ""

    def demands(self) -> tuple["Demand", "Demand"]:
        """Returns the work per image of the refinery's forward, and of the student's forward and backward.

        Both are zero if the networks cannot take the crops.
        """
        if self.why_not():
            return Demand(0.0, 0.0), Demand(0.0, 0.0)
        return self._demand(self.refinery, backward=False), self._demand(self.student, backward=True)

    def demand_of(self, rewritten: Callable[[nn.Module], nn.Module], *, student: bool) -> "Demand":
        """Returns the work per image of the student, or else of the refinery, after `rewritten` has replaced it."""
        return self._demand(self.student if student else self.refinery, backward=student, rewritten=rewritten)

    def _demand(
        self, name: str, *, backward: bool, rewritten: Callable[[nn.Module], nn.Module] = lambda network: network
    ) -> "Demand":
        settings = self.settings
        moved = traffic(
            name,
            backward=backward,
            batch=settings.batch,
            resolution=settings.resolution,
            autocast=settings.autocast,
            classes=CLASSES,
            rewritten=rewritten,
        )
        return Demand(self._flops(name, backward=backward), moved.bytes_per_image)

    def _flops(self, name: str, *, backward: bool) -> float:
        images, side = 2, self.settings.resolution  # batch normalisation in training refuses a single value a channel
        with torch.device("meta"), FlopCounterMode(display=False) as counter:
            logits = models.build(name, CLASSES)(torch.empty(images, 3, side, side))
            if backward:
                logits.sum().backward()
        return counter.get_total_flops() / images

    def contender(self, name: str, build: Callable[["Pair"], Runner], demand: "Demand | None" = None) -> Contender:
        """Returns a contender of this pair. build: is called with the pair. demand: the work per image."""
        row = {
            "name": name,
            "group": str(self),
            "unit": "images/s",
            "batch": self.settings.batch,
            "flops": demand.flops if demand else None,
            "bytes": demand.bytes if demand else None,
        }
        return Contender(partial(build, self), row, self.why_not())


def crops(settings: Settings) -> Tensor:
    """Returns random pixels: uint8 [batch, 3, resolution, resolution], channels-last, on the device."""
    shape = (settings.batch, settings.resolution, settings.resolution, 3)
    return torch.randint(256, shape, dtype=torch.uint8, device=settings.device).permute(0, 3, 1, 2)


def batch(settings: Settings) -> CropBatch:
    """Returns a batch of random crops on the device."""
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
    """Returns the network as a label source with batch statistics, on the device."""
    dtype = pair.settings.autocast or torch.float32
    source = Refinery(network, models.normalisation(pair.refinery), dtype=dtype)
    return on_device(source, torch.device(pair.settings.device))
