"""Label sources: whoever says what a crop shows. All are interchangeable parts of the same step.

A source works in two halves. `fetch` runs on the loader's side, on the host, and looks things up in files; `forward`
runs on the device, inside the compiled graph, and makes the targets of a batch.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from data.loader import CropBatch
from kernels.refinery_loss import kl_to_class_ids, kl_to_logits, kl_to_probabilities


@dataclass
class Targets:
    """What the student is to say about each crop, in one of three forms.

    ids: class ids int64 [B]. logits: a refinery's logits [B, C]. probabilities: [B, C], rows sum to 1.
    """

    ids: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    probabilities: torch.Tensor | None = None

    def classes(self) -> torch.Tensor:
        """The likeliest class of each crop: int64 [B]."""
        if self.ids is not None:
            return self.ids
        scores = self.logits if self.logits is not None else self.probabilities
        assert scores is not None
        return scores.argmax(dim=1)

    def loss(self, student: torch.Tensor) -> torch.Tensor:
        """KL(target || student's output), batch mean, a float32 scalar. student: logits [B, C]."""
        if self.ids is not None:
            return kl_to_class_ids(student, self.ids)
        if self.logits is not None:
            return kl_to_logits(student, self.logits)
        assert self.probabilities is not None
        return kl_to_probabilities(student, self.probabilities)


class LabelSource(nn.Module):
    """Base of all label sources: overrides forward, and fetch where labels lie in files."""

    def fetch(self, indices: NDArray[np.int64], copies: NDArray[np.int64], epoch: int) -> Any:
        """Host tensors for these crops (indices and copies int64 [B]), or None where nothing is looked up."""
        return None

    def forward(self, batch: CropBatch) -> Targets:
        raise NotImplementedError
