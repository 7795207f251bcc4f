"""The accuracy of a network: top-1, top-5, loss, and the accuracy of each class; beside it other kinds of accuracy."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from data.loader import CropBatch, Loader, open_loader
from data.originals import Originals
from data.plan import CropRule
from data.progress import images_bar
from data.sets import ConvertedSet
from kernels.normalise import Normalisation, Normalise
from train import TrainError
from train.device import computing_in
from train.distributed import ALONE, Group


class Stopped(Exception):
    """Scoring was stopped before its end; raised in all processes."""


@dataclass
class Scores:
    """Accuracies in percent. per_class: for each class, its images and its top-1 (None if it has no images).

    predicted: int64 [images of the set], the most likely class of each; -1 for one that could not be read.
    loss: mean cross entropy in nats with the true labels, over the classes that the network chooses among.
    """

    top1: float
    top5: float
    images: int
    per_class: list[tuple[int, float | None]]
    predicted: torch.Tensor
    loss: float


@dataclass(frozen=True)
class Said:
    """A network's answers for the scored images of a batch.

    indices, labels: int64 [n], images of the set, and their classes. likeliest: int64 [n, k], the most likely of the
    classes to choose from, five unless there are fewer; probabilities: theirs, float32 [n, k]. of_label: float32 [n],
    the probability of each image's label.
    """

    indices: torch.Tensor
    labels: torch.Tensor
    likeliest: torch.Tensor
    probabilities: torch.Tensor
    of_label: torch.Tensor


def answering(
    network: nn.Module, normalisation: Normalisation, *, device: torch.device, autocast: torch.dtype | None
) -> Callable[[torch.Tensor], torch.Tensor]:
    """The network in evaluation mode, as a function of crops uint8 [B, 3, R, R] to logits float32 [B, outputs]."""
    network.eval()
    normalise = Normalise(normalisation).to(device)

    @torch.inference_mode()
    def logits(crops: torch.Tensor) -> torch.Tensor:
        with computing_in(autocast, device):
            return network(normalise(crops)).float()

    return logits


def likeliest_five(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The five most likely classes, int64 [B, 5], and all probabilities, float32 [B, C], of logits [B, C].

    All of them if there are fewer.
    """
    return logits.topk(min(5, logits.shape[1]), dim=1).indices, logits.softmax(dim=1)


@torch.inference_mode()
def score(
    network: nn.Module,
    loader: Loader | Originals,
    normalisation: Normalisation,
    *,
    device: torch.device,
    autocast: torch.dtype | None,
    columns: Sequence[int] | None = None,
    together: Group = ALONE,
    stop: Callable[[], bool] = lambda: False,
    each: Callable[[Said], None] | None = None,
) -> Scores:
    """Runs the network over the loader's images, in evaluation mode.

    columns: the network's output for each class of the loader, or -1 if the network lacks it; None if the two are the
    same. The network chooses only among the loader's classes, and images of classes that it lacks are not scored.
    together: the processes whose loaders divide the set's images among them. stop: whether to stop, called before each
    batch. each: called after each batch. Raises Stopped if `stop` returns True in any process, and TrainError if no
    image is left.
    """
    answer = answering(network, normalisation, device=device, autocast=autocast)
    num_classes = loader.num_classes
    known = torch.tensor(range(num_classes) if columns is None else columns)
    # The loader's classes to choose from, and their outputs.
    choices = (known >= 0).nonzero()[:, 0].to(device)
    outputs = known.to(device)[choices]
    # The index of each class among the choices; cross entropy ignores images with index -1.
    places = torch.full((num_classes,), -1, dtype=torch.int64, device=device)
    places[choices] = torch.arange(len(choices), device=device)
    # Rows: images of each class, those right in top-1, those right in top-5.
    counts = torch.zeros(3, num_classes, dtype=torch.int64, device=device)
    predicted = torch.full((loader.num_samples,), -1, dtype=torch.int64, device=device)
    # Per image, so that the sum has the same order for any number of processes.
    losses = torch.zeros(loader.num_samples, dtype=torch.float64, device=device)
    stopped = False
    with images_bar(loader.num_samples, "score", leave=False) as bar:
        for batch in loader.epoch(0):
            stopped = stop()
            if stopped:
                break
            chosen = answer(batch.crops)[:, outputs]
            first_five, probabilities = likeliest_five(chosen)
            likeliest = choices[first_five]
            predicted[batch.indices] = likeliest[:, 0]
            own = F.cross_entropy(chosen, places[batch.labels], ignore_index=-1, reduction="none")
            losses[batch.indices] = own.double()
            hits = likeliest == batch.labels[:, None]
            for row, weights in enumerate((torch.isin(batch.labels, choices), hits[:, 0], hits.any(dim=1))):
                counts[row].scatter_add_(0, batch.labels, weights.long())
            if each:
                each(_said(batch, choices, first_five, probabilities))
            bar.update(len(batch.labels))
    if any(together.largest([stopped])):
        raise Stopped
    predicted = together.sum(predicted + 1) - 1
    losses = together.sum(losses)
    images, first, within5 = together.sum(counts).cpu().tolist()
    total = sum(images)
    if not total:
        raise TrainError("there is no image to score: none could be read that is of a class of the network")
    return Scores(
        top1=100 * sum(first) / total,
        top5=100 * sum(within5) / total,
        images=total,
        per_class=[(n, 100 * right / n if n else None) for n, right in zip(images, first, strict=True)],
        predicted=predicted.cpu(),
        loss=float(losses.sum()) / total,
    )


def _said(batch: CropBatch, choices: torch.Tensor, first_five: torch.Tensor, probabilities: torch.Tensor) -> Said:
    """choices: int64, the classes of the columns of `probabilities`, in order; first_five: indices of these."""
    scored = torch.isin(batch.labels, choices)
    labels, probabilities, first_five = batch.labels[scored], probabilities[scored], first_five[scored]
    return Said(
        indices=batch.indices[scored],
        labels=labels,
        likeliest=choices[first_five],
        probabilities=probabilities.gather(1, first_five),
        of_label=probabilities.gather(1, torch.searchsorted(choices, labels)[:, None])[:, 0],
    )


def validation_loader(
    data: ConvertedSet,
    *,
    resolution: int,
    crop: CropRule,
    batch: int,
    **loading: Any,
) -> Loader:
    """The validation images of a set, each once. loading: further arguments of open_loader (decoder, device, ...)."""
    return open_loader(data.beton("val"), resolution=resolution, batch_size=batch, train=False, crop=crop, **loading)
