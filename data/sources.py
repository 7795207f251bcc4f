"""Where images come from: image folders, the torchvision sets by name, and the embedded `scenes`."""

import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from data import DataError, scenes
from data.pixels import EXTENSIONS

TORCHVISION_SETS = ("cifar10", "svhn", "imagenette")
_VAL_SHARE = 0.1


@dataclass(frozen=True)
class CropRule:
    """How crops fit a set: train crops by `scale`, `ratio` and `flip`, validation crops by `center_ratio`.

    scale: (low, high) share of the image's area. ratio: (low, high) of width / height.
    center_ratio: side of the validation crop as a share of the shorter side. resolution: pixels a side.
    """

    resolution: int
    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: bool = True
    center_ratio: float = 224 / 256


@dataclass(frozen=True)
class Split:
    """The images of one split: items[i] names image i, read(items[i]) opens it. labels: int64 [n]."""

    items: Sequence[Any]
    labels: NDArray[np.int64]
    read: Callable[[Any], Image.Image]


@dataclass(frozen=True)
class Source:
    """A set of images to be converted.

    crop: the rule that fits it, or None where it follows from the sizes of the images.
    fingerprint: changes whenever the images do. notes: what the user should know about how the set was read.
    """

    name: str
    class_names: tuple[str, ...]
    train: Split
    val: Split
    crop: CropRule | None
    fingerprint: str
    notes: tuple[str, ...] = ()


def open_source(data: str) -> Source:
    """Opens `scenes`, a torchvision set by name, or an image folder by path.

    Raises DataError for a name that is neither a set nor a folder, a folder without images or with one class,
    classes in val that train lacks, and a set that cannot be downloaded.
    """
    if data == "scenes":
        return _scenes()
    if data in TORCHVISION_SETS:
        return _torchvision_set(data)
    return _folder(Path(data))


