"""Runs: the files in their folders; they resume with the same bits, and are neither repeated nor mixed up."""

import json
import os
import re
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from tqdm import tqdm

import models
from data.loader import open_loader
from kernels.normalise import Normalise
from models import ModelError
from models.trained import digest_of, load_trained
from tests.stopping import stop_at
from tests.train.conftest import TINY
from train import TrainError, loop
from train.config import parse
from train.distributed import Group
from train.evaluate import evaluate
from train.interrupt import Interrupted
from train.job import check, resolve
from train.loop import Trainer
from train.runs import all_runs, checkpoint, finished_refinery, read_run
from train.runs.__main__ import table
from train.runs.code import training_code
from train.runs.environment import environment
from train.runs.record import locked
from train.step import Step
from train.student import Student
from train.train import train

ROOT = Path(__file__).parents[2]
PAIR = ["--model", "mobilenet0.25 resnet18", "--optimizer.lr", "0.01"]


def test_files_of_a_finished_run(run, bf16_units, capsys):
    finished = run("--precision", "auto")
    folder = finished.folder
    assert folder.parent == Path("runs") / "images0" or folder.parent.parent == Path("runs")
    names = {file.name for file in folder.iterdir()}
    assert names >= {
        "config.yaml",
        "identity.json",
        "metrics.jsonl",
        "result.json",
        "starts.jsonl",
        "last.pt",
        "best.pt",
        "tensorboard",
    }
    assert not [name for name in names if "partial" in name]
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in metrics] == [1, 2]
    for line in metrics:
        assert 0 <= line["top1"] <= line["top5"] <= 100
        assert line["images_per_second_per_device"] > 0
        assert 0 <= line["waiting"] <= 1
        assert line["loss"] > 0
    result = json.loads((folder / "result.json").read_text())
    assert result["top1"] == metrics[-1]["top1"]
    assert result["best_top1"] == max(line["top1"] for line in metrics)
    assert result["epochs"] == 2
    assert result["seconds"] > 0
    assert list((folder / "tensorboard").iterdir())
    # The configuration is complete: it gives the same run again.
    config = yaml.safe_load((folder / "config.yaml").read_text())
    precision = "bf16" if bf16_units else "fp32"
    assert (config["resolution"], config["crop"]["flip"], config["precision"]) == (32, True, precision)
    assert f"CPU, {precision}{'' if bf16_units else ' (no bf16 units)'}; decoder ffcv" in capsys.readouterr().out
    (start,) = (json.loads(line) for line in (folder / "starts.jsonl").read_text().splitlines())
    assert (start["epoch"], start["step"], start["decoder"], start["compiled"]) == (0, 0, "ffcv", False)
    assert start["torch"] == torch.__version__
    made, now = start["environment"], environment("cpu")
    assert {name: made[name] for name in ("versions", "cpu", "compiler", "commit", "command")} == {
        name: now[name] for name in ("versions", "cpu", "compiler", "commit", "command")
    }
    assert made["code"] == training_code()
    assert [again.folder for again in train(parse(["--config", str(folder / "config.yaml")]))] == [folder]


def test_the_validation_loss_is_recorded(run, converted, capsys):
    """The mean cross entropy of the validation crops with the images' labels, for any training labels."""
    folder = run("--labels.smoothing", "0.2", "--epochs", "1").folder
    (line,) = (json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines())
    trained = load_trained(str(folder))
    total, images = 0.0, 0
    for batch in open_loader(converted.beton("val"), resolution=32, batch_size=4, train=False).epoch(0):
        with torch.inference_mode():
            logits = trained.network.eval()(Normalise(trained.normalisation)(batch.crops))
        total -= logits.double().log_softmax(dim=1)[range(len(logits)), batch.labels].sum().item()
        images += len(logits)
    assert images == 15
    assert line["val_loss"] == pytest.approx(total / images, rel=1e-4)
    assert f"top-5 {line['top5']:.2f} %, loss {line['val_loss']:.3f}; " in capsys.readouterr().out


def test_a_validation_loss_that_is_not_finite_stays_json(run, monkeypatch, capsys):
    """In evaluation mode a network may overflow although it trains well with batch statistics."""
    original = loop.score_all

    def score_all(*arguments, **options):
        found = original(*arguments, **options)
        for scores in found:
            scores.loss = float("inf")
        return found

    monkeypatch.setattr(loop, "score_all", score_all)
    finished = run("--epochs", "1")
    assert '"val_loss": null' in (finished.folder / "metrics.jsonl").read_text()
    assert "loss not finite; " in capsys.readouterr().out
    assert finished.metrics[0]["val_loss"] is None


