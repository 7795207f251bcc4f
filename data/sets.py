"""Converted sets on disk: their contents, and which one belongs to DATA.

A converted set is a folder: `train.beton` and `val.beton` (baseline 4:2:0 JPEGs with a restart grid, see data/tiles.py,
blocks, see data/blocks.py, or raw pixels), `train.names.json` and `val.names.json` (the images' file names, in order,
if they come from files), `set.json` (class names in order, resolution and crop rule, how it was made), `rejects.txt`
(images that could not be read).
"""

import contextlib
import hashlib
import json
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from command import first_line
from data import DataError, ilsvrc
from data.beton import Beton, FileIdentity, identity_of
from data.described import (
    Fits,
    check_fields,
    file_name,
    flag,
    json_object,
    number,
    path_below,
    read_json,
    span,
    text,
    whole,
)
from data.layouts import val_folder
from data.plan import CropRule
from data.sources import TORCHVISION_SETS, Source, crops_for, open_source, quick_identity

_FORMAT = 3
# In this one, the resolution is part of the crop rule.
_OLDER_FORMAT = 2


def _class_names(value: Any) -> bool:
    return isinstance(value, list) and len(value) > 1 and all(map(text, value)) and len(set(value)) == len(value)


# What set.json may hold, field by field: it may come from other people. `name` becomes a folder for run files.
_FIELDS: dict[str, Fits] = {
    "name": file_name,
    "class_names": _class_names,
    "source_fingerprint": text,
    "crop": json_object,
    "made": json_object,
}
_RESOLUTION: dict[str, Fits] = {"resolution": whole(1, 8192)}
_CROP_FIELDS: dict[str, Fits] = {
    "scale": span(1e-6, 1),
    "ratio": span(1e-3, 1e3),
    "flip": flag,
    "center_ratio": number(1e-6, 1),
}


@dataclass(frozen=True)
class ConvertedSet:
    """A converted set on disk, as `set.json` describes it.

    folder holds `train.beton` and `val.beton`. name: of its source (`scenes`, a set's name or a folder's). resolution:
    pixels per side of the crops that fit it.
    """

    folder: Path
    name: str
    class_names: tuple[str, ...]
    resolution: int
    crop: CropRule
    source_fingerprint: str
    made: dict[str, Any]

    def beton(self, split: str) -> Path:
        """The file of a split's images. Raises DataError if they are no longer those that `fingerprint` identified."""
        path = self._path(split)
        if "_known" in vars(self):
            fingerprint, identity, _ = self._known[split]
            with contextlib.suppress(FileNotFoundError):
                if identity_of(path) != identity and Beton(path).fingerprint != fingerprint:
                    raise DataError(f"{path}: was replaced by other images while it was in use; type the command again")
        return path

    @cached_property
    def fingerprint(self) -> str:
        """Identifies the stored images and labels of both splits."""
        return hashlib.sha256("".join(fingerprint for fingerprint, *_ in self._known.values()).encode()).hexdigest()

    def num_images(self, split: str) -> int:
        """How many images a split has."""
        return self._known[split][2]

    @cached_property
    def _known(self) -> dict[str, tuple[str, FileIdentity, int]]:
        """The fingerprint, the identity and the number of images of each split's file."""
        files = {split: Beton(self._path(split)) for split in ("train", "val")}
        return {split: (file.fingerprint, file.identity, file.num_samples) for split, file in files.items()}

    def _path(self, split: str) -> Path:
        return self.folder / f"{split}.beton"

    def image_names(self, split: str) -> list[str]:
        """The file names of a split's stored images, in their order, as CLASS/FILE below the split's folder.

        Bytes that are not text are escaped as os.fsdecode does. Raises DataError for a set without file names (cifar10,
        svhn or scenes, or converted by an earlier version), and if they are damaged.
        """
        path = names_file(self.folder, split)
        try:
            names = read_json(path)
        except FileNotFoundError:
            raise DataError(
                f"{self.folder}: holds no file names of its images; remove it and convert the folder or archive of "
                "images again (cifar10, svhn and scenes have none)"
            ) from None
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({error.strerror})") from None
        except ValueError:
            names = None
        if (
            not isinstance(names, list)
            or len(names) != Beton(self.beton(split)).num_samples
            or not all(map(path_below, names))
        ):
            raise DataError(f"{path}: damaged; convert the set again")
        return names

    def write(self) -> None:
        """Writes set.json into the folder."""
        described = {
            "format": _FORMAT,
            "name": self.name,
            "class_names": self.class_names,
            "resolution": self.resolution,
            "crop": asdict(self.crop),
            "source_fingerprint": self.source_fingerprint,
            "made": self.made,
        }
        (self.folder / "set.json").write_text(json.dumps(described, indent=1) + "\n")


