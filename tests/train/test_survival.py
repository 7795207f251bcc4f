"""Kills, full disks, damaged files and closed terminals lose at most the work since the last checkpoint."""

import errno
import fcntl
import io
import json
import os
import random
import re
import shutil
import signal
import stat
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from PIL import Image

from models import ModelError
from models.trained import load_trained
from tests.paths import python_path
from tests.stopping import stop_at
from tests.train.conftest import TINY
from train import TrainError, loop
from train.config import parse
from train.interrupt import Interrupted
from train.job import Job
from train.runs import all_runs, checkpoint, read_run
from train.runs.__main__ import table
from train.runs.record import Record, Silent, locked
from train.score import Scores

ROOT = Path(__file__).parents[2]
TIMES = ("images_per_second_per_device", "waiting", "seconds")


def content(folder: Path) -> tuple[dict[str, torch.Tensor], list[dict], dict]:
    """The results of a run without times: weights, metrics, result."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    result = json.loads((folder / "result.json").read_text())
    without = [{key: value for key, value in each.items() if key not in TIMES} for each in (*lines, result)]
    return torch.load(folder / "last.pt", weights_only=True)["model"], without[:-1], without[-1]


def assert_same(one: Path, other: Path) -> None:
    (weights, lines, result), (others, other_lines, other_result) = content(one), content(other)
    assert all(torch.equal(value, others[name]) for name, value in weights.items())
    assert lines == other_lines
    assert result == other_result
    assert [line["epoch"] for line in lines] == list(range(1, result["epochs"] + 1))
    bests = [torch.load(folder / "best.pt", weights_only=True) for folder in (one, other)]
    assert bests[0]["progress"]["epoch"] == bests[1]["progress"]["epoch"]
    assert all(torch.equal(value, bests[1]["model"][name]) for name, value in bests[0]["model"].items())


@pytest.fixture
def stopped(run, monkeypatch):
    """A run of two epochs that was stopped after step 1 of 3 of the second, in the folder `run`."""
    with monkeypatch.context() as patch:
        stop_at(4, patch)
        with pytest.raises(Interrupted):
            run("--out", "run")
    return Path("run")


def of_earlier_version(folder: Path) -> None:
    """Changes checkpoints to those of earlier versions: no identity, no metrics, no previous checkpoint."""
    (folder / "last.before.pt").unlink(missing_ok=True)
    for file in folder.glob("*.pt"):
        state = torch.load(file, weights_only=True)
        del state["identity"], state["metrics"]
        torch.save(state, file)


# Each file is written under a temporary name, synced and renamed, and its folder is synced.


def test_each_file_is_renamed_only_after_it_is_synced(run, monkeypatch):
    """The order matters only for power failures: after a kill, the system's cache is still written."""
    calls = []
    real_fsync, real_replace = os.fsync, os.replace

    def fsync(number):
        calls.append(("sync", Path(os.readlink(f"/proc/self/fd/{number}")).name))
        real_fsync(number)

    def replace(source, target):
        calls.append(("rename", Path(target).name))
        real_replace(source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    run("--out", "run", "--epochs", "1")
    names = ("identity.json", "config.yaml", "starts.jsonl", "metrics.jsonl", "best.pt", "last.pt", "result.json")
    for name in names:
        at = [place for place, call in enumerate(calls) if call == ("rename", name)]
        assert at, name
        for place in at:
            (before, written), (after, folder) = calls[place - 1], calls[place + 1]
            assert before == "sync"
            assert name in written
            assert (after, folder) == ("sync", "run")


def test_an_equal_identity_is_not_written_again(run, stopped):
    before = (stopped / "identity.json").stat()
    run("--out", "run")
    after = (stopped / "identity.json").stat()
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)


@pytest.mark.parametrize("name", ["identity.json", "metrics.jsonl", "last.pt", "result.json"])
def test_a_full_disk_ends_in_one_line_and_the_run_can_be_continued(run, name, capsys):
    """/dev/full refuses what is written to it, as a full disk does."""
    run("--out", "whole")
    full = Path("run") / f".{name}.partial"
    full.parent.mkdir()
    full.symlink_to("/dev/full")
    if name == "metrics.jsonl":
        # It exists and is empty.
        Path("run", name).touch()
    with pytest.raises(TrainError) as ended:
        run("--out", "run")
    says = str(ended.value)
    assert "\n" not in says
    assert "the disk of run is full" in says
    assert f"run/{name}" in says
    assert "kept" not in says or Path("run/last.pt").is_file()
    assert not full.is_symlink()
    run("--out", "run")
    assert_same(Path("whole"), Path("run"))


