"""Compares an exported file with the network in PyTorch on the validation set, and times both."""

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from data.loader import CropBatch, Loader
from data.progress import images_bar
from train import TrainError

# How far probabilities may differ from those of PyTorch; if the best two are closer, either may come first.
TOLERANCE = 1e-3
# Points of top-1 by which a binary network may differ: rounding flips signs, and these change all later layers.
BINARY_TOLERANCE = 0.5
# Points of top-1 that int8 may lose, or this many standard errors of the loss.
INT8_LOSS, STANDARD_ERRORS = 1.0, 2.0

# Crops uint8 [N, 3, R, R] to probabilities float32 [N, C], on the host.
Answer = Callable[[NDArray[np.uint8]], NDArray[np.float32]]

_SECONDS, _MOST_CALLS, _FEWEST_CALLS = 0.5, 100, 5


@dataclass
class Marks:
    """One program's results. first, within5: bool [n], whether the label is the first class, or in the first five."""

    first: NDArray[np.bool_] = field(default_factory=lambda: np.zeros(0, bool))
    within5: NDArray[np.bool_] = field(default_factory=lambda: np.zeros(0, bool))

    def add(self, first: NDArray[np.bool_], within5: NDArray[np.bool_]) -> None:
        self.first, self.within5 = np.append(self.first, first), np.append(self.within5, within5)

    @property
    def top1(self) -> float:
        """Percent."""
        return 100 * float(self.first.mean())

    @property
    def top5(self) -> float:
        return 100 * float(self.within5.mean())


@dataclass
class Difference:
    """largest: of two probabilities. turned: images whose first class differs, though the best two are apart."""

    largest: float = 0.0
    turned: int = 0

    def add(self, expected: NDArray[np.float32], found: NDArray[np.float32]) -> None:
        if found.shape != expected.shape:
            raise TrainError(f"the file's output has the shape {list(found.shape)}, not {list(expected.shape)}")
        largest = float(np.abs(found - expected).max())
        # NaN counts as larger than any number.
        self.largest = max(self.largest, math.inf if math.isnan(largest) else largest)
        best = np.sort(expected, axis=1)[:, -2:]
        apart = best[:, -1] - best[:, 0] >= TOLERANCE if expected.shape[1] > 1 else np.zeros(len(expected), bool)
        self.turned += int((apart & (found.argmax(axis=1) != expected.argmax(axis=1))).sum())


def marks_of(
    answers: Sequence[Answer], loader: Loader, columns: Sequence[int], *, text: str
) -> tuple[list[Marks], Difference]:
    """The results of both on the loader's crops, and the difference of the second from the first on the same crops.

    columns: the network's output for each class of the loader; images are scored among these.
    Raises TrainError if there is no image.
    """
    marks, difference = [Marks() for _ in answers], Difference()
    with images_bar(loader.num_samples, text, leave=False) as bar:
        for batch in loader.epoch(0):
            crops, labels = crops_of(batch), batch.labels.cpu().numpy()
            said = [answer(crops) for answer in answers]
            for each, probabilities in zip(marks, said, strict=True):
                order = (-probabilities[:, columns]).argsort(axis=1, kind="stable")[:, :5]
                hits = order == labels[:, None]
                each.add(hits[:, 0], hits.any(axis=1))
            if len(said) > 1:
                difference.add(said[0], said[1])
            bar.update(len(labels))
    if not len(marks[0].first):
        raise TrainError("there is no image to check the file on")
    return marks, difference


def crops_of(batch: CropBatch) -> NDArray[np.uint8]:
    """The crops of a batch as input of ONNX files: uint8 [N, 3, R, R] on the host, contiguous."""
    return np.ascontiguousarray(batch.crops.cpu().numpy())


def in_pytorch(module: nn.Module, device: torch.device) -> Answer:
    """The output of a network with its normalisation and softmax, on the device."""

    @torch.inference_mode()
    def answer(crops: NDArray[np.uint8]) -> NDArray[np.float32]:
        return module(torch.from_numpy(crops).to(device)).cpu().numpy()

    return answer


def check_equal(difference: Difference, expected: Marks, found: Marks, *, binary: bool) -> str:
    """How the file compares with PyTorch, as text. Raises TrainError if it differs."""
    said = f"probabilities differ by at most {difference.largest:.1e}, {difference.turned} first classes differ"
    if binary:
        said = f"top-1 {found.top1:.2f} % for {expected.top1:.2f} %; {said}"
        equal = abs(found.top1 - expected.top1) <= BINARY_TOLERANCE and math.isfinite(difference.largest)
        allowed = f"{BINARY_TOLERANCE} points of top-1, for a binary network"
    else:
        equal = difference.largest <= TOLERANCE and not difference.turned
        allowed = f"{TOLERANCE:g}, and no first class where the best two lie further apart"
    if not equal:
        raise TrainError(
            f"model.onnx differs from the network in PyTorch and was not kept: on {len(found.first)} "
            f"validation images {said}; allowed are {allowed}"
        )
    return said


def check_loss(before: Marks, after: Marks, *, accepted: bool) -> str:
    """The loss of accuracy by int8, as text. Raises TrainError if it is too large, unless it is accepted."""
    loss = before.top1 - after.top1
    error = 100 * float((before.first.astype(float) - after.first).std()) / math.sqrt(len(before.first))
    allowed = max(INT8_LOSS, STANDARD_ERRORS * error)
    said = f"top-1 {before.top1:.2f} % before, {after.top1:.2f} % after: {loss:.2f} points less ± {error:.2f}"
    if loss > allowed and not accepted:
        raise TrainError(
            f"INT8=1: {said}; that is more than the {allowed:.2f} points allowed, and nothing was written. "
            "Leave INT8 out, or accept it with ARGS=--accept_loss"
        )
    return said


@torch.inference_mode()
def milliseconds(answer: Answer, crop: NDArray[np.uint8]) -> float:
    """The median time of a forward pass of one crop, uint8 [1, 3, R, R]."""
    for _ in range(2):
        answer(crop)
    times: list[float] = []
    begun = time.perf_counter()
    while len(times) < _FEWEST_CALLS or (len(times) < _MOST_CALLS and time.perf_counter() - begun < _SECONDS):
        start = time.perf_counter()
        answer(crop)
        times.append(1000 * (time.perf_counter() - start))
    return statistics.median(times)
