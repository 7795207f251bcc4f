"""ImageNet's training and validation images (ILSVRC 2012) as they are distributed: a folder of tars, not unpacked.

ILSVRC2012_img_train.tar a tar of tars, one per class
ILSVRC2012_img_val.tar          50,000 images, without classes
and their classes, one of
ILSVRC2012_devkit_t12.tar.gz    or unpacked as ILSVRC2012_devkit_t12/: a number for each image, and meta.mat
*.txt                           one WordNet id (n01440764) per line, in the order of the images' names
"""

import hashlib
import io
import re
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image

from command import first_line
from data import DataError, archives
from data.layouts import Classes, Parts, sorted_classes

_TRAIN, _VAL = "ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar"
_DEVKIT = "ILSVRC2012_devkit_t12"
_META, _NUMBERS = "data/meta.mat", "data/ILSVRC2012_validation_ground_truth.txt"
_VAL_IMAGE = re.compile(r"ILSVRC2012_val_(\d{8})\.JPEG")
_WNID = re.compile(r"n\d{8}")


def is_distributed(root: Path) -> bool:
    """Whether a folder holds at least one of the tars and no folders of unpacked images."""
    unpacked = any((root / part).is_dir() for part in ("train", "val"))
    return not unpacked and any((root / name).is_file() for name in (_TRAIN, _VAL))


def fingerprint(root: Path) -> str:
    """Changes with the tars and the classes; fast, from sizes and times. Raises DataError if one is missing."""
    files = [*_tars(root), *_truth_files(root)]
    return hashlib.sha256("".join(map(archives.fingerprint, files)).encode()).hexdigest()


def open_distributed(root: Path) -> tuple[Parts, Callable[[Any], Image.Image], Callable[[Any], Image.Image]]:
    """The images by class, and functions that read the training and the validation images.

    Raises DataError if a file is missing or damaged, or if images and classes do not match.
    """
    tars = _tars(root)
    place, wnids = _ground_truth(root)
    of_train, of_val = map(archives.open_archive, tars)
    train: dict[str, dict[str, Any]] = {}
    for path, member in of_train.files.items():
        wnid, slash, name = path.partition("/")
        if slash:
            train.setdefault(wnid, {})[name] = member
    if not train:
        raise DataError(f"{tars[0]}: holds no tars of classes; it is not the file that ImageNet distributes")
    unknown = sorted(set(wnids) - set(train))
    if unknown:
        line = wnids.index(unknown[0]) + 1
        raise DataError(f"{place}: image {line} is of class {unknown[0]}, which {tars[0]} lacks")
    return (
        Parts(sorted_classes(train), _val_classes(tars[1], of_val.files, place, wnids), str(tars[0]), str(tars[1])),
        of_train.read,
        of_val.read,
    )


def _val_classes(tar: Path, files: dict[str, Any], place: str, wnids: list[str]) -> Classes:
    images = {}
    for path, member in files.items():
        name = path.rpartition("/")[2]
        numbered = _VAL_IMAGE.fullmatch(name)
        if not numbered:
            raise DataError(f"{tar}: {path} is not named as ILSVRC2012_val_00000001.JPEG is: its class is not known")
        images[int(numbered[1])] = name, member
    if len(images) != len(wnids):
        raise DataError(f"{place}: names the classes of {len(wnids)} images, and {tar} holds {len(images)}")
    if set(images) != set(range(1, len(wnids) + 1)):
        raise DataError(f"{tar}: its images are not numbered from 1 to {len(wnids)}; fetch it again")
    classes: dict[str, dict[str, Any]] = {}
    for number, wnid in enumerate(wnids, 1):
        name, member = images[number]
        classes.setdefault(wnid, {})[name] = member
    return sorted_classes(classes)


def _tars(root: Path) -> tuple[Path, Path]:
    tars = root / _TRAIN, root / _VAL
    for tar, other in zip(tars, reversed(tars), strict=True):
        if not tar.is_file():
            raise DataError(f"{tar}: no such file; it belongs to {other.name}, which is there")
    return tars


def _truth_files(root: Path) -> list[Path]:
    """The files that name the classes of the validation images: the development kit, or else the only list."""
    unpacked = [root / _DEVKIT / part for part in (_META, _NUMBERS)]
    if all(file.is_file() for file in unpacked):
        return unpacked
    packed = root / f"{_DEVKIT}.tar.gz"
    if packed.is_file():
        return [packed]
    lists = sorted(file for file in root.glob("*.txt") if file.is_file())
    if len(lists) != 1:
        found = f"{len(lists)} .txt files" if lists else "no list of them"
        raise DataError(
            f"{root}: the classes of {_VAL} are not known ({found}); put {_DEVKIT}.tar.gz there, or one "
            "list (.txt) with one WordNet id per line"
        )
    return lists


def _ground_truth(root: Path) -> tuple[str, list[str]]:
    """The WordNet id of each validation image, in order, and the source's name for messages."""
    files = _truth_files(root)
    try:
        if len(files) == 2:
            return str(files[1]), _by_numbers(files[0].read_bytes(), files[1].read_text(), *map(str, files))
        (file,) = files
        if file.suffix != ".txt":
            with tarfile.open(file) as kit:
                meta, numbers = (_member(kit, part) for part in (_META, _NUMBERS))
            return str(file), _by_numbers(meta, numbers.decode(), f"{file}:{_META}", f"{file}:{_NUMBERS}")
        wnids = file.read_text().split("\n")
    except OSError as error:
        raise DataError(f"{files[0]}: cannot be read ({error.strerror or first_line(error)})") from None
    except (tarfile.TarError, EOFError, KeyError, UnicodeDecodeError, zlib.error) as error:
        raise DataError(f"{files[0]}: damaged, or not what it is named as ({first_line(error)})") from None
    wnids = [line.strip() for line in wnids]
    while wnids and not wnids[-1]:
        wnids.pop()
    for number, wnid in enumerate(wnids, 1):
        if not _WNID.fullmatch(wnid):
            advice = f"; numbers need {_DEVKIT}.tar.gz, which says what they mean" if wnid.isdigit() else ""
            raise DataError(f"{file}: line {number} is {wnid[:40]!r}, not a WordNet id as n01440764{advice}")
    return str(file), wnids


def _member(kit: tarfile.TarFile, path: str) -> bytes:
    """The contents of a file of the development kit, by its path in the kit's folder."""
    for info in kit:
        if info.isreg() and info.name.endswith(f"/{path}"):
            contents = kit.extractfile(info)
            assert contents
            return contents.read(archives.MOST_BYTES)
    raise KeyError(f"no {path} in it")


def _by_numbers(meta: bytes, numbers: str, meta_place: str, place: str) -> list[str]:
    """Maps numbers to WordNet ids by ILSVRC2012_ID of meta.mat; they are not in the order of the sorted WordNet ids."""
    # Loaded here: few sets need it.
    from scipy.io import loadmat

    try:
        synsets = loadmat(io.BytesIO(meta), squeeze_me=True)["synsets"]
        wnid_of = {
            int(number): str(wnid) for number, wnid in zip(synsets["ILSVRC2012_ID"], synsets["WNID"], strict=True)
        }
    except Exception as error:  # loadmat raises many kinds for damaged files
        raise DataError(f"{meta_place}: damaged ({first_line(error)}); fetch it again") from None
    wnids = []
    for line, number in enumerate(numbers.split(), 1):
        if not number.isdecimal() or int(number) not in wnid_of:
            raise DataError(f"{place}: line {line} is {number[:40]!r}, which {meta_place} does not know")
        wnids.append(wnid_of[int(number)])
    return wnids