def test_a_checkpoint_that_does_not_fit_leaves_the_previous_one(run, stopped):
    run("--out", "whole")
    (stopped / ".last.pt.partial").symlink_to("/dev/full")
    before = (stopped / "last.pt").read_bytes()
    with pytest.raises(TrainError, match=r"\(the disk of run is full\).*; the previous checkpoint is kept"):
        run("--out", "run")
    assert (stopped / "last.pt").read_bytes() == before
    run("--out", "run")
    assert_same(Path("whole"), stopped)


class Killed(BaseException):
    pass


@pytest.mark.slow
def test_a_kill_at_any_change_of_a_file_costs_nothing_that_was_saved(run, monkeypatch):
    """A kill before each sync and each renaming of a run in turn, with the temporary files that it leaves."""
    words = ("--epochs", "2", "--save_minutes", "1e-9")
    run(*words, "--out", "whole")
    real = {name: getattr(os, name) for name in ("fsync", "replace", "link")}
    changes = 0

    def counting(name):
        def call(*args, **options):
            nonlocal changes
            changes += 1
            if changes >= limit:
                raise Killed
            return real[name](*args, **options)

        return call

    limit, ended = 0, False
    while not ended:
        limit, changes = limit + 1, 0
        shutil.rmtree("run", ignore_errors=True)
        with monkeypatch.context() as patch:
            for name in real:
                patch.setattr(os, name, counting(name))
            patch.setattr(Path, "unlink", lambda path, missing_ok=False: None)
            try:
                run(*words, "--out", "run")
                ended = True
            except Killed:
                pass
        run(*words, "--out", "run")
        assert_same(Path("whole"), Path("run"))
    assert limit > 30


def alike(one: Path, other: Path) -> None:
    assert_same(one, other)
    generators = [torch.load(folder / "last.pt", weights_only=True)["generators"]["cpu"] for folder in (one, other)]
    assert torch.equal(*generators)


@pytest.mark.parametrize("saves", [2, *(pytest.param(saves, marks=pytest.mark.slow) for saves in (1, 3, 5))])
def test_a_kill_between_the_checkpoints_of_two_networks_keeps_them_together(run, monkeypatch, capsys, saves):
    """They share the random numbers of dropout, which would differ if they continued separately."""
    names = "torchvision:squeezenet1_1 torchvision:mobilenet_v3_small"
    words = ("--model", names, "--save_minutes", "1e-9", "--optimizer.lr", "0.01")
    whole = run(*words, "--runs", "whole")
    left, save = saves, Record.save

    def killed(self, state, *, best=False):
        nonlocal left
        save(self, state, best=best)
        if self._folder.name.startswith("torchvision-squeezenet"):
            left -= 1
            if not left:
                raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(Record, "save", killed)
        with pytest.raises(Killed):
            run(*words, "--runs", "killed")
    capsys.readouterr()
    for one, other in zip(whole, run(*words, "--runs", "killed"), strict=True):
        alike(one.folder, other.folder)
    assert "goes back to the previous checkpoint" in capsys.readouterr().out


@pytest.mark.slow
def test_networks_that_did_not_train_together_lose_nothing(run, monkeypatch, capsys):
    """Even if one is at the position of the other's previous checkpoint, it continues by itself."""
    words = ("--save_minutes", "1e-9", "--optimizer.lr", "0.01")
    for model, step in (("mobilenet0.25", 3), ("resnet18", 2)):
        with monkeypatch.context() as patch:
            stop_at(step, patch)
            with pytest.raises(Interrupted):
                run(*words, "--model", model)
    capsys.readouterr()
    run(*words, "--model", "mobilenet0.25 resnet18")
    out = capsys.readouterr().out
    assert "after step 3 of 3" in out
    assert "after step 2 of 3" in out


# Damaged descriptions.


DAMAGED = {
    "empty": "",
    "cut short": '{"top1": 50.0, "to',
    "no text": b"\xff\xfe\x00",
    "a list": "[]",
    "nothing": "null",
    "keys missing": "{}",
    "wrong types": None,
}


