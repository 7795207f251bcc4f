"""Checks, plan and estimates of a command before it trains anything."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
import yaml

from data.convert import convert_source
from data.sources import open_source
from models import ModelError
from tests.pictures import write_class_folders
from tests.stopping import stop_at
from train import TrainError
from train.ahead import look_ahead, parts_of
from train.announce import announce_plan
from train.chain import chain
from train.config import parse
from train.estimate import checkpoint_bytes, measured
from train.interrupt import Interrupted
from train.job import check, resolve
from train.length import Cost, Remaining, said_seconds, steps_left
from train.runs import all_runs
from train.train import train

DEVICE = ["--device", "cpu", "--precision", "fp32"]
TINY = ["--model", "mobilenet0.25", "--resolution", "32", *DEVICE]


@pytest.fixture
def words(converted, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return [*TINY, "--data", str(converted.folder)]


def plan(*words) -> None:
    """Prints the plan, without timing anything."""
    announce_plan(parts_of(look_ahead([parse(words)])))


def job_of(*words):
    data, (labels,) = check([parse(words)])
    return resolve(parse(words), data, labels)


def test_a_dry_run_prints_the_plan_and_trains_nothing(words, capsys):
    assert train(parse([*words, "--refinery", "resnet18", "--recipe", "quick"]), dry_run=True) == []
    out = capsys.readouterr().out
    # 48 images: 6 steps of 8 crops, and so 16 / 6 as many epochs as the recipe's 4.
    for line in (
        r"^plan    resnet18, the refinery: 11 epochs of 6 steps of 8 crops at 32 px, about \d+ s$",
        r"^        mobilenet0.25 from resnet18: 11 epochs of 6 steps of 8 crops at 32 px, about \d+ s$",
        r"^fitted  mobilenet0.25: batches of 8 in place of 64 and 11 epochs in place of 4 of recipe quick",
        r"^time    about \d+ (s|min) in all, estimated from a few timed steps$",
        r"^writes  runs/images\w*|set: checkpoints of up to \d+ MB$",
    ):
        assert re.search(line, out, re.MULTILINE), line
    assert out.endswith("nothing was trained (--dry-run)\n")
    assert not list(Path().iterdir())


def test_a_fitted_run_is_the_same_as_with_its_values_given(words):
    job = job_of(*words, "--recipe", "quick")
    typed = job_of(*words, "--recipe", "quick", "--batch", "8", "--epochs", "11")
    assert (job.batch, job.config.epochs, job.fit is None, typed.fit) == (8, 11, False, None)
    assert job.identity == typed.identity
    assert job.folder == typed.folder


def test_measuring_does_not_change_a_runs_bits(words, monkeypatch, capsys):
    """Dropout draws from the generators that the timed steps use too."""
    words = [*words, "--model", "torchvision:squeezenet1_1", "--batch", "16", "--epochs", "1"]
    (plain,) = train(parse([*words, "--out", "plain"]))
    assert "not measured" in capsys.readouterr().out
    monkeypatch.setattr("train.ahead.is_short", lambda job: False)
    (timed,) = train(parse([*words, "--out", "timed"]))
    assert "estimated from a few timed steps" in capsys.readouterr().out
    one, other = (torch.load(run.weights, weights_only=True) for run in (plain, timed))
    assert all(torch.equal(value, other["model"][name]) for name, value in one["model"].items())
    assert all(torch.equal(value, other["generators"][name]) for name, value in one["generators"].items())


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--batch", "64"], r"batch=64: the 48 training images of .* make no batch of 64 for resnet18; take a smaller"),
        (["--batch", "1"], "batch=1: a refinery with batch statistics needs more than one crop"),
        (["--batch", "1", "--labels.bn", "running"], "batch=1: resnet18: cannot be trained on one crop at a time"),
        (["--batch", "2", "--replicas", "2"], "batch=2: resnet18: cannot be trained on one crop .*; take at least 4"),
        (["--resolution", "1"], "resolution=1 is too small; it takes 32 px and up"),
        (
            ["--resolution", "8192", "--batch", "48"],
            r"batch=48, resolution=8192: the crops of a step alone take 27 GiB",
        ),
        (["--out", "a file"], r"a file: the run cannot be written there \(Not a directory\); give another OUT"),
        (["--out", "a file/below"], r"a file/below: the run cannot be written there \(Not a directory\)"),
        (["--runs", "/proc/runs"], r"/proc/runs: the run cannot be written there"),
        (["--out", "x" * 300], r"xxx: the run cannot be written there \(File name too long\)"),
        (["--labels.resolution", "8"], "resnet18: resolution=8 is too small"),
        (["--replicas", "3", "--batch", "16"], "batch=16: is not a multiple of replicas=3"),
    ],
)
def test_errors_of_the_student_are_found_before_the_refinery_is_trained(words, options, says, monkeypatch, capsys):
    monkeypatch.setattr("train.checks.memory_of", lambda device: 24 << 30)
    Path("a file").touch()
    with pytest.raises((TrainError, ModelError), match=says) as ended:
        train(parse([*words, "--epochs", "1", "--batch", "16", "--refinery", "resnet18", *options]))
    assert "\n" not in str(ended.value)
    assert [path.name for path in Path().iterdir()] == ["a file"]


def test_a_batch_of_one_trains_if_each_map_has_several_values(words):
    (run,) = train(parse([*words, "--resolution", "64", "--batch", "1", "--epochs", "1"]))
    assert run.identity["batch"] == 1


def test_batch_and_folder_are_checked_before_images_are_converted(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_class_folders(tmp_path / "images" / "train", 2, 4)
    write_class_folders(tmp_path / "images" / "val", 2, 2, seed=7)
    for options, says in (
        (["--batch", "9"], "the 8 training images of images make no"),
        (["--out", "/proc/x"], "/proc"),
    ):
        with pytest.raises(TrainError, match=says):
            train(parse([*TINY, "--data", "images", *options]))
    assert not Path("converted").exists()


def test_too_little_disk_space_is_reported_before_training(words, monkeypatch):
    usage = shutil.disk_usage(".")
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage._replace(free=1 << 20))
    with pytest.raises(TrainError, match=r"runs/.*: 5.\d* MB are to be written there, and 1.05 MB are free; make room"):
        train(parse([*words, "--epochs", "1", "--batch", "16"]))
    assert not Path("runs").exists()


def test_the_folder_of_another_run_is_refused_before_the_refinery_is_trained(words):
    words = [*words, "--batch", "16", "--epochs", "1"]
    train(parse([*words, "--out", "mine"]))
    with pytest.raises(TrainError, match="mine: holds a run with another configuration"):
        train(parse([*words, "--refinery", "resnet18", "--out", "mine"]))
    assert not Path("runs").exists()


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
def test_the_size_of_a_checkpoint_is_that_of_its_file(words, kind):
    options = ["--batch", "16", "--epochs", "1", "--optimizer.kind", kind, "--optimizer.lr", "0.001", "--ema", "0.9"]
    (run,) = train(parse([*words, *options]))
    expected = checkpoint_bytes(parse([*words, *options]), 3)
    assert run.weights.stat().st_size == pytest.approx(expected, rel=0.1)


def test_more_epochs_of_a_finished_run_are_explained(words, capsys):
    words = [*words, "--batch", "16"]
    (short,) = train(parse([*words, "--epochs", "1"]))
    capsys.readouterr()
    plan(*words, "--epochs", "2")
    out = capsys.readouterr().out
    assert f"length  {short.folder} is the same run with 1 epochs, over which its learning rate fell; one of 2" in out
    assert f"PRETRAINED={short.weights}" in out
    plan(*words, "--epochs", "2", "--seed", "1")
    assert "is the same run" not in capsys.readouterr().out
    train(parse([*words, "--epochs", "1", "--out", "mine"]))
    with pytest.raises(TrainError, match="mine: holds this run with 1 epochs, over which its learning rate falls"):
        train(parse([*words, "--epochs", "2", "--out", "mine"]))


def test_a_short_run_is_used_as_refinery_only_if_it_is_named(words, capsys):
    words = [*words, "--batch", "16"]
    (trial,) = train(parse([*words, "--model", "resnet18", "--epochs", "1"]))
    asked = [*words, "--refinery", "resnet18"]
    capsys.readouterr()
    for options, says in (
        (["--epochs", "2"], "recipe label-refinery and 2 epochs; trained first"),
        (["--epochs", "1", "--recipe", "quick"], "recipe quick and 1 epochs; trained first"),
    ):
        plan(*asked, *options)
        out = capsys.readouterr().out
        assert says in out
        assert f"{trial.folder} (recipe label-refinery, 1 epochs, top-1" in out
        assert f"is taken only if it is named: REFINERY={trial.folder}" in out
        assert "plan    resnet18, the refinery" in out
    plan(*words, "--epochs", "2", "--refinery", str(trial.folder))
    assert "the refinery" not in capsys.readouterr().out
    # An equal length is enough, whatever the student's other options.
    plan(*asked, "--epochs", "1", "--optimizer.lr", "0.01", "--seed", "4")
    assert f"refinery: {trial.folder}, top-1" in capsys.readouterr().out
    # A run without a known recipe is not used.
    (trial.folder / "config.yaml").unlink()
    plan(*asked, "--epochs", "1", "--seed", "4")
    assert "plan    resnet18, the refinery" in capsys.readouterr().out


@pytest.mark.slow
def test_a_chain_has_one_plan(words, capsys):
    config = parse([*words, "--batch", "16", "--epochs", "1", "--recipe", "quick"])
    assert chain(config, ["resnet18", "mobilenet0.25", "mobilenet0.25"], dry_run=True) == []
    out = capsys.readouterr().out
    assert re.search(r"^plan    resnet18: 1 epochs of 3 steps of 16 crops at 32 px, about", out, re.MULTILINE)
    assert re.search(r"^        mobilenet0.25 from resnet18: 1 epochs", out, re.MULTILINE)
    assert re.search(r"^        mobilenet0.25 from mobilenet0.25: 1 epochs", out, re.MULTILINE)
    assert not Path("runs").exists()
    with pytest.raises(TrainError, match="batch=1: mobilenet0.25: cannot be trained on one crop at a time"):
        chain(config.replace({"batch": 1, "labels.bn": "running"}), ["mobilenet0.25", "resnet18"])
    chain(config.replace({"model": "resnet18"}), ["resnet18"])
    capsys.readouterr()
    chain(config, ["resnet18", "mobilenet0.25"], dry_run=True)
    out = capsys.readouterr().out
    assert re.search(r"^plan    mobilenet0.25 from resnet18: 1 epochs", out, re.MULTILINE)


def test_a_plan_counts_only_the_remaining_steps(words, monkeypatch, capsys):
    words = [*words, "--batch", "16", "--epochs", "3"]
    with monkeypatch.context() as patch:
        stop_at(5, patch)
        with pytest.raises(Interrupted):
            train(parse(words))
    capsys.readouterr()
    train(parse(words), dry_run=True)
    assert "3 epochs of 3 steps of 16 crops at 32 px, of which 1 and 2 steps are done, about" in capsys.readouterr().out
    (run,) = train(parse(words))
    capsys.readouterr()
    train(parse(words), dry_run=True)
    assert capsys.readouterr().out == "all is trained already\n"
    assert [each.folder for each in all_runs(Path("runs"))] == [run.folder]


def test_the_remaining_time_follows_the_steps(words):
    job = job_of(*words, "--batch", "16", "--epochs", "4", "--resolution", "64", "--resolution_from", "0.5")
    weights = [(side / 64) ** 2 for side in (32, 32, 48, 64)]
    assert [job.resolution_in(epoch) for epoch in range(4)] == [32, 32, 48, 64]
    assert steps_left(job) == pytest.approx(3 * sum(weights))
    assert steps_left(job, (2, 1)) == pytest.approx(3 * sum(weights[2:]) - weights[2])
    assert steps_left(job, (4, 0)) == 0
    remaining = Remaining(job, cost=Cost(step=10.0, validation=5.0), later=100.0)
    assert remaining.seconds(0, 0) == pytest.approx(30 * sum(weights) + 20 + 100)
    remaining.count_step(0, 1000.0)  # as if it compiled
    assert remaining.seconds(0, 0) == pytest.approx(30 * sum(weights) + 20 + 100)
    remaining.count_step(0, 1.0)
    remaining.count_validation(2.0)
    assert remaining.seconds(3, 1) == pytest.approx(2 * 4 + 2 + 100)


def test_an_estimate_has_the_right_order_of_magnitude(words):
    job = job_of(*words, "--batch", "16", "--epochs", "3")
    cost = measured([job])
    (run,) = train(parse([*words, "--batch", "16", "--epochs", "3"]))
    seconds = json.loads((run.folder / "result.json").read_text())["seconds"]
    # Other programs share the machine.
    assert seconds / 20 < cost.seconds(job) < 20 * seconds
    assert cost.step > cost.validation / 15 * 0.1


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        *((0.1, "1 s"), (89, "89 s"), (91, "2 min"), (3600, "60 min"), (12_000, "3 h 20 min"), (14_400, "4 h")),
        *((190_000, "2 days 5 h"), (864_000, "10 days")),
    ],
)
def test_durations_read_well(seconds, said):
    assert said_seconds(seconds) == said


def test_the_saved_configuration_gives_the_same_run(tmp_path, monkeypatch):
    """Of a set that is smaller than the recipe's batch."""
    monkeypatch.chdir(tmp_path)
    write_class_folders(tmp_path / "images", 2, 12)
    data = convert_source(open_source("images"), tmp_path / "set", processes=1)
    (run,) = train(parse([*TINY, "--data", str(data.folder), "--recipe", "fine-tune", "--epochs", "1"]))
    saved = yaml.safe_load((run.folder / "config.yaml").read_text())
    assert (saved["batch"], run.identity["batch"]) == (8, 8)
    assert [again.folder for again in train(parse(["--config", str(run.folder / "config.yaml")]))] == [run.folder]
