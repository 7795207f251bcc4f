"""Where images come from: image folders and archives, the torchvision sets by name, and the embedded `scenes`."""

import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from command import first_line
from data import DataError, archives, scenes
from data.folders import Found, files_below
from data.pixels import EXTENSIONS, open_image
from data.plan import CropRule

TORCHVISION_SETS = ("cifar10", "svhn", "imagenette")
_VAL_SHARE = 0.1
_HAS_SPLITS = "has images for training and others for validation; leave --split out"


@dataclass(frozen=True)
class Split:
    """The images of one split: items[i] names image i, read(items[i]) opens it. labels: int64 [n].

    names: of the image files, as CLASS/FILE below the split's folder; None where images come from no files. Bytes that
    are no text are escaped as os.fsdecode does.
    """

    items: Sequence[Any]
    labels: NDArray[np.int64]
    read: Callable[[Any], Image.Image]
    names: Sequence[str] | None = None


@dataclass(frozen=True)
class Source:
    """A set of images to be converted.

    resolution (pixels a side), crop: of the crops that fit it; None where they follow from the sizes of the images.
    fingerprint: changes whenever the images do. notes: what the user should know about how the set was read.
    """

    name: str
    class_names: tuple[str, ...]
    train: Split
    val: Split
    fingerprint: str
    resolution: int | None = None
    crop: CropRule | None = None
    notes: tuple[str, ...] = ()


def open_source(data: str, *, whole: bool = False) -> Source:
    """Opens `scenes`, a torchvision set by name, or an image folder or archive (zip, tar) of one by path.

    whole: of class folders alone, all images are val's and none train's, for a set that is only evaluated on.
    A compressed tar is unpacked to a temporary file first; see open_archive.
    Raises DataError for a name that is neither a set nor a folder nor an archive, one without images or with one class,
    classes in val that train lacks, a damaged or encrypted archive, a set that cannot be downloaded, and for the whole
    of what has a train and a val split.
    """
    if whole and data in ("scenes", *TORCHVISION_SETS):
        raise DataError(f"DATA={data}: {_HAS_SPLITS}")
    if data == "scenes":
        return _scenes()
    if data in TORCHVISION_SETS:
        return _torchvision_set(data)
    path = Path(data)
    if path.is_dir():
        return _folder(path, whole)
    if path.is_file():
        return _archive(path, whole)
    sets = ", ".join(("scenes", *TORCHVISION_SETS))
    raise DataError(
        f"DATA={data}: no such folder or archive (.zip, .tar, .tar.gz, .tar.xz, .tar.bz2), and not the name of a set "
        f"({sets})"
    )