def damage(path: Path, kind: str) -> None:
    damaged = DAMAGED[kind]
    if damaged is None:
        damaged = json.dumps({key: [1] for key in json.loads(path.read_text())})
    path.write_bytes(damaged.encode() if isinstance(damaged, str) else damaged)


def test_a_damaged_result_is_made_again(run, capsys):
    finished = run("--out", "whole")
    for kind in DAMAGED:
        folder = Path(shutil.copytree("whole", f"run {kind}"))
        damage(folder / "result.json", kind)
        assert read_run(folder).result is None
        weights = (folder / "last.pt").read_bytes()
        capsys.readouterr()
        assert run("--out", str(folder)).result == finished.result
        assert (folder / "last.pt").read_bytes() == weights
        out = capsys.readouterr().out
        assert f"warning: {folder}/result.json: is damaged" in out
        assert "epoch 1/" not in out


@pytest.mark.parametrize("kind", ["empty", "a list", "wrong types"])
def test_a_damaged_identity_is_restored_from_the_checkpoint(run, stopped, kind, capsys):
    run("--out", "whole")
    identity = (stopped / "identity.json").read_text()
    damage(stopped / "identity.json", kind)
    assert [each.folder for each in all_runs(stopped)] == [stopped]
    capsys.readouterr()
    run("--out", "run")
    assert "continuing in epoch 2 of 2, after step 1 of 3" in capsys.readouterr().out
    assert (stopped / "identity.json").read_text() == identity
    assert_same(Path("whole"), stopped)


def test_a_damaged_identity_never_asks_for_the_removal_of_a_run(run, stopped):
    """Nor is a run with another configuration taken for this one."""
    damage(stopped / "identity.json", "empty")
    with pytest.raises(TrainError, match="holds a run with another configuration"):
        run("--out", "run", "--seed", "3")
    of_earlier_version(stopped)
    before = (stopped / "last.pt").read_bytes()
    with pytest.raises(TrainError, match=r"run/identity.json: is damaged") as ended:
        run("--out", "run")
    assert "\n" not in str(ended.value)
    assert "remove" not in str(ended.value)
    assert (stopped / "last.pt").read_bytes() == before
    # Before the first checkpoint there is nothing to lose.
    for file in stopped.glob("*.pt"):
        file.unlink()
    assert run("--out", "run").result


def test_one_damaged_folder_does_not_hide_the_others(run, capsys):
    one = run("--model", "resnet18", "--epochs", "1")
    other = run("--epochs", "1")
    for file in other.folder.glob("*.pt"):
        file.unlink()
    damaged = []
    for name in ("identity.json", "result.json"):
        for kind in DAMAGED:
            damaged.append(Path(shutil.copytree(other.folder, other.folder.with_name(f"{name} {kind}"))))
            damage(damaged[-1] / name, kind)
    capsys.readouterr()
    table("runs")
    warnings, _, rows = capsys.readouterr().out.partition("\ndata ")
    assert len(warnings.splitlines()) == len(damaged)
    for folder in damaged:
        assert f"warning: {folder}/" in warnings
        assert (str(folder) in rows) == ("result.json" in folder.name)
    for run_ in (one, other):
        assert re.search(f"finished +{re.escape(str(run_.folder))}$", rows, re.MULTILINE)
    run("--refinery", "resnet18", "--epochs", "1", "--out", "student")
    assert f"refinery: {one.folder}, top-1" in capsys.readouterr().out


def test_each_type_of_an_identity_is_checked(run, stopped):
    of_earlier_version(stopped)
    whole = json.loads((stopped / "identity.json").read_text())
    for key in ("data", "model", "refinery", "labels", "crop", "resolution", "epochs", "seed"):
        for value in (None, True, 1.5, "text", ["list"], {"a": "mapping"}):
            if (key, value) in (("model", "text"), ("refinery", None), ("labels", {"a": "mapping"})):
                continue
            (stopped / "identity.json").write_text(json.dumps(whole | {key: value}))
            with pytest.raises(TrainError, match=rf"identity.json: is damaged \({key}"):
                read_run(stopped)
    (stopped / "identity.json").write_text(json.dumps(whole))
    assert read_run(stopped).identity == whole


# Metrics.


