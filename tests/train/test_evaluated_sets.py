"""The images that a run is scored on: its own data, or plain folders as a whole; and the files of results."""

import csv
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import models
from data.sources import open_source
from models import ModelError
from tests.pictures import write_class_folders
from train import TrainError
from train.config import parse
from train.evaluate import evaluate
from train.score.images import _are_of
from train.train import train

NAME = "mobilenet0.25"
IDS = ("n01491361", "n02104029", "n15075141")


@pytest.fixture(scope="module")
def workplace(tmp_path_factory) -> tuple[Path, Path]:
    """A folder with `plain`, class folders of 20 images each, and the folder of a run on it; and one with the set."""
    root = tmp_path_factory.mktemp("workplace")
    write_class_folders(root / "plain", 2, 20)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        words = ["--model", NAME, "--resolution", "32", "--batch", "16", "--epochs", "2", "--device", "cpu"]
        (run,) = train(parse([*words, "--data", "plain", "--precision", "fp32", "--decoder", "torchvision"]))
    return root, root / run.folder


@pytest.fixture
def place(workplace, monkeypatch) -> Path:
    """Changes to the folder and removes earlier results beside the checkpoint. Returns the run's folder."""
    root, folder = workplace
    monkeypatch.chdir(root)
    for file in folder.glob("evaluation-*"):
        file.unlink()
    return folder


def scored(folder: Path, data: str | None = None, **options: Any) -> dict[str, Any]:
    evaluate(str(folder), data, out="scores.json", device="cpu", decoder="torchvision", **options)
    return json.loads(Path("scores.json").read_text())


def test_without_data_the_runs_own_is_scored(place, capsys):
    scores = scored(place)
    assert (scores["data"], scores["split"], scores["images"]) == ("plain", "val", 4)
    assert scores["top1"] == json.loads((place / "result.json").read_text())["top1"]
    out = capsys.readouterr().out
    assert "data plain, the run's own\n" in out
    assert f"checkpoint {place}/last.pt, after epoch 2 (--which best takes best.pt)\n" in out
    assert "other images" not in out  # than when it was trained


def test_training_images_of_a_set_without_splits_are_not_scored(place, tmp_path, capsys):
    """Under any path, unless all are requested."""
    own = scored(place)
    (tmp_path / "link").symlink_to(Path("plain").resolve())
    shutil.copytree("plain", tmp_path / "copy")
    for data in ("plain", "./plain", str(Path("plain").resolve()), str(tmp_path / "link"), str(tmp_path / "copy")):
        scores = scored(place, data)
        assert {**scores, "data": "plain"} == own, data
    assert scored(place, split="all")["images"] == 40
    assert "plain has no split for validation: all of its 40 images are scored\n" in capsys.readouterr().out


def test_a_copy_of_the_runs_archive_is_recognised(tmp_path):
    write_class_folders(tmp_path / "a", 2, 3)
    write_class_folders(tmp_path / "b", 2, 3, seed=50)
    own, other = (shutil.make_archive(str(tmp_path / name), "zip", tmp_path / name) for name in ("a", "b"))
    (tmp_path / "copies").mkdir()
    copy = shutil.copy2(own, tmp_path / "copies")
    run = SimpleNamespace(data=own)
    assert _are_of(str(copy), run)
    assert not _are_of(other, run)
    assert not _are_of(str(copy), None)
    assert not _are_of(str(tmp_path / "absent"), run)


