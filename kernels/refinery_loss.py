"""The loss of label refinery: KL divergence from the label to the student's output (Label Refinery, eq. 1).

Computed in float32 whatever the networks' precision. The label's own entropy, constant for the student, is taken off,
so that the loss is 0 where the student has learned all that the label says.
"""

import torch
from torch.nn import functional as F


def kl_to_class_ids(student: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """KL(one-hot || student), cross-entropy. student: logits [B, C]; ids: int64 [B]. Returns the batch mean."""
    return F.cross_entropy(student.float(), ids)


def kl_to_logits(student: torch.Tensor, refinery: torch.Tensor) -> torch.Tensor:
    """KL(softmax(refinery) || softmax(student)), temperature 1. Both: logits [B, C]. Returns the batch mean."""
    log_labels = F.log_softmax(refinery.float(), dim=1)
    return F.kl_div(F.log_softmax(student.float(), dim=1), log_labels, reduction="batchmean", log_target=True)


def kl_to_probabilities(student: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """KL(labels || softmax(student)). student: logits [B, C]; labels: [B, C], rows sum to 1. Returns the batch mean."""
    return F.kl_div(F.log_softmax(student.float(), dim=1), labels.float(), reduction="batchmean")
