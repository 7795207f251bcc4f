"""Where images come from: image folders, archives and tables, the torchvision sets, and the embedded `scenes`."""

import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from command import first_line
from data import DataError, archives, ilsvrc, layouts, parquet, scenes
from data.beton import Beton
from data.folders import Found, files_below
from data.pixels import EXTENSIONS, open_image
from data.plan import CropRule

TORCHVISION_SETS = ("cifar10", "svhn", "imagenette")
_VAL_SHARE = 0.1
_HAS_SPLITS = "has images for training and others for validation; leave --split out"


@dataclass(frozen=True)
class Split:
    """The images of one split: items[i] names image i, read(items[i]) opens it. labels: int64 [n].

    names: of the image files, as CLASS/FILE below the split's folder; None if images come from no files. Bytes that are
    not text are escaped as os.fsdecode does.
    """

    items: Sequence[Any]
    labels: NDArray[np.int64]
    read: Callable[[Any], Image.Image]
    names: Sequence[str] | None = None


@dataclass(frozen=True)
class Source:
    """A set of images to be converted.

    resolution (pixels per side), crop: of the crops that fit it; None if they depend on the sizes of the images.
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


def open_source(data: str, *, whole: bool | None = False) -> Source:
    """Opens `scenes`, a torchvision set by name, or by path an image folder, an archive (zip, tar) of one, or a CSV.

    By path also a folder of ImageNet's tars (data/ilsvrc.py) or of Parquet files (data/parquet.py). The layouts of
    folders and of a CSV: data/layouts.py.

    whole: if a set has no splits (only class folders), all its images are in val and none in train, for a set that is
    only evaluated on; with None, a set that has splits is opened as it is.
    A compressed tar is unpacked to a temporary file first; see open_archive.
    Raises DataError for a name that is neither a set nor a folder nor a file of these kinds, a set without images or
    with one class, classes in val that train lacks, a damaged or encrypted archive, a set that cannot be downloaded,
    and with whole=True for a set that has a train and a val split.
    """
    if whole and data in ("scenes", *TORCHVISION_SETS):
        raise DataError(f"DATA={data}: {_HAS_SPLITS}")
    if data == "scenes":
        return _scenes()
    if data in TORCHVISION_SETS:
        return _torchvision_set(data)
    path = Path(data)
    if path.is_dir() and ilsvrc.is_distributed(path):
        return _ilsvrc(path, whole)
    _refuse_betons(path)
    if path.is_dir() and parquet.splits(path):
        return _parquet(path, whole)
    if path.is_dir():
        return _folder(path, whole)
    if path.is_file():
        return _csv(path, whole) if path.suffix.lower() == ".csv" else _archive(path, whole)
    sets = ", ".join(("scenes", *TORCHVISION_SETS))
    raise DataError(
        f"DATA={data}: no such folder or archive (.zip, .tar, .tar.gz, .tar.xz, .tar.bz2) or .csv, and not the name of "
        f"a set ({sets})"
    )


def crops_for(sizes: NDArray[np.int32]) -> tuple[int, CropRule]:
    """The default resolution and crop rule for images of these sizes (int [n, 2], pixels).

    Photographs get the paper's rule. Below 96 pixels a crop of 8 % of the area would be a few pixels wide, so crops of
    small images are at least a quarter of the area, and validation uses whole images.
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

    # Small crops of small images: most show one object, often not the main one.
    rule = CropRule(scale=(0.05, 0.2), center_ratio=0.7)
    return Source("scenes", scenes.CLASS_NAMES, split("train"), split("val"), scenes_fingerprint(), 32, rule)


def scenes_fingerprint() -> str:
    """The fingerprint of `scenes` as this code draws it."""
    return hashlib.sha256(Path(scenes.__file__).read_bytes()).hexdigest()


def _draw_scene(item: tuple[str, int]) -> Image.Image:
    return scenes.draw(*item)


