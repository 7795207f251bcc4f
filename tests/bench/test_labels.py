"""The comparison of kinds of labels on the same crops: their differences, and the speed of training from them."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import BenchError
from bench.compare_labels import run
from bench.labels import (
    CropLabels,
    _by_size,
    _configs,
    _crop_labels,
    _differences,
    _opened,
    _seed,
    _statistics,
    calibration_error,
    measure,
)
from data.beton import Beton
from data.plan import epoch_order, seed_of_generation
from train import TrainError
from train.config import CropConfig, parse
from train.job import Job, check, resolve
from train.label import LabelOptions, label
from train.labels.rows import CellRows
from train.labels.store import Store, create_store, open_store
from train.maps import MapsOptions, make_maps
from train.train import train


@pytest.fixture(scope="module")
def place(converted, tmp_path_factory) -> Path:
    """A refinery, its labels in three formats, and its maps of 3 x 3 cells."""
    folder = tmp_path_factory.mktemp("place")
    words = ["--data", str(converted.folder), "--resolution", "32", "--batch", "16", "--epochs", "1", "--device", "cpu"]
    words += ["--precision", "fp32", "--recipe", "quick"]
    (teacher,) = train(parse([*words, "--model", "mobilenet0.25", "--out", str(folder / "refinery")]))
    for name, options in {"exact": LabelOptions("exact"), "top2": LabelOptions(k=2), "top1": LabelOptions(k=1)}.items():
        label(parse([*words, "--refinery", str(teacher.folder), "--out", str(folder / name)]), options)
    make_maps(parse([*words, "--refinery", str(teacher.folder), "--out", str(folder / "maps")]), MapsOptions(96))
    return folder


def opened(place: Path, *names: str) -> list[Store]:
    return _opened([str(place / name) for name in names])


def jobs_of(place: Path, stores: list[Store], options: dict[str, Any]) -> list[Job]:
    """Returns the jobs of runs on the ground truth, the refinery and each store."""
    configs = _configs(stores, str(place / "refinery"), options)
    data, kinds = check(configs)
    return [resolve(config, data, its) for config, its in zip(configs, kinds, strict=True)]


def test_differences_of_labels_of_the_same_crops(place, converted):
    stores = opened(place, "maps", "exact", "top2", "top1")
    assert [store.folder.name for store in stores] == ["exact", "top2", "top1", "maps"]
    options = {"data": str(converted.folder), "model": "mobilenet0.25", "device": "cpu"}
    jobs = jobs_of(place, stores, options)
    made = stores[0].description
    assert {_seed(stores, job) for job in jobs} == {made.seed}
    labels = [_crop_labels(job, made.seed, crops=20) for job in jobs]
    assert [tuple(each.distribution.shape) for each in labels] == [(32, 3)] * 6  # whole batches
    assert all(torch.equal(each.images, labels[0].images) for each in labels)
    beton = Beton(converted.beton("train"))
    seen = epoch_order(48, seed=made.seed, epoch=0)[:32]
    boxes, _ = made.crop.training(seen, beton.sizes[seen], seed=made.seed, epoch=0)
    for each in labels:
        assert each.areas.tolist() == (boxes[:, 2:].prod(1) / beton.sizes[seen].prod(1)).tolist()
    truth, refinery, exact, top2, top1, maps = (_differences(each, labels[1]) for each in labels)
    assert truth["divergence"] is None
    assert truth["agreement"] < 1
    assert truth["calibration_error"] == 0
    assert refinery == exact
    assert (exact["agreement"], exact["divergence"]) == (1, 0)
    assert 0 < top2["divergence"] < 0.006  # with three classes, two determine the third
    assert top1["divergence"] > top2["divergence"]
    assert top2["agreement"] == top1["agreement"] == 1
    assert top2["correct"] is None
    assert 0 < maps["divergence"] < 1
    assert {each["crops"] for each in (refinery, maps)} == {32}


def test_maps_alone_are_compared_on_the_crops_of_a_run(place, converted, monkeypatch):
    """They are compared with the statistics that they were made with. The timed part is replaced here."""
    timed = []
    monkeypatch.setattr("bench.labels._measured", lambda names, configs, *rest: timed.extend(configs) or [{}, {}, {}])
    options = {"data": str(converted.folder), "model": "mobilenet0.25", "device": "cpu", "resolution": 40, "batch": 12}
    found = measure([str(place / "maps")], str(place / "refinery"), options, crops=40, turns=2)
    _, online, student = timed
    assert (online.labels.bn, online.labels.resolution, online.precision) == ("running", None, "fp32")
    assert student.labels.stored == str(place / "maps")
    assert {(config.resolution, config.batch, config.crop) for config in timed} == {(40, 12, CropConfig())}
    assert found.settings | {"resolution": 40, "batch": 12, "refinery": "mobilenet0.25"} == found.settings
    assert "maps: 3x3 cells at 96 px. The refinery labels the crops with running statistics, which" in found.notes[2]
    assert f"48 training crops of {converted.name} at 40 px, 25 to 100 % of the image's area" in found.notes[0]
    _, refinery, maps, *by_size = found.rows
    assert (refinery["crops"], refinery["agreement"], refinery["divergence"]) == (48, 1, 0)
    assert maps["bytes_per_row"] == 3 * 3 * 3 * 3
    assert maps["seconds_to_make"] > 0
    # The crops of a student: another seed than the refinery's own.
    stores = opened(place, "maps")
    job = jobs_of(place, stores, options)[1]
    assert _seed(stores, job) == seed_of_generation(0, 1)
    areas = _crop_labels(job, seed_of_generation(0, 1), crops=40).areas
    assert sum(row["crops"] for row in by_size if row["name"] == "refinery") == 48
    (small,) = (row for row in by_size if row["name"] == "maps" and row["group"] == "crops of 25 to 50 %")
    assert small["crops"] == ((areas > 0.25) & (areas <= 0.5)).sum() > 0


@pytest.mark.parametrize(
    ("folders", "bn", "says"),
    [
        ("maps", "running", "running statistics, which the maps were made with (Label Refinery uses batch statistics"),
        ("exact maps", "batch", "batch statistics, as in the stored labels; the maps were made with running"),
        ("exact maps", "averaged", "averaged statistics, as in the stored labels; the maps were made with running"),
        ("exact maps", "running", "running statistics, as in the stored labels and in maps."),
    ],
)
def test_a_note_names_the_statistics_of_the_refinery(place, folders, bn, says):
    stores = opened(place, *folders.split())
    assert says in _statistics(bn, stores)[0]
    assert _statistics(bn, [store for store in stores if store.description.plan]) == []


def test_correct_counts_only_crops_that_show_a_class():
    labels = CropLabels(
        torch.eye(3)[[0, 1, 2, 0]],
        torch.tensor([0, 1, 2, 0]),
        torch.zeros(4),
        torch.ones(4),
        torch.tensor([0, -1, 1, 0]),
    )
    assert _differences(labels, labels)["correct"] == pytest.approx(2 / 3)
    nothing = labels.of(labels.shown < 0)
    assert _differences(nothing, nothing)["correct"] is None


def test_differences_by_the_size_of_crops():
    """Upper bounds belong to a range; there are no crops of 25 to 50 % here."""
    areas = torch.tensor([0.08, 0.51, 0.25, 0.75, 1.0, 0.76], dtype=torch.float64)
    classes, others = torch.tensor([0, 1, 2, 0, 1, 2]), torch.tensor([0, 1, 0, 1, 0, 2])
    sure = 0.8 * torch.eye(3) + 0.1
    shown = torch.tensor([0, 0, 0, 0, 0, -1])
    labels = [CropLabels(sure[each], each, classes, areas, shown) for each in (others, classes)]
    rows = {(row["group"], row["name"]): row for row in _by_size(["maps", "refinery"], labels)}
    found = [rows[f"crops of {size}", "maps"] for size in ("up to 25 %", "50 to 75 %", "over 75 %")]
    assert len(rows) == 6
    assert [row["crops"] for row in found] == [2, 2, 2]
    assert [row["agreement"] for row in found] == [0.5, 0.5, 0.5]
    assert found[0]["divergence"] == pytest.approx(0.8 * math.log(9) / 2)
    assert found[0]["correct"] == 1
    assert found[2]["correct"] == 1
    assert found[1]["correct"] == 0
    assert rows["crops of over 75 %", "refinery"]["agreement"] == 1
    assert rows["crops of over 75 %", "refinery"]["correct"] == 0


def test_calibration_error_by_hand():
    confidence = torch.tensor([0.01, 0.05, 0.55, 0.6, 1.0])
    correct = torch.tensor([False, True, True, False, True])
    # Bins of 1/15: the first two share one, the others have one each.
    assert calibration_error(confidence, correct) == pytest.approx((0.94 + 0.45 + 0.6 + 0) / 5)


def test_labels_that_cannot_be_compared(place, converted):
    with pytest.raises(BenchError, match="labels is empty"):
        _opened([])
    stores = opened(place, "exact", "top2")
    create_store(place / "other", replace(stores[1].description, batch=8))
    with pytest.raises(BenchError, match=r"other: cannot be compared with .*exact \(batch is 8 there and 16 here\)"):
        _opened([str(place / "exact"), str(place / "other")])
    maps = open_store(place / "maps").description
    create_store(place / "else", replace(maps, refinery=maps.refinery | {"weights": "0" * 64}))
    create_store(place / "others", replace(maps, data=maps.data | {"images": 7}))
    for first, other, says in [
        ("exact", "else", "refinery.weights is 0{16} there"),
        ("maps", "else", "refinery.weights is 0{16} there"),
        ("maps", "others", "data.images is 7 there and 48 here"),
    ]:
        with pytest.raises(BenchError, match=f"{other}: cannot be compared with .*{first} .{says}"):
            opened(place, first, other)
    # Maps of other sizes can be compared.
    larger = CellRows(maps.data["classes"], maps.k, 4).width
    create_store(place / "larger", replace(maps, resolution=128, cells=4, batch=8, bytes_per_crop=larger))
    assert len(opened(place, "maps", "larger", "exact")) == 3
    for name in ("resolution", "batch"):
        with pytest.raises(BenchError, match=f"{name}=8: is for maps alone; .*exact has (32|16); leave it out"):
            _configs(stores, str(place / "refinery"), {"data": str(converted.folder), name: 8})
    with pytest.raises(BenchError, match="two folders have the same name"):
        _opened([str(place / "exact"), str(place / "exact")])
    with pytest.raises(BenchError, match="refinery=resnet18: name the run folder"):
        _configs(stores, "resnet18", {"data": str(converted.folder)})
    with pytest.raises(TrainError, match="labels.json: cannot be read"):
        _opened([str(place)])
    with pytest.raises(BenchError, match="epochs=0"):
        run(labels="x", refinery="y", epochs=0)


@pytest.mark.slow
def test_a_comparison_is_written(place, converted, tmp_path, capsys):
    labels = f"{place / 'exact'} {place / 'maps'}"
    run(labels, str(place / "refinery"), data=str(converted.folder), epochs=2, device="cpu", out=str(tmp_path))
    out = capsys.readouterr().out
    (path,) = tmp_path.glob("*-compare-labels-*.json")
    every = json.loads(path.read_text())["rows"]
    rows = {row["name"]: row for row in every if "unit" in row}
    assert list(rows) == [
        *("ground truth", "refinery", "exact", "maps"),
        *("the refinery's forward alone", "crops labelled into files"),
    ]
    assert not any("not_run" in row for row in every)
    assert rows["maps"]["ratio"]["min"] <= rows["maps"]["ratio"]["median"] <= rows["maps"]["ratio"]["max"]
    assert rows["exact"]["bytes_per_row"] == 12
    assert {row["name"] for row in every[6:]} == {"ground truth", "refinery", "exact", "maps"}
    assert str(place) not in path.read_text()
    assert "| training            | exact" in out
    assert "| crops of 25 to 50 % | maps" in out
    assert len(list(tmp_path.iterdir())) == 3