def open_set(folder: str | Path) -> ConvertedSet:
    """Reads the `set.json` of a converted set. Raises DataError if it is missing or damaged."""
    folder = Path(folder)
    path = folder / "set.json"
    try:
        described = read_json(path)
        check_fields(described, {"format": whole(0, 1000)})
        older = described["format"] == _OLDER_FORMAT
        if described["format"] != _FORMAT and not older:
            raise DataError(f"{path}: written by another version; convert the set again")
        check_fields(described, _FIELDS if older else _FIELDS | _RESOLUTION)
        crop = described["crop"]
        check_fields(crop, _CROP_FIELDS | _RESOLUTION if older else _CROP_FIELDS, of="crop.")
    except DataError:
        raise
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); is {folder} a converted set?") from None
    except ValueError as error:
        raise DataError(f"{path}: damaged ({first_line(error)}); convert the set again") from None
    return ConvertedSet(
        folder=folder,
        name=described["name"],
        class_names=tuple(described["class_names"]),
        resolution=(crop if older else described)["resolution"],
        crop=CropRule(tuple(crop["scale"]), tuple(crop["ratio"]), crop["flip"], crop["center_ratio"]),
        source_fingerprint=described["source_fingerprint"],
        made=described["made"],
    )


def names_file(folder: Path, split: str) -> Path:
    """Where a converted set keeps the file names of a split: a JSON list, in ASCII, one per line."""
    return folder / f"{split}.names.json"


def is_converted(data: str | Path) -> bool:
    return (Path(data) / "set.json").is_file()


def _of_other_writers(folder: Path) -> ConvertedSet | None:
    """The set of a folder that holds train.beton and val.beton but no set.json; None for other folders.

    Its classes are named by their numbers. Raises DataError if the files cannot be read or their classes differ.
    """
    files = {split: folder / f"{split}.beton" for split in ("train", "val")}
    if not all(map(Path.is_file, files.values())) or (folder / "train").is_dir():
        return None
    betons = {split: Beton(file) for split, file in files.items()}
    train, val = (int(beton.labels.max(initial=-1)) + 1 for beton in betons.values())
    if train != val or train < 2 or any(beton.labels.min() < 0 for beton in betons.values()):
        raise DataError(
            f"{files['val']}: has classes below {val}, and train.beton below {train}; they must be the same"
        )
    resolution, crop = crops_for(betons["train"].sizes)
    fingerprint = hashlib.sha256("".join(beton.fingerprint for beton in betons.values()).encode()).hexdigest()
    name = folder.resolve().name or "images"
    return ConvertedSet(folder, name, tuple(map(str, range(train))), resolution, crop, fingerprint, made={})


@dataclass(frozen=True)
class Unconverted:
    """A source without a converted set, or with an outdated one (stale); data.convert makes it at `folder`."""

    source: Source
    folder: Path
    stale: bool

    @property
    def class_names(self) -> tuple[str, ...]:
        return self.source.class_names

    @property
    def source_fingerprint(self) -> str:
        return self.source.fingerprint


def find_set(data: str, *, cache: str | Path = "converted") -> ConvertedSet | Unconverted:
    """The set for DATA: a converted set, one converted earlier below `cache`, or one that is still to be converted.

    A folder with train.beton and val.beton of another writer is a converted set whose classes are numbered. Fast:
    nothing is decoded. Raises DataError as open_source and open_set do.
    """
    if is_converted(data):
        return open_set(data)
    path = Path(data)
    others = _of_other_writers(path)
    if others:
        return others
    known = quick_identity(path)
    if known:
        # Checked before the archive is opened, since a compressed tar would have to be unpacked.
        name, fingerprint = known
        converted = still_fitting(_cache_folder(cache, name, str(path.resolve())), fingerprint)
        if converted:
            return converted
    source = open_source(data)
    folder = _cache_folder(cache, source.name, data if source.crop else str(path.resolve()))
    converted = still_fitting(folder, source.fingerprint, source)
    return converted or Unconverted(source, folder, stale=folder.exists())


def open_unsplit(data: str) -> Source | None:
    """All images of a set without a validation split, as open_source(whole=True) returns them; None for other sets.

    Raises DataError as open_source does.
    """
    path = Path(data)
    named = data == "scenes" or data in TORCHVISION_SETS
    if named or not path.exists() or is_converted(data) or _of_other_writers(path):
        return None
    # Known without listing the images.
    if val_folder(path) or (path.is_dir() and ilsvrc.is_distributed(path)):
        return None
    source = open_source(data, whole=None)
    return None if len(source.train.items) else source


def _cache_folder(cache: str | Path, name: str, location: str) -> Path:
    return Path(cache) / f"{name}-{hashlib.sha256(location.encode(errors='surrogateescape')).hexdigest()[:8]}"


def still_fitting(folder: Path, fingerprint: str, source: Source | None = None) -> ConvertedSet | None:
    """The set converted earlier, unless its images or the source's crops have changed, or it is damaged."""
    if not is_converted(folder):
        return None
    with contextlib.suppress(DataError):
        converted = open_set(folder)
        crops = (converted.resolution, converted.crop)
        same_crops = source is None or source.crop is None or (source.resolution, source.crop) == crops
        if converted.source_fingerprint == fingerprint and same_crops:
            return converted
    return None
