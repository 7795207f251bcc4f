"""Augmentation of crops on the device: colour changes, and mixing of pairs of crops (ReLabel, section 4.1)."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from data.decoders import delivered
from data.plan import random_colours, random_mixing
from kernels.colour import change_colours
from kernels.mix import mix
from train import TrainError


@dataclass(frozen=True)
class AugmentConfig:
    """How crops are augmented on the device.

    Args:
        color_jitter: brightness, contrast and saturation are each multiplied by 1 - this to 1 + this (0: none; 0.4 in
            ReLabel)
        lighting: standard deviation of the noise along the principal components of ImageNet's colours (0: none; 0.1 in
            ReLabel)
        cutmix: probability per step that a box of each crop shows another crop, whose label gets the box's share
        cutmix_beta: the box's share of the area is drawn from a beta distribution with both parameters this
        mixup: probability per step that crops are blended in pairs, and their labels with them
        mixup_beta: like cutmix_beta, for the share of a blend
        unmixed: the last share of the run in which nothing is mixed
        refinery_sees: what a refinery labels: mixed, exactly what the student sees; coloured, the crop before it is
            mixed; plain, the crop as it was cut. Labels from before the mixing are mixed like the crops
    """

    color_jitter: float = 0.0
    lighting: float = 0.0
    cutmix: float = 0.0
    cutmix_beta: float = 1.0
    mixup: float = 0.0
    mixup_beta: float = 0.2
    unmixed: float = 0.0
    refinery_sees: Literal["mixed", "coloured", "plain"] = "mixed"

    def __post_init__(self):
        for name in ("color_jitter", "cutmix", "mixup", "unmixed"):
            if not 0 <= getattr(self, name) <= 1:
                raise TrainError(f"augment.{name}={getattr(self, name):g}: must be 0 to 1")
        if self.cutmix + self.mixup > 1:
            raise TrainError(
                f"augment.cutmix={self.cutmix:g} and augment.mixup={self.mixup:g}: are probabilities of one or the "
                "other, and must not be above 1 in sum"
            )
        if not 0 <= self.lighting < float("inf"):
            raise TrainError(f"augment.lighting={self.lighting:g}: must not be below 0")
        for name in ("cutmix_beta", "mixup_beta"):
            if not 0 < getattr(self, name) < float("inf"):
                raise TrainError(f"augment.{name}={getattr(self, name):g}: must be above 0")

    @property
    def colours(self) -> bool:
        """Whether colours are changed."""
        return self.color_jitter > 0 or self.lighting > 0

    @property
    def mixes(self) -> bool:
        """Whether crops are mixed."""
        return self.cutmix > 0 or self.mixup > 0

    def describe(self) -> str:
        """A description of the augmentation in one line; empty if there is none."""
        values = {"colour jitter": self.color_jitter, "lighting": self.lighting}
        values |= {"CutMix": self.cutmix, "Mixup": self.mixup}
        return ", ".join(f"{name} {value:g}" for name, value in values.items() if value)


class Augment:
    """The augmentation of a run. seed: the run's. epochs: its length. device: where its crops are.

    Draws are a hash of seed, epoch and step, so that a continued run draws the same.
    """

    def __init__(self, config: AugmentConfig, *, seed: int, epochs: int, device: torch.device):
        self.colours, self.mixes = config.colours, config.mixes
        self._config, self._seed, self._device = config, seed, device
        self._mixed_epochs = epochs - round(config.unmixed * epochs)

    def draw(self, count: int, resolution: int, *, epoch: int, step: int, part: int = 0) -> Tensor:
        """The augmentation of each of the `count` crops of a step's part: float32 [count, 13] on the device.

        Columns: see `colour` and `mix`. It is one tensor, which takes one copy to the device, and no value is passed as
        a Python number, for which a compiled graph would be recompiled.
        """
        config, mixing = self._config, epoch < self._mixed_epochs
        factors, shifts = random_colours(
            count,
            seed=self._seed,
            epoch=epoch,
            step=step,
            part=part,
            jitter=config.color_jitter,
            lighting=config.lighting,
        )
        mixed = random_mixing(
            count,
            resolution,
            seed=self._seed,
            epoch=epoch,
            step=step,
            part=part,
            cutmix=config.cutmix if mixing else 0,
            cutmix_beta=config.cutmix_beta,
            mixup=config.mixup if mixing else 0,
            mixup_beta=config.mixup_beta,
        )
        same = np.tile([*mixed.box, mixed.inside, mixed.kept], (count, 1))
        table = np.concatenate([factors, shifts, mixed.partners[:, None], same], axis=1, dtype=np.float32)
        return delivered(torch.from_numpy(table), self._device)

    def colour(self, crops: Tensor, draws: Tensor) -> Tensor:
        """Crops [B, 3, R, R] in 0..255 with changed colours (kernels.colour): by the draws' columns 0 to 5."""
        return change_colours(crops, draws[:, :3], draws[:, 3:6]) if self.colours else crops

    def mix(self, crops: Tensor, draws: Tensor) -> Tensor:
        """Crops [B, 3, R, R] mixed in pairs (kernels.mix): by the draws' columns 6 to 11."""
        return mix(crops, partners(draws), draws[:, 7:11], draws[:, 11]) if self.mixes else crops


def partners(draws: Tensor) -> Tensor:
    """The index in the batch of the crop that is mixed into each: int64 [B]."""
    return draws[:, 6].long()


def kept(draws: Tensor) -> Tensor:
    """The share of its own label that each crop keeps, 0 to 1: [B]."""
    return draws[:, 12]
