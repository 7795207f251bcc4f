"""The commands as a user types them, end to end on a tiny set, and their single line for bad input."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import models
from command import exit_on_user_error, run_command
from tests.paths import python_path
from tests.pictures import photograph, write_class_folders
from train.config import parse
from train.evaluate import evaluate
from train.predict import predict
from train.runs.__main__ import table
from train.train import train

ROOT = Path(__file__).parents[2]
TINY = ["--model", "mobilenet0.25", "--resolution", "32", "--batch", "16", "--epochs", "1", "--device", "cpu"]


def command(module: str, *words: object, cwd: Path, **options) -> subprocess.CompletedProcess:
    environment = os.environ | {"PYTHONPATH": python_path(), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-m", module, *map(str, words)],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
        **options,
    )


@pytest.fixture(scope="module")
def workplace(image_folder, tmp_path_factory):
    """A folder in which a refinery and its student were trained from a folder of images by one command."""
    place = tmp_path_factory.mktemp("workplace")
    done = command("train", *TINY, "--refinery", "resnet18", "--data", image_folder, cwd=place)
    assert done.returncode == 0, done.stderr
    return place, done


def run_folder(place: Path, prefix: str) -> Path:
    (folder,) = (path.parent for path in place.glob(f"runs/*/{prefix}*/result.json"))
    return folder


def test_a_folder_becomes_a_trained_pair_by_one_command(workplace):
    place, done = workplace
    assert "train: 48 images at" in done.stdout
    assert "resnet18 has no finished run" in done.stdout
    assert "labels  refinery resnet18" in done.stdout
    assert done.stdout.count("finished: top-1") == 2
    assert "images/s" in done.stderr  # the bar
    assert "Traceback" not in done.stderr
    result = json.loads((run_folder(place, "mobilenet0.25-from-resnet18") / "result.json").read_text())
    assert set(result) == {"top1", "top5", "best_top1", "epochs", "images_per_second_per_device", "seconds"}


def test_evaluate_agrees_with_the_run(workplace, image_folder):
    place, _ = workplace
    folder = run_folder(place, "mobilenet0.25")
    done = command("train.evaluate", "--checkpoint", folder, "--data", image_folder, "--device", "cpu", cwd=place)
    assert done.returncode == 0, done.stderr
    (written,) = folder.glob("evaluation-last-*.json")
    scores = json.loads(written.read_text())
    result = json.loads((folder / "result.json").read_text())
    assert scores["top1"] == pytest.approx(result["top1"])
    assert f"top-1 {scores['top1']:.2f} %" in done.stdout
    assert [entry["images"] for entry in scores["per_class"].values()] == [5, 5, 5]
    assert sum(entry["top1"] for entry in scores["per_class"].values()) / 3 == pytest.approx(scores["top1"])


def test_predict_names_the_classes(workplace, image_folder, tmp_path):
    place, _ = workplace
    folder = run_folder(place, "mobilenet0.25")
    (tmp_path / "broken.jpg").write_text("no image")
    photograph(3, 100, 140).convert("L").save(tmp_path / "gray.png")
    (tmp_path / "below").mkdir()
    photograph(4, 90, 90).save(tmp_path / "below" / "colour.webp")
    done = command("train.predict", "--checkpoint", folder / "best.pt", "--images", tmp_path, cwd=place)
    assert done.returncode == 0, done.stderr
    assert "broken.jpg: left out" in done.stderr
    for name in ("gray.png", "colour.webp"):
        rows = done.stdout.split(name)[1].splitlines()[1:4]
        assert sorted(row.split()[-1] for row in rows) == ["class0", "class1", "class2"]
        chances = [float(row.split()[0]) for row in rows]
        assert chances == sorted(chances, reverse=True)
        assert sum(chances) == pytest.approx(100, abs=0.2)


@pytest.mark.slow
def test_on_scenes_the_run_reports_the_truth_about_crops(tmp_path):
    done = command("train", "--model", "mobilenet0.25", "--epochs", "1", "--batch", "128", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    quality = json.loads((run_folder(tmp_path, "mobilenet0.25") / "result.json").read_text())["crop_labels"]
    assert 2000 < quality["crops"] <= 2400
    assert 50 < quality["image_label_right"] < 90
    assert quality["label_right"] == quality["image_label_right"]  # without a refinery they are the same label
    assert "the image's label is correct for" in done.stdout
    assert "labels  ground truth" in done.stdout


def test_ctrl_c_writes_a_checkpoint_and_says_how_to_continue(workplace, image_folder):
    place, _ = workplace
    words = [*TINY, "--epochs", "400", "--seed", "5", "--out", "stopped", "--data", str(image_folder)]
    environment = os.environ | {
        "PYTHONPATH": python_path(),
        "OMP_NUM_THREADS": "1",
        "TYPED_COMMAND": "make train EPOCHS=400",
    }
    process = subprocess.Popen(
        [sys.executable, "-m", "train", *words], cwd=place, env=environment, stderr=subprocess.PIPE, text=True
    )
    metrics = place / "stopped" / "metrics.jsonl"
    for _ in range(1200):
        if metrics.is_file() and metrics.read_text():
            break
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in errors
    assert errors.rstrip().endswith("to continue, type again:\n  make train EPOCHS=400")
    state = torch.load(place / "stopped" / "last.pt", weights_only=True)
    assert state["progress"]["epoch"] >= 1


def train_main() -> None:
    exit_on_user_error(lambda: train(parse(sys.argv[1:])))


def main_of(function: Callable[..., Any]) -> Callable[[], Any]:
    return partial(run_command, function, prog="command")


@pytest.fixture
def refusal(workplace, monkeypatch, capsys):
    """The one line with which a command, called within this process, refuses its words."""
    monkeypatch.chdir(workplace[0])

    def refusal(function: Callable[[], Any], *words: object) -> str:
        arguments = [str(word) for word in words]
        monkeypatch.setattr(sys, "argv", ["command", *arguments])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            function()
        assert ended.value.code == 2
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1, lines
        assert lines[0].startswith("error: ")
        return lines[0]

    return refusal


def test_bad_inputs_end_in_one_line_before_anything_slow(workplace, refusal, tmp_path, image_folder):
    place, _ = workplace
    other = write_class_folders(tmp_path / "other", 5, 3)
    student = run_folder(place, "mobilenet0.25")
    torch.save(models.build("resnet18", 7).state_dict(), tmp_path / "seven.pt")
    torch.save(models.build("alexnet", 3).state_dict(), tmp_path / "three.pt")
    (tmp_path / "cut.beton").write_bytes(b"\x02\x00")
    for words, says in [
        (["--data", "no/such/folder"], "no/such/folder: no such folder"),
        (["--model", "resnet19"], "resnet18"),
        (["--refinery", "resnet19"], "resnet19: no such run folder or file, nor the name of a network"),
        (["--decoder", "opencv"], "decoder=opencv"),
        (["--recipe", "slow"], "recipe=slow"),
        (["--model", "alexnet", "--resolution", "32"], "alexnet: resolution=32 is too small"),
        (["--refinery", student, "--data", other], "labels 3 classes, and DATA="),
        (["--refinery", f"resnet18:{tmp_path / 'seven.pt'}"], "7 classes"),
        (["--refinery", f"resnet34:{tmp_path / 'seven.pt'}"], "does not fit resnet34"),
        (["--refinery", f"resnet18:{student / 'last.pt'}"], "holds weights of mobilenet0.25, not of resnet18"),
        (["--pretrained", "absent.pt"], "absent.pt"),
        (["--device", "tpu"], "device=tpu"),
        (["--batch", "64"], "no batch of 64"),
    ]:
        assert says in refusal(train_main, *TINY, "--data", image_folder, *words), words
    for words, says in [
        (["--checkpoint", "absent.pt"], "absent.pt: no such run folder or file"),
        (["--checkpoint", tmp_path / "cut.beton"], "cut.beton"),
        (["--checkpoint", student, "--data", other], "it lacks class3, class4"),
        (["--checkpoint", student, "--resolution", "-1"], "cannot take crops of -1 px"),
        (
            ["--checkpoint", f"alexnet:{tmp_path / 'three.pt'}", "--resolution", "32"],
            "alexnet cannot take crops of 32 px",
        ),
    ]:
        assert says in refusal(main_of(evaluate), "--data", image_folder, *words), words
    for words, says in [
        (["--checkpoint", student, "--images", "absent.jpg"], "IMAGES=absent.jpg: no such file"),
        (["--checkpoint", f"resnet18:{tmp_path / 'seven.pt'}", "--images", image_folder], "names of classes"),
        (["--checkpoint", student, "--images", image_folder, "--resolution", "0"], "cannot take crops of 0 px"),
    ]:
        assert says in refusal(main_of(predict), *words), words
    assert "no such folder" in refusal(main_of(table), "--folder", "absent")
    assert len(list(place.glob("runs/*/*/result.json"))) == 2


def test_help_reads_well(tmp_path):
    for module in ("train", "data.convert"):
        done = command(module, "--help", cwd=tmp_path)
        assert done.returncode == 0
        assert done.stdout.startswith(f"usage: python -m {module}")
        assert "default" in done.stdout
