"""Kinds of labels side by side: what they say of the same crops, and how fast one trains from them."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bench import BenchError
from bench.compare_labels import run
from bench.labels import Said, _configs, _differences, _opened, _said, calibration_error
from train import TrainError
from train.config import parse
from train.job import check, resolve
from train.label import LabelOptions, label
from train.labels.store import Store, create_store
from train.train import train


@pytest.fixture(scope="module")
def place(converted, tmp_path_factory) -> Path:
    """A refinery, and its labels in three formats."""
    folder = tmp_path_factory.mktemp("place")
    words = ["--data", str(converted.folder), "--resolution", "32", "--batch", "16", "--epochs", "1", "--device", "cpu"]
    words += ["--precision", "fp32", "--recipe", "quick"]
    (teacher,) = train(parse([*words, "--model", "mobilenet0.25", "--out", str(folder / "refinery")]))
    for name, options in {"exact": LabelOptions("exact"), "top2": LabelOptions(k=2), "top1": LabelOptions(k=1)}.items():
        label(parse([*words, "--refinery", str(teacher.folder), "--out", str(folder / name)]), options)
    return folder


def opened(place: Path) -> list[Store]:
    return _opened([str(place / name) for name in ("exact", "top2", "top1")])


def test_what_labels_say_of_the_same_crops(place, converted):
    stores = opened(place)
    options = {"data": str(converted.folder), "model": "mobilenet0.25", "device": "cpu"}
    configs = _configs(stores, str(place / "refinery"), options)
    data, kinds = check(configs)
    jobs = [resolve(config, data, its) for config, its in zip(configs, kinds, strict=True)]
    said = [_said(job, stores[0].description.seed, crops=20) for job in jobs]
    assert [tuple(each.distribution.shape) for each in said] == [(32, 3)] * 5  # whole batches
    assert all(torch.equal(each.images, said[0].images) for each in said)
    truth, refinery, exact, top2, top1 = (_differences(each, said[1]) for each in said)
    assert truth["divergence"] is None
    assert truth["agreement"] < 1
    assert truth["calibration_error"] == 0
    assert refinery == exact
    assert (exact["agreement"], exact["divergence"]) == (1, 0)
    assert 0 < top2["divergence"] < 0.006  # two of three classes are all three
    assert top1["divergence"] > top2["divergence"]
    assert top2["agreement"] == top1["agreement"] == 1
    assert top2["correct"] is None


def test_the_truth_about_crops_counts_those_that_show_something():
    said = Said(torch.eye(3)[[0, 1, 2, 0]], torch.tensor([0, 1, 2, 0]), torch.zeros(4), torch.tensor([0, -1, 1, 0]))
    assert _differences(said, said)["correct"] == pytest.approx(2 / 3)


def test_calibration_error_by_hand():
    confidence = torch.tensor([0.01, 0.05, 0.55, 0.6, 1.0])
    correct = torch.tensor([False, True, True, False, True])
    # Bins of 1/15: the first two share one, the others have one each.
    assert calibration_error(confidence, correct) == pytest.approx((0.94 + 0.45 + 0.6 + 0) / 5)


def test_labels_that_cannot_be_compared(place, converted):
    with pytest.raises(BenchError, match="labels is empty"):
        _opened([])
    stores = opened(place)
    create_store(place / "other", replace(stores[1].description, batch=8))
    with pytest.raises(BenchError, match=r"other: cannot be compared with .*exact \(batch is 8 there and 16 here\)"):
        _opened([str(place / "exact"), str(place / "other")])
    with pytest.raises(BenchError, match="give these other names"):
        _opened([str(place / "exact"), str(place / "exact")])
    with pytest.raises(BenchError, match="refinery=resnet18: name the run folder"):
        _configs(stores, "resnet18", {"data": str(converted.folder)})
    with pytest.raises(TrainError, match="labels.json: cannot be read"):
        _opened([str(place)])
    with pytest.raises(BenchError, match="epochs=0"):
        run(labels="x", refinery="y", epochs=0)


@pytest.mark.slow
def test_a_comparison_is_written(place, converted, tmp_path, capsys):
    labels = f"{place / 'exact'} {place / 'top2'}"
    run(labels, str(place / "refinery"), data=str(converted.folder), epochs=2, device="cpu", out=str(tmp_path))
    out = capsys.readouterr().out
    (path,) = tmp_path.glob("*-compare-labels-*.json")
    rows = {row["name"]: row for row in json.loads(path.read_text())["rows"]}
    assert list(rows) == [
        *("ground truth", "refinery", "exact", "top2"),
        *("the refinery's forward alone", "crops labelled into files"),
    ]
    assert not any("not_run" in row for row in rows.values())
    assert rows["top2"]["ratio"]["min"] <= rows["top2"]["ratio"]["median"] <= rows["top2"]["ratio"]["max"]
    assert rows["exact"]["bytes_per_crop"] == 12
    assert str(place) not in path.read_text()
    assert "| training  | exact" in out
    assert len(list(tmp_path.iterdir())) == 3