def crops_for(sizes: NDArray[np.int32]) -> tuple[int, CropRule]:
    """The resolution and the rule of crops of images of these sizes (int [n, 2], pixels), if no more is known of them.

    Photographs get the paper's rule. Below 96 pixels a crop of 8 % of the area would be a few pixels wide, so small
    images are cropped to no less than a quarter and validated whole.
    """
    short = int(np.median(np.min(sizes, axis=1)))
    resolution = min(224, max(32, short // 32 * 32))
    if short < 96:
        return resolution, CropRule(scale=(0.25, 1.0), center_ratio=1.0)
    return resolution, CropRule()


def _scenes() -> Source:
    def split(name: str) -> Split:
        n = scenes.SIZES[name]
        labels = np.array([scenes.label(name, i) for i in range(n)], dtype=np.int64)
        return Split([(name, i) for i in range(n)], labels, _draw_scene)

    # Small crops of small pictures: most show one object, and often another than the main one.
    rule = CropRule(scale=(0.05, 0.2), center_ratio=0.7)
    return Source("scenes", scenes.CLASS_NAMES, split("train"), split("val"), scenes_fingerprint(), 32, rule)


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
            rule = CropRule(scale=(0.25, 1.0), center_ratio=1.0)
            return Source(name, tuple(train.classes), splits[0], splits[1], "torchvision", 32, rule)
        digits = [datasets.SVHN(str(root), split=part, download=True) for part in ("train", "test")]
    except (OSError, RuntimeError) as error:
        reason = first_line(error)
        raise DataError(
            f"DATA={name}: could not be downloaded to {root} ({reason}); put its files there, or give a folder"
        ) from None
    # A flipped 2 is no digit, and a tight crop of a house number shows the neighbouring digit.
    splits = [Split(part.data.transpose(0, 2, 3, 1), part.labels.astype(np.int64), _from_array) for part in digits]
    rule = CropRule(scale=(0.5, 1.0), flip=False, center_ratio=1.0)
    return Source(name, tuple("0123456789"), splits[0], splits[1], "torchvision", 32, rule)


def _from_array(pixels: NDArray[np.uint8]) -> Image.Image:
    return Image.fromarray(np.ascontiguousarray(pixels))


def _folder(root: Path, whole: bool = False) -> Source:
    files: dict[str, str] = {}
    skipped: tuple[str, ...] = ()
    # Of a folder with train/ and val/ nothing else is looked at: a test/ beside them may be large.
    parts = [root / "train", root / "val"]
    for part in parts if all(part.is_dir() for part in parts) else [root]:
        found = image_files(part)
        files |= {os.path.relpath(file, root): file for file in found.files}
        skipped += found.notes
    names, train, val, notes = _arranged(str(root), f"{root}/", files, open_image, whole)
    return Source(
        root.resolve().name or "images", names, train, val, _fingerprint(root, [train, val]), notes=skipped + notes
    )


def _archive(path: Path, whole: bool = False) -> Source:
    fingerprint = archives.fingerprint(path)
    archive = archives.open_archive(path)
    names, train, val, notes = _arranged(str(path), archive.below, archive.files, archive.read, whole)
    return Source(archives.archive_name(path), names, train, val, fingerprint, notes=notes)


def _arranged(
    root: str, below: str, files: Mapping[str, Any], read: Callable[[Any], Image.Image], whole: bool
) -> tuple[tuple[str, ...], Split, Split, tuple[str, ...]]:
    """Class names, train and val splits, and notes, from image files by their paths below root.

    The paths are train/CLASS/... and val/CLASS/..., or CLASS/... alone to be split, or as a whole to be val. below:
    what stands before a path in messages.
    """
    tops = _by_folder(files)
    notes: tuple[str, ...] = ()
    if "train" in tops and "val" in tops:
        if whole:
            raise DataError(f"{root}: {_HAS_SPLITS}")
        train, val = (_classes(f"{below}{part}", tops[part]) for part in ("train", "val"))
        unknown = sorted(set(val) - set(train))
        if unknown:
            raise DataError(
                f"{below}val: {len(unknown)} classes that {below}train lacks ({', '.join(unknown[:3])}"
                f"{', ...' if len(unknown) > 3 else ''}); remove them or add their training images"
            )
    elif "train" in tops or "val" in tops:
        missing = "val" if "train" in tops else "train"
        raise DataError(
            f"{below}{missing}: no such folder, or no images in it; give both train/ and val/, or class folders alone "
            "to be split"
        )
    elif whole:
        train, val = {}, _classes(root, files)
    else:
        classes = _classes(root, files)
        train, val = {}, {}
        for name, images in classes.items():
            held_out = _held_out(name, list(images))
            train[name] = {path: item for path, item in images.items() if path not in held_out}
            val[name] = {path: item for path, item in images.items() if path in held_out}
        count = sum(map(len, val.values()))
        notes = (
            f"{root} has no train/ and val/: {count} of its {sum(map(len, classes.values()))} images "
            "(10 % of a class, always the same) are held out for validation",
        )
        if not count:
            raise DataError(f"{root}: too few images to hold any out for validation (2 of a class are needed)")
    names = tuple(sorted(train or val))
    if len(names) < 2:
        raise DataError(f"{root}: only one class ({names[0]}); a classifier needs class folders for two or more")
    return names, _split_of(train, names, read), _split_of(val, names, read), notes


def _by_folder(files: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Files by the first folder of their paths, which is taken off; loose files are left out."""
    folders: dict[str, dict[str, Any]] = {}
    for path, item in files.items():
        folder, slash, rest = path.partition("/")
        if slash:
            folders.setdefault(folder, {})[rest] = item
    return folders


def _classes(root: str, files: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The images of each class folder by their paths, sorted; empty folders don't count."""
    classes = {name: dict(sorted(images.items())) for name, images in _by_folder(files).items()}
    if not classes:
        raise DataError(f"{root}: no images in class folders below it ({', '.join(sorted(EXTENSIONS))})")
    return classes


def image_files(folder: str | Path) -> Found:
    """The image files in a folder and below, by extension; see files_below."""
    return files_below(folder, EXTENSIONS)


def _held_out(name: str, paths: list[str]) -> set[str]:
    """A tenth of a class's images, at least one of two, chosen by the hash of their paths: a stable choice."""
    count = max(round(len(paths) * _VAL_SHARE), 1) if len(paths) > 1 else 0
    by_hash = sorted(paths, key=lambda path: hashlib.sha256(f"{name}/{path}".encode(errors="surrogateescape")).digest())
    return set(by_hash[:count])


def _split_of(
    classes: Mapping[str, Mapping[str, Any]], names: tuple[str, ...], read: Callable[[Any], Image.Image]
) -> Split:
    items = [item for name in names for item in classes.get(name, {}).values()]
    files = [f"{name}/{path}" for name in names for path in classes.get(name, ())]
    counts = [len(classes.get(name, ())) for name in names]
    return Split(items, np.repeat(np.arange(len(names), dtype=np.int64), counts), read, files)


def _fingerprint(root: Path, splits: list[Split]) -> str:
    digest = hashlib.sha256()
    for split in splits:
        for file in split.items:
            try:
                stat = os.stat(file)
            except OSError as error:
                raise DataError(f"{file}: cannot be read ({error.strerror}); has it just been removed?") from None
            digest.update(
                f"{os.path.relpath(file, root)}\0{stat.st_size}\0{stat.st_mtime_ns}\n".encode(errors="surrogateescape")
            )
        digest.update(b"--\n")
    return digest.hexdigest()
