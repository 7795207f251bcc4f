"""The description of a folder of stored labels, `labels.json`: which crops they label, and how they were made."""

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

from command import first_line
from data.described import Fits, check_fields, flag, json_object, number, one_of, optional, read_json, span, text, whole
from data.durable import write_text
from data.plan import CropRule
from data.sets import ConvertedSet
from models.trained import Trained
from train import TrainError
from train.labels.rows import CellRows, Rows, build_rows
from train.runs import key_of

_VERSION = 1
# Suffix of files that are being written.
PARTIAL = ".partial"


@dataclass(frozen=True)
class Description:
    """Which crops stored labels are of, and how they were made.

    data: name, fingerprint, images and classes of the set. refinery: its network, the digest of its weights, its
    generation, which batch statistics it used and the resolution it saw crops at (None: unchanged). plan: seed, crop
    rule and copies of an epoch, which determine the crops. resolution: pixels per side of the crops. precision, batch,
    order: these affect labels through rounding, or through the batch's statistics. format, k, dtype: see
    train.labels.rows.build_rows. bytes_per_crop: bytes of a row.

    Label maps (format map) have one row per image, no plan, and one file. resolution: pixels per side of the images,
    squashed to squares. cells: per side of a map. shift: whether the logits were shifted, cell by cell, so that the
    dropped ones are 0 on average.

    For imported maps (train/trees.py), fields that their files do not specify are None. refinery: the name that the
    user gave, the SHA-256 of all rows as the digest of its weights (None until they are finished), and generation 0.
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
        """Bytes of an epoch's rows."""
        return self.data["images"] * self.copies, self.bytes_per_crop

    @property
    def bytes_per_epoch(self) -> int:
        rows, width = self.shape
        return rows * width

    @property
    def key(self) -> str:
        """Eight hex digits that identify the description."""
        # Fields of maps are not part of the name of other labels.
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
    """The data's part of a description; `images` of its training images have labels."""
    return {
        "name": data.name,
        "fingerprint": data.fingerprint,
        "images": images,
        "classes": len(data.class_names),
    }


def refinery_part(trained: Trained, *, bn: str, resolution: int | None) -> dict[str, Any]:
    """The refinery's part of a description, for crops at this resolution, with these statistics."""
    return {
        "network": trained.name,
        "weights": trained.digest,
        "generation": trained.generation,
        "bn": bn,
        "resolution": resolution,
    }


def differences(asked: Description, found: Description) -> list[str]:
    """The differences of two descriptions, as phrases."""
    here, there = _flat(asdict(asked)), _flat(asdict(found))
    return [
        f"{name} is {short(there.get(name))} there and {short(here.get(name))} here"
        for name in here | there
        if here.get(name) != there.get(name)
    ]


def read_description(folder: Path) -> tuple[Description, dict[int, dict[str, Any]]]:
    """The contents of labels.json: the description, and crc32 and seconds of each finished epoch (see Store.finished).

    Raises TrainError if it is missing, damaged or of another version.
    """
    path = description_file(folder)
    try:
        said = read_json(path)
        check_fields(said, {"version": whole(0, 1000), "checksum": text, "epochs": json_object})
        if said["version"] != _VERSION:
            raise TrainError(f"{path}: written by another version of this program; label again")
        if said.pop("checksum") != key_of(said):
            raise ValueError("its checksum differs")
        epochs, _ = said.pop("epochs"), said.pop("version")
        # Labels stored by versions before maps lack these fields.
        said = {"cells": None, "shift": None} | said
        _check(said)
        for epoch, made in epochs.items():
            if not (epoch.isascii() and epoch.isdecimal() and str(int(epoch[:9])) == epoch):
                raise ValueError(f"epochs has {json.dumps(epoch)}")
            check_fields(made, _EPOCH_FIELDS, of=f"epochs.{epoch}.")
        return Description(**said), {int(epoch): made for epoch, made in epochs.items()}
    except TrainError:
        raise
    except OSError as error:
        raise TrainError(f"{path}: cannot be read ({error.strerror}); is {folder} a folder of stored labels?") from None
    except ValueError as error:
        raise TrainError(f"{path}: is damaged ({first_line(error)}); label again, into another folder") from None


