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
from torch.nn import functional as F

from data.loader import CropBatch, Pairing
from kernels.refinery_loss import probabilities_loss, refinery_loss, sparse_loss


@dataclass
class Targets:
    """What the student is to say about each crop, in one of four forms.

    ids: class ids int64 [B]. logits: a refinery's logits [B, C]. probabilities: [B, C], rows sum to 1.
    sparse: (classes int64 [B, K], their probabilities [B, K], what each of the other classes gets [B]).
    """

    ids: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    probabilities: torch.Tensor | None = None
    sparse: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None

    def classes(self) -> torch.Tensor:
        """The likeliest class of each crop: int64 [B]."""
        if self.ids is not None:
            return self.ids
        if self.sparse is not None:
            classes, values, _ = self.sparse
            return classes.gather(1, values.argmax(dim=1, keepdim=True))[:, 0]
        scores = self.logits if self.logits is not None else self.probabilities
        assert scores is not None
        return scores.argmax(dim=1)

    def loss(self, student: torch.Tensor, *, kind: str = "soft", temperature: float = 1.0) -> torch.Tensor:
        """Each crop's loss, float32 [B]. student: logits [B, C]. kind, temperature: see kernels.refinery_loss.

        Class ids are learned by cross-entropy, whatever the kind.
        """
        if self.ids is not None:
            return F.cross_entropy(student.float(), self.ids, reduction="none")
        if self.logits is not None:
            return refinery_loss(student, self.logits, kind=kind, temperature=temperature)
        if self.sparse is not None:
            return sparse_loss(student, *self.sparse, kind=kind, temperature=temperature)
        assert self.probabilities is not None
        return probabilities_loss(student, self.probabilities, kind=kind, temperature=temperature)


class LabelSource(nn.Module):
    """Base of all label sources: overrides forward, and fetch where labels lie in files.

    pairings: further crops of each image that forward needs.
    """

    pairings: tuple[Pairing, ...] = ()

    def fetch(self, indices: NDArray[np.int64], copies: NDArray[np.int64], epoch: int) -> Any:
        """Host tensors for these crops (indices and copies int64 [B]), or None where nothing is looked up."""
        return None

    def forward(self, batch: CropBatch) -> Targets:
        raise NotImplementedError