def _torchvision_set(name: str) -> Source:
    # Imported here: torchvision takes seconds, and folders do not need it.
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
    # A flipped 2 is not a digit, and a tight crop of a house number shows the neighbouring digit.
    splits = [Split(part.data.transpose(0, 2, 3, 1), part.labels.astype(np.int64), _from_array) for part in digits]
    rule = CropRule(scale=(0.5, 1.0), flip=False, center_ratio=1.0)
    return Source(name, tuple("0123456789"), splits[0], splits[1], "torchvision", 32, rule)


def _from_array(pixels: NDArray[np.uint8]) -> Image.Image:
    return Image.fromarray(np.ascontiguousarray(pixels))


def _folder(root: Path, whole: bool | None = False) -> Source:
    files: dict[str, str] = {}
    skipped: tuple[str, ...] = ()
    # In a folder with train/ and val/ everything else is ignored: a test/ beside them may be large.
    val_name = layouts.val_folder(root)
    parts = [root / "train", root / val_name] if val_name else [root]
    for part in parts:
        found = image_files(part)
        files |= {os.path.relpath(file, root): file for file in found.files}
        skipped += found.notes
    annotations = _annotations(root, val_name)
    arranged = layouts.of_folders(str(root), f"{root}/", files, annotations)
    names, train, val, notes = _arranged(str(root), arranged, open_image, whole)
    # The folder in an annotated val/ is not a class.
    skipped += layouts.empty_folders(root, parts[:1] if annotations else parts, set(names))
    fingerprint = _fingerprint(root, [train, val], b"".join(annotations.values()))
    return Source(root.resolve().name or "images", names, train, val, fingerprint, notes=skipped + notes)


def _annotations(root: Path, val_name: str | None) -> dict[str, bytes]:
    file = root / (val_name or "val") / layouts.ANNOTATIONS
    try:
        return {f"{val_name}/{file.name}": file.read_bytes()} if file.is_file() else {}
    except OSError as error:
        raise DataError(f"{file}: cannot be read ({error.strerror})") from None


def _archive(path: Path, whole: bool | None = False) -> Source:
    fingerprint = archives.fingerprint(path)
    archive = archives.open_archive(path)
    parts = layouts.of_folders(str(path), archive.below, archive.files, archive.annotations)
    names, train, val, notes = _arranged(str(path), parts, archive.read, whole)
    return Source(archives.archive_name(path), names, train, val, fingerprint, notes=notes)


def _csv(path: Path, whole: bool | None = False) -> Source:
    names, train, val, notes = _arranged(str(path), layouts.of_csv(path), open_image, whole)
    fingerprint = _fingerprint(path.parent, [train, val], path.read_bytes())
    return Source(path.stem, names, train, val, fingerprint, notes=notes)


def _ilsvrc(root: Path, whole: bool | None = False) -> Source:
    fingerprint = ilsvrc.fingerprint(root)
    parts, read_train, read_val = ilsvrc.open_distributed(root)
    names, train, val, notes = _arranged(str(root), parts, read_train, whole)
    return Source(root.resolve().name, names, train, replace(val, read=read_val), fingerprint, notes=notes)


def _parquet(root: Path, whole: bool | None = False) -> Source:
    parts = parquet.open_splits(root)
    names, *splits, notes = _arranged(str(root), parts, parquet.read_row, whole)
    # Images that are stored together are read together.
    train, val = map(_in_order_of_items, splits)
    return Source(root.resolve().name, names, train, val, parquet.fingerprint(root), notes=notes)


def _in_order_of_items(split: Split) -> Split:
    order = sorted(range(len(split.items)), key=split.items.__getitem__)
    assert split.names is not None
    return Split([split.items[i] for i in order], split.labels[order], split.read, [split.names[i] for i in order])


def quick_identity(path: Path) -> tuple[str, str] | None:
    """The name and fingerprint of a source whose images take long to list, as from open_source; None for others."""
    if path.is_dir() and ilsvrc.is_distributed(path):
        return path.resolve().name, ilsvrc.fingerprint(path)
    if path.is_dir() and parquet.splits(path):
        return path.resolve().name, parquet.fingerprint(path)
    if path.is_file():
        return archives.archive_name(path), archives.fingerprint(path)
    return None


