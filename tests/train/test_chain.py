"""Chains of generations: refineries and students, finished runs, and the table at the end."""

import json
from pathlib import Path

import pytest

from models import ModelError
from tests.stopping import stop_at
from train import TrainError
from train.chain import chain
from train.config import parse
from train.interrupt import Interrupted
from train.runs import all_runs

MODELS = ["resnet18", "mobilenet0.25", "mobilenet0.25"]


@pytest.fixture
def words(run, converted):
    """Options of tiny runs, in the folder that `run` has chosen."""
    return [
        *("--resolution", "32", "--batch", "16", "--epochs", "1", "--device", "cpu", "--precision", "fp32"),
        *("--data", str(converted.folder)),
    ]


def test_each_generation_learns_from_the_one_before(words, capsys):
    first, second, third = chain(parse([*words, "--loss.kind", "reversed"]), MODELS)
    assert first.identity["refinery"] is None
    assert second.identity["refinery"]["network"] == "resnet18"
    assert third.identity["refinery"]["network"] == "mobilenet0.25"
    assert second.identity["refinery"]["weights"] != third.identity["refinery"]["weights"]
    assert [run.identity["loss"]["kind"] for run in (first, second, third)] == ["soft", "reversed", "reversed"]
    (folder,) = Path("runs").glob("*/chain-*")
    rows = json.loads((folder / "chain.json").read_text())
    assert [row["model"] for row in rows] == MODELS
    assert [row["labels"] for row in rows] == ["ground truth", "resnet18", "mobilenet0.25"]
    for row, run in zip(rows, (first, second, third), strict=True):
        last = json.loads((run.folder / "metrics.jsonl").read_text().splitlines()[-1])
        assert (row["top1"], row["top5"]) == (run.result["top1"], run.result["top5"])
        assert row["gap"] == pytest.approx(last["train_top1"] - run.result["top1"])
    text = (folder / "chain.txt").read_text()
    assert len(text.splitlines()) == 4
    assert text in capsys.readouterr().out
    assert (folder / "chain.png").read_bytes().startswith(b"\x89PNG")


def test_finished_generations_are_not_repeated_and_a_stopped_one_continues(words, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        stop_at(5, patch)  # three steps an epoch: in the second generation
        with pytest.raises(Interrupted):
            chain(parse(words), MODELS)
    assert not list(Path("runs").glob("*/chain-*"))
    capsys.readouterr()
    chain(parse(words), MODELS)
    out = capsys.readouterr().out
    assert out.count("is finished: top-1") == 1
    assert out.count("continuing in epoch 1 of 1, after step 2 of 3") == 1
    assert len(list(all_runs(Path("runs")))) == 3


@pytest.mark.slow
def test_a_chain_may_start_from_a_refinery(words, run):
    refinery = run("--model", "resnet18", "--epochs", "1").folder
    first, second = chain(parse([*words, "--refinery", str(refinery)]), MODELS[1:])
    assert first.identity["refinery"]["network"] == "resnet18"
    assert second.identity["refinery"]["network"] == "mobilenet0.25"


@pytest.mark.slow
def test_labels_of_the_first_generation_are_not_used_by_later_ones(words, tmp_path):
    (tmp_path / "is_a.txt").write_text("thing class0\nthing class1\nclass1 class2\n")
    for kind, option in (
        ("ground_truth", ["--labels.smoothing", "0.1"]),
        ("taxonomy", ["--labels.taxonomy", str(tmp_path / "is_a.txt")]),
    ):
        first, second = chain(parse([*words, *option]), MODELS[1:])
        assert first.identity["refinery"] is None
        assert first.identity["labels"]["kind"] == kind
        assert second.identity["labels"]["kind"] == "refinery"


def test_bad_chains_are_refused_before_anything_is_trained(words, monkeypatch):
    monkeypatch.setattr("train.chain.train_jobs", None)
    with pytest.raises(ModelError, match="mobilnet"):
        chain(parse(words), ["resnet18", "mobilnet"])
    with pytest.raises(ModelError, match="alexnet: resolution=32 is too small"):
        chain(parse(words), ["resnet18", "alexnet"])
    with pytest.raises(TrainError, match="MODELS is empty"):
        chain(parse(words), [])
    for contradiction, says in (
        (["--refinery", "resnet18", "--labels.smoothing", "0.1"], "labels.smoothing is for ground truth"),
        (["--refinery", "resnet18", "--labels.taxonomy", "x"], "labels.taxonomy takes the place of a refinery"),
        (["--labels.taxonomy", "x", "--labels.smoothing", "0.1"], "labels.smoothing is for ground truth"),
    ):
        with pytest.raises(TrainError, match=says):
            chain(parse([*words, *contradiction]), MODELS)
    with pytest.raises(TrainError, match="out=here: is the folder of one run"):
        chain(parse([*words, "--out", "here"]), MODELS)
