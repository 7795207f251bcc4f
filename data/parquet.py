"""Sets of images in Parquet files, as Hugging Face's `datasets` writes them.

A folder, or its data/, holds files such as train-00000-of-00002.parquet. A row holds an image, as the bytes of its
file, and the number of its class; the schema's metadata names the columns and the classes.
"""

import functools
import hashlib
import io
import json
import re
import sys
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from command import first_line
from data import DataError, archives
from data.layouts import VAL_NAMES, Classes, Parts, some
from data.pixels import open_image

_PART = re.compile(r"(train|" + "|".join(VAL_NAMES) + r")(-.*)?\.parquet", re.IGNORECASE)


class Row(NamedTuple):
    """An image: its Parquet file, row group, place in the group, and column. name: of its own file, or ''."""

    file: str
    group: int
    place: int
    column: str
    name: str

    def __str__(self) -> str:
        return f"{self.file}: row {self.place} of row group {self.group}"


def splits(root: Path) -> dict[str, list[Path]]:
    """The Parquet files of each split in a folder or in its data/, in order; empty if there are none."""
    found: dict[str, list[Path]] = {}
    for folder in (root, root / "data"):
        for file in sorted(folder.glob("*.parquet")) if not found else ():
            named = _PART.fullmatch(file.name)
            if named and file.is_file():
                found.setdefault(named[1].lower(), []).append(file)
    return found


def fingerprint(root: Path) -> str:
    """Changes with the files; fast, from their names, sizes and times."""
    files = [file for files in splits(root).values() for file in files]
    return hashlib.sha256("".join(map(archives.fingerprint, files)).encode()).hexdigest()


def open_splits(root: Path) -> Parts:
    """The images by class, as Rows; without a split for validation, all are train's. Their bytes are not read yet.

    Raises DataError if pyarrow is missing, there is no train split, or the files are damaged, lack images or classes,
    or have different ones.
    """
    files = splits(root)
    val_name = next((name for name in VAL_NAMES if name in files), None)
    if "train" not in files:
        raise DataError(f"{files[val_name or ''][0]}: there is no train.parquet or train-*.parquet beside it")
    train = _by_class(files["train"], files["train"][0])
    if val_name is None:
        return Parts(train)
    val = _by_class(files[val_name], files["train"][0])
    notes = () if val_name == "val" else (f"{root}: split {val_name} is used for validation",)
    return Parts(train, val, f"{root}: train", f"{root}: {val_name}", notes)


def read_row(row: Row) -> Image.Image:
    """Opens the image. Raises ValueError or OSError if it is damaged or not an image."""
    contents = _group(row.file, row.column, row.group)[row.place]
    if contents is None:
        raise ValueError("no bytes of an image are stored")
    return open_image(io.BytesIO(contents))


def _by_class(files: list[Path], first: Path) -> Classes:
    """The images of a split by class. first: the file whose columns and classes all others must have."""
    features = _features(first, _open(first))
    image, label, names = features
    classes: dict[str, dict[str, Row]] = {}
    count = 0
    for file in files:
        table = _open(file)
        if _features(file, table) != features:
            raise DataError(f"{file}: has other columns or classes than {first}")
        for group in range(table.num_row_groups):
            try:
                read = table.read_row_group(group, columns=[label, f"{image}.path"])
                numbers, images = read.column(label).to_pylist(), read.column(image).to_pylist()
                own = [str((stored and stored["path"]) or "") for stored in images]
            except Exception as error:  # pyarrow raises many kinds
                raise DataError(f"{file}: damaged ({first_line(error)}); fetch it again") from None
            for place, (number, name) in enumerate(zip(numbers, own, strict=True)):
                row = Row(str(file), group, place, image, name)
                # -1 in the splits of competitions, whose classes are not published.
                if number is None or not 0 <= number < len(names):
                    raise DataError(f"{row}: has no class; give splits whose images have classes")
                base = name.rpartition("/")[2]
                classes.setdefault(names[number], {})[f"{count:07}{base and '-'}{base}"] = row
                count += 1
    if not count:
        raise DataError(f"{files[0]}: holds no images")
    return classes


def _pyarrow(file: Path) -> Any:
    # Loaded here: few sets need it.
    try:
        from pyarrow import parquet
    except ImportError:
        raise DataError(
            f"{file}: Parquet files are read by pyarrow, which is not installed ({sys.executable} -m pip install "
            "pyarrow)"
        ) from None
    return parquet


def _open(file: Path) -> Any:
    parquet = _pyarrow(file)
    try:
        return parquet.ParquetFile(file)
    except Exception as error:  # pyarrow raises many kinds
        raise DataError(f"{file}: no Parquet file, or damaged ({first_line(error)}); fetch it again") from None


def _features(file: Path, table: Any) -> tuple[str, str, tuple[str, ...]]:
    """The columns of the image and of its class, and the names of the classes."""
    try:
        described = json.loads(table.schema_arrow.metadata[b"huggingface"])["info"]["features"]
        kinds = {name: feature.get("_type") for name, feature in described.items() if isinstance(feature, dict)}
        image_columns = [name for name, kind in kinds.items() if kind == "Image"]
        label_columns = [name for name, kind in kinds.items() if kind == "ClassLabel"]
        names = {name: tuple(map(str, described[name]["names"])) for name in label_columns}
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError):
        raise DataError(
            f"{file}: does not describe its columns as Hugging Face's datasets does; save it with its to_parquet, or "
            "give a folder of images"
        ) from None
    label_columns = ["label"] if "label" in label_columns else label_columns
    for kind, columns in (("Image", image_columns), ("ClassLabel", label_columns)):
        if len(columns) != 1:
            raise DataError(
                f"{file}: has {len(columns)} columns of type {kind}{f' ({some(columns)})' if columns else ''}; save it "
                "with one"
            )
    if len(set(names[label_columns[0]])) != len(names[label_columns[0]]):
        raise DataError(f"{file}: two of its classes have the same name")
    return image_columns[0], label_columns[0], names[label_columns[0]]


# The images of a row group are stored together: read in order, each group is read once.
@functools.lru_cache(maxsize=1)
def _group(file: str, column: str, group: int) -> list[bytes | None]:
    """The bytes of the images of a row group."""
    read = _pyarrow(Path(file)).ParquetFile(file).read_row_group(group, columns=[f"{column}.bytes"], use_threads=False)
    return [image and image.get("bytes") for image in read.column(column).to_pylist()]