def test_a_finished_run_is_not_repeated(run, capsys):
    first = run()
    before = (first.folder / "last.pt").stat().st_mtime_ns
    again = run()
    assert again.folder == first.folder
    assert (first.folder / "last.pt").stat().st_mtime_ns == before
    assert "is finished: top-1" in capsys.readouterr().out


def test_another_configuration_is_another_run(run):
    folders = {
        run(*words).folder for words in ([], ["--seed", "1"], ["--optimizer.lr", "0.01"], ["--crop.flip", "false"])
    }
    assert len(folders) == 4
    # Options of speed are not part of it.
    assert run("--decoder", "torchvision", "--threads", "1").folder in folders


@pytest.mark.parametrize(
    ("step", "refinery", "precision", "others"),
    [
        (1, False, "fp32", []),
        (2, True, "bf16", []),
        (3, False, "bf16", ["--augment.cutmix", "1", "--augment.color_jitter", "0.4"]),
        (3, True, "fp32", []),
        (5, True, "fp32", ["--augment.mixup", "0.5", "--augment.lighting", "0.1", "--augment.refinery_sees", "plain"]),
    ],
)
def test_resuming_equals_never_stopping_bit_for_bit(run, monkeypatch, capsys, step, refinery, precision, others):
    """Stopped within the first epoch, at its end, and within the second; momentum and metrics included."""
    monkeypatch.setattr("train.device._has_bf16", lambda device: True)
    words = ["--precision", precision, *others]
    if refinery:
        words += ["--refinery", f"{run('--model', 'resnet18', '--epochs', '1').folder}"]
    whole = run(*words, "--out", "whole")
    with monkeypatch.context() as patch:
        stop_at(step, patch)
        with pytest.raises(Interrupted, match="to continue, type again"):
            run(*words, "--out", "parts")
    assert not Path("parts/result.json").exists()
    capsys.readouterr()
    parts = run(*words, "--out", "parts")
    said = capsys.readouterr().out
    assert "continuing in epoch" in said
    assert "may differ" not in said
    one, other = (torch.load(folder / "last.pt", weights_only=True) for folder in (whole.folder, parts.folder))
    for name, value in one["model"].items():
        assert torch.equal(value, other["model"][name]), name
    for mine, theirs in zip(one["optimizer"]["state"].values(), other["optimizer"]["state"].values(), strict=True):
        assert torch.equal(mine["momentum_buffer"], theirs["momentum_buffer"])
    times = ("images_per_second_per_device", "waiting")
    lines = [
        [
            {key: value for key, value in json.loads(line).items() if key not in times}
            for line in (folder / "metrics.jsonl").read_text().splitlines()
        ]
        for folder in (whole.folder, parts.folder)
    ]
    assert lines[0] == lines[1]


def test_the_bar_shows_the_epochs_means_and_what_is_left(run, monkeypatch):
    shown = []
    original = tqdm.set_postfix_str

    def set_postfix_str(self, said="", refresh=True):
        shown.append(said)
        original(self, said, refresh)

    monkeypatch.setattr(tqdm, "set_postfix_str", set_postfix_str)
    monkeypatch.setattr(loop, "_SECONDS_BETWEEN_LOOKS", 0)
    (line,) = run("--epochs", "1").metrics
    assert len(shown) == 3
    assert all(re.fullmatch(r"loss \d\.\d{3}, top-1 \d+\.\d %; .* left in all", said) for said in shown)
    # The last one was after all steps of the epoch.
    assert shown[-1].startswith(f"loss {line['loss']:.3f}, top-1 {line['train_top1']:.1f} %; ")


def test_metrics_are_computed_from_the_sums(run, monkeypatch, capsys):
    """Also of several networks, which are named; the bar of a continued epoch ends with all its images."""
    sums = []
    original = Trainer.validate

    def validate(self):
        sums.append([student.sums.tolist() for student in self.students])
        original(self)

    monkeypatch.setattr(Trainer, "validate", validate)
    with monkeypatch.context() as patch:
        stop_at(2, patch)
        with pytest.raises(Interrupted):
            run(*PAIR, "--epochs", "1")
    capsys.readouterr()
    runs = run(*PAIR, "--epochs", "1")
    shown = capsys.readouterr()
    ((*each,),) = sums
    for finished, (loss, top1, top5, crops) in zip(runs, each, strict=True):
        (line,) = finished.metrics
        assert crops == 48
        assert (line["loss"], line["train_top1"]) == (pytest.approx(loss / 48), pytest.approx(100 * top1 / 48))
        assert line["train_top5"] == 100 * top5 / 48 == 100
        assert f"{finished.identity['model']}, epoch 1/1: loss {loss / 48:.3f}, " in shown.err + shown.out
    assert "epoch 1/1: 100%" in shown.err
    assert " 48/48 " in shown.err


