"""What stored labels are of, and how they were made: the description of a folder of them, `labels.json`."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from data.plan import CropRule
from data.sets import ConvertedSet
from models.trained import Trained
from train import TrainError
from train.labels.rows import Rows, build_rows
from train.runs import key_of
from train.runs.atomic import write_text

_VERSION = 1
# What is being written.
PARTIAL = ".partial"


@dataclass(frozen=True)
class Description:
    """What stored labels are of, and how they were made.

    data: name, fingerprint, images and classes of the set. refinery: its network, the digest of its weights, its
    generation, whose batch statistics it used and the resolution it saw crops at (None: as they are). plan: seed, crop
    rule and copies of an epoch, of which the crops are a function. resolution: pixels a side of the crops. precision,
    batch, order: what labels depend on by rounding, or with the batch's statistics. format, k, dtype: see
    train.labels.rows.build_rows. bytes_per_crop: of a row.

    Of label maps (format map) there is one row an image, no plan, and one file. resolution: pixels a side of the
    pictures, squashed to squares. cells: a side of a map. shift: whether the logits were moved, cell by cell, so that
    those which were left out are 0 on average.

    Of imported maps (train/trees.py), what their files do not say is None. refinery: the name that the user gave, as
    the digest of its weights the SHA-256 of all rows (None until they are finished), and generation 0.
    """

    data: dict[str, Any]
    refinery: dict[str, Any]
    plan: dict[str, Any] | None
    resolution: int | None
    precision: str | None
    batch: int | None
    order: str | None
    format: str
    k: int | None
    dtype: str | None
    bytes_per_crop: int
    cells: int | None = None
    shift: bool | None = None

    @property
    def seed(self) -> int:
        assert self.plan
        return int(self.plan["seed"])

    @property
    def copies(self) -> int:
        return int(self.plan["copies"]) if self.plan else 1

    @cached_property
    def crop(self) -> CropRule:
        assert self.plan
        rule = self.plan["crop"]
        return CropRule(**rule | {name: tuple(rule[name]) for name in ("scale", "ratio")})

    @property
    def shape(self) -> tuple[int, int]:
        """Of an epoch's rows."""
        return self.data["images"] * self.copies, self.bytes_per_crop

    @property
    def bytes_per_epoch(self) -> int:
        rows, width = self.shape
        return rows * width

    @property
    def key(self) -> str:
        """Names all of it, in eight hex digits."""
        # What only maps have is no part of the name of other labels.
        return key_of(
            {name: value for name, value in asdict(self).items() if value is not None or name in ("k", "dtype")}
        )

    @property
    def kind(self) -> str:
        """The format of the rows, in a few words."""
        if self.format == "map":
            return f"maps of {self.cells}x{self.cells} cells, top {self.k}"
        return self.format if self.k is None else f"top {self.k}"

    def file_name(self, epoch: int) -> str:
        return "train.maps" if self.format == "map" else f"epoch-{epoch:04d}.labels"

    def build_rows(self) -> Rows:
        """The format of the rows."""
        return build_rows(self.format, self.data["classes"], k=self.k, dtype=self.dtype)


def data_part(data: ConvertedSet, images: int) -> dict[str, Any]:
    """What a description says of the data, of whose training images so many have labels."""
    return {
        "name": data.name,
        "fingerprint": data.fingerprint,
        "images": images,
        "classes": len(data.class_names),
    }


def refinery_part(trained: Trained, *, bn: str, resolution: int | None) -> dict[str, Any]:
    """What a description says of a refinery that saw crops at this resolution, with these statistics."""
    return {
        "network": trained.name,
        "weights": trained.digest,
        "generation": trained.generation,
        "bn": bn,
        "resolution": resolution,
    }


def differences(asked: Description, found: Description) -> list[str]:
    """In what two descriptions differ, as phrases."""
    here, there = _flat(asdict(asked)), _flat(asdict(found))
    return [
        f"{name} is {short(there.get(name))} there and {short(here.get(name))} here"
        for name in here | there
        if here.get(name) != there.get(name)
    ]


def read_description(folder: Path) -> tuple[Description, dict[int, dict[str, Any]]]:
    """What labels.json says: the description, and of each finished epoch crc32 and seconds (see Store.finished).

    Raises TrainError where it is missing, damaged or of another version.
    """
    path = description_file(folder)
    try:
        said = json.loads(path.read_text())
        if said["version"] != _VERSION:
            raise TrainError(f"{path}: written by another version of this program; label again")
        if said.pop("checksum") != key_of(said):
            raise ValueError
        epochs = {int(epoch): made for epoch, made in said.pop("epochs").items()}
        return Description(**{name: value for name, value in said.items() if name != "version"}), epochs
    except TrainError:
        raise
    except OSError as error:
        raise TrainError(f"{path}: cannot be read ({error.strerror}); is {folder} a folder of stored labels?") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise TrainError(f"{path}: is damaged; label again, into another folder") from None


def write_description(folder: Path, description: Description, epochs: Mapping[int, dict[str, Any]]) -> None:
    """Writes labels.json, or leaves the one that is there as it is where that fails (OSError)."""
    path = description_file(folder)
    numbered = {str(epoch): made for epoch, made in sorted(epochs.items())}
    said = {"version": _VERSION} | asdict(description) | {"epochs": numbered}
    write_text(path, json.dumps(said | {"checksum": key_of(said)}, indent=1) + "\n")


def description_file(folder: Path) -> Path:
    """Where the folder of labels keeps their description."""
    return folder / "labels.json"


def _flat(value: Any, name: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {name: value}
    flat: dict[str, Any] = {}
    for key, inner in value.items():
        flat |= _flat(inner, f"{name}.{key}" if name else key)
    return flat


def short(value: Any) -> str:
    """A value as messages show it: of a digest, what tells two apart."""
    return value[:16] if isinstance(value, str) and len(value) == 64 else str(value)
