"""The table of `make runs`, and the folders that `make clean-runs` finds and removes."""

import json
import os
import re
import shutil
from pathlib import Path

import pytest

from tests.stopping import stop_at
from tests.train.conftest import TINY
from train import TrainError
from train.config import parse
from train.interrupt import Interrupted
from train.runs import read_run
from train.runs.__main__ import table
from train.runs.clean import clean
from train.runs.record import locked
from train.runs.state import differences, in_use, state_of
from train.train import train


@pytest.fixture(scope="module")
def made(converted, tmp_path_factory):
    """Three runs of one epoch: one, one with another rate and seed, and one whose refinery is named by its folder."""
    root = tmp_path_factory.mktemp("runs")
    words = [*TINY, "--data", str(converted.folder), "--epochs", "1", "--runs", str(root)]
    (first,) = train(parse([*words, "--out", str(root / "first")]))
    (second,) = train(parse([*words, "--out", str(root / "second"), "--optimizer.lr", "0.02", "--seed", "7"]))
    (student,) = train(parse([*words, "--out", str(root / "student"), "--refinery", str(first.folder)]))
    return [first, second, student]


@pytest.fixture
def runs(made, tmp_path, monkeypatch) -> Path:
    """A copy of them below the working folder, where the student names its refinery."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(made[0].folder.parent, "runs")
    config = Path("runs/student/config.yaml")
    config.write_text(config.read_text().replace(str(made[0].folder), "runs/first"))
    return Path("runs")


def failed_start(folder: Path, like: Path) -> Path:
    """As a command leaves it that ended in its first steps."""
    folder.mkdir()
    for name in ("identity.json", "config.yaml", "starts.jsonl"):
        shutil.copy(like / name, folder)
    (folder / "metrics.jsonl").touch()
    (folder / ".lock").touch()
    return folder


def stopped(folder: Path, like: Path) -> Path:
    shutil.copytree(like, folder)
    (folder / "result.json").unlink()
    return folder


def rows_of(out: str) -> dict[str, str]:
    """The lines of a table by the names of the runs' folders."""
    return {line.rpartition("/")[2]: line for line in out.splitlines() if " runs/" in line}


def test_differing_options_are_named(runs, capsys):
    table("runs")
    rows = rows_of(capsys.readouterr().out)
    assert list(rows) == ["first", "second", "student"]
    assert "  optimizer.lr=0.02  finished  " in rows["second"]
    assert re.search(r"  optimizer\.lr=0\.[0-9]+ +finished  ", rows["first"])
    # The seed has its own column; the student has no other run to be compared with.
    assert "seed" not in rows["second"] + rows["first"]
    assert "=" not in rows["student"]
    assert all(" label-refinery " in row for row in rows.values())
    assert re.search(r" 20\d\d-\d\d-\d\d \d\d:\d\d ", rows["first"])


def test_without_differences_there_is_no_column(runs, capsys):
    shutil.rmtree("runs/second")
    table("runs")
    assert "differs in" not in capsys.readouterr().out


def test_differences_of_options_that_only_some_have(made):
    one, two = made[0], read_run(made[0].folder)
    two.identity["loss"] = {**two.identity["loss"], "truth": 0.1}
    two.identity["data"] = two.identity["data"] | {"fingerprint": "0123456789abcdef"}
    here = one.identity["data"]["fingerprint"][:8]
    assert differences([one, two], ["a", "a"]) == [
        f"data.fingerprint={here}",
        "data.fingerprint=01234567, loss.truth=0.1",
    ]
    assert differences([one, two], ["a", "b"]) == ["", ""]


def test_failed_starts_are_omitted_and_counted(runs, capsys):
    failed_start(runs / "failed", runs / "first")
    stopped(runs / "stopped", runs / "first")
    table("runs")
    out = capsys.readouterr().out
    rows = rows_of(out)
    assert list(rows) == ["first", "second", "stopped", "student"]
    assert "stopped, epoch 1 of 1" in rows["stopped"]
    assert out.endswith("1 failed start left out (make clean-runs lists them)\n")
    with locked(runs / "failed"):
        table("runs")
    assert "training, epoch 0 of 1" in rows_of(capsys.readouterr().out)["failed"]
    for name in ("first", "second", "student", "stopped"):
        shutil.rmtree(runs / name)
    with pytest.raises(TrainError, match="no runs in it yet; 1 failed start left out"):
        table("runs")


def test_a_run_that_was_stopped_in_its_first_epoch_has_begun(run, monkeypatch):
    with monkeypatch.context() as patch:
        stop_at(2, patch)
        with pytest.raises(Interrupted):
            run("--out", "run")
    assert state_of(read_run(Path("run"))) == "stopped, epoch 0 of 2"


def test_checking_a_lock_does_not_take_it(runs):
    assert not in_use(runs / "first")
    with locked(runs / "first"):
        assert in_use(runs / "first")
    assert not in_use(runs / "nowhere")