class Agreeing(Group):
    """One of two processes that always agree."""

    def largest(self, values):
        self.asked = list(values)
        return list(values)


def test_the_first_process_decides_when_to_save_and_to_look(converted, tmp_path):
    """The others only request stops, and processes exchange this only every few steps."""
    config = parse([*TINY, "--data", str(converted.folder), "--runs", str(tmp_path), "--save_minutes", "1"])
    data, (labels,) = check([config])
    trainer = Trainer([resolve(config, data, labels)])
    long, short = 3600.0, 0.0
    # After a minute, as given, and after two seconds.
    assert trainer._agreed(60.5, short, 0.1) == (False, True, False)
    assert trainer._agreed(short, 2.5, 0.1) == (False, False, True)
    assert trainer._agreed(59.5, 1.5, 0.1) == (False, False, False)
    for rank, saves in ((0, True), (1, False)):
        group = Agreeing(rank, 2)
        trainer.job = replace(trainer.job, group=group)
        trainer._apart = 3
        for step in (1, 2, 4):
            trainer.progress.step = step
            assert trainer._agreed(long, long, 0.125) == (False, False, False)
        trainer.progress.step = 3
        assert trainer._agreed(long, long, 0.125) == (False, saves, saves)
        # With steps of an eighth of a second, the first process asks for an exchange every fourth step.
        assert group.asked == ([False, True, True, 4] if saves else [False, 0, 0, 0])
        # With slow steps, after each.
        trainer._apart = 1
        trainer._agreed(long, long, 30.0)
        assert group.asked == ([False, True, True, 1] if saves else [False, 0, 0, 0])


# A network with dropout, which draws from generators; stopped between the two crops of an image.
DROPPING = ["--model", "torchvision:squeezenet1_1", "--copies", "2", "--order", "quasi-random", "--epochs", "1"]
DROPPING += ["--optimizer.lr", "0.01"]


def test_dropout_and_copies_resume_bit_for_bit(run, monkeypatch):
    whole = run(*DROPPING, "--out", "whole")
    with monkeypatch.context() as patch:
        stop_at(3, patch)
        with pytest.raises(Interrupted, match="after step 3 of 6"):
            run(*DROPPING, "--out", "parts")
    torch.manual_seed(1)  # something else uses the generator before it continues
    parts = run(*DROPPING, "--out", "parts")
    assert same_weights(whole.folder, parts.folder)
    without = run(*DROPPING, "--seed", "1").folder
    assert not same_weights(whole.folder, without)


@pytest.mark.slow
def test_a_new_process_continues_with_the_same_bits(run, converted, monkeypatch):
    words = [*DROPPING, "--ema", "0.9", "--augment.cutmix", "0.5", "--refinery", str(run("--epochs", "1").folder)]
    whole = run(*words, "--out", "whole")
    with monkeypatch.context() as patch:
        stop_at(3, patch)
        with pytest.raises(Interrupted):
            run(*words, "--out", "parts")
    done = subprocess.run(
        [sys.executable, "-m", "train", *TINY, "--data", str(converted.folder), *words, "--out", "parts"],
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    assert "continuing in epoch 1 of 1, after step 3 of 6" in done.stdout
    assert "may differ" not in done.stdout
    assert same_weights(whole.folder, Path("parts"))


def test_the_scale_of_a_float16_run_resumes(converted, tmp_path, monkeypatch):
    """Simulated on a CPU, which would otherwise use float32 instead."""
    config = parse([*TINY, "--data", str(converted.folder), "--epochs", "1"])
    data, (labels,) = check([config])
    job = resolve(config, data, labels)
    original = Student.__init__

    def init(self, *others, **options):
        original(self, *others, **options)
        # The first steps overflow, and each halves the scale.
        self.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)
        self.scaler.scale(torch.zeros(()))  # makes the scale, as a student does

    monkeypatch.setattr(Student, "__init__", init)

    def trained(name: str) -> dict:
        half = replace(job, config=replace(job.config, precision="fp16"), folder=tmp_path / name)
        Trainer([half]).run()
        return torch.load(half.folder / "last.pt", weights_only=True)

    whole = trained("whole")
    assert whole["scaler"]["scale"] == 2.0**37
    with monkeypatch.context() as patch:
        stop_at(2, patch)
        with pytest.raises(Interrupted):
            trained("parts")
    parts = trained("parts")
    assert parts["scaler"] == whole["scaler"]
    assert all(torch.equal(value, parts["model"][name]) for name, value in whole["model"].items())


