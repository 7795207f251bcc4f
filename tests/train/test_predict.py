"""Predictions of many files: their formats, and that they agree with an evaluation."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import models
from models.weights import CHECKPOINT_FORMAT
from tests.paths import python_path
from tests.pictures import photograph, write_class_folders
from train import TrainError
from train.evaluate import evaluate
from train.predict import predict, words_of
from train.score.predictions import Rows

ROOT = Path(__file__).parents[2]
NAME, SIDE = "mobilenet0.25", 32
IDS = ("n01440764", "n02012849", "n03126707")
WORDS = {"n01440764": "tench", "n02012849": "crane (n02012849)", "n03126707": "crane (n03126707)"}


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    """Holds images/ with three classes of ImageNet, last.pt and best.pt in run/, of other weights."""
    monkeypatch.chdir(tmp_path)
    write_class_folders(tmp_path / "images", 3, 5)
    for label, name in enumerate(IDS):
        (tmp_path / "images" / f"class{label}").rename(tmp_path / "images" / name)
    (tmp_path / "run").mkdir()
    mean, std = models.normalisation(NAME)
    for seed, file in enumerate(("last", "best")):
        torch.manual_seed(seed)
        network = models.build(NAME, len(IDS))
        # Makes its output differ from image to image.
        network(torch.randn(16, 3, SIDE, SIDE))
        *_, head = (module for module in network.modules() if isinstance(module, nn.Linear))
        with torch.no_grad():
            head.weight *= 30
        described = {"name": NAME, "class_names": list(IDS), "resolution": SIDE, "center_ratio": 0.9}
        state = {"format": CHECKPOINT_FORMAT, "model": network.state_dict(), "progress": {"epoch": 4 - seed, "step": 0}}
        torch.save(state | {"network": described | {"mean": mean, "std": std}}, tmp_path / "run" / f"{file}.pt")
    return tmp_path


def csv_rows(path: str) -> list[dict[str, str]]:
    with open(path, newline="", errors="surrogateescape") as file:
        return list(csv.DictReader(file))


def test_the_three_formats_have_the_same_contents(place):
    for ending in ("csv", "json", "jsonl"):
        predict("run", "images", out=f"out.{ending}", device="cpu")
    objects = json.loads(Path("out.json").read_text())
    assert [json.loads(line) for line in Path("out.jsonl").read_text().splitlines()] == objects
    rows = csv_rows("out.csv")
    assert [row["file"] for row in rows] == sorted(map(str, Path("images").rglob("*.jpg")))
    for row, each in zip(rows, objects, strict=True):
        assert row["file"] == each["file"]
        assert {prediction["class"] for prediction in each["predictions"]} == set(IDS)
        for number, prediction in zip(("", "2", "3"), each["predictions"], strict=True):
            assert row[f"class{number}"] == prediction["class"]
            assert row[f"name{number}"] == prediction["name"] == WORDS[prediction["class"]]
            assert float(row[f"probability{number}"]) == prediction["probability"]
        chances = [prediction["probability"] for prediction in each["predictions"]]
        assert chances == sorted(chances, reverse=True)
        assert sum(chances) == pytest.approx(1, abs=1e-5)
    assert len({row["probability"] for row in rows}) == 15


def test_on_the_terminal_ids_and_words(place, capsys):
    predict("run", f"images/{IDS[0]}/000.jpg", device="cpu")
    predict("run", f"images/{IDS[0]}/000.jpg", out="out.json", device="cpu")
    (expected,) = json.loads(Path("out.json").read_text())
    name, *lines = capsys.readouterr().out.splitlines()
    assert name == expected["file"]
    for line, prediction in zip(lines, expected["predictions"], strict=False):
        assert line == f"  {100 * prediction['probability']:5.1f} %  {prediction['class']} {prediction['name']}"


def test_rows_are_those_of_an_evaluation(place, bf16_units):
    """Exactly equal in the same batches; in others, sums have another order."""
    write = {"device": "cpu", "batch": 4}
    evaluate("run", "images", out="scores.json", predictions="evaluated.csv", **write)
    predict("run", "images", out="predicted.csv", **write)
    predict("run", " ".join(map(str, sorted(Path("images").rglob("*.jpg"))[::-1])), out="others.csv", device="cpu")
    evaluated, predicted, others = map(csv_rows, ("evaluated.csv", "predicted.csv", "others.csv"))
    of_label = {"label", "correct", "label_probability"}
    assert [{name: cell for name, cell in row.items() if name not in of_label} for row in evaluated] == predicted
    tolerance = 0.03 if bf16_units else 1e-5
    for row, other in zip(predicted, others[::-1], strict=True):
        chances, theirs = (
            {each[f"class{number}"]: float(each[f"probability{number}"]) for number in ("", "2", "3")}
            for each in (row, other)
        )
        assert chances == pytest.approx(theirs, abs=tolerance)
    scores = json.loads(Path("scores.json").read_text())
    assert 100 * sum(row["correct"] == "1" for row in evaluated) / 15 == pytest.approx(scores["top1"])
    for row in evaluated:
        assert row["label"] == Path(row["file"]).parent.name
        assert (row["correct"] == "1") == (row["class"] == row["label"])
        (number,) = (number for number in ("", "2", "3") if row[f"class{number}"] == row["label"])
        assert row["label_probability"] == row[f"probability{number}"]


def test_best_or_last(place, capsys):
    photo = f"images/{IDS[0]}/000.jpg"
    for which in (None, "last", "best"):
        predict("run", photo, out=f"{which}.csv", which=which, device="cpu")
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("checkpoint")]
    assert said[0] == "checkpoint run/last.pt, after epoch 4 (--which best takes best.pt)"
    assert said[2] == "checkpoint run/best.pt, after epoch 3 (--which last takes last.pt)"
    predict("run/best.pt", photo, out="file.csv", device="cpu")
    none, last, best, file = (Path(f"{name}.csv").read_text() for name in ("None", "last", "best", "file"))
    assert none == last != best == file


def test_unreadable_images_are_skipped_and_listed(place, capsys):
    (place / "images" / IDS[1] / "001.jpg").write_bytes(b"no image")
    (place / "images" / "caf\u00e9,\n\udcff.jpg").write_bytes((place / "images" / IDS[0] / "000.jpg").read_bytes())
    os.mkfifo(place / "pipe.jpg")
    Path("list.txt").write_text(
        f"{place}/gone.jpg\nimages/{IDS[1]}/001.jpg\nimages\npipe.jpg\nimages/{IDS[1]}/002.jpg\n"
    )
    predict("run", "images @list.txt", out="out.csv", batch=2, device="cpu")
    said = capsys.readouterr()
    rows = csv_rows("out.csv")
    assert [rows[place]["file"] for place in (0, -1)] == ["images/caf\u00e9,\n\udcff.jpg", f"images/{IDS[1]}/002.jpg"]
    assert len(rows) == 14 + 1 + 1
    left_out = [line.split(": left out, cannot be read (")[0] for line in said.err.splitlines() if "left out," in line]
    unreadable = f"images/{IDS[1]}/001.jpg"
    assert left_out == [unreadable, f"{place}/gone.jpg", unreadable, "images", "pipe.jpg"]
    assert "5 of 21 files could not be read and are left out" in said.err
    assert "written to out.csv" in said.out
    with pytest.raises(TrainError, match=r"^IMAGES=pipe.jpg: none of the 1 files could be read"):
        predict("run", "pipe.jpg", out="nothing.csv", device="cpu")
    assert not Path("nothing.csv").exists()


def test_bad_options_are_refused_before_the_network_is_loaded(place):
    Path("own.csv").write_text("name,price\n")
    for options, says in [
        ({"out": "out.txt"}, "OUT=out.txt: give a name that ends in .csv, .json or .jsonl"),
        ({"out": "own.csv"}, "OUT=own.csv: is not an earlier result"),
        ({"out": "images"}, "OUT=images: give a name that ends"),
        ({"format": "xml"}, "FORMAT=xml: unknown; use text or csv or json or jsonl"),
        ({"which": "worst"}, "WHICH=worst: unknown; use last or best"),
        ({"batch": 0}, "BATCH=0: must be at least 1"),
        ({"threads": 0}, "threads=0: must be at least 1"),
        ({"device": "tpu"}, "device=tpu"),
    ]:
        with pytest.raises(TrainError, match=f"^{says}"):
            predict("absent.pt", "images", **options)
    assert Path("own.csv").read_text() == "name,price\n"


def test_several_words_are_one_value():
    """As a shell expands a pattern without quotes."""
    words = ["--checkpoint", "c", "--images", "a b.jpg", "c.jpg", "--out", "o.csv"]
    assert words_of(words) == ["--checkpoint", "c", "--images", "'a b.jpg' c.jpg", "--out", "o.csv"]
    for alone in (["--images", "a b.jpg"], ["--images"], ["--images", "--out", "o.csv"], ["--checkpoint", "c"]):
        assert words_of(alone) == alone


def test_an_empty_list_of_rows_is_json():
    written: list[str] = []
    Rows(written.append, "json", IDS, most=3, labelled=False).close()
    assert json.loads("".join(written)) == []


def test_output_is_immediate_and_a_closed_reader_is_no_error(place):
    """Standard output contains only rows; if it is on a full disk, the command ends with one line."""
    environment = os.environ | {"PYTHONPATH": python_path(), "OMP_NUM_THREADS": "1"}
    words = "--checkpoint run --images images/*/*.jpg --format jsonl --batch 1 --device cpu"
    typed = f"{sys.executable} -m train.predict {words}"

    def done(shell: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            ["bash", "-c", shell], env=environment, capture_output=True, text=True, timeout=240, check=False
        )

    read = done(f"{typed} | head -n 1; echo ${{PIPESTATUS[0]}}; {typed} > /dev/full; echo $?")
    line, left, full = read.stdout.splitlines()
    assert json.loads(line)["file"] == f"images/{IDS[0]}/000.jpg"
    assert (left, full) == ("1", "2")
    assert "Traceback" not in read.stderr
    assert read.stderr.splitlines()[-1] == "error: standard output: cannot be written (the disk is full)"


def test_images_of_other_sizes_and_kinds(place):
    photograph(1, 300, 90).convert("L").save("tall.png")
    photograph(2, 40, 200).save("wide.webp")
    predict("run", "tall.png wide.webp", out="out.jsonl", batch=1, device="cpu")
    assert [json.loads(line)["file"] for line in Path("out.jsonl").read_text().splitlines()] == [
        "tall.png",
        "wide.webp",
    ]
