"""The first crops that a training will see, with their labels from each source."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray

from data import scenes
from data.beton import Beton
from data.loader import CropBatch
from data.sources import scenes_fingerprint
from kernels.normalise import Normalise
from train.augment import kept, partners
from train.device import computing_in, on_device
from train.job import Job
from train.look.answers import Judge
from train.report.analysis import Labels, likeliest, picture
from train.step import correct

_EPOCHS_SHOWN = 4


@dataclass(frozen=True)
class Crop:
    """A training crop.

    index: its image. image: uint8 [height, width, 3], as stored. boxes: (top, left, height, width) of its crops in the
    first epochs; the first is this one. pixels: uint8 [R, R, 3], as the network sees it. label: the image's class.
    said: the three most likely classes by the label that training uses. by_network: by the checkpoint; None without
    one. truth: on `scenes` what the crop shows, unless it is mixed; None if unknown.
    """

    index: int
    image: NDArray[np.uint8]
    boxes: tuple[tuple[int, int, int, int], ...]
    pixels: NDArray[np.uint8]
    label: int
    said: Labels
    by_network: Labels | None
    truth: str | None


@dataclass(frozen=True)
class FirstCrops:
    """The first batch of a training: some crops, and statistics of all of them.

    count: crops in the batch. agree: for how many of them the label's most likely class is the image's. given: the mean
    probability that labels give to the image's class, 0 to 1. enlarged: how many have fewer pixels than the network
    sees.
    sides: square roots of their areas in stored pixels, float64 [count]. resolution: pixels per side.
    """

    crops: list[Crop]
    count: int
    agree: int
    given: float
    enlarged: int
    sides: NDArray[np.float64]
    resolution: int


@torch.no_grad()
def first_crops(job: Job, beton: Beton, names: Sequence[str], most: int, checkpoint: Judge | None) -> FirstCrops:
    """The first step's batch of a run, augmented and labelled as in training, and up to `most` crops of it.

    Raises DataError, ModelError and TrainError as a training's first step does.
    """
    labels = on_device(job.labels.open(job), job.device)
    resolution = job.resolution_in(0)
    loader = job.open_crops(labels, resolution=resolution, drop_last=False)
    batch = next(loader.epoch(job.plan_epoch(0)))
    seen = mixed = batch.crops
    draws = None
    if job.augment:
        draws = job.augment.draw(len(batch.crops), resolution, epoch=0, step=0)
        coloured = job.augment.colour(batch.crops, draws)
        mixed = job.augment.mix(coloured, draws)
        seen = {"plain": batch.crops, "coloured": coloured, "mixed": mixed}[labels.sees]
    with computing_in(job.autocast, job.device):
        targets = labels(batch if seen is batch.crops else replace(batch, crops=seen))
    chances = targets.distribution(len(names))
    if job.augment and job.augment.mixes and draws is not None and labels.sees != "mixed":
        # With the weights that the loss of a step gives to the two labels.
        share = kept(draws)[:, None]
        chances = share * chances + (1 - share) * chances[partners(draws)]
    chances = chances.cpu()
    own = batch.labels.cpu()
    rows = _of_all_classes(own.numpy(), most)
    sides = np.sqrt(batch.boxes[:, 2:].double().prod(dim=1).cpu().numpy())
    return FirstCrops(
        crops=_crops(job, beton, names, batch, mixed, chances, rows, checkpoint),
        count=len(own),
        agree=int(correct(chances, own)[0]),
        given=float(chances.gather(1, own[:, None]).mean()),
        enlarged=int((sides < resolution).sum()),
        sides=sides,
        resolution=resolution,
    )


def _crops(
    job: Job,
    beton: Beton,
    names: Sequence[str],
    batch: CropBatch,
    shown: torch.Tensor,
    chances: torch.Tensor,
    rows: list[int],
    checkpoint: Judge | None,
) -> list[Crop]:
    pixels = shown[rows].round().clamp(0, 255).byte().permute(0, 2, 3, 1).cpu().numpy()
    indices, boxes = batch.indices[rows].cpu().numpy(), batch.boxes[rows].cpu().numpy()
    said = likeliest(chances[rows], names)
    by_network = _by_network(job, checkpoint, shown[rows], names) if checkpoint else None
    truth: list[str | None] = [None] * len(rows)
    mixes = job.augment is not None and job.augment.mixes
    if job.data.source_fingerprint == scenes_fingerprint() and not mixes:
        shows = scenes.crop_truth("train", indices, boxes).tolist()
        truth = [names[label] if label >= 0 else "nothing (ground)" for label in shows]
    later = [
        job.crop.training(indices, beton.sizes[indices], seed=job.crop_seed, epoch=job.plan_epoch(epoch))[0]
        for epoch in range(1, min(_EPOCHS_SHOWN, job.config.epochs))
    ]
    return [
        Crop(
            index=int(index),
            image=picture(beton, int(index)),
            boxes=tuple(tuple(map(int, each[place])) for each in (boxes, *later)),  # type: ignore[misc]
            pixels=pixels[place],
            label=int(beton.labels[index]),
            said=said[place],
            by_network=by_network[place] if by_network else None,
            truth=truth[place],
        )
        for place, index in enumerate(indices.tolist())
    ]


def _by_network(job: Job, checkpoint: Judge, crops: torch.Tensor, names: Sequence[str]) -> list[Labels] | None:
    """The checkpoint's labels of crops, in evaluation mode; None if it does not accept their size."""
    if checkpoint.trained.failure_at(crops.shape[-1]):
        return None
    network = on_device(checkpoint.trained.network, job.device).eval()
    normalise = Normalise(checkpoint.trained.normalisation).to(job.device)
    with computing_in(job.autocast, job.device):
        logits = network(normalise(crops)).float()
    columns = torch.tensor(checkpoint.columns, device=logits.device)
    return likeliest(logits[:, columns].softmax(dim=1).cpu(), names)


def _of_all_classes(labels: NDArray[np.int64], most: int) -> list[int]:
    """Up to this many rows of a batch: the first of each class, then the second of each, and so on."""
    times: dict[int, int] = {}
    rounds = []
    for row, label in enumerate(labels.tolist()):
        times[label] = times.get(label, 0) + 1
        rounds.append((times[label], row))
    return [row for _, row in sorted(rounds)[:most]]