@pytest.mark.parametrize("stopped", [None, 5])
def test_best_pt_is_of_the_epoch_with_the_highest_accuracy(run, monkeypatch, stopped):
    """The last of equal ones; also if the run is continued in between."""
    accuracies = [40.0, 60.0, 50.0, 60.0, 20.0]
    kept = []
    original = loop.score_all

    def score_all(answer, *others, **options):
        (scores,), (network,) = original(answer, *others, **options), answer.networks
        scores.top1 = accuracies[len(kept)]
        kept.append({name: value.clone() for name, value in network.state_dict().items()})
        return [scores]

    monkeypatch.setattr(loop, "score_all", score_all)
    words = ["--epochs", "5", "--batch", "48", "--out", "run"]  # a step each
    if stopped:
        with monkeypatch.context() as patch:
            stop_at(stopped, patch)
            with pytest.raises(Interrupted):
                run(*words)
    assert run(*words).result["best_top1"] == 60
    best, last = (torch.load(f"run/{name}.pt", weights_only=True) for name in ("best", "last"))
    assert (best["progress"]["epoch"], last["progress"]["epoch"]) == (4, 5)
    for state, weights in ((best, kept[3]), (last, kept[4])):
        assert state["best_top1"] == 60
        assert all(torch.equal(value, weights[name]) for name, value in state["model"].items())


def test_a_change_of_decoder_is_printed_and_recorded(run, monkeypatch, capsys):
    """A notice says that the last bits of the weights may differ."""
    with monkeypatch.context() as patch:
        stop_at(2, patch)
        with pytest.raises(Interrupted):
            run("--out", "run")
    run("--out", "run", "--decoder", "torchvision")
    assert (
        "the last bits may differ from those of a run without a stop: decoder was ffcv and is torchvision"
        in capsys.readouterr().out
    )
    starts = [json.loads(line) for line in Path("run/starts.jsonl").read_text().splitlines()]
    assert [(start["step"], start["decoder"]) for start in starts] == [(0, "ffcv"), (2, "torchvision")]


def test_a_kill_between_two_checkpoints_leaves_the_best(run, monkeypatch):
    """Whichever of the epoch's two files was written before the kill, the run ends with both."""
    whole = run("--out", "whole", "--epochs", "1")
    original = checkpoint.save

    class Killed(BaseException):
        pass

    def save(path, state, **options):
        original(path, state, **options)
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save", save)
        with pytest.raises(Killed):
            run("--out", "parts", "--epochs", "1")
    run("--out", "parts", "--epochs", "1")
    for name in ("best.pt", "last.pt"):
        one, other = (torch.load(folder / name, weights_only=True) for folder in (whole.folder, Path("parts")))
        assert one["best_top1"] == other["best_top1"]
        assert all(torch.equal(value, other["model"][key]) for key, value in one["model"].items())


def test_a_student_starts_from_other_weights_and_crops_than_its_refinery(run, monkeypatch):
    """Also in self-refinement; students of one refinery share their crops."""
    first_batches, first_weights = [], []
    original = Step.__call__

    def call(self, batch, *where):
        for student in self.students:
            first_weights.append(next(student.network.parameters()).detach().clone())
        first_batches.append(batch.indices.tolist())
        original(self, batch, *where)

    monkeypatch.setattr(Step, "__call__", call)
    one = ["--epochs", "1", "--batch", "48"]  # a step
    teacher = run(*one)
    student = run(*one, "--refinery", str(teacher.folder))
    sibling = run(*one, "--refinery", str(teacher.folder), "--model", "mobilenet0.5")
    pupil = run(*one, "--refinery", str(student.folder))
    assert [each.identity["generation"] for each in (teacher, student, sibling, pupil)] == [0, 1, 1, 2]
    assert first_batches[0] != first_batches[1] == first_batches[2] != first_batches[3] != first_batches[0]
    assert not torch.equal(first_weights[0], first_weights[1])
    assert not torch.equal(first_weights[1], first_weights[3])
    assert len({each.crop_seed for each in (teacher, student, pupil)}) == 3
    # Published weights have no known generation.
    torch.save(torch.load(student.weights, weights_only=True)["model"], "bare.pt")
    assert run(*one, "--refinery", "mobilenet0.25:bare.pt").identity["generation"] == 1


