"""One training step: crops in, labels from their source, student forward and backward, weights moved.

Nothing here waits for the device: the sums and the not-finite flag stay on it until they are read.
"""

import torch
from torch import nn

from data.loader import CropBatch
from kernels.normalise import Normalisation, Normalise
from train.labels import LabelSource

# What the sums hold, in order.
LOSS, TOP1, TOP5, CROPS = range(4)


class Step:
    """A step of training `student` on the labels of `labels`.

    sums: float64 [4] on the device: loss times crops, correct top-1, correct top-5 (of the images' classes), crops;
    counted since they were last set to zero. A loss that is not finite makes sums[LOSS] not finite.
    autocast: bfloat16 or None for float32 throughout. compiled: labels, student and loss as one compiled graph.
    """

    def __init__(
        self,
        student: nn.Module,
        labels: LabelSource,
        optimizer: torch.optim.Optimizer,
        normalisation: Normalisation,
        *,
        device: torch.device,
        autocast: torch.dtype | None,
        compiled: bool,
    ):
        self.student = student
        self.labels = labels
        self.optimizer = optimizer
        self._normalise = Normalise(normalisation).to(device)
        self._device = device
        self._autocast = autocast
        self.sums = torch.zeros(4, dtype=torch.float64, device=device)
        self._loss = torch.compile(self._loss_of, fullgraph=True) if compiled else self._loss_of

    def __call__(self, batch: CropBatch) -> None:
        self.student.train()
        loss, sums = self._loss(batch)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.sums += sums

    def _loss_of(self, batch: CropBatch) -> tuple[torch.Tensor, torch.Tensor]:
        with torch.autocast(self._device.type, dtype=self._autocast, enabled=self._autocast is not None):
            targets = self.labels(batch)
            logits = self.student(self._normalise(batch.crops))
        loss = targets.loss(logits)
        top1, top5 = correct(logits, batch.labels)
        crops = len(batch.labels)
        sums = torch.stack(
            [
                loss.detach().double() * crops,
                top1.double(),
                top5.double(),
                torch.full_like(top1, crops, dtype=torch.float64),
            ]
        )
        return loss, sums


def correct(logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """How many crops have their class first, and among the first five (or all, of fewer). Two int64 scalars."""
    first = logits.topk(min(5, logits.shape[1]), dim=1).indices == labels[:, None]
    return first[:, 0].sum(), first.sum()
