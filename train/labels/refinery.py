"""An online refinery: a trained network that labels the very crop the student sees (Label Refinery, section 3)."""

from collections.abc import Sequence
from copy import deepcopy
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from data.loader import CropBatch, Pairing
from kernels.normalise import Normalisation, Normalise
from models.folding import fold
from train import TrainError
from train.labels import LabelSource, Targets

BN_CHOICES = ("batch", "running")
# Only shapes matter to the folding of batch normalisation; every network with one takes this size.
_USUAL_RESOLUTION = 224


class Refinery(LabelSource):
    """The network's logits for each crop. Its weights and running statistics stay as they are; dropout is off.

    columns: where the data's classes stand among its outputs, for a network that knows more classes; None: they are the
    same. The other outputs are dropped, so that the label is the softmax over the data's classes: what the network says
    of the crop given that it shows one of these. What it gave to the others is no probability that the student, who
    lacks them, could learn.

    bn: "batch" normalises with the statistics of the current batch, as the network itself was trained, which the
    paper found to label more accurately (section 3); "running" uses the stored ones, folded into the convolutions.
    normalisation: mean and std of its input. resolution: px a side that crops are resized to for it; None: as they are.
    center: the central crop that it labels in place of each training crop ("soft static", Table 4); None: it labels the
    training crop itself.
    dtype: what its convolutions and linear layers compute in under autocast, and so what their weights are stored in.
    """

    columns: torch.Tensor | None

    def __init__(
        self,
        network: nn.Module,
        normalisation: Normalisation,
        *,
        bn: str = "batch",
        resolution: int | None = None,
        center: Pairing | None = None,
        columns: Sequence[int] | None = None,
        dtype: torch.dtype = torch.float32,
    ):
        super().__init__()
        self.network = deepcopy(network).requires_grad_(False)
        self.normalise = Normalise(normalisation)
        self.bn = bn
        self.resolution = resolution
        self.pairings = (center,) if center else ()
        self.register_buffer("columns", None if columns is None else torch.tensor(columns), persistent=False)
        norms: list[Any] = [m for m in self.network.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        self.eval()
        if bn == "batch":
            for module in norms:
                # Without running statistics, batch normalisation uses the batch's own, in evaluation mode too.
                module.track_running_stats = False
                module.running_mean = module.running_var = module.num_batches_tracked = None
        elif norms:
            fold(self.network, resolution or _USUAL_RESOLUTION)
        for module in self.network.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                module.to(dtype)

    def train(self, mode: bool = True) -> "Refinery":
        # A refinery never trains: its dropout stays off.
        return super().train(False)

    def forward(self, batch: CropBatch) -> Targets:
        if self.bn == "batch" and batch.crops.shape[0] == 1:
            raise TrainError(
                "batch=1: batch statistics of a single crop mean nothing; use a larger batch or bn=running"
            )
        crops = self.normalise(batch.paired[self.pairings[0]] if self.pairings else batch.crops)
        if self.resolution and crops.shape[-1] != self.resolution:
            crops = F.interpolate(crops, size=(self.resolution, self.resolution), mode="bilinear", antialias=True)
        logits = self.network(crops)
        return Targets(logits=logits if self.columns is None else logits[:, self.columns])