def as_written_before(folder: Path, *, before_tables: bool) -> None:
    """Rewrites a run's identity as written by a version without kinds of labels and generations."""
    path = folder / "identity.json"
    identity = json.loads(path.read_text())
    del identity["generation"]
    labels = {"smoothing": 0.0, "bn": "batch", "resolution": None, "per": "crop", "taxonomy": None}
    identity["labels"] = labels | {name: value for name, value in identity["labels"].items() if name != "kind"}
    identity["crop"] |= {"resolution": identity["resolution"]}
    if before_tables:
        del identity["labels"]["per"], identity["labels"]["taxonomy"]
    path.write_text(json.dumps(identity))


@pytest.mark.parametrize("before_tables", [False, True])
def test_runs_of_an_earlier_version_still_open(run, capsys, before_tables):
    """They are listed and can be refineries, but are not taken for runs of this version, whose crops differ."""
    teacher = run("--model", "resnet18", "--epochs", "1")
    student = run("--refinery", "resnet18", "--epochs", "1")
    for each in (teacher, student):
        as_written_before(each.folder, before_tables=before_tables)
    assert [read_run(each.folder).identity["labels"]["kind"] for each in (teacher, student)] == [
        "ground_truth",
        "refinery",
    ]
    assert read_run(student.folder).crop_seed == 0
    capsys.readouterr()
    table("runs")
    assert capsys.readouterr().out.count("finished") == 2
    again = run("--refinery", "resnet18", "--epochs", "1", "--seed", "5")
    assert f"{teacher.folder}, top-1" in capsys.readouterr().out
    assert again.identity["refinery"] == student.identity["refinery"]
    with pytest.raises(TrainError, match="holds a run with another configuration"):
        run("--model", "resnet18", "--epochs", "1", "--out", str(teacher.folder))


def test_an_average_and_growing_crops_resume_bit_for_bit(run, bf16_units, monkeypatch):
    # As evaluate computes.
    words = ["--ema", "0.9", "--resolution_from", "0.67", "--resolution", "48", "--epochs", "4", "--precision", "auto"]
    whole = run(*words, "--out", "whole")
    with monkeypatch.context() as patch:
        stop_at(5, patch)
        with pytest.raises(Interrupted):
            run(*words, "--out", "parts")
    parts = run(*words, "--out", "parts")
    assert same_weights(whole.folder, parts.folder)
    state = torch.load(whole.folder / "last.pt", weights_only=True)
    assert not torch.equal(state["model"]["classifier.weight"], state["trained"]["classifier.weight"])
    data = yaml.safe_load((whole.folder / "config.yaml").read_text())["data"]
    evaluate(str(whole.folder), data, out="scores.json", device="cpu")
    # The saved network is the one that was scored.
    assert json.loads(Path("scores.json").read_text())["top1"] == whole.result["top1"]


def test_crops_grow(run, monkeypatch):
    seen = []
    original = Step.__call__

    def call(self, batch, *where):
        seen.append(batch.crops.shape[-1])
        original(self, batch, *where)

    monkeypatch.setattr(Step, "__call__", call)
    run("--resolution_from", "0.45", "--resolution", "72", "--epochs", "6")
    assert seen[::3] == [32, 32, 32, 48, 72, 72]


def test_crops_too_small_for_the_network_are_refused_before_they_come(run):
    with pytest.raises(ModelError, match="alexnet: resolution=32 is too small"):
        run("--model", "alexnet", "--resolution", "64", "--resolution_from", "0.5")


def test_a_missing_refinery_is_trained_first_and_used_again(run, capsys):
    first = run("--refinery", "resnet18")
    out = capsys.readouterr().out
    assert "resnet18 has no finished run on" in out
    assert "ground truth, the label of the whole image" in out
    assert "labels  refinery resnet18" in out
    refinery = first.identity["refinery"]
    runs = list(all_runs(Path("runs")))
    assert sorted(r.identity["model"] for r in runs) == ["mobilenet0.25", "resnet18"]
    second = run("--refinery", "resnet18", "--seed", "1")
    out = capsys.readouterr().out
    assert "is finished and used as it is" in out
    assert second.identity["refinery"] == refinery
    assert second.folder != first.folder


