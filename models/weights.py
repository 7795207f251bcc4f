"""Weights from files: our own checkpoints, published state dicts (.pt, .pth, .pytar) and .safetensors.

    weights = load_weights("resnet50.pytar")
    network = build("resnet50", num_classes=1000)
    load_into(network, weights, name="resnet50", strict_head=True)

No code in a file is ever run.
"""

import argparse
import re
import zipfile
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from models import ModelError, build

# The value of "format" in a checkpoint of this project.
CHECKPOINT_FORMAT = "label-refinery-checkpoint"

_WANTED = "pass a file with a state dict, tensors by name"


@dataclass(frozen=True)
class Weights:
    """The contents of a file of weights, on the CPU.

    state: tensors by their name in the plain network, without the prefixes of DataParallel and torch.compile. network:
    the description in a checkpoint of ours (name, class names, ..., see models.trained); else None. epoch: number of
    finished epochs of a checkpoint of ours; None if unknown.
    """

    path: Path
    state: dict[str, Tensor]
    network: dict[str, Any] | None
    epoch: int | None = None


def load_weights(path: str | PathLike[str]) -> Weights:
    """Reads a checkpoint of ours, a state dict (bare, or under "state_dict" or "model"), or .safetensors.

    Raises ModelError for a file that is missing, damaged, without weights, or that cannot be loaded without running
    code.
    """
    path = Path(path)
    content = _read(path)
    if not isinstance(content, dict):
        raise ModelError(f"{path}: holds a {type(content).__name__}; {_WANTED}")
    state: Any = content
    network = epoch = None
    if content.get("format") == CHECKPOINT_FORMAT:
        state, network = content.get("model"), content.get("network")
        if not isinstance(network, dict) or not isinstance(network.get("name"), str):
            raise ModelError(f"{path}: is a checkpoint that does not name its network; write it again")
        progress = content.get("progress")
        epoch = progress.get("epoch") if isinstance(progress, dict) else None
    else:
        for key in ("state_dict", "model"):
            if isinstance(content.get(key), dict):
                state = content[key]
                break
    if not isinstance(state, dict) or not state or not all(map(_is_weight, state.items())):
        raise ModelError(f"{path}: holds no weights; {_WANTED}")
    return Weights(path, _plain_names(state), network, epoch if isinstance(epoch, int) else None)


def count_outputs(weights: Weights, *, name: str) -> int | None:
    """Returns the number of classes of weights of the network `name`; None if they do not have its classifier."""
    sizes = {weights.state[key].shape[0] for key in _head(name) if key in weights.state and weights.state[key].dim()}
    return sizes.pop() if len(sizes) == 1 else None


def load_into(network: nn.Module, weights: Weights, *, name: str, strict_head: bool) -> list[str]:
    """Copies weights into a network made by `build(name, ...)`, keeping its dtype and device.

    strict_head: whether the head, i.e. every tensor whose shape depends on the number of classes, must fit like all
        others. If False, for fine-tuning, a head that is missing or has another number of classes is skipped and keeps
        its initialisation.

    Returns the names of the skipped tensors. Raises ModelError, with the network unchanged, for weights of
    another network, and for missing, unexpected and mis-shaped tensors.
    """
    given, own = weights.state, network.state_dict()
    if weights.network is not None and _architecture(weights.network["name"]) != _architecture(name):
        raise ModelError(
            f"{weights.path}: holds weights of {weights.network['name']}, not of {name}; "
            f"ask for {weights.network['name']} or pass another file"
        )

    unexpected = [key for key in given if key not in own]
    # PyTorch before 0.4.1, which wrote the papers' files, had no such counter; it is unused if there is a momentum.
    missing = [key for key in own if key not in given and not key.endswith(".num_batches_tracked")]
    misshaped = [key for key in own if key in given and given[key].shape != own[key].shape]
    head = _head(name) if missing or misshaped else set()
    other_classes = [key for key in misshaped if key in head and given[key].shape[1:] == own[key].shape[1:]]
    misshaped = [key for key in misshaped if key not in other_classes]
    left_out = []
    if not strict_head:
        left_out = [key for key in own if key in other_classes or (key in head and key in missing)]
        missing = [key for key in missing if key not in head]

    if missing or unexpected or misshaped:
        shapes = [f"{key} {list(given[key].shape)} for {list(own[key].shape)}" for key in misshaped]
        misfits = {"missing": missing, "unexpected": unexpected, "mis-shaped": shapes}
        listed = [f"{len(keys)} {kind}: {_first_few(keys)}" for kind, keys in misfits.items() if keys]
        raise ModelError(f"{weights.path}: does not fit {name}, choose its own file ({'; '.join(listed)})")
    if strict_head and other_classes:
        theirs, ours = given[other_classes[0]].shape[0], own[other_classes[0]].shape[0]
        raise ModelError(
            f"{weights.path}: holds {name} for {theirs} classes, not {ours}; pass weights for {ours} classes"
        )
    network.load_state_dict({key: given[key] for key in given if key not in left_out}, strict=False)
    return left_out


def check_sums(path: Path) -> None:
    """Verifies the checksums that torch.save wrote, which torch.load does not check.

    A file that is not a zip, as before PyTorch 1.6, has none and passes. Raises zipfile.BadZipFile, or another error of
    reading, for a damaged file.
    """
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as file:
            damaged = file.testzip()
        if damaged:
            raise zipfile.BadZipFile(f"{damaged} has another checksum than was written")


def _read(path: Path) -> Any:
    try:
        path.open("rb").close()
    except OSError as error:
        raise ModelError(f"{path}: cannot be opened ({error.strerror}); pass a file of weights") from error
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        check_sums(path)
        # The training scripts of timm and torchvision store their command line with the weights.
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        # A damaged file can raise almost any error, since its bytes control the unpickler.
        code = re.search(r"Unsupported global: GLOBAL ([\w.]+)", str(error))
        if code:
            raise ModelError(
                f"{path}: holds {code[1]}, which takes running code to load, or is damaged; "
                "save its tensors alone: torch.save(network.state_dict(), path)"
            ) from error
        raise ModelError(f"{path}: is damaged, cut short or no file of weights; fetch it again") from error


def _is_weight(item: tuple[Any, Any]) -> bool:
    key, value = item
    return isinstance(key, str) and isinstance(value, Tensor)


def _plain_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    # torch.compile wraps any module, the whole network or a part of it; DataParallel only the whole.
    plain = {key.replace("_orig_mod.", ""): value for key, value in state.items()}
    while all(key.startswith("module.") for key in plain):
        plain = {key.removeprefix("module."): value for key, value in plain.items()}
    return plain


def _architecture(name: str) -> str:
    """Returns the name without the tag of a hub's weights, which identifies their training, not the architecture."""
    return name.partition(".")[0] if ":" in name else name


def _head(name: str) -> set[str]:
    """Returns the keys of all tensors whose shape depends on the number of classes."""
    with torch.device("meta"):
        one, two = build(name, 1).state_dict(), build(name, 2).state_dict()
    return {key for key in one if one[key].shape != two[key].shape}


def _first_few(keys: list[str]) -> str:
    return ", ".join(keys[:3]) + (", ..." if len(keys) > 3 else "")
