"""Adversarial jitter: crops changed so that student and refinery disagree more (Label Refinery, section 3.1)."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import nn

from data.loader import CropBatch
from kernels.normalise import Normalise
from train.device import computing_in
from train.labels.source import LabelSource


def with_jittered(
    batch: CropBatch,
    labels: LabelSource,
    student: nn.Module,
    normalise: Normalise,
    *,
    eta: float,
    autocast: torch.dtype | None,
) -> CropBatch:
    """The batch followed by its jittered crops: crops float32 [2B, 3, R, R] in 0..255, not clipped.

    X' = X + eta dL/dX (eq. 3), one ascent step on each crop's KL(refinery || student), through both networks. X is the
    student's normalised input (`normalise`), which the paper leaves open. The gradient is that of the sum of the crops'
    losses, which equals each crop's own except for the mixing by batch normalisation.
    """
    device = batch.crops.device
    crops = batch.crops.float().requires_grad_()
    with computing_in(autocast, device), _statistics_kept(student):
        targets = labels(replace(batch, crops=crops))
        logits = student(normalise(crops))
    (gradient,) = torch.autograd.grad(targets.loss(logits).sum(), crops)
    # X = scale crops + shift, so d crops is dX / scale, and dL/dX is dL/d crops / scale.
    moved = crops.detach() + eta * gradient / normalise.scale**2
    return replace(batch, crops=torch.cat([crops.detach(), moved]))


@contextmanager
def _statistics_kept(network: nn.Module) -> Iterator[None]:
    """The network's running statistics do not change in this context."""
    norms = [m for m in network.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    before = [norm.track_running_stats for norm in norms]
    for norm in norms:
        # In training mode batch statistics are still used, but they do not update the running ones.
        norm.track_running_stats = False
    try:
        yield
    finally:
        for norm, tracked in zip(norms, before, strict=True):
            norm.track_running_stats = tracked