def test_the_refinery_does_not_change_while_it_labels(run):
    teacher = run("--model", "resnet18").folder / "last.pt"
    before = teacher.read_bytes()
    run("--refinery", str(teacher.parent))
    run("--refinery", str(teacher), "--seed", "2")
    run("--refinery", f"resnet18:{teacher}", "--seed", "3", "--labels.bn", "running")
    assert teacher.read_bytes() == before


def test_a_bare_file_of_weights_can_be_a_refinery(run, tmp_path):
    state = torch.load(run("--model", "resnet18").folder / "last.pt", weights_only=True)["model"]
    torch.save(state, tmp_path / "bare.pytar")
    assert run("--refinery", f"resnet18:{tmp_path / 'bare.pytar'}").identity["refinery"]["network"] == "resnet18"
    with pytest.raises(ModelError, match="holds bare weights; name their network too"):
        run("--refinery", str(tmp_path / "bare.pytar"))


def test_fine_tuning_starts_from_a_file(run, tmp_path, capsys):
    state = torch.load(run("--model", "resnet18").folder / "last.pt", weights_only=True)["model"]
    state["fc.weight"], state["fc.bias"] = torch.zeros(1000, 512), torch.zeros(1000)
    torch.save(state, tmp_path / "imagenet.pth")
    capsys.readouterr()
    tuned = run("--model", "resnet18", "--pretrained", str(tmp_path / "imagenet.pth"), "--optimizer.lr", "1e-9")
    out = capsys.readouterr().out
    assert "pre-trained weights from" in out
    assert "fc.weight" in out
    weights = torch.load(tuned.weights, weights_only=True)["model"]
    torch.testing.assert_close(weights["layer1.0.conv1.weight"], state["layer1.0.conv1.weight"], rtol=0, atol=1e-5)


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_checkpoint(run, monkeypatch):
    with monkeypatch.context() as patch:
        stop_at(4, patch)
        with pytest.raises(Interrupted):
            run("--out", "run")
    before = Path("run/last.pt").read_bytes()
    original = Step.__call__

    def call(self, batch, *where):
        with torch.no_grad():
            next(self.students[0].network.parameters()).fill_(float("nan"))
        original(self, batch, *where)

    monkeypatch.setattr(Step, "__call__", call)
    with pytest.raises(TrainError, match=r"finite in epoch 2, by step 3, at learning rate .*before it is kept"):
        run("--out", "run")
    assert Path("run/last.pt").read_bytes() == before
    with pytest.raises(TrainError, match="finite in epoch 1, by step 3, at learning rate") as ended:
        run("--out", "new")
    assert "kept" not in str(ended.value)


def test_weights_that_are_not_finite_after_the_last_step_are_not_saved(run, monkeypatch):
    original = Step.__call__
    steps = 0

    def call(self, batch, *where):
        nonlocal steps
        original(self, batch, *where)
        steps += 1
        if steps == 6:
            with torch.no_grad():
                next(self.students[0].network.parameters()).fill_(float("inf"))

    monkeypatch.setattr(Step, "__call__", call)
    with pytest.raises(TrainError, match="weights are no longer finite in epoch 2, by step 3, at learning rate"):
        run("--out", "run")
    assert torch.load("run/last.pt", weights_only=True)["progress"]["epoch"] == 1
    assert not Path("run/result.json").exists()


def test_a_stop_after_the_last_validation_stops_the_rest_of_the_command(run, monkeypatch, capsys):
    original = Trainer.validate

    def validate(self):
        original(self)
        if self.progress.epoch == self.job.config.epochs:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(Trainer, "validate", validate)
    with pytest.raises(Interrupted, match="stopped after a finished run; to continue, type again"):
        run("--refinery", "resnet18")
    (only,) = all_runs(Path("runs"))
    assert only.identity["model"] == "resnet18"
    assert only.result


def same_weights(one: Path, other: Path) -> bool:
    states = [torch.load(folder / "last.pt", weights_only=True)["model"] for folder in (one, other)]
    return all(torch.equal(value, states[1][name]) for name, value in states[0].items())


def test_several_networks_train_together_as_they_would_alone(run, capsys):
    refinery = run("--model", "resnet18", "--epochs", "1").folder
    words = [*PAIR, "--refinery", str(refinery)]
    capsys.readouterr()
    together = run(*words)
    assert capsys.readouterr().out.count("finished: top-1") == 2
    folders = [each.folder for each in together]
    for folder in folders:
        folder.rename(folder.with_name(f"together-{folder.name}"))
    for name, folder in zip(PAIR[1].split(), folders, strict=True):
        alone = run(*words, "--model", name)
        assert alone.folder == folder
        assert same_weights(folder, folder.with_name(f"together-{folder.name}"))
    # A network that was trained alone is not trained again together.
    assert [each.folder for each in run(*words)] == folders


