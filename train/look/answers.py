"""A network's answers for the images of a split, and mistakes, suspects, confusion and calibration from these."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray

from data import plan
from data.beton import Beton
from data.decoders import Request, View, build_decoder
from data.plan import CropRule
from data.progress import images_bar
from kernels.normalise import Normalise
from models.trained import Trained
from train.device import autocast_type, computing_in, on_device
from train.report.analysis import Compute

_CALIBRATION_BINS = 15
# The smallest probability, whose logarithm is still finite.
_LEAST = 1e-12


@dataclass(frozen=True)
class Answers:
    """A network's answers for the central crops of some images.

    whose: the network's name for readers. indices: int64 [n], the images' indices in their split, ascending. labels,
    predicted: int64 [n], the class by the set and the most likely by the network. confidence, of_label: float32 [n],
    the probabilities that it gives to these two. within5: bool [n], the label is among the first five. classes: how
    many there are.
    """

    whose: str
    indices: NDArray[np.int64]
    labels: NDArray[np.int64]
    predicted: NDArray[np.int64]
    confidence: NDArray[np.float32]
    of_label: NDArray[np.float32]
    within5: NDArray[np.bool_]
    classes: int

    @property
    def right(self) -> NDArray[np.bool_]:
        return self.predicted == self.labels

    @cached_property
    def losses(self) -> NDArray[np.float64]:
        """Cross-entropy of each image with its label, in nats: float64 [n]."""
        return -np.log(np.maximum(self.of_label.astype(np.float64), _LEAST))

    def most_doubted(self, count: int) -> NDArray[np.int64]:
        """Rows of the images whose predicted class differs from their label, by loss, the highest first."""
        wrong = np.flatnonzero(~self.right)
        return wrong[np.argsort(-self.losses[wrong], kind="stable")[:count]]

    def of_classes(self) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """Images of each class, int64 [C], and its accuracy in percent, float64 [C], NaN if it has none."""
        images = np.bincount(self.labels, minlength=self.classes)
        hits = np.bincount(self.labels[self.right], minlength=self.classes)
        return images, np.where(images > 0, 100 * hits / np.maximum(images, 1), np.nan)

    def confused(self) -> list[tuple[int, int, int]]:
        """(label, predicted, images) of all pairs of classes that were confused, the most frequent first."""
        wrong = ~self.right
        pairs, counts = np.unique(self.labels[wrong] * self.classes + self.predicted[wrong], return_counts=True)
        order = np.argsort(-counts, kind="stable")
        rows = zip(pairs[order].tolist(), counts[order].tolist(), strict=True)
        return [(*divmod(pair, self.classes), count) for pair, count in rows]


def confusion(answers: Answers) -> NDArray[np.float32]:
    """For each class the shares of its images predicted as each class: float32 [C, C], rows sum to 1, or to 0."""
    places = answers.labels * answers.classes + answers.predicted
    counts = np.bincount(places, minlength=answers.classes**2).reshape(answers.classes, answers.classes)
    return (counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)).astype(np.float32)


@dataclass(frozen=True)
class Calibration:
    """Images sorted by confidence into bins, without empty ones; each float64 [bins] except counts, int64 [bins].

    confidence, accuracy: means of the bin, 0 to 1. low, high: the 95 % interval of the accuracy (Wilson).
    error: expected calibration error, 0 to 1: the mean difference of the two, weighted by images.
    """

    confidence: NDArray[np.float64]
    accuracy: NDArray[np.float64]
    low: NDArray[np.float64]
    high: NDArray[np.float64]
    counts: NDArray[np.int64]
    error: float


def calibration(answers: Answers) -> Calibration:
    """Fifteen bins of equal width, as usual."""
    places = np.minimum((answers.confidence * _CALIBRATION_BINS).astype(int), _CALIBRATION_BINS - 1)
    counts = np.bincount(places, minlength=_CALIBRATION_BINS)
    filled = counts > 0
    n = counts[filled]
    sums = np.bincount(places, weights=answers.confidence, minlength=_CALIBRATION_BINS)[filled]
    confidence = sums / n
    accuracy = np.bincount(places, weights=answers.right, minlength=_CALIBRATION_BINS)[filled] / n
    z = 1.96
    middle = (accuracy + z * z / (2 * n)) / (1 + z * z / n)
    half = z * np.sqrt(accuracy * (1 - accuracy) / n + (z / (2 * n)) ** 2) / (1 + z * z / n)
    error = float((n * np.abs(confidence - accuracy)).sum() / max(n.sum(), 1))
    # Rounding may put a bound on the wrong side of the accuracy itself.
    low, high = np.minimum(middle - half, accuracy), np.maximum(middle + half, accuracy)
    return Calibration(confidence, accuracy, low, high, n, error)


@dataclass(frozen=True)
class Judge:
    """A network to evaluate. whose: its name for readers. columns: its output for each class of the set.

    side: pixels per side of the crops. rule: how they are chosen. precision: what it computes in.
    """

    whose: str
    trained: Trained
    columns: Sequence[int]
    side: int
    rule: CropRule
    precision: str

    @torch.inference_mode()
    def answers(self, beton: Beton, indices: NDArray[np.int64], compute: Compute, *, name: str) -> Answers:
        """The answers of the network, in evaluation mode, for the central crops of these images. name: the progress
        bar's.

        It chooses only among the classes of the set. Raises DataError for damaged images.
        """
        network = on_device(self.trained.network, compute.device).eval()
        normalise = Normalise(self.trained.normalisation).to(compute.device)
        columns = torch.tensor(self.columns, device=compute.device)
        autocast = autocast_type(self.precision)
        found: list[tuple[torch.Tensor, ...]] = []
        with images_bar(len(indices), name, leave=False) as bar:
            for rows, pixels in self._crops(beton, indices, compute):
                labels = torch.from_numpy(beton.labels[rows]).to(compute.device)
                with computing_in(autocast, compute.device):
                    logits = network(normalise(pixels)).float()
                chances = logits[:, columns].softmax(dim=1)
                likeliest = chances.topk(min(5, chances.shape[1]), dim=1)
                of_label = chances.gather(1, labels[:, None])[:, 0]
                within5 = (likeliest.indices == labels[:, None]).any(dim=1)
                found.append((likeliest.indices[:, 0], likeliest.values[:, 0], of_label, within5))
                bar.update(len(rows))
        predicted, confidence, of_label, within5 = (torch.cat(part).cpu().numpy() for part in zip(*found, strict=True))
        labels_of = beton.labels[indices]
        classes = len(self.columns)
        return Answers(self.whose, indices, labels_of, predicted, confidence, of_label, within5, classes)

    def _crops(
        self, beton: Beton, indices: NDArray[np.int64], compute: Compute
    ) -> Iterator[tuple[NDArray[np.int64], torch.Tensor]]:
        parts = [indices[start : start + compute.batch] for start in range(0, len(indices), compute.batch)]

        def requests() -> Iterator[Request]:
            for rows in parts:
                beton.check_unchanged()
                boxes, flips = self.rule.validation(beton.sizes[rows])
                yield Request(rows, boxes[:, None], flips[:, None])

        decoder = build_decoder(
            compute.decoder,
            beton,
            views=(View(1, self.side),),
            device=compute.device,
            threads=compute.threads,
            max_batch=compute.batch,
        )
        for rows, (pixels,) in zip(parts, decoder.decode(requests()), strict=True):
            yield rows, pixels


def chosen(beton: Beton, most: int, *, seed: int) -> NDArray[np.int64]:
    """All images of a split, or `most` of them by the plan's random order: int64, ascending."""
    return np.sort(plan.epoch_order(beton.num_samples, seed=seed, epoch=0)[:most])
