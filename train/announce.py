"""What a run says before it begins and when it has ended."""

import sys
from pathlib import Path
from typing import Any

import torch

from train.config import PER_WORDS, LossConfig, first_resolution
from train.device import Precision
from train.loop import Trainer
from train.trained import Trained


def announce(trainer: Trainer, refinery: Trained | None, *, asked: Precision) -> None:
    """Says what is about to be trained, on what, and how."""
    config, rule = trainer.config, trainer.rule
    low, high = (f"{100 * share:g}" for share in rule.scale)
    labels = "ground truth, the label of the whole image for every crop"
    if refinery:
        labels = f"refinery {refinery.name} ({refinery.place}), with {config.labels.bn} statistics"
        labels += PER_WORDS[config.labels.per]
        if config.labels.resolution:
            labels += f", at {config.labels.resolution} px"
        if config.loss != LossConfig():
            labels += f"; loss {config.loss.kind}, temperature {config.loss.temperature:g}"
        if config.jitter:
            labels += f"; adversarial jitter, eta {config.jitter:g}"
    elif config.labels.taxonomy:
        labels = f"one a category, by {config.labels.taxonomy}"
    elif config.labels.smoothing:
        labels += f", smoothed by {config.labels.smoothing:g}"
    first = first_resolution(config.resolution_from, rule.resolution)
    sides = f"{first} to {rule.resolution}" if first < rule.resolution else str(rule.resolution)
    lines = [
        ("model", f"{job.config.model}, {sum(p.numel() for p in job.network.parameters()) / 1e6:.2f} M parameters")
        for job in trainer.jobs
    ]
    lines += [
        ("labels", labels),
        (
            "data",
            f"{trainer.data.folder}: {trainer.loader.num_samples} images to train on, "
            f"{trainer.validation.num_samples} for validation, {len(trainer.data.class_names)} classes",
        ),
        (
            "crops",
            f"{sides} px, {low} to {high} % of the area, aspect {rule.ratio[0]:.2f} to "
            f"{rule.ratio[1]:.2f}, {'flips' if rule.flip else 'no flips'}; validation: the central "
            f"{100 * rule.center_ratio:.3g} %",
        ),
        (
            "length",
            f"{config.epochs} epochs of {trainer.loader.steps} steps of {config.batch} crops, recipe {config.recipe}"
            + (f", weights averaged with decay {config.ema:g}" if config.ema else ""),
        ),
        ("device", f"{_units(trainer, asked)}; decoder {trainer.decoder}"),
        *(("run", str(job.folder)) for job in trainer.jobs),
    ]
    for name, text in lines:
        print(f"{name:7} {text}")
    sys.stdout.flush()


def _units(trainer: Trainer, asked: Precision) -> str:
    device, used = trainer.device, trainer.config.precision
    text = f"{torch.cuda.get_device_name(device) if device.type == 'cuda' else 'CPU'}, {used}"
    if asked == "auto" and used != "bf16":
        text += " (no bf16 units)"
    elif asked not in ("auto", used):
        text += f" in place of {asked}, for which it has no units"
    return text + (", compiled" if trainer.compiled else "")


def report(result: dict[str, Any], folder: Path, refinery: Trained | None) -> None:
    """Says how a run ended."""
    print(
        f"finished: top-1 {result['top1']:.2f} %, top-5 {result['top5']:.2f} %, "
        f"{result['images_per_second_per_device']:.0f} images/s, {result['seconds'] / 60:.1f} minutes; {folder}"
    )
    quality = result.get("crop_labels")
    if quality:
        print(
            f"of {quality['crops']} training crops that show something, the image's label is right about "
            f"{quality['image_label_right']:.1f} %"
            + (f", the refinery's about {quality['label_right']:.1f} %" if refinery else "")
        )
    sys.stdout.flush()
