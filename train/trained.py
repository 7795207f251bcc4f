"""A trained network as the user names it: a run folder, a checkpoint file, or NAME:FILE."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import nn

import models
from kernels.normalise import Normalisation
from models.weights import load_into, load_weights
from train import TrainError


@dataclass
class Trained:
    """A network with its weights.

    resolution, center_ratio: pixels a side it was trained at, and its validation crop; None where the file doesn't say.
    """

    network: nn.Module
    name: str
    file: Path
    class_names: tuple[str, ...]
    normalisation: Normalisation
    resolution: int | None = None
    center_ratio: float | None = None


def parse_spec(spec: str) -> tuple[str | None, str | None]:
    """A network's name and a file, either of which may be left out: NAME, NAME:FILE, or a run folder or file.

    `resnet50`, `timm:NAME`, `resnet50:weights.pt`, `timm:NAME:weights.pt`, `runs/scenes/resnet50-0123abcd`.
    """
    if spec in models.names() or (spec.startswith("timm:") and spec.count(":") == 1):
        return spec, None
    name, _, file = spec.rpartition(":")
    if name in models.names() or name.startswith("timm:"):
        return name, file
    return None, spec


def load_trained(spec: str, *, class_names: Sequence[str] | None = None) -> Trained:
    """Loads a run folder (its last.pt), a checkpoint file of ours, or NAME:FILE.

    class_names: the classes of a bare file of weights, which names none.

    Raises TrainError for a path that is not there and ModelError for files that do not fit the network.
    """
    name, place = parse_spec(spec)
    path = Path(place or "")
    if path.is_dir():
        if not (path / "last.pt").is_file():
            raise TrainError(f"{path}: no last.pt in it; is it the folder of a run?")
        path = path / "last.pt"
    if not path.is_file():
        raise TrainError(f"{spec}: no such run folder or file, nor the name of a network ({', '.join(models.names())})")
    weights = load_weights(path)
    described = weights.network
    if not described and not name:
        raise TrainError(f"{path}: holds bare weights; name their network too, as in resnet50:{path}")
    if not described and class_names is None:
        raise TrainError(f"{path}: holds bare weights without the names of classes; use a run folder or its checkpoint")
    name = name or str(described["name"] if described else "")
    names = tuple(described["class_names"]) if described else tuple(class_names or ())
    network = models.build(name, len(names))
    load_into(network, weights, name=name, strict_head=True)
    if described:
        normalisation = (tuple(described["mean"]), tuple(described["std"]))
        return Trained(network, name, path, names, normalisation, described["resolution"], described["center_ratio"])
    return Trained(network, name, path, names, models.normalisation(name))
