"""Prints a description of a run before it starts, and its result when it has ended."""

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from command import printable
from data.durable import in_units
from train.ahead import Part
from train.balance import class_weights
from train.checks import check_room
from train.config import LossConfig
from train.estimate import written_bytes
from train.job import Job, of_other_length
from train.length import said_seconds, steps_of
from train.loop import Trainer


def announce_plan(parts: Sequence[Part], *, dry_run: bool = False) -> None:
    """Prints what a command will train, for how long, and what it will write; nothing if nothing is left to train.

    dry_run: prints that the command ends here. Raises TrainError if the disk lacks space for the files.
    """
    if parts:
        _announce_parts(parts)
    if dry_run:
        print("nothing was trained (--dry-run)" if parts else "all is trained already", flush=True)


def _announce_parts(parts: Sequence[Part]) -> None:
    lines = [("plan" if not number else "", _part(part)) for number, part in enumerate(parts)]
    for job in [job for part in parts for job in part.jobs if not any(part.done)]:
        other = of_other_length(job)
        if other:
            lines.append(
                (
                    "length",
                    f"{other.folder} is the same run with {other.identity['epochs']} epochs, over which its learning "
                    f"rate fell; one of {job.config.epochs} starts from the beginning (with "
                    f"PRETRAINED={other.weights} from its weights)",
                )
            )
    lines += [("fitted", job.fit) for part in parts for job in part.jobs if job.fit]
    if any(part.cost for part in parts):
        total = said_seconds(sum(part.seconds for part in parts))
        uncompiled = ", uncompiled" if parts[0].jobs[0].compiled else ""
        lines.append(("time", f"about {total} in all, estimated from a few timed steps{uncompiled}"))
    else:
        lines.append(("time", "not measured for so few crops (--dry-run does)"))
    lines.append(("writes", _writes([job for part in parts for job in part.jobs])))
    _print(lines)
    print(flush=True)


def _part(part: Part) -> str:
    job = part.jobs[0]
    names = " and ".join(each.config.model for each in part.jobs)
    refinery = job.identity["refinery"]
    labels = ", the refinery" if part.is_refinery else f" from {refinery['network']}" if refinery else ""
    text = (
        f"{names}{labels}: {job.config.epochs} epochs of {steps_of(job)} steps of {job.batch} crops at "
        f"{job.resolution} px"
    )
    if any(part.done):
        text += f", of which {part.done[0]} and {part.done[1]} steps are done"
    return text + (f", about {said_seconds(part.seconds)}" if part.cost else "")


def _writes(jobs: Sequence[Job]) -> str:
    """Which folders are written to, and how much. Raises TrainError if there is not enough space."""
    needed: dict[Path, int] = {}
    for job in jobs:
        # If the refinery is still to be trained, the student's own folder is not known yet.
        folder = job.folder if job.config.out else job.folder.parent
        needed[folder] = needed.get(folder, 0) + written_bytes(job.config, len(job.data.class_names))
    for folder, size in needed.items():
        its = [job.folder for job in jobs if folder in (job.folder, job.folder.parent)]
        check_room(folder, size, [file for run in its for file in run.glob("*.pt")])
    return "; ".join(f"{folder}: checkpoints of up to {in_units(size)}" for folder, size in needed.items())


def announce(trainer: Trainer) -> None:
    """Prints what is about to be trained, on what, and how."""
    job = trainer.job
    config, crop = job.config, job.crop
    low, high = (f"{100 * share:g}" for share in crop.scale)
    labels = job.labels.describe()
    loss = config.loss
    if replace(loss, truth=0.0, balance=0.0) != LossConfig():
        labels += f"; loss {loss.kind}, temperature {loss.temperature:g}"
    if loss.truth:
        labels += f"; {100 * loss.truth:g} % ground truth in the loss"
    if loss.balance:
        weights = class_weights(trainer.loader.images_per_class, loss.balance)
        labels += f"; classes weigh {weights[weights > 0].min():.2g} to {weights.max():.2g} (balance {loss.balance:g})"
    if config.jitter:
        labels += f"; adversarial jitter, eta {config.jitter:g}"
    first, last = job.resolutions[0], job.resolution
    sides = f"{first} to {last}" if first < last else str(last)
    lines = [
        ("model", f"{student.name}, {sum(p.numel() for p in student.network.parameters()) / 1e6:.2f} M parameters")
        for student in trainer.students
    ]
    lines += [
        ("labels", labels),
        (
            "data",
            f"{job.data.folder}: {trainer.loader.num_samples} images to train on, "
            f"{trainer.validation.num_samples} for validation, {len(job.data.class_names)} classes",
        ),
        (
            "crops",
            f"{sides} px, {low} to {high} % of the area, aspect {crop.ratio[0]:.2f} to "
            f"{crop.ratio[1]:.2f}, {'flips' if crop.flip else 'no flips'}; validation: the central "
            f"{100 * crop.center_ratio:.3g} %",
        ),
        *([("augment", augment)] if (augment := _augmented(job)) else []),
        (
            "length",
            f"{config.epochs} epochs of {trainer.loader.steps} steps of {config.batch} crops, recipe {config.recipe}"
            + (f", weights averaged with decay {config.ema:g}" if config.ema else ""),
        ),
        ("device", f"{_units(job)}; decoder {trainer.loader.decoder}"),
        *(("run", str(student.job.folder)) for student in trainer.students),
    ]
    _print(lines)


def _print(lines: Sequence[tuple[str, str]]) -> None:
    for name, text in lines:
        print(f"{name:7} {printable(text)}")
    sys.stdout.flush()


def _augmented(job: Job) -> str:
    config = job.config.augment
    text = config.describe()
    unmixed = round(config.unmixed * job.config.epochs)
    if config.mixes and unmixed:
        text += f", nothing mixed in the last {unmixed} epochs"
    if text and "augment.refinery_sees" in type(job.labels).options and job.config.labels.per == "crop":
        text += {
            "mixed": "; the refinery labels what the student sees",
            "coloured": "; the refinery labels the coloured crop" + ("; labels are mixed" if config.mixes else ""),
            "plain": "; the refinery labels the crop as it was cut" + ("; labels are mixed" if config.mixes else ""),
        }[config.refinery_sees]
    return text


def _units(job: Job) -> str:
    device, used = job.device, job.config.precision
    text = f"{torch.cuda.get_device_name(device) if device.type == 'cuda' else 'CPU'}, {used}"
    if job.asked_precision == "auto" and used != "bf16":
        text += " (no bf16 units)"
    elif job.asked_precision not in ("auto", used):
        text += f" in place of {job.asked_precision}, for which it has no units"
    return text + (", compiled" if job.compiled else "")


def announce_result(result: dict[str, Any], job: Job) -> None:
    """Prints the result of a run."""
    print(
        f"finished: top-1 {result['top1']:.2f} %, top-5 {result['top5']:.2f} %, "
        f"{result['images_per_second_per_device']:.0f} images/s, {result['seconds'] / 60:.1f} minutes; {job.folder}"
    )
    quality = result.get("crop_labels")
    if quality:
        print(
            f"of {quality['crops']} training crops that show something, the image's label is correct for "
            f"{quality['image_label_right']:.1f} %"
            + (f", the refinery's for {quality['label_right']:.1f} %" if job.labels.refinery else "")
        )
    sys.stdout.flush()
