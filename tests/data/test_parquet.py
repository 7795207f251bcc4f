"""Parquet as Hugging Face's `datasets` writes it: with the columns and the metadata that it writes."""

import io
import json
import sys
from pathlib import Path

import numpy as np
import pytest

from data import DataError
from data.beton import Beton
from data.convert import convert_source
from data.sets import Unconverted, find_set
from data.sources import open_source
from tests.pictures import photograph

NAMES = ["zebra, striped", "ant", "bee"]


def test_a_missing_pyarrow_is_reported_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    file = tmp_path / "train.parquet"
    file.write_bytes(b"PAR1")
    assert refusal(tmp_path) == (
        f"{file}: Parquet files are read by pyarrow, which is not installed ({sys.executable} -m pip install pyarrow)"
    )


def refusal(path: Path) -> str:
    with pytest.raises(DataError) as refused:
        open_source(str(path))
    assert "\n" not in str(refused.value)
    return str(refused.value)


def jpeg(number: int) -> bytes:
    buffer = io.BytesIO()
    # The width identifies the image.
    photograph(number, 40, 40 + number).save(buffer, "JPEG")
    return buffer.getvalue()


def write(path: Path, numbers: range, *, names: list[str] = NAMES, labels: list | None = None, features=None) -> Path:
    """Images whose class is their number modulo 3, three to a row group."""
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    path.parent.mkdir(parents=True, exist_ok=True)
    images = [{"bytes": jpeg(number), "path": f"photo{number}.jpg" if number % 2 else None} for number in numbers]
    features = features or {"image": {"_type": "Image"}, "label": {"names": names, "_type": "ClassLabel"}}
    schema = arrow.schema(
        [("image", arrow.struct([("bytes", arrow.binary()), ("path", arrow.string())])), ("label", arrow.int64())],
        metadata={"huggingface": json.dumps({"info": {"features": features}})},
    )
    labels = labels if labels is not None else [number % 3 for number in numbers]
    parquet.write_table(arrow.table({"image": images, "label": labels}, schema=schema), path, row_group_size=3)
    return path


@pytest.mark.parametrize("below", ["", "data"])
def test_splits_in_several_files(tmp_path, below):
    write(tmp_path / below / "train-00000-of-00002.parquet", range(0, 8))
    write(tmp_path / below / "train-00001-of-00002-0123456789abcdef.parquet", range(8, 12))
    write(tmp_path / below / "validation-00000-of-00001.parquet", range(20, 25))
    write(tmp_path / below / "test-00000-of-00001.parquet", range(30, 33))
    source = open_source(str(tmp_path))
    assert source.class_names == ("ant", "bee", "zebra, striped")
    assert source.notes == (f"{tmp_path}: split validation is used for validation",)
    for split, numbers in ((source.train, range(12)), (source.val, range(20, 25))):
        # In the order in which they are stored.
        assert [split.read(item).width - 40 for item in split.items] == list(numbers)
        assert [source.class_names[label] for label in split.labels] == [NAMES[number % 3] for number in numbers]
    assert source.val.names is not None
    assert list(source.val.names)[:2] == ["bee/0000000", "zebra, striped/0000001-photo21.jpg"]


def test_one_split_is_split_the_same_way_every_time_and_converted_once(tmp_path):
    root = tmp_path / "set"
    write(root / "train.parquet", range(12))
    found = find_set(str(root), cache=tmp_path / "cache")
    assert isinstance(found, Unconverted)
    assert (len(found.source.train.items), len(found.source.val.items)) == (9, 3)
    made = convert_source(found.source, found.folder, processes=2)
    assert find_set(str(root), cache=tmp_path / "cache") == made
    beton = Beton(made.beton("train"))
    np.testing.assert_array_equal(beton.labels, found.source.train.labels)
    assert beton.sizes[:, 1].tolist() == [found.source.train.read(item).width for item in found.source.train.items]
    assert open_source(str(root), whole=True).val.labels.tolist() == [2, 0, 1] * 4
    write(root / "train.parquet", range(13))
    assert isinstance(find_set(str(root), cache=tmp_path / "cache"), Unconverted)


def test_bad_inputs_are_refused(tmp_path):
    train, val = tmp_path / "train.parquet", tmp_path / "test.parquet"
    write(val, range(3))
    assert refusal(tmp_path) == f"{val}: there is no train.parquet or train-*.parquet beside it"
    write(train, range(6), names=["ant", "bee", "zebra"])
    assert refusal(tmp_path) == f"{val}: has other columns or classes than {train}"
    val.unlink()
    write(train, range(3), labels=[0, 1, -1])
    assert refusal(tmp_path) == f"{train}: row 2 of row group 0: has no class; give splits whose images have classes"
    write(train, range(3), labels=[0, 1, None])
    assert "has no class" in refusal(tmp_path)
    write(train, range(0))
    assert refusal(tmp_path) == f"{train}: holds no images"
    write(train, range(3), features={"image": {"_type": "Image"}, "label": {"_type": "Value"}})
    assert refusal(tmp_path) == f"{train}: has 0 columns of type ClassLabel; save it with one"
    write(train, range(3), features=[1])
    assert f"{train}: does not describe its columns" in refusal(tmp_path)
    write(train, range(3), names=["ant", "ant", "bee"])
    assert refusal(tmp_path) == f"{train}: two of its classes have the same name"
    train.write_bytes(train.read_bytes()[:-9])
    assert refusal(tmp_path).startswith(f"{train}: no Parquet file, or damaged (")


def test_unreadable_images_are_skipped_with_their_names(tmp_path):
    arrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    file = write(tmp_path / "train.parquet", range(9))
    write(tmp_path / "val.parquet", range(3))
    table = parquet.read_table(file)
    images = table.column("image").to_pylist()
    images[4]["bytes"], images[5] = None, {"bytes": b"no image", "path": None}
    column = arrow.array(images, table.schema.field("image").type)
    parquet.write_table(table.set_column(0, table.schema.field("image"), column), file, row_group_size=3)
    convert_source(open_source(str(tmp_path)), tmp_path / "out", processes=1)
    assert (tmp_path / "out" / "rejects.txt").read_text().splitlines() == [
        f"{file}: row 1 of row group 1: no bytes of an image are stored",
        f"{file}: row 2 of row group 1: cannot identify image file",
    ]