@pytest.mark.parametrize("finished", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_metrics_are_restored_from_the_checkpoint(run, monkeypatch, finished):
    words = ("--epochs", "3")
    run("--out", "whole", *words)
    if finished:
        run("--out", "run", *words)
        Path("run/result.json").unlink()
    else:
        with monkeypatch.context() as patch:
            stop_at(8, patch)
            with pytest.raises(Interrupted):
                run("--out", "run", *words)
    lines = Path("run/metrics.jsonl").read_text().splitlines(keepends=True)
    done = len(lines)
    assert done == (3 if finished else 2)
    damages = {
        "emptied": "",
        "gone": None,
        "doubled": "".join([*lines, *lines]),
        "without an epoch": "".join(lines[1:]),
        "not JSON": "{\n" + "".join(lines[1:]),
        "of wrong types": '{"epoch": "one"}\n' + "".join(lines[1:]),
    }
    for kind, text in damages.items():
        folder = Path(shutil.copytree("run", kind))
        path = folder / "metrics.jsonl"
        path.unlink()
        if text is not None:
            path.write_text(text)
        if text:
            assert [line["epoch"] for line in read_run(folder).metrics] == list(range(1, done + 1))
        run("--out", kind, *words)
        assert_same(Path("whole"), folder)
        # If a finished run's file is damaged, metrics are read from the checkpoint.
        path.write_text("")
        assert len(read_run(folder).metrics) == 3


def test_a_result_without_metrics_says_so_in_one_line(run):
    """Of an earlier version, whose checkpoint does not hold them."""
    run("--out", "run")
    of_earlier_version(Path("run"))
    Path("run/result.json").unlink()
    Path("run/metrics.jsonl").write_text("")
    with pytest.raises(TrainError, match=r"run/metrics.jsonl: has no line of epoch 2") as ended:
        run("--out", "run")
    assert "\n" not in str(ended.value)
    Path("run/metrics.jsonl").write_text("{\n{}\n")
    with pytest.raises(TrainError, match=r"run/metrics.jsonl:1: is damaged"):
        list(read_run(Path("run")).metrics)
    table("run")


# best.pt.


@pytest.mark.parametrize("name", ["best.pt", "last.pt"])
def test_the_best_is_not_stale_after_a_full_disk_between_the_two_checkpoints(run, name, stopped):
    run("--out", "whole")
    (stopped / f".{name}.partial").symlink_to("/dev/full")
    with pytest.raises(TrainError, match="the disk of run is full"):
        run("--out", "run")
    run("--out", "run")
    assert_same(Path("whole"), stopped)


# Damaged checkpoints.


def same(one, other) -> bool:
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and torch.equal(one, other)
    if isinstance(one, dict):
        return isinstance(other, dict) and one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list):
        return isinstance(other, list) and len(one) == len(other) and all(map(same, one, other))
    return type(one) is type(other) and one == other


@pytest.mark.parametrize("kind", ["bit", "zeros"])
def test_damage_to_a_checkpoint_does_not_pass_silently(run, tmp_path, kind):
    """Each damage is detected, by training and by loading the network, or is in unused bytes."""
    path = run("--epochs", "1", "--out", "run").folder / "last.pt"
    whole, state = path.read_bytes(), checkpoint.load(path)
    damaged = tmp_path / "damaged.pt"
    draw, noticed = random.Random(1), 0
    for _ in range(100):
        data = bytearray(whole)
        at = draw.randrange(len(data))
        if kind == "bit":
            data[at] ^= 1 << draw.randrange(8)
        else:
            at -= at % 4096
            data[at : at + 4096] = bytes(len(data[at : at + 4096]))
        damaged.write_bytes(data)
        try:
            read = checkpoint.load(damaged)
        except TrainError as error:
            assert "\n" not in str(error)
            noticed += 1
        else:
            assert same(read, state)
        try:
            network = load_trained(str(damaged)).network
        except ModelError as error:
            assert "\n" not in str(error)
        else:
            assert same(dict(network.state_dict()), state["model"])
    assert noticed > 60


