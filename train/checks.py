"""Checks of a run's requirements, before anything in its command is started."""

import os
import shutil
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import torch

import models
from data.durable import in_units, reason
from train import TrainError
from train.config import Config
from train.labels.refinery import RefineryLabels

if TYPE_CHECKING:
    from train.job import Job

# Bytes that a value of a crop takes at least when a step begins: as a byte, and normalised in 16 bits.
_BYTES = 3


def check_job(job: "Job") -> None:
    """Raises TrainError for a run that cannot be trained: its batch, its memory or its folder. Nothing is written."""
    config, images = job.config, job.data.num_images("train")
    check_batch(config, images, str(job.data.folder), job.group.world)
    crops = job.batch // job.replicas
    if crops == 1:
        _check_single_crop(job)
    check_memory(config, job.resolution, job.device, job.group.world)
    check_folder(job.folder, "the run")


def check_batch(config: Config, images: int, data: str, world: int) -> None:
    """Raises TrainError if there are too few training images for a batch. data: where they are. world: processes."""
    if images // world < config.batch // world:
        raise TrainError(
            f"batch={config.batch}: the {images} training images of {data} make no batch of {config.batch} for "
            f"{config.model}; take a smaller batch"
        )


def check_memory(config: Config, side: int, device: torch.device, world: int) -> None:
    """Raises TrainError if the crops of one step, `side` pixels per side, are already too large for the memory."""
    needed = config.batch // world * 3 * side**2 * _BYTES
    if needed > memory_of(device):
        raise TrainError(
            f"batch={config.batch}, resolution={side}: the crops of a step alone take {needed / 2**30:.0f} GiB, more "
            f"than {said_memory(device)}; take a smaller resolution or batch"
        )


def check_folder(folder: Path, what: str) -> None:
    """Raises TrainError unless files can be written into a folder, which exists or can be made. None is left there.

    what: the kind of files, for the message.
    """
    try:
        with suppress(FileNotFoundError):
            folder.lstat()  # a name may be too long, or below a file
        with tempfile.TemporaryFile(dir=_existing(folder)):
            pass
    except OSError as error:
        raise TrainError(
            f"{folder}: {what} cannot be written there ({reason(error, folder)}); give another OUT"
        ) from None


def check_room(folder: Path, size: int, files: Sequence[Path] = ()) -> None:
    """Raises TrainError unless these bytes fit on the disk of a folder, which may already hold some of the files."""
    there = sum(file.stat().st_size for file in files if file.is_file())
    free = shutil.disk_usage(_existing(folder)).free
    if size - there > free:
        raise TrainError(
            f"{folder}: {in_units(size)} are to be written there, and {in_units(free)} are free; make room, or give "
            "another OUT"
        )


def _existing(folder: Path) -> Path:
    """The folder, or its nearest parent that exists."""
    while not os.path.lexists(folder):
        folder = folder.parent
    return folder


def memory_of(device: torch.device) -> int:
    """Bytes of memory of a device; for the CPU, of this machine."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1]
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def said_memory(device: torch.device) -> str:
    """The memory of a device, for messages."""
    owner = torch.cuda.get_device_name(device) if device.type == "cuda" else "this machine"
    return f"the {memory_of(device) / 2**30:.0f} GiB of {owner}"


def _check_single_crop(job: "Job") -> None:
    """Raises TrainError if batch normalisation does not work with the single crop in each part of a step."""
    asked = f"batch={job.batch}: {job.config.model}"
    enough = f"take at least {2 * job.replicas}"
    if isinstance(job.labels, RefineryLabels) and job.labels.given.bn == "batch":
        raise TrainError(
            f"batch={job.batch}: a refinery with batch statistics needs more than one crop; use labels.bn=running"
        )
    try:
        with torch.device("meta"):
            network = models.build(job.config.model, len(job.data.class_names)).train()
            for side in job.resolutions:
                network(torch.empty(1, 3, side, side))
    except Exception as error:  # its layers may raise anything
        raise TrainError(f"{asked}: cannot be trained on one crop at a time ({error}); {enough}") from None
