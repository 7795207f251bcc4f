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
from train.failures import is_out_of_memory, reason


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


class Answers:
    """Networks as one function of crops uint8 [B, 3, R, R] to the logits of each, float32 [B, outputs].

    networks: each with the normalisation of its input. compiled: as one compiled graph; batches smaller than the first
    one are filled up to its size, which the graph was compiled for. If compilation fails, a notice is printed.
    """

    def __init__(
        self,
        networks: Sequence[tuple[nn.Module, Normalisation]],
        *,
        device: torch.device,
        autocast: torch.dtype | None,
        compiled: bool = False,
    ):
        self.networks = [network for network, _ in networks]
        self.device, self._autocast = device, autocast
        self._normalise = [Normalise(normalisation).to(device) for _, normalisation in networks]
        self._compiled = torch.compile(self._logits, fullgraph=True, dynamic=False) if compiled else None
        self._full = 0

    @torch.no_grad()
    def __call__(self, crops: torch.Tensor) -> list[torch.Tensor]:
        # Not inference_mode: its tensors are of another kind, which would need a further graph.
        if self._compiled is None:
            return self._logits(crops)
        count = len(crops)
        self._full = max(self._full, count)
        filled = crops
        if count < self._full:
            filled = torch.cat([crops, crops[:1].expand(self._full - count, -1, -1, -1)])
            filled = filled.contiguous(memory_format=torch.channels_last)
        try:
            return [logits[:count] for logits in self._compiled(filled)]
        except Exception as error:  # compilers raise many kinds of errors
            if is_out_of_memory(error):
                raise
            print(f"validation cannot be compiled and runs uncompiled ({reason(error)})", flush=True)
        self._compiled = None
        return self._logits(crops)

    def _logits(self, crops: torch.Tensor) -> list[torch.Tensor]:
        with computing_in(self._autocast, self.device):
            pairs = zip(self.networks, self._normalise, strict=True)
            return [network(normalise(crops)).float() for network, normalise in pairs]


def answering(
    network: nn.Module, normalisation: Normalisation, *, device: torch.device, autocast: torch.dtype | None
) -> Callable[[torch.Tensor], torch.Tensor]:
    """The network in evaluation mode, as a function of crops uint8 [B, 3, R, R] to logits float32 [B, outputs]."""
    network.eval()
    answer = Answers([(network, normalisation)], device=device, autocast=autocast)
    return lambda crops: answer(crops)[0]


def likeliest_five(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The five most likely classes, int64 [B, 5], and all probabilities, float32 [B, C], of logits [B, C].

    All of them if there are fewer.
    """
    return logits.topk(min(5, logits.shape[1]), dim=1).indices, logits.softmax(dim=1)


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
    answer = Answers([(network, normalisation)], device=device, autocast=autocast)
    return score_all(answer, loader, together, columns=columns, stop=stop, each=each)[0]


@torch.no_grad()
def score_all(
    answer: Answers,
    loader: Loader | Originals,
    together: Group = ALONE,
    *,
    columns: Sequence[int] | None = None,
    stop: Callable[[], bool] = lambda: False,
    each: Callable[[Said], None] | None = None,
) -> list[Scores]:
    """Scores several networks in one pass over the loader's images, in evaluation mode; see `score`."""
    for network in answer.networks:
        network.eval()
    counts = [_Counts(loader, columns, answer.device, each) for _ in answer.networks]
    stopped = False
    with images_bar(loader.num_samples, "score", leave=False) as bar:
        for batch in loader.epoch(0):
            stopped = stop()
            if stopped:
                break
            for count, logits in zip(counts, answer(batch.crops), strict=True):
                count.add(batch, logits)
            bar.update(len(batch.labels))
    if any(together.largest([stopped])):
        raise Stopped
    return [count.scores(together) for count in counts]


class _Counts:
    """Counts of a network's answers so far; arguments as for `score`."""

    def __init__(
        self,
        loader: Loader | Originals,
        columns: Sequence[int] | None,
        device: torch.device,
        each: Callable[[Said], None] | None,
    ):
        num_classes = loader.num_classes
        known = torch.tensor(range(num_classes) if columns is None else columns)
        # The loader's classes to choose from, and their outputs.
        self._choices = (known >= 0).nonzero()[:, 0].to(device)
        self._outputs = known.to(device)[self._choices]
        # The index of each class among the choices; cross entropy ignores images with index -1.
        self._places = torch.full((num_classes,), -1, dtype=torch.int64, device=device)
        self._places[self._choices] = torch.arange(len(self._choices), device=device)
        # Rows: images of each class, those right in top-1, those right in top-5.
        self._counts = torch.zeros(3, num_classes, dtype=torch.int64, device=device)
        self._predicted = torch.full((loader.num_samples,), -1, dtype=torch.int64, device=device)
        # Per image, so that the sum has the same order for any number of processes.
        self._losses = torch.zeros(loader.num_samples, dtype=torch.float64, device=device)
        self._each = each

    def add(self, batch: CropBatch, logits: torch.Tensor) -> None:
        """Counts the answers to a batch, float32 [B, outputs]."""
        chosen = logits[:, self._outputs]
        first_five, probabilities = likeliest_five(chosen)
        likeliest = self._choices[first_five]
        self._predicted[batch.indices] = likeliest[:, 0]
        own = F.cross_entropy(chosen, self._places[batch.labels], ignore_index=-1, reduction="none")
        self._losses[batch.indices] = own.double()
        hits = likeliest == batch.labels[:, None]
        rows = torch.isin(batch.labels, self._choices), hits[:, 0], hits.any(dim=1)
        for row, weights in enumerate(rows):
            self._counts[row].scatter_add_(0, batch.labels, weights.long())
        if self._each:
            self._each(_said(batch, self._choices, first_five, probabilities))

    def scores(self, together: Group) -> Scores:
        """The scores over all images of all processes. Raises TrainError if there are none."""
        predicted = together.sum(self._predicted + 1) - 1
        losses = together.sum(self._losses)
        images, first, within5 = together.sum(self._counts).cpu().tolist()
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