def flip(path: Path) -> None:
    """Damages a file within its tensors, where only a checksum detects it."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


def test_a_damaged_checkpoint_falls_back_to_the_previous_one(run, stopped, capsys):
    run("--out", "whole")
    assert checkpoint.load(stopped / "last.before.pt")["progress"]["epoch"] == 1
    flip(stopped / "last.pt")
    capsys.readouterr()
    run("--out", "run")
    out = capsys.readouterr().out
    assert out.count("warning: run/last.pt: is damaged or missing") == 1
    assert "continuing from run/last.before.pt" in out
    assert "continuing in epoch 2 of 2, after step 0 of 3" in out
    assert_same(Path("whole"), stopped)


def test_a_damaged_checkpoint_does_not_replace_the_undamaged_previous_one(run, stopped, monkeypatch):
    flip(stopped / "last.pt")
    with monkeypatch.context() as patch:
        stop_at(2, patch)
        with pytest.raises(Interrupted):
            run("--out", "run")
    positions = [checkpoint.load(stopped / name)["progress"]["step"] for name in ("last.before.pt", "last.pt")]
    assert positions == [0, 2]


def test_if_the_previous_checkpoint_is_damaged_too_the_best_is_used(run, stopped, capsys):
    run("--out", "whole")
    flip(stopped / "last.pt")
    flip(stopped / "last.before.pt")
    run("--out", "run")
    assert "continuing from run/best.pt" in capsys.readouterr().out
    assert_same(Path("whole"), stopped)


def test_a_missing_checkpoint_falls_back_to_the_previous_one(run, stopped):
    """As a kill leaves it on a file system without hard links."""
    run("--out", "whole")
    (stopped / "last.pt").unlink()
    run("--out", "run")
    assert_same(Path("whole"), stopped)


def test_file_systems_without_hard_links(run, monkeypatch):
    def link(source, target):
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "link", link)
    run("--out", "run")
    assert checkpoint.load(Path("run/last.before.pt"))["progress"]["epoch"] == 1


def test_damage_to_all_checkpoints_ends_in_one_line(run, stopped):
    for file in stopped.glob("*.pt"):
        flip(file)
    with pytest.raises(TrainError, match=r"^run/last.pt: not a readable checkpoint \(") as ended:
        run("--out", "run")
    assert "\n" not in str(ended.value)
    assert "kept" not in str(ended.value)


@pytest.mark.slow
def test_an_incomplete_or_foreign_checkpoint_ends_in_one_line(run, stopped):
    whole = torch.load(stopped / "last.pt", weights_only=True)
    foreign = [[1, 2], {"model": whole["model"]}]
    for key in ("format", "model", "optimizer", "sums", "best_top1", "generators", "progress"):
        foreign += [{name: value for name, value in whole.items() if name != key}, whole | {key: "text"}]
    for state in foreign:
        for file in stopped.glob("*.pt"):
            torch.save(state, file)
        with pytest.raises(TrainError, match=r"^run/last.pt: ") as ended:
            run("--out", "run")
        assert "\n" not in str(ended.value)


def test_a_network_is_not_read_from_a_damaged_checkpoint(run):
    folder = run("--epochs", "1", "--out", "run").folder
    for name in ("last.pt", "best.pt"):
        flip(folder / name)
        with pytest.raises(ModelError, match=rf"run/{name}: is damaged"):
            load_trained(str(folder / name))


# The lock.


def test_the_lock_is_one_that_network_file_systems_grant(run, tmp_path, monkeypatch):
    """NFS locks a file as a range of bytes, for which the handle must be open for writing."""
    real = fcntl.flock

    def flock(file, how):
        number = file if isinstance(file, int) else file.fileno()
        if fcntl.fcntl(number, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        real(file, how)

    monkeypatch.setattr(fcntl, "flock", flock)
    with locked(tmp_path / "run"), pytest.raises(TrainError, match="another process is training this run"):  # noqa: SIM117
        with locked(tmp_path / "run"):
            pass
    assert run("--epochs", "1").result


def test_where_nothing_can_be_locked_a_notice_is_printed(tmp_path, monkeypatch, capsys):
    def flock(file, how):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", flock)
    with locked(tmp_path / "run"):
        pass
    assert "cannot be locked there (No locks available)" in capsys.readouterr().out


@pytest.mark.slow
def test_a_kill_releases_the_lock(tmp_path):
    code = (
        "import sys, time; from pathlib import Path; from train.runs.record import locked\n"
        "with locked(Path(sys.argv[1])):\n    print('locked', flush=True); time.sleep(600)"
    )
    holder = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == "locked\n"
    with pytest.raises(TrainError, match="another process is training"), locked(tmp_path):
        pass
    holder.kill()
    holder.wait()
    with locked(tmp_path):
        pass


def test_only_the_first_of_several_processes_holds_the_lock(tmp_path, converted):
    words = [*TINY, "--data", str(converted.folder)]
    records = [kind(tmp_path / "run", parse(words), {}) for kind in (Record, Silent, Silent)]
    with (
        records[0],
        records[1],
        records[2],
        pytest.raises(TrainError, match="another process"),
        locked(tmp_path / "run"),
    ):
        pass


# TensorBoard.


def test_a_full_disk_for_plots_loses_only_the_plots(run, capsys):
    run("--out", "whole")
    Path("run").mkdir()
    Path("run/tensorboard").write_text("")
    capsys.readouterr()
    run("--out", "run")
    out = capsys.readouterr()
    assert out.out.count("warning: run/tensorboard: ") == 1
    assert "Traceback" not in out.err
    assert_same(Path("whole"), Path("run"))


def test_a_disk_that_fills_up_during_a_run_loses_only_the_plots(run, monkeypatch, capsys):
    """/dev/full takes the place of the file of plots after the first epoch."""
    original = Record.add

    def add(self, metrics, **options):
        if metrics["epoch"] == 2:
            (plots,) = Path("run/tensorboard").iterdir()
            plots.unlink()
            plots.symlink_to("/dev/full")
        original(self, metrics, **options)

    monkeypatch.setattr(Record, "add", add)
    assert run("--out", "run", "--epochs", "4").result
    out = capsys.readouterr()
    assert out.out.count("warning: run/tensorboard: the disk of run/tensorboard is full") == 1
    assert "Traceback" not in out.err


def test_tensorboard_reads_the_plots(run, stopped):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run("--out", "run")
    events = EventAccumulator("run/tensorboard").Reload()
    metrics = read_run(stopped).metrics
    assert set(events.Tags()["scalars"]) == {
        *("train/loss", "train/top1", "train/top5", "train/lr"),
        *("validation/loss", "validation/top1", "validation/top5"),
        *("speed/images_per_second_per_device", "speed/waiting"),
    }
    points = events.Scalars("validation/top1")
    assert [point.step for point in points] == [1, 2]
    assert [point.value for point in points] == pytest.approx([line["top1"] for line in metrics])
    losses = [point.value for point in events.Scalars("validation/loss")]
    assert losses == pytest.approx([line["val_loss"] for line in metrics])
    # At the start of the run, but not when it continues.
    (picture,) = events.Images("train/crops")
    assert picture.step == 0
    assert Image.open(io.BytesIO(picture.encoded_image_string)).size == (picture.width, picture.height)


# Stops.


@pytest.mark.parametrize(
    ("number", "epoch", "words"),
    [
        (signal.SIGTERM, 2, []),
        pytest.param(signal.SIGINT, 2, ["--ema", "0.9"], marks=pytest.mark.slow),
        pytest.param(
            *(signal.SIGTERM, 2, ["--model", "mobilenet0.25 resnet18", "--optimizer.lr", "0.01"]),
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_stop_in_validation_takes_effect_within_a_batch(run, monkeypatch, number, epoch, words, capsys):
    """Twelve steps per epoch; validation has four batches, also for several networks."""
    where = "--runs" if len(words) == 4 else "--out"
    run(*words, where, "whole", "--batch", "4")
    batches, original = 0, loop.score_all

    class Counting:
        def __init__(self, loader):
            self._loader = loader

        def __getattr__(self, name):
            return getattr(self._loader, name)

        def epoch(self, *where):
            nonlocal batches
            for batch in self._loader.epoch(*where):
                batches += 1
                if batches == 6:
                    signal.raise_signal(number)
                yield batch

    def score_all(answer, loader, *others, **options) -> list[Scores]:
        return original(answer, Counting(loader), *others, **options)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "score_all", score_all)
        with pytest.raises(Interrupted, match=f"stopped in epoch {epoch} of 2, after step 12 of 12; to continue"):
            run(*words, where, "run", "--batch", "4")
    assert batches == 6
    capsys.readouterr()
    run(*words, where, "run", "--batch", "4")
    assert f"continuing in epoch {epoch} of 2, after step 12 of 12" in capsys.readouterr().out
    for folder in [path.parent for path in Path("whole").rglob("result.json")]:
        assert_same(folder, Path("run") / folder.relative_to("whole"))


def start(folder: Path, *words: str, **options) -> subprocess.Popen:
    environment = os.environ | {"PYTHONPATH": python_path(), "OMP_NUM_THREADS": "1", "TYPED_COMMAND": "make train"}
    command = [sys.executable, "-m", "train", *TINY, "--data", str(folder), "--out", "run", *words]
    return subprocess.Popen(command, env=environment, **options)


def wait_for(path: Path, process: subprocess.Popen) -> None:
    while not path.is_file():
        assert process.poll() is None
        time.sleep(0.05)


@pytest.mark.slow
def test_a_closed_terminal_saves_and_stops(converted, tmp_path):
    """With a real terminal that is closed, so writing to it fails."""
    controller, terminal = os.openpty()

    def own_terminal():
        os.setsid()
        fcntl.ioctl(0, 0x540E, 0)  # TIOCSCTTY

    process = start(
        converted.folder,
        *("--epochs", "2000"),
        cwd=tmp_path,
        stdin=terminal,
        stdout=terminal,
        stderr=terminal,
        preexec_fn=own_terminal,
    )
    os.close(terminal)
    os.set_blocking(controller, False)
    while not (tmp_path / "run/last.pt").is_file():
        assert process.poll() is None
        time.sleep(0.05)
        with suppress(BlockingIOError):
            os.read(controller, 65536)
    before = checkpoint.position(tmp_path / "run")
    os.close(controller)
    assert process.wait(60) == 130
    assert checkpoint.position(tmp_path / "run") >= before
    assert not (tmp_path / "run/result.json").exists()


@pytest.mark.slow
def test_a_run_under_nohup_continues_without_its_terminal(converted, tmp_path):
    with open(tmp_path / "log", "w") as log:
        process = start(
            converted.folder,
            *("--epochs", "30"),
            cwd=tmp_path,
            stdout=log,
            stderr=log,
            preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN),
        )
        wait_for(tmp_path / "run/last.pt", process)
        process.send_signal(signal.SIGHUP)
        assert process.wait(100) == 0
    assert read_run(tmp_path / "run").result


# Lost and saved time.


def test_time_lost_is_bounded_by_an_option(run, monkeypatch):
    saved, original = [], checkpoint.save

    def save(path, state, **options):
        original(path, state, **options)
        saved.append((path.name, state["progress"]["epoch"], state["progress"]["step"]))

    monkeypatch.setattr(checkpoint, "save", save)
    run("--epochs", "1", "--out", "seldom")
    assert saved == [("best.pt", 1, 0), ("last.pt", 1, 0)]
    saved.clear()
    run("--epochs", "1", "--out", "often", "--save_minutes", "1e-9")
    assert [each[1:] for each in saved if each[0] == "last.pt"] == [(0, 1), (0, 2), (0, 3), (1, 0)]
    assert parse([]).save_minutes == 10
    for wrong in ("0", "-1"):
        with pytest.raises(TrainError, match="save_minutes="):
            parse(["--save_minutes", wrong])


def test_save_minutes_are_not_part_of_a_runs_identity(run, stopped):
    assert run("--out", "run", "--save_minutes", "5").result


def test_a_continued_run_does_not_decode_earlier_batches_again(run, stopped, monkeypatch):
    decoded, original = [], Job.open_crops

    def open_crops(self, *args, **options):
        loader = original(self, *args, **options)
        decode = loader._decoder.decode

        def counting(requests):
            def counted():
                for request in requests:
                    decoded.append(len(request.indices))
                    yield request

            return decode(counted())

        loader._decoder.decode = counting
        return loader

    monkeypatch.setattr(Job, "open_crops", open_crops)
    run("--out", "run")
    assert sum(decoded) == 2 * 16


def test_a_run_leaves_no_unfinished_files(run):
    folder = run("--out", "run").folder
    assert {file.name for file in folder.iterdir()} == {
        *("identity.json", "config.yaml", "starts.jsonl", "metrics.jsonl", "result.json"),
        *("last.pt", "last.before.pt", "best.pt", "tensorboard", ".lock"),
    }
    assert all(stat.S_IMODE(file.stat().st_mode) & 0o600 == 0o600 for file in folder.iterdir())