def crop_rule_for(sizes: NDArray[np.int32]) -> CropRule:
    """The crop rule for images of these sizes (int [n, 2], pixels), where nothing else is known of them.

    Photographs get the paper's rule. Below 96 pixels a crop of 8 % of the area would be a few pixels wide, so small
    images are cropped to no less than a quarter and validated whole.
    """
    short = int(np.median(np.min(sizes, axis=1)))
    resolution = min(224, max(32, short // 32 * 32))
    if short < 96:
        return CropRule(resolution, scale=(0.25, 1.0), center_ratio=1.0)
    return CropRule(resolution)


def _scenes() -> Source:
    def split(name: str) -> Split:
        n = scenes.SIZES[name]
        labels = np.array([scenes.label(name, i) for i in range(n)], dtype=np.int64)
        return Split([(name, i) for i in range(n)], labels, _draw_scene)

    # Small crops of small pictures: most show one object, and often another than the main one.
    rule = CropRule(32, scale=(0.05, 0.2), center_ratio=0.7)
    return Source("scenes", scenes.CLASS_NAMES, split("train"), split("val"), rule, scenes_fingerprint())


def scenes_fingerprint() -> str:
    """The fingerprint of `scenes` as this code draws it."""
    return hashlib.sha256(Path(scenes.__file__).read_bytes()).hexdigest()


def _draw_scene(item: tuple[str, int]) -> Image.Image:
    return scenes.draw(*item)


def _torchvision_set(name: str) -> Source:
    # Imported here: torchvision takes seconds, and a folder needs none of it.
    from torchvision import datasets

    root = Path("downloads") / name
    try:
        if name == "imagenette":
            folder = root / "imagenette2"
            if not folder.is_dir():
                datasets.Imagenette(str(root), split="train", size="full", download=True)
            return _folder(folder)
        if name == "cifar10":
            train, val = (datasets.CIFAR10(str(root), train=part, download=True) for part in (True, False))
            splits = [Split(part.data, np.asarray(part.targets, dtype=np.int64), _from_array) for part in (train, val)]
            rule = CropRule(32, scale=(0.25, 1.0), center_ratio=1.0)
            return Source(name, tuple(train.classes), splits[0], splits[1], rule, "torchvision")
        digits = [datasets.SVHN(str(root), split=part, download=True) for part in ("train", "test")]
    except (OSError, RuntimeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(
            f"DATA={name}: could not be downloaded to {root} ({reason}); put its files there, or give a folder"
        ) from None
    # A flipped 2 is no digit, and a tight crop of a house number shows the neighbouring digit.
    splits = [Split(part.data.transpose(0, 2, 3, 1), part.labels.astype(np.int64), _from_array) for part in digits]
    rule = CropRule(32, scale=(0.5, 1.0), flip=False, center_ratio=1.0)
    return Source(name, tuple("0123456789"), splits[0], splits[1], rule, "torchvision")


def _from_array(pixels: NDArray[np.uint8]) -> Image.Image:
    return Image.fromarray(np.ascontiguousarray(pixels))


def _folder(root: Path) -> Source:
    if not root.is_dir():
        sets = ", ".join(("scenes", *TORCHVISION_SETS))
        raise DataError(f"DATA={root}: no such folder, and not the name of a set ({sets})")
    train_root, val_root = root / "train", root / "val"
    notes: tuple[str, ...] = ()
    if train_root.is_dir() and val_root.is_dir():
        train_classes = _class_folders(train_root)
        val_classes = _class_folders(val_root)
        unknown = sorted(set(val_classes) - set(train_classes))
        if unknown:
            raise DataError(
                f"{val_root}: {len(unknown)} classes that {train_root} lacks ({', '.join(unknown[:3])}"
                f"{', ...' if len(unknown) > 3 else ''}); remove them or add their training images"
            )
        names = tuple(sorted(train_classes))
        splits = [_split_of(part, names) for part in (train_classes, val_classes)]
    elif train_root.is_dir() or val_root.is_dir():
        missing = val_root if train_root.is_dir() else train_root
        raise DataError(f"{missing}: no such folder; give both train/ and val/, or class folders alone to be split")
    else:
        classes = _class_folders(root)
        names = tuple(sorted(classes))
        held_out = {name: _held_out(root, files) for name, files in classes.items()}
        kept = {name: [file for file in files if file not in held_out[name]] for name, files in classes.items()}
        splits = [_split_of(part, names) for part in (kept, {name: sorted(part) for name, part in held_out.items()})]
        notes = (
            f"{root} has no train/ and val/: {len(splits[1].items)} of its "
            f"{sum(map(len, classes.values()))} images (10 % of a class, always the same) are held out for validation",
        )
        if not splits[1].items:
            raise DataError(f"{root}: too few images to hold any out for validation (2 of a class are needed)")
    if len(names) < 2:
        raise DataError(f"{root}: only one class ({names[0]}); a classifier needs class folders for two or more")
    return Source(root.resolve().name, names, splits[0], splits[1], None, _fingerprint(root, splits), notes)


def _class_folders(root: Path) -> dict[str, list[str]]:
    """The image files of each class folder below root, sorted, hidden ones left out; empty folders don't count."""
    classes: dict[str, list[str]] = {}
    for entry in sorted(os.scandir(root), key=lambda entry: entry.name):
        if entry.is_dir() and not entry.name.startswith("."):
            files = image_files(entry.path)
            if files:
                classes[entry.name] = files
    if not classes:
        raise DataError(f"{root}: no images in class folders below it ({', '.join(sorted(EXTENSIONS))})")
    return classes


def image_files(folder: str | Path) -> list[str]:
    """The image files in a folder and below, by extension, sorted; hidden ones are left out."""
    return sorted(
        os.path.join(place, file)
        for place, _, files in os.walk(folder, followlinks=True)
        for file in files
        if os.path.splitext(file)[1].lower() in EXTENSIONS and not file.startswith(".")
    )


def _held_out(root: Path, files: list[str]) -> set[str]:
    """A tenth of the files, at least one of two, chosen by the hash of their names so that the choice is stable."""
    count = max(round(len(files) * _VAL_SHARE), 1) if len(files) > 1 else 0
    by_hash = sorted(files, key=lambda file: hashlib.sha256(os.path.relpath(file, root).encode()).digest())
    return set(by_hash[:count])


def _split_of(classes: dict[str, list[str]], names: tuple[str, ...]) -> Split:
    items = [file for name in names for file in classes.get(name, ())]
    counts = [len(classes.get(name, ())) for name in names]
    return Split(items, np.repeat(np.arange(len(names), dtype=np.int64), counts), Image.open)


def _fingerprint(root: Path, splits: list[Split]) -> str:
    digest = hashlib.sha256()
    for split in splits:
        for file in split.items:
            stat = os.stat(file)
            digest.update(
                f"{os.path.relpath(file, root)}\0{stat.st_size}\0{stat.st_mtime_ns}\n".encode(errors="surrogateescape")
            )
        digest.update(b"--\n")
    return digest.hexdigest()