def test_nothing_to_clean(runs, capsys):
    clean("runs")
    assert capsys.readouterr().out == "runs: no failed, damaged or stopped runs; nothing to remove\n"
    with pytest.raises(TrainError, match="absent: no such folder"):
        clean("absent")


def test_cleaning_lists_what_it_would_free_and_removes_nothing(runs, capsys):
    failed = failed_start(runs / "failed", runs / "first")
    (runs / "lock-only").mkdir()
    (runs / "lock-only" / ".lock").touch()
    stopped(runs / "stopped", runs / "second")
    before = sorted(runs.rglob("*"))
    clean("runs")
    out = capsys.readouterr().out
    assert sorted(runs.rglob("*")) == before
    rows = rows_of(out)
    assert re.match(r"failed start +.* can be removed +runs/failed$", rows["failed"])
    assert re.match(r"failed start +0 bytes +can be removed +runs/lock-only$", rows["lock-only"])
    assert re.match(r"stopped, epoch 1 of 1 +\S+ MB +kept: --stopped removes it too +runs/stopped$", rows["stopped"])
    assert not {"first", "second", "student"} & set(rows)
    size = sum(file.stat().st_size for file in failed.iterdir())
    assert out.endswith(f"2 runs, {size / 1000:.3g} kB, can be removed: type the same with ARGS=--yes\n")


def test_cleaning_removes_what_it_listed_and_nothing_else(runs, capsys):
    failed_start(runs / "failed", runs / "first")
    stopped(runs / "stopped", runs / "first")
    kept = {path for path in runs.rglob("*") if "failed" not in path.parts}
    clean("runs", yes=True)
    assert "removed 1 run, " in capsys.readouterr().out
    assert set(runs.rglob("*")) == kept
    shutil.rmtree(runs / "first")
    clean("runs", stopped=True, yes=True)
    # The student's refinery had exactly these weights, wherever their file is.
    assert "kept: runs/student learned from it" in capsys.readouterr().out
    assert (runs / "stopped").is_dir()
    shutil.rmtree(runs / "student")
    clean("runs", stopped=True, yes=True)
    assert {path.name for path in runs.iterdir()} == {"second"}


def test_a_run_that_is_named_as_a_refinery_is_kept(runs, capsys):
    """Also if its checkpoints have changed since, as those of a continued run."""
    (runs / "first" / "result.json").unlink()
    for file in (runs / "first").glob("*.pt"):
        file.write_bytes(b"")
    clean("runs", stopped=True, yes=True)
    assert re.search(r"kept: runs/student learned from it +runs/first$", capsys.readouterr().out, re.MULTILINE)
    config = runs / "student" / "config.yaml"
    config.write_text(config.read_text().replace("refinery: runs/first", "refinery: mobilenet0.25:runs/first/best.pt"))
    clean("runs", stopped=True, yes=True)
    assert "kept: runs/student learned from it" in capsys.readouterr().out


def test_a_run_in_progress_is_kept(runs, capsys):
    failed = failed_start(runs / "failed", runs / "first")
    with locked(failed):
        clean("runs", yes=True)
    assert "kept: a process trains in it" in capsys.readouterr().out
    assert failed.is_dir()


@pytest.mark.parametrize("name", ["notes.txt", "export"])
def test_a_folder_with_files_of_others_is_kept(runs, capsys, name):
    failed = failed_start(runs / "failed", runs / "first")
    (failed / name).mkdir()
    (failed / ".last.pt.partial").write_text("left by a kill")
    clean("runs", stopped=True, yes=True)
    assert f"kept: holds {name}" in capsys.readouterr().out
    assert failed.is_dir()


def test_damaged_runs_are_found(runs, capsys):
    """One whose identity is lost holds nothing of use, unless there is a checkpoint."""
    damaged = failed_start(runs / "damaged", runs / "first")
    (damaged / "identity.json").write_text("{")
    other = stopped(runs / "other", runs / "second")
    (other / "identity.json").write_text("{}")
    for file in other.glob("*.pt"):
        file.write_bytes(b"broken")
    clean("runs")
    rows = rows_of(capsys.readouterr().out)
    assert "failed start" in rows["damaged"]
    assert rows["other"].startswith("damaged ")
    assert "kept: --stopped removes it too" in rows["other"]
    clean("runs", stopped=True, yes=True)
    assert not damaged.exists()
    assert not other.exists()


def test_stored_labels_are_not_taken_for_a_run(runs):
    """They have locks too."""
    labels = runs / "labels"
    labels.mkdir()
    (labels / ".lock").touch()
    (labels / "labels.json").write_text(json.dumps({}))
    clean("runs", stopped=True, yes=True)
    assert labels.is_dir()


def test_links_are_not_followed(runs, tmp_path):
    """What it points to is not a run's to remove."""
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "kept").touch()
    failed = failed_start(runs / "failed", runs / "first")
    os.symlink(elsewhere, failed / "tensorboard")
    clean("runs", yes=True)
    assert not failed.exists()
    assert (elsewhere / "kept").is_file()
