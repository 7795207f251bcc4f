"""Scores a trained network on a validation set: top-1, top-5 and the accuracy of each class.

python -m train.evaluate --checkpoint runs/scenes/... --data images/
make evaluate CHECKPOINT=runs/scenes/... DATA=images/
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from data import DataError
from data.command import run_command
from data.convert import ConvertedSet, Unconverted, find_set
from data.loader import Loader, open_loader
from data.progress import images_bar
from data.sources import CropRule
from kernels.normalise import Normalisation, Normalise
from models import ModelError
from train import TrainError
from train.device import autocast_type, device_named, precision_on
from train.trained import Trained, load_trained


@dataclass
class Scores:
    """Accuracies in percent. per_class: for each class, its images and its top-1 (None where it has no images)."""

    top1: float
    top5: float
    images: int
    per_class: list[tuple[int, float | None]]


@torch.inference_mode()
def score(
    network: nn.Module,
    loader: Loader,
    normalisation: Normalisation,
    *,
    device: torch.device,
    autocast: torch.dtype | None,
    columns: Sequence[int] | None = None,
) -> Scores:
    """Runs the network over the loader's images, in evaluation mode.

    columns: for each class of the loader, its place among the network's outputs; None where they are the same.
    """
    network.eval()
    normalise = Normalise(normalisation).to(device)
    num_classes = loader.num_classes
    # Rows: images of each class, those right at first, those right within five.
    counts = torch.zeros(3, num_classes, dtype=torch.int64, device=device)
    with images_bar(loader.num_samples, "validate", leave=False) as bar:
        for batch in loader.epoch(0):
            with torch.autocast(device.type, dtype=autocast, enabled=autocast is not None):
                logits = network(normalise(batch.crops)).float()
            if columns is not None:
                logits = logits[:, columns]
            hits = logits.topk(min(5, num_classes), dim=1).indices == batch.labels[:, None]
            for row, weights in enumerate((torch.ones_like(batch.labels), hits[:, 0], hits.any(dim=1))):
                counts[row].scatter_add_(0, batch.labels, weights.long())
            bar.update(len(batch.labels))
    images, first, within5 = counts.cpu().tolist()
    total = sum(images)
    return Scores(
        top1=100 * sum(first) / total,
        top5=100 * sum(within5) / total,
        images=total,
        per_class=[(n, 100 * right / n if n else None) for n, right in zip(images, first, strict=True)],
    )


def validation_loader(
    data: ConvertedSet, *, rule: CropRule, batch: int, decoder: str, device: torch.device, threads: int | None
) -> Loader:
    """The validation images of a set, each once, cropped as the rule says."""
    return open_loader(
        data.beton("val"),
        resolution=rule.resolution,
        batch_size=batch,
        decoder=decoder,
        train=False,
        device=device,
        threads=threads,
        center_ratio=rule.center_ratio,
    )


def evaluate(
    checkpoint: str,
    data: str = "scenes",
    out: str | None = None,
    resolution: int | None = None,
    batch: int = 256,
    decoder: str = "auto",
    device: str = "auto",
    threads: int | None = None,
) -> None:
    """Scores a checkpoint on the validation images of a set, and writes the scores with the accuracy of each class.

    Args:
        checkpoint: a run folder, a checkpoint file, or NAME:FILE for a bare file of weights
        data: a folder of images, a converted set, or scenes, cifar10, svhn, imagenette
        out: the JSON file to write (default: beside the checkpoint)
        resolution: pixels a side of the crops (default: what the network was trained at)
        batch: crops at a time
        decoder: auto, ffcv, dali or torchvision
        device: auto, cpu, cuda or cuda:N
        threads: decoding threads (default: one a processor)
    """
    where = device_named(device)
    found = find_set(data)
    trained = load_trained(checkpoint, class_names=found.class_names)
    columns = columns_of(trained, found.class_names, data)
    target = (
        Path(out) if out else trained.file.parent / f"evaluation-{trained.file.stem}-{Path(data).resolve().name}.json"
    )
    converted = found.convert() if isinstance(found, Unconverted) else found
    resolution = resolution or trained.resolution or converted.crop.resolution
    rule = replace(converted.crop, resolution=resolution)
    loader = validation_loader(converted, rule=rule, batch=batch, decoder=decoder, device=where, threads=threads)
    network = trained.network.to(where).to(memory_format=torch.channels_last)
    autocast = autocast_type(precision_on(where))
    scores = score(network, loader, trained.normalisation, device=where, autocast=autocast, columns=columns)
    print(f"top-1 {scores.top1:.2f} %, top-5 {scores.top5:.2f} % on {scores.images} images at {resolution} px")
    written = {
        "checkpoint": str(trained.file),
        "network": trained.name,
        "data": data,
        "resolution": resolution,
        "top1": scores.top1,
        "top5": scores.top5,
        "images": scores.images,
        "per_class": {
            name: {"images": images, "top1": top1}
            for name, (images, top1) in zip(converted.class_names, scores.per_class, strict=True)
        },
    }
    try:
        target.write_text(json.dumps(written, indent=1) + "\n")
    except OSError as error:
        raise TrainError(f"{target}: cannot be written ({error.strerror}); name another file with OUT") from None
    print(f"written to {target}")


def columns_of(trained: Trained, class_names: Sequence[str], data: str) -> list[int] | None:
    """Where the set's classes stand among the network's outputs; None where the two lists are the same.

    Raises TrainError when the network lacks a class of the set.
    """
    if tuple(trained.class_names) == tuple(class_names):
        return None
    places = {name: place for place, name in enumerate(trained.class_names)}
    missing = [name for name in class_names if name not in places]
    if missing:
        raise TrainError(
            f"{trained.file}: {trained.name} was trained on {len(trained.class_names)} classes, and {data} has "
            f"{len(class_names)}, of which it lacks {', '.join(missing[:3])}{', ...' if len(missing) > 3 else ''}"
        )
    return [places[name] for name in class_names]


if __name__ == "__main__":
    run_command(evaluate, prog="python -m train.evaluate", errors=(DataError, ModelError, TrainError))
