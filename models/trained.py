"""A trained network as the user names it: a run folder, a checkpoint file, NAME:FILE, or NAME:pretrained."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

import torch
from torch import nn

import models
from command import first_line
from kernels.normalise import Normalisation
from models import ModelError
from models.classes import by_id, class_columns
from models.imagenet import class_ids
from models.weights import count_outputs, load_into, load_weights

# The checkpoints of a run: of its last epoch, and of the epoch with the highest top-1 accuracy.
Which = Literal["last", "best"]

# Used in place of a file for a hub's published weights.
_PRETRAINED = "pretrained"


@dataclass
class Trained:
    """A network with its weights.

    file: None for a hub's published weights. class_names: classes of its outputs, in order. resolution: pixels per side
    in its training; None if unknown. center_ratio: side of its validation crop as a share of the image's shorter side;
    None if unknown. generation: 0 if it was trained on the ground truth, or if unknown; else its refinery's + 1. epoch:
    number of finished epochs of its run when it was saved; None if unknown.
    """

    network: nn.Module
    name: str
    file: Path | None
    class_names: tuple[str, ...]
    normalisation: Normalisation
    resolution: int | None = None
    center_ratio: float | None = None
    generation: int = 0
    epoch: int | None = None

    @property
    def origin(self) -> str:
        """The source of its weights, for messages."""
        return str(self.file) if self.file else f"{self.name}:{_PRETRAINED}"

    @cached_property
    def digest(self) -> str:
        """SHA-256, in hex, of its file, or of its weights if there is no file."""
        if self.file:
            return digest_of(self.file)
        digest = hashlib.sha256()
        for name, value in sorted(self.network.state_dict().items()):
            digest.update(name.encode())
            digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
        return digest.hexdigest()

    def columns_of(self, class_names: Sequence[str]) -> list[int] | None:
        """Returns the index of the output for each class, or -1; None if the classes are the network's, in order."""
        return None if self.class_names == tuple(class_names) else class_columns(self.class_names, class_names)

    @torch.inference_mode()
    def failure_at(self, resolution: int) -> str | None:
        """Returns why the network does not accept crops of this many pixels per side, or None if it does."""
        if resolution == self.resolution:
            return None
        try:
            self.network.eval()(torch.zeros(1, 3, resolution, resolution))
        except (RuntimeError, ValueError, AssertionError) as error:
            return first_line(error)
        return None

    def check_resolution(self, resolution: int) -> None:
        """Raises ModelError unless the network accepts crops of this many pixels per side."""
        failure = self.failure_at(resolution) if resolution > 0 else "there is no such size"
        if failure:
            raise ModelError(
                f"{self.origin}: {self.name} cannot take crops of {resolution} px ({failure}); give another resolution"
            )


def digest_of(path: Path) -> str:
    """Returns the SHA-256 of a file, in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def parse_spec(spec: str) -> tuple[str | None, str | None]:
    """Splits NAME, NAME:FILE, or the path of a run folder or file into a network's name and a path; one may be None.

    For example `resnet50`, `timm:NAME`, `resnet50:weights.pt`, `timm:NAME:weights.pt`, `runs/scenes/resnet50-0123abcd`.
    Instead of a file, `pretrained` means a hub's published weights, as in `timm:NAME:pretrained`.
    """
    hubs = tuple(f"{hub}:" for hub in models.HUBS)
    if spec in models.names() or (spec.startswith(hubs) and spec.count(":") == 1):
        return spec, None
    name, _, file = spec.rpartition(":")
    if name in models.names() or name.startswith(hubs):
        return name, file
    return None, spec


def names_network_alone(spec: str) -> bool:
    """Whether a network is named without weights."""
    return parse_spec(spec)[1] is None


def load_trained(spec: str, *, class_names: Sequence[str] | None = None, which: Which | None = None) -> Trained:
    """Loads a network from a run folder (its last.pt), a checkpoint file of ours, NAME:FILE, or NAME:pretrained.

    which: for a run folder, the checkpoint of its last epoch (default) or of the one with the highest top-1 accuracy.
    class_names: the classes of the data. A bare file of weights does not name its classes. It is assumed to have these,
    unless it has as many outputs as ImageNet has classes and these are among ImageNet's, or not given; then it is
    assumed to have ImageNet's, in the order of all published networks.

    Raises ModelError for a path that does not exist, for files that do not fit the network, for published weights that
    cannot be fetched, and for `which` with anything but a run folder.
    """
    name, file = parse_spec(spec)
    if file is None:
        raise ModelError(f"{spec}: names a network without weights; give a run folder or a file")
    if which and not (file and Path(file).is_dir()):
        raise ModelError(f"{spec}: is not the folder of a run, of which --which {which} is one file; leave --which out")
    if name and file == _PRETRAINED:
        return _published(name)
    path = Path(file)
    if path.is_dir():
        chosen = path / f"{which or 'last'}.pt"
        if not chosen.is_file():
            raise ModelError(f"{path}: no {chosen.name} in it; is it the folder of a run?")
        path = chosen
    if not path.is_file():
        raise ModelError(f"{spec}: no such run folder or file, nor the name of a network ({', '.join(models.names())})")
    weights = load_weights(path)
    described = weights.network
    if not described and not name:
        raise ModelError(f"{path}: holds bare weights; name their network too, as in resnet50:{path}")
    name = name or str(described["name"] if described else "")
    if described:
        names = tuple(described["class_names"])
    else:
        names = _classes_of_bare(count_outputs(weights, name=name), class_names)
        if not names:
            raise ModelError(
                f"{path}: holds bare weights without the names of classes; use a run folder or its checkpoint"
            )
    network = models.build(name, len(names))
    load_into(network, weights, name=name, strict_head=True)
    if described:
        return Trained(
            network,
            name,
            path,
            names,
            normalisation=(tuple(described["mean"]), tuple(described["std"])),
            resolution=described["resolution"],
            center_ratio=described["center_ratio"],
            generation=described.get("generation", 0),  # checkpoints of earlier versions lack it
            epoch=weights.epoch,
        )
    return Trained(network, name, path, names, models.normalisation(name))


def _published(name: str) -> Trained:
    known = models.published(name)
    names = class_ids(known.num_classes)
    if not names:
        raise ModelError(
            f"{name}: its published weights are not a classifier of ImageNet's classes; fine-tune it, or take another"
        )
    network = models.build(name, len(names), pretrained=True)
    return Trained(network, name, None, names, known.normalisation, known.resolution, known.center_ratio)


def _classes_of_bare(outputs: int | None, class_names: Sequence[str] | None) -> tuple[str, ...]:
    """Returns the classes of a bare file of weights; empty if they are not known."""
    given = tuple(class_names or ())
    ours = by_id(given)
    # Numbered folders are in another order than the outputs of any ImageNet network.
    if outputs is None or (len(given) == outputs and ours == given):
        return ours
    imagenet = class_ids(outputs) or ()
    return imagenet if set(ours) <= set(imagenet) else ours