def test_a_plain_test_folder_is_scored_whole(place, tmp_path, capsys):
    test = write_class_folders(tmp_path / "test", 2, 9, seed=500)
    # No image is held out of a class of one.
    shutil.rmtree(test / "class1")
    write_class_folders(tmp_path / "more", 2, 1, seed=900)
    shutil.move(tmp_path / "more" / "class1", test / "class1")
    scores = scored(place, str(test), predictions="images.csv")
    assert (scores["split"], scores["images"]) == ("all", 10)
    assert [entry["images"] for entry in scores["per_class"].values()] == [9, 1]
    assert f"{test} has no split for validation: all of its 10 images are scored\n" in capsys.readouterr().out
    with open("images.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["file"] for row in rows] == list(open_source(str(test), whole=True).val.items)
    archive = shutil.make_archive(str(tmp_path / "zipped"), "zip", test)
    zipped = scored(place, archive, predictions="zipped.csv")
    assert zipped["per_class"] == scores["per_class"]
    with open("zipped.csv", newline="") as file:
        assert [row | {"file": ""} for row in csv.DictReader(file)] == [row | {"file": ""} for row in rows]
    assert scored(place, str(test), split="val")["images"] == 1
    # With both parts, the images for validation.
    for part in ("train", "val"):
        shutil.copytree(test, tmp_path / "both" / part)
    (tmp_path / "both" / "val" / "class0" / "000.jpg").unlink()
    assert scored(place, str(tmp_path / "both"))["images"] == 9


def test_rows_of_stored_images_name_their_files(place):
    scores = scored(place, predictions="stored.jsonl")
    rows = [json.loads(line) for line in Path("stored.jsonl").read_text().splitlines()]
    names = {path.relative_to("plain").as_posix() for path in Path("plain").rglob("*.jpg")}
    assert {row["file"] for row in rows} < names
    assert len({row["file"] for row in rows}) == 4
    assert all(row["label"] == row["file"].split("/")[0] for row in rows)
    assert 25 * sum(row["correct"] for row in rows) == scores["top1"]


def test_results_of_different_sets_and_options_do_not_overwrite_each_other(place, tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    tests = [str(write_class_folders(tmp_path / name / "test", 2, 3, seed=seed)) for name, seed in (("a", 1), ("b", 2))]
    ways: list[dict[str, Any]] = [
        {},
        {"data": tests[0]},
        {"data": tests[1]},
        {"data": tests[1], "split": "val"},
        {"data": tests[1], "resolution": 64},
        {"split": "all"},
        {"which": "best"},
        {"which": "best", "data": tests[0]},
    ]
    for number, way in enumerate(ways, 1):
        for _ in range(2):  # the same is replaced
            evaluate(str(place), device="cpu", decoder="torchvision", **way)
        assert len(list(place.glob("evaluation-*.json"))) == number, way
    (tmp_path / "b" / "test" / "class0" / "000.jpg").unlink()
    evaluate(str(place), tests[1], device="cpu")
    assert len(list(place.glob("evaluation-*.json"))) == len(ways) + 1
    assert len(list(place.glob("evaluation-best-*"))) == 2


def test_results_of_weights_with_the_same_stem_do_not_overwrite_each_other(place, tmp_path, monkeypatch):
    test = str(write_class_folders(tmp_path / "test", 2, 3))
    monkeypatch.chdir(tmp_path)
    state = models.build(NAME, 2).state_dict()
    torch.save(state, "w.pytar")
    save_file(state, "w.safetensors")
    for file in ("w.pytar", "w.safetensors"):
        evaluate(f"{NAME}:{file}", test, device="cpu", resolution=32)
    assert len(list(Path().glob("evaluation-w*.json"))) == 2


def test_changed_images_are_reported(workplace, tmp_path, monkeypatch, capsys):
    root, folder = workplace
    for name in ("plain", "runs"):
        shutil.copytree(root / name, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    write_class_folders(tmp_path / "more", 2, 1, seed=77)
    (tmp_path / "more" / "class0" / "000.jpg").rename(tmp_path / "plain" / "class0" / "new.jpg")
    scored(tmp_path / folder.relative_to(root))
    assert (
        "plain: holds other images than when the run was trained, or stores them otherwise\n" in capsys.readouterr().out
    )


def test_a_network_of_more_classes_names_those_of_the_data(wordnet_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    torch.save(models.build(NAME, 1000).state_dict(), "w.pytar")
    options: dict[str, Any] = {"predictions": "p.csv", "resolution": 64, "device": "cpu"}
    evaluate(f"{NAME}:w.pytar", str(wordnet_folder / "val"), out="s.json", **options)
    with open("p.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 15
    for row in rows:
        assert {row["class"], row["class2"], row["class3"]} == set(IDS)
        assert "class4" not in row
        assert sum(float(row[f"probability{number}"]) for number in ("", "2", "3")) == pytest.approx(1, abs=1e-5)
    assert {row["name"] for row in rows} <= {"great white shark", "kuvasz", "toilet tissue"}


def test_images_of_classes_that_the_network_lacks_have_no_rows(wordnet_folder, tmp_path, monkeypatch):
    """The network knows two of ImageNet's classes that the data have, and one more."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    network = models.build(NAME, 3)
    names = [IDS[2], "n01440764", IDS[0]]
    mean, std = models.normalisation(NAME)
    described = {"name": NAME, "class_names": names, "resolution": 64, "center_ratio": 0.9, "mean": mean, "std": std}
    torch.save({"format": "label-refinery-checkpoint", "model": network.state_dict(), "network": described}, "w.pt")
    evaluate("w.pt", str(wordnet_folder / "val"), out="s.json", predictions="p.jsonl", device="cpu")
    rows = [json.loads(line) for line in Path("p.jsonl").read_text().splitlines()]
    assert [row["label"] for row in rows] == [IDS[0]] * 5 + [IDS[2]] * 5
    for row in rows:
        likelihoods = {each["class"]: each["probability"] for each in row["predictions"]}
        assert set(likelihoods) == {IDS[0], IDS[2]}
        assert row["label_probability"] == likelihoods[row["label"]]
    assert json.loads(Path("s.json").read_text())["images"] == 10


def test_bad_options_are_refused_before_anything_slow(place, tmp_path, monkeypatch):
    monkeypatch.setattr("train.evaluate.ensure_converted", lambda found: pytest.fail("the work has begun"))
    Path("own.csv").write_text("name,price\n")
    torch.save(models.build(NAME, 2).state_dict(), "w.pytar")
    run = str(place)
    for checkpoint, options, error, says in [
        (run, {"out": str(tmp_path)}, TrainError, f"OUT={tmp_path}: is a folder"),
        (run, {"out": f"{place}/last.pt"}, TrainError, "OUT=.*last.pt: is not an earlier result of this command"),
        (run, {"out": "/proc/scores.json"}, TrainError, "OUT=/proc/scores.json: cannot be written"),
        (run, {"predictions": "own.csv"}, TrainError, "PREDICTIONS=own.csv: is not an earlier result"),
        (run, {"predictions": "a.txt"}, TrainError, "PREDICTIONS=a.txt: give a name that ends in .csv, .json or"),
        (run, {"out": "same.csv", "predictions": "./same.csv"}, TrainError, "PREDICTIONS=./same.csv: is OUT too"),
        (run, {"which": "worst"}, TrainError, "WHICH=worst: unknown; use last or best"),
        (run, {"split": "test"}, TrainError, "split=test: unknown; use val or all"),
        (run, {"batch": 0}, TrainError, "BATCH=0: must be at least 1"),
        (
            f"{run}/last.pt",
            {"which": "best"},
            ModelError,
            ".*last.pt: is not the folder of a run, of which",
        ),
        ("absent.pt", {}, ModelError, "absent.pt: no such run folder or file"),
        (NAME, {}, ModelError, f"{NAME}: names a network without weights; give a run folder or a file"),
        (f"{NAME}:w.pytar", {}, ModelError, "w.pytar: holds bare weights without the names of classes"),
    ]:
        with pytest.raises(error, match=f"^{says}"):
            evaluate(checkpoint, device="cpu", **options)
    assert (place / "last.pt").stat().st_size > 100_000
    (place / "best.pt").rename(tmp_path / "best.pt")
    try:
        with pytest.raises(ModelError, match="no best.pt in it"):
            evaluate(run, which="best", device="cpu")
    finally:
        (tmp_path / "best.pt").rename(place / "best.pt")
    Path("plain").rename("elsewhere")
    try:
        with pytest.raises(TrainError, match="last.pt: was trained on plain; give it, or other images, as DATA"):
            evaluate(run, device="cpu")
    finally:
        Path("elsewhere").rename("plain")
    # A checkpoint that was copied out of its run's folder does not name its data.
    shutil.copy(place / "last.pt", tmp_path / "copied.pt")
    with pytest.raises(TrainError, match=r"copied.pt: does not say what it was trained on; name validation"):
        evaluate(str(tmp_path / "copied.pt"), device="cpu")
    assert not [path for path in Path().iterdir() if path.name.startswith(".")]


def test_a_result_that_cannot_be_written_beside_the_checkpoint(place, monkeypatch):
    def refuse(*where: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("train.score.result_file.locked", refuse)
    with pytest.raises(TrainError, match=r"evaluation-last-plain-\w{8}.json: cannot be written .*with OUT$"):
        evaluate(str(place), device="cpu")
