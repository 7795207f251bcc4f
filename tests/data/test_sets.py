"""Converted sets of other people: valid contents of set.json and the lists of names; everything else is refused."""

import json
import shutil
from pathlib import Path

import pytest
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

from data import DataError
from data.sets import open_set
from tests.damage import files

VALID = {
    "format": 3,
    "name": "photos",
    "class_names": ["cat", "dog", "owl"],
    "resolution": 64,
    "crop": {"scale": [0.08, 1.0], "ratio": [0.75, 1.25], "flip": True, "center_ratio": 0.875},
    "source_fingerprint": "ab" * 32,
    "made": {"storage": "jpeg", "rejects": 0},
}


def written(folder: Path, described) -> Path:
    (folder / "set.json").write_text(json.dumps(described))
    return folder


def refusal(folder: Path) -> str:
    with pytest.raises(DataError) as refused:
        open_set(folder)
    message = str(refused.value)
    assert str(folder / "set.json") in message
    assert "\n" not in message
    return message


@pytest.mark.parametrize("name", ["..", "../..", "/etc", "a/b", ".", "", "a\0b", "x" * 300, 7, None, ["a"]])
def test_names_of_other_peoples_sets_cannot_be_paths(tmp_path, name):
    """Its runs go to runs/NAME."""
    assert "(name is " in refusal(written(tmp_path, VALID | {"name": name}))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("format", True),
        ("class_names", ["cat"]),
        ("class_names", ["cat", "cat"]),
        ("class_names", "cats"),
        ("class_names", ["cat", 1]),
        ("class_names", ["cat", "\ud800"]),
        ("resolution", 0),
        ("resolution", 10**9),
        ("resolution", 64.0),
        ("resolution", True),
        ("source_fingerprint", 5),
        ("made", []),
        ("crop", None),
        ("crop.scale", [0, 1]),
        ("crop.scale", [0.5, 0.1]),
        ("crop.scale", [0.5]),
        ("crop.scale", [0.1, 10**400]),
        ("crop.ratio", [float("nan"), 1]),
        ("crop.ratio", [1e-300, 1]),
        ("crop.flip", 1),
        ("crop.center_ratio", 1.5),
        ("crop.center_ratio", "1"),
    ],
)
def test_each_field_is_checked(tmp_path, field, value):
    outer, dot, inner = field.partition(".")
    described = VALID | {outer: VALID["crop"] | {inner: value} if dot else value}
    assert f"damaged ({field} is " in refusal(written(tmp_path, described))


def test_a_missing_field_is_named(tmp_path):
    for name in VALID:
        described = {key: value for key, value in VALID.items() if key != name}
        assert f"damaged ({name} is missing)" in refusal(written(tmp_path, described))
    for text in ("[]", "7", "[" * 100_000, "{", ""):
        (tmp_path / "set.json").write_text(text)
        assert "set.json: damaged (" in refusal(tmp_path)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(contents=files(VALID))
def test_fuzz_set_json(tmp_path, contents):
    """A loaded set equals its file; everything else is refused."""
    (tmp_path / "set.json").write_bytes(contents)
    try:
        found = open_set(tmp_path)
    except DataError as error:
        assert "set.json" in str(error)
        assert "\n" not in str(error)
        event("refused")
        return
    event("loaded, as it says")
    said = json.loads(contents)
    crop = said["crop"]
    assert (found.name, list(found.class_names)) == (said["name"], said["class_names"])
    assert found.resolution == (said if said["format"] == 3 else crop)["resolution"]
    assert [list(found.crop.scale), list(found.crop.ratio)] == [crop["scale"], crop["ratio"]]
    assert (found.crop.flip, found.crop.center_ratio) == (crop["flip"], crop["center_ratio"])
    assert (found.source_fingerprint, found.made) == (said["source_fingerprint"], said["made"])
    # The result is usable.
    boxes, _ = found.crop.training([0, 1], [(1, 60_000), (300, 200)], seed=0, epoch=0)
    assert (boxes[:, 2:] > 0).all()
    assert (Path("runs") / found.name).parent == Path("runs")


@pytest.fixture(scope="module")
def named(converted, tmp_path_factory):
    folder = tmp_path_factory.mktemp("named") / "set"
    shutil.copytree(converted.folder, folder)
    return folder, json.loads((folder / "val.names.json").read_text())


@given(data=st.data())
def test_fuzz_names_of_images(named, data):
    folder, names = named
    contents = data.draw(files(names))
    (folder / "val.names.json").write_bytes(contents)
    try:
        found = open_set(folder).image_names("val")
    except DataError as error:
        assert "val.names.json: damaged" in str(error)
        event("refused")
        return
    event("loaded, as it says")
    assert found == json.loads(contents)
    # Trees of maps are written with these names.
    for name in found:
        path = Path("tree") / name
        assert ".." not in path.parts
        assert path.parts[0] == "tree"
