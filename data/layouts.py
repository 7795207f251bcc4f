"""How data sets are laid out on disk: which class each image has, and which images are for training or validation."""

import csv
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from command import first_line
from data import DataError
from data.pixels import EXTENSIONS

# Names of the folder of the validation images; the first that exists is used.
VAL_NAMES = ("val", "valid", "validation", "test")
# Tiny-ImageNet's val/ holds no class folders: this file in it names the class of each image.
ANNOTATIONS = "val_annotations.txt"
# Names of the columns of a CSV, in lower case.
_COLUMNS = {
    "file": ("file", "filename", "file_name", "filepath", "path", "image"),
    "class": ("class", "label", "class_name", "category"),
    "split": ("split",),
}
_SHOWN = 3

# The item to read for each image, by class and by the path within the class.
Classes = Mapping[str, Mapping[str, Any]]


class Parts(NamedTuple):
    """The images of a set, by class.

    val: None if the set has no splits: train then holds all images. train_place, val_place: their names in messages.
    """

    train: Classes
    val: Classes | None = None
    train_place: str = "train"
    val_place: str = "val"
    notes: tuple[str, ...] = ()


def val_folder(root: Path) -> str | None:
    """The name of a set's folder of validation images, if it has one beside train/."""
    if not (root / "train").is_dir():
        return None
    return next((name for name in VAL_NAMES if (root / name).is_dir()), None)


def of_folders(root: str, below: str, files: Mapping[str, Any], annotations: Mapping[str, bytes]) -> Parts:
    """The parts by the paths of image files: train/CLASS/... and val/CLASS/..., or CLASS/... alone.

    root: the name of the set in messages. below: the prefix of paths in messages. annotations: the contents of files
    named ANNOTATIONS, by path.
    Raises DataError if a class folder or one of the two parts is missing.
    """
    tops = _by_folder(files)
    val_names = [name for name in VAL_NAMES if name in tops]
    if "train" not in tops and "val" not in tops:
        return Parts(_classes(root, files))
    if "train" not in tops or not val_names:
        missing = "val" if "train" in tops else "train"
        raise DataError(
            f"{below}{missing}: no such folder, or no images in it; give both train/ and val/, or class folders alone "
            "to be split"
        )
    val_name = val_names[0]
    place = f"{below}{val_name}"
    notes = () if val_name == "val" else (f"{place}: used for validation, as there is no val/",)
    train = _classes(f"{below}train", tops["train"])
    images = tops[val_name]
    listed = annotations.get(f"{val_name}/{ANNOTATIONS}")
    if listed is not None and {path.rpartition("/")[0] for path in images} in ({""}, {"images"}):
        val, missing_notes = _annotated(f"{place}/{ANNOTATIONS}", listed, images)
        return Parts(train, val, f"{below}train", place, notes + missing_notes)
    return Parts(train, _classes(place, images), f"{below}train", place, notes)


def empty_folders(root: Path, parts: list[Path], classes: set[str]) -> tuple[str, ...]:
    """A note about class folders without images in any of the parts, if there are any."""
    folders = set()
    for part in parts:
        with os.scandir(part) as entries:
            folders |= {entry.name for entry in entries if entry.is_dir(follow_symlinks=False)}
    empty = sorted(name for name in folders - classes if not name.startswith(".") and name != "__MACOSX")
    return (f"{root}: {len(empty)} folders hold no images and are not classes ({some(empty)})",) if empty else ()


def of_csv(path: Path) -> Parts:
    """The parts by a table of file, class and optionally split, whose first line names the columns; paths are relative
    to it.

    The items are paths. Raises DataError if the table or a line of it is not valid, or a file is missing.
    """
    columns, lines = _table(path)
    found: dict[str, dict[str, dict[str, str]]] = {}
    known: dict[str, int] = {}
    absent = []
    for number, row in lines:
        cells = {
            kind: row[column].strip() if column is not None and column < len(row) else ""
            for kind, column in columns.items()
        }
        name, split = cells["file"], cells["split"].lower()
        if not name or not cells["class"]:
            raise DataError(f"{path}: line {number} names no {'class' if name else 'file'}")
        if columns["split"] is not None and split not in ("train", *VAL_NAMES):
            raise DataError(f"{path}: line {number}: split {cells['split']!r} is none of train, {', '.join(VAL_NAMES)}")
        file = os.path.normpath(path.parent / name)
        if file in known:
            raise DataError(f"{path}: line {number} names {name}, as line {known[file]} does; name each file once")
        known[file] = number
        if not os.path.isfile(file):
            absent.append(f"line {number}: {file}")
        plain = "/".join(part for part in name.split("/") if part not in ("", ".", ".."))
        images = found.setdefault(split, {}).setdefault(cells["class"], {})
        # Two files, such as ../a.jpg and a.jpg, may have one plain name.
        images[plain if plain not in images else f"{number}/{plain}"] = file
    if not known:
        raise DataError(f"{path}: names no images")
    if absent:
        raise DataError(f"{path}: {len(absent)} of its {len(known)} files are missing ({absent[0]})")
    return _parts_by_split(path, {split: sorted_classes(classes) for split, classes in found.items()})