def _refuse_betons(path: Path) -> None:
    """Raises DataError for a .beton file or a folder of them, with a message that describes it."""
    if path.is_dir():
        names = [file.name for file in sorted(path.glob("*.beton"))]
        if not names or any(entry.is_dir() for entry in path.iterdir()):
            return
        if {"train.beton", "val.beton"} <= set(names):
            raise DataError(
                f"DATA={path}: holds converted images (train.beton, val.beton); here, files of images are needed"
            )
        raise DataError(
            f"DATA={path}: holds .beton files ({layouts.some(names)}), but not both train.beton and val.beton; give "
            "them these names, or convert the images that they were made from"
        )
    if path.suffix == ".beton":
        beton = Beton(path)
        raise DataError(
            f"DATA={path}: is a .beton of {beton.num_samples} images of {len(np.unique(beton.labels))} classes; give "
            f"the folder that it lies in, with train.beton and val.beton: DATA={path.parent}"
        )


def _arranged(
    root: str, parts: layouts.Parts, read: Callable[[Any], Image.Image], whole: bool | None
) -> tuple[tuple[str, ...], Split, Split, tuple[str, ...]]:
    """Class names, train and val splits, and notes; a set without splits is split, or is all val (see open_source)."""
    train, val = parts.train, parts.val
    notes = parts.notes
    if val is not None:
        if whole:
            raise DataError(f"{root}: {_HAS_SPLITS}")
        unknown = sorted(set(val) - set(train))
        if unknown:
            raise DataError(
                f"{parts.val_place}: {len(unknown)} classes that {parts.train_place} lacks ({layouts.some(unknown)}); "
                "remove them or add their training images"
            )
    elif whole is not False:
        train, val = {}, parts.train
    else:
        train, val = {}, {}
        for name, images in parts.train.items():
            held_out = _held_out(name, list(images))
            train[name] = {path: item for path, item in images.items() if path not in held_out}
            val[name] = {path: item for path, item in images.items() if path in held_out}
        count = sum(map(len, val.values()))
        notes += (
            f"{root} has no split for validation: {count} of its {sum(map(len, parts.train.values()))} images are held "
            "out for validation (10 % of each class and at least one image, always the same)",
        )
        if not count:
            raise DataError(f"{root}: too few images to hold any out for validation (2 of a class are needed)")
    names = tuple(sorted(train or val))
    if len(names) < 2:
        raise DataError(f"{root}: only one class ({names[0]}); a classifier needs class folders for two or more")
    unseen = [name for name in names if not val.get(name)]
    if unseen:
        notes += (f"{root}: {len(unseen)} of {len(names)} classes have no images in val ({layouts.some(unseen)})",)
    return names, _split_of(train, names, read), _split_of(val, names, read), notes


def image_files(folder: str | Path) -> Found:
    """The image files in a folder and below, by extension; see files_below."""
    return files_below(folder, EXTENSIONS)


def _held_out(name: str, paths: list[str]) -> set[str]:
    """A tenth of a class's images, at least one if it has two, chosen by the hash of their paths: a stable choice."""
    count = max(round(len(paths) * _VAL_SHARE), 1) if len(paths) > 1 else 0
    by_hash = sorted(paths, key=lambda path: hashlib.sha256(f"{name}/{path}".encode(errors="surrogateescape")).digest())
    return set(by_hash[:count])


def _split_of(classes: layouts.Classes, names: tuple[str, ...], read: Callable[[Any], Image.Image]) -> Split:
    items = [item for name in names for item in classes.get(name, {}).values()]
    files = [f"{name}/{path}" for name in names for path in classes.get(name, ())]
    counts = [len(classes.get(name, ())) for name in names]
    return Split(items, np.repeat(np.arange(len(names), dtype=np.int64), counts), read, files)


def _fingerprint(root: Path, splits: list[Split], described: bytes = b"") -> str:
    """described: the contents of the file that names the classes of the images, if there is one."""
    digest = hashlib.sha256(described)
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