# Valid values of each field of labels.json, since it may come from other people, including its checksum.
_MOST_SIDE, _MOST_CLASSES = 8192, 1 << 20
_side = whole(1, _MOST_SIDE)
_FIELDS: dict[str, Fits] = {
    "data": json_object,
    "refinery": json_object,
    "format": one_of("exact", "packed", "map"),
    "k": optional(whole(1, _MOST_CLASSES)),
    "dtype": optional(text),
    "bytes_per_crop": whole(1, 2**40),
}
_CROP_LABELS: dict[str, Fits] = {
    "plan": json_object,
    "resolution": _side,
    "precision": text,
    "batch": whole(1, 2**31),
    "order": one_of("random", "quasi-random"),
    "cells": one_of(None),
    "shift": one_of(None),
}
# Fields that the files of imported maps do not specify are None.
_MAPS: dict[str, Fits] = {
    "plan": one_of(None),
    "resolution": optional(_side),
    "precision": optional(text),
    "batch": optional(whole(1, 2**31)),
    "order": optional(one_of("sequential")),
    "k": whole(1, _MOST_CLASSES),
    "cells": whole(1, _MOST_SIDE),
    "shift": optional(flag),
}
_DATA_FIELDS: dict[str, Fits] = {
    "name": text,
    "fingerprint": text,
    "images": whole(1, 2**40),
    "classes": whole(1, _MOST_CLASSES),
}
# The name becomes a part of the name of run folders.
_REFINERY_FIELDS: dict[str, Fits] = {
    "network": lambda value: text(value) and 0 < len(os.fsencode(value)) <= 150,
    "weights": optional(text),
    "generation": whole(0, 10**6),
    "bn": optional(one_of("batch", "running")),
    "resolution": optional(_side),
}
_PLAN_FIELDS: dict[str, Fits] = {"seed": whole(-(2**63), 2**64 - 1), "crop": json_object, "copies": whole(1, 2**16)}
_CROP_FIELDS: dict[str, Fits] = {"scale": span(1e-6, 1), "ratio": span(1e-3, 1e3), "flip": flag}
_EPOCH_FIELDS: dict[str, Fits] = {"crc32": whole(0, 2**32 - 1), "seconds": number(0)}


def _check(said: dict[str, Any]) -> None:
    """Raises ValueError unless these are the fields of a Description."""
    check_fields(said, _FIELDS)
    check_fields(said, _MAPS if said["format"] == "map" else _CROP_LABELS)
    check_fields(said["data"], _DATA_FIELDS, of="data.")
    check_fields(said["refinery"], _REFINERY_FIELDS, of="refinery.")
    if said["plan"] is not None:
        check_fields(said["plan"], _PLAN_FIELDS, of="plan.")
        check_fields(said["plan"]["crop"], _CROP_FIELDS, of="plan.crop.")
        if said["plan"]["crop"].keys() != _CROP_FIELDS.keys():
            raise ValueError(f"plan.crop has {', '.join(said['plan']['crop'])}")
    unknown = said.keys() - {field.name for field in fields(Description)}
    if unknown:
        raise ValueError(f"{min(unknown)} is unknown")
    classes, k, cells = said["data"]["classes"], said["k"], said["cells"]
    rows: Rows | CellRows = (
        CellRows(classes, k, cells) if cells else build_rows(said["format"], classes, k=k, dtype=said["dtype"])
    )
    if (rows.k, rows.width) != (k, said["bytes_per_crop"]):
        raise ValueError(f"bytes_per_crop is {said['bytes_per_crop']} and k {k}, which do not go with its format")


def write_description(folder: Path, description: Description, epochs: Mapping[int, dict[str, Any]]) -> None:
    """Writes labels.json; if that fails (OSError), an existing one is unchanged."""
    path = description_file(folder)
    numbered = {str(epoch): made for epoch, made in sorted(epochs.items())}
    said = {"version": _VERSION} | asdict(description) | {"epochs": numbered}
    write_text(path, json.dumps(said | {"checksum": key_of(said)}, indent=1) + "\n")


def description_file(folder: Path) -> Path:
    """The file of the description in a folder of labels."""
    return folder / "labels.json"


def _flat(value: Any, name: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {name: value}
    flat: dict[str, Any] = {}
    for key, inner in value.items():
        flat |= _flat(inner, f"{name}.{key}" if name else key)
    return flat


def short(value: Any) -> str:
    """A value for messages: of a digest, only the first digits."""
    return value[:16] if isinstance(value, str) and len(value) == 64 else str(value)