def _table(path: Path) -> tuple[dict[str, int | None], list[tuple[int, list[str]]]]:
    """The indices of the columns file, class and split of a CSV, and its other lines with their numbers."""
    try:
        with open(path, newline="", encoding="utf-8-sig") as table:
            rows = csv.reader(table)
            header = [name.strip().lower() for name in next(rows, [])]
            lines = [(rows.line_num, row) for row in rows if any(map(str.strip, row))]
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None
    except (csv.Error, UnicodeDecodeError) as error:
        raise DataError(f"{path}: not a CSV file in UTF-8 ({first_line(error)})") from None
    columns: dict[str, int | None] = {}
    for kind, names in _COLUMNS.items():
        columns[kind] = next((header.index(name) for name in names if name in header), None)
        if columns[kind] is None and kind != "split":
            raise DataError(
                f"{path}: its first line names no column of the {kind} ({', '.join(names)}); it names: "
                f"{some(header) or 'nothing'}"
            )
    return columns, lines


def _parts_by_split(path: Path, found: dict[str, Classes]) -> Parts:
    if set(found) == {""}:
        return Parts(found[""])
    val_names = [name for name in VAL_NAMES if name in found]
    for split, there in (("train", "train" in found), ("val", val_names)):
        if not there:
            raise DataError(f"{path}: its column split names no image as {split}; name some, or leave the column out")
    notes = [] if val_names[0] == "val" else [f"{path}: split {val_names[0]} is used for validation"]
    for name in val_names[1:]:
        notes.append(f"{path}: {sum(map(len, found[name].values()))} images of split {name} are not used")
    return Parts(found["train"], found[val_names[0]], f"{path}: train", f"{path}: {val_names[0]}", tuple(notes))


def sorted_classes(classes: Classes) -> Classes:
    return {name: dict(sorted(images.items())) for name, images in classes.items()}


def some(names: list[str]) -> str:
    """The first few of these names, for a message."""
    return f"{', '.join(names[:_SHOWN])}{', ...' if len(names) > _SHOWN else ''}"


def _annotated(place: str, listed: bytes, images: Mapping[str, Any]) -> tuple[Classes, tuple[str, ...]]:
    """The images by class, according to Tiny-ImageNet's val_annotations.txt: FILE, tab, CLASS, tab, a box."""
    class_of = {}
    for number, line in enumerate(os.fsdecode(listed).splitlines(), 1):
        fields = line.split("\t")
        if not line.strip():
            continue
        if len(fields) < 2 or not fields[0] or not fields[1].strip():
            raise DataError(f"{place}: line {number} is not a file and a class separated by a tab")
        class_of[fields[0]] = fields[1].strip()
    by_name = {path.rpartition("/")[2]: item for path, item in images.items()}
    unnamed = sorted(set(by_name) - set(class_of))
    if unnamed:
        raise DataError(f"{place}: names no class for {len(unnamed)} of {len(by_name)} images ({some(unnamed)})")
    classes: dict[str, dict[str, Any]] = {}
    for name, item in by_name.items():
        classes.setdefault(class_of[name], {})[name] = item
    absent = sorted(set(class_of) - set(by_name))
    notes = (f"{place}: {len(absent)} of the images that it names are missing ({some(absent)})",) if absent else ()
    return sorted_classes(classes), notes


def _by_folder(files: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Files by the first folder of their paths, which is removed; files outside folders are skipped."""
    folders: dict[str, dict[str, Any]] = {}
    for path, item in files.items():
        folder, slash, rest = path.partition("/")
        if slash:
            folders.setdefault(folder, {})[rest] = item
    return folders


def _classes(root: str, files: Mapping[str, Any]) -> Classes:
    """The images of each class folder by their paths, sorted; empty folders are ignored."""
    classes = sorted_classes(_by_folder(files))
    if not classes:
        raise DataError(f"{root}: no images in class folders below it ({', '.join(sorted(EXTENSIONS))})")
    return classes