def test_several_networks_are_resumed_together(run, monkeypatch, capsys):
    whole = run(*PAIR)
    for each in whole:
        each.folder.rename(each.folder.with_name(f"whole-{each.folder.name}"))
    with monkeypatch.context() as patch:
        stop_at(4, patch)
        with pytest.raises(Interrupted):
            run(*PAIR)
    for each in whole:
        assert (each.folder / "last.pt").is_file()
    capsys.readouterr()
    run(*PAIR)
    assert capsys.readouterr().out.count("continuing in epoch 2 of 2, after step 1 of 3") == 1
    for each in whole:
        assert same_weights(each.folder, each.folder.with_name(f"whole-{each.folder.name}"))


def test_a_network_that_was_started_alone_continues_alone(run, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        stop_at(2, patch)
        with pytest.raises(Interrupted):
            run(*PAIR, "--model", "resnet18")
    capsys.readouterr()
    first, second = run(*PAIR)
    assert (first.identity["model"], second.identity["model"]) == ("mobilenet0.25", "resnet18")
    out = capsys.readouterr().out
    assert out.count("continuing in epoch 1 of 2, after step 2 of 3") == 1
    assert out.count("finished: top-1") == 2


def test_networks_that_cannot_train_together_are_refused(run):
    with pytest.raises(TrainError, match="name each network once"):
        run("--model", "resnet18 resnet18")
    with pytest.raises(TrainError, match="out=here: is the folder of one run"):
        run(*PAIR, "--out", "here")


@pytest.mark.slow
def test_cheaper_refineries_give_other_runs(run, capsys):
    words = ["--refinery", str(run("--model", "resnet18", "--epochs", "1").folder)]
    options = ([], ["--labels.bn", "running"], ["--labels.resolution", "24"], ["--loss.kind", "l2"])
    assert len({run(*words, *option).folder for option in options}) == 4
    out = capsys.readouterr().out
    assert "with running statistics" in out
    assert "with batch statistics, at 24 px" in out
    assert "loss l2, temperature 1" in out


@pytest.mark.slow
def test_too_little_memory_names_a_batch_that_fits(run, monkeypatch):
    """A limit on PyTorch's real allocator simulates a small machine."""
    original = Step.__call__

    def call(self, batch, *where):
        if len(batch.labels) > 4:
            torch.empty(2**52)
        original(self, batch, *where)

    monkeypatch.setattr(Step, "__call__", call)
    says = r"batch=16: a step at 32 px does not fit in the \d+ GiB.*; --batch 4 fits"
    with pytest.raises(TrainError, match=says):
        run()
    # A refinery that labels other crops than those trained on sees the same number of them.
    torch.manual_seed(0)
    network = models.build("resnet18", 3)
    torch.save(network.state_dict(), "refinery.pt")
    with pytest.raises(TrainError, match=says):
        run("--refinery", "resnet18:refinery.pt", "--labels.per", "image")


@pytest.mark.slow
def test_a_refinery_by_name_is_one_of_the_same_crops_and_of_ground_truth(run, tmp_path, capsys):
    is_a = tmp_path / "is_a.txt"
    is_a.write_text("thing class0\nthing class1\nclass1 class2\n")
    others = [
        run("--model", "resnet18", "--epochs", "1", "--crop.scale", "[0.9, 1.0]"),
        run("--model", "resnet18", "--epochs", "1", "--labels.taxonomy", str(is_a)),
    ]
    capsys.readouterr()
    run("--refinery", "resnet18", "--epochs", "1")
    assert "resnet18 has no finished run on" in capsys.readouterr().out
    mine = run("--model", "resnet18", "--epochs", "2")
    (found,) = [r for r in all_runs(Path("runs")) if r.identity["refinery"]]
    assert found.identity["refinery"]["weights"] not in {digest_of(other.weights) for other in others}
    assert finished_refinery(Path("runs"), mine.identity).folder == mine.folder


@pytest.mark.slow
def test_networks_of_other_batches_train_apart(run, tmp_path, capsys):
    (tmp_path / "mine.yaml").write_text("{batch: 16, epochs: 1, networks: {mobilenet: {batch: 8}}}")
    refinery = str(run("--model", "resnet18", "--epochs", "1").folder)
    words = ["--resolution", "32", "--device", "cpu", "--recipe", str(tmp_path / "mine.yaml"), "--refinery", refinery]
    data = yaml.safe_load(Path(refinery, "config.yaml").read_text())["data"]
    first, second = train(parse([*words, "--data", data, "--model", PAIR[1]]))
    assert (first.identity["batch"], second.identity["batch"]) == (8, 16)
    said = "batch: mobilenet0.25 takes 8 and resnet18 16 from recipe"
    assert said in capsys.readouterr().out


def test_two_processes_do_not_train_one_run(run):
    """A lock of another open file simulates another process: the system treats both the same."""
    folder = run("--epochs", "1").folder
    before = {file.name: file.read_bytes() for file in folder.iterdir() if file.is_file()}
    (folder / "result.json").unlink()
    with locked(folder), pytest.raises(TrainError, match="another process is training this run"):
        run("--epochs", "1")
    assert {file.name: file.read_bytes() for file in folder.iterdir() if file.is_file()} == {
        name: content for name, content in before.items() if name != "result.json"
    }
    assert run("--epochs", "1").result


def test_a_folder_with_another_run_is_refused(run):
    run("--out", "mine")
    with pytest.raises(TrainError, match="mine: holds a run with another configuration"):
        run("--out", "mine", "--seed", "3")


def test_a_truncated_line_is_written_again(run, monkeypatch, capsys):
    """As a full disk leaves it, in the metrics file; the checkpoint is complete."""
    with monkeypatch.context() as patch:
        stop_at(5, patch)
        with pytest.raises(Interrupted):
            run("--out", "run")
    for name in ("metrics.jsonl", "starts.jsonl"):
        with open(f"run/{name}", "a") as file:
            file.write('{"epoch": 2, "lo')
    table("run")
    assert "epoch 1 of 2" in capsys.readouterr().out
    run("--out", "run")
    assert [json.loads(line)["epoch"] for line in Path("run/metrics.jsonl").read_text().splitlines()] == [1, 2]
    assert len([json.loads(line) for line in Path("run/starts.jsonl").read_text().splitlines()]) == 2


def test_a_damaged_checkpoint_is_refused_by_name(run, monkeypatch):
    with monkeypatch.context() as patch:
        stop_at(2, patch)
        with pytest.raises(Interrupted):
            run("--out", "run")
    Path("run/last.pt").write_bytes(Path("run/last.pt").read_bytes()[:1000])
    with pytest.raises(TrainError, match=r"run/last.pt: not a readable checkpoint"):
        run("--out", "run")


def test_table(run, capsys):
    run()
    run("--seed", "1")
    capsys.readouterr()
    table("runs")
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    assert lines[0].split()[:3] == ["data", "model", "refinery"]
    assert all("mobilenet0.25" in line and "finished" in line for line in lines[1:])
    with pytest.raises(TrainError, match="absent: no such folder"):
        table("absent")


@pytest.mark.slow
def test_each_ablation_gives_other_weights(run, tmp_path, capsys):
    """Tables 3 to 7 of the paper: each option runs to the end, and gives other weights from the same start."""
    refinery = run("--model", "resnet18", "--epochs", "1")
    words = ["--refinery", str(refinery.folder), "--epochs", "1"]
    is_a = tmp_path / "is_a.txt"
    is_a.write_text("thing class0\nthing class1\nclass1 class2\n")
    start = ["--pretrained", str(run("--epochs", "1").weights), "--recipe", "quick"]
    runs = [
        run(*words, *option)
        for option in (
            [],
            ["--labels.per", "image"],
            ["--labels.per", "image", "--labels.bn", "running"],
            ["--labels.per", "category", "--labels.bn", "running"],
            ["--loss.kind", "hard"],
            ["--loss.kind", "reversed"],
            ["--loss.kind", "l2"],
            start,
            [*start, "--jitter", "1"],
        )
    ]
    runs.append(run("--labels.taxonomy", str(is_a), "--epochs", "1"))
    assert len({each.folder for each in runs}) == 10
    states = [torch.load(each.weights, weights_only=True)["model"] for each in runs]
    assert len({next(iter(state.values())).sum().item() for state in states}) == 10
    out = capsys.readouterr().out
    for said in ("one per image", "one per category", "adversarial jitter, eta 1", f"one per category, by {is_a}"):
        assert said in out
