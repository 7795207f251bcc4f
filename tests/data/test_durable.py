"""Concurrent, stopped and killed conversions, and full disks: nothing is lost or left behind."""

import errno
import fcntl
import os
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from data import DataError
from data.beton import PAGE_SIZE
from data.convert import _CHUNK_BYTES, Storage, _chunk, _stopping_on_signals, convert_source, ensure_converted
from data.durable import locked, move_folder
from data.sets import Unconverted, find_set
from data.sources import open_source
from tests.kills.harness import await_end_of
from tests.paths import python_path
from tests.pictures import write_class_folders

ROOT = Path(__file__).parents[2]


@pytest.fixture
def few(tmp_path) -> Path:
    return write_class_folders(tmp_path / "images", 2, 3)


def test_only_one_process_at_a_time_holds_a_lock(tmp_path):
    """Also while its file is repeatedly created and removed."""
    inside, most = 0, 0

    def enter(_):
        nonlocal inside, most
        with locked(tmp_path / "lock", "waiting") as held:
            assert held
            inside += 1
            most = max(most, inside)
            time.sleep(0.0005)
            inside -= 1

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(enter, range(400)))
    assert most == 1
    assert os.listdir(tmp_path) == []


def test_a_waiting_conversion_uses_the_set_that_was_made_meanwhile(few, tmp_path, capsys):
    first = find_set(str(few), cache=tmp_path / "cache")
    assert isinstance(first, Unconverted)
    first.folder.parent.mkdir()
    with ThreadPoolExecutor(1) as pool:
        with locked(first.folder.with_name(f".{first.folder.name}.lock"), "not printed"):
            waiting = pool.submit(ensure_converted, first)
            said = ""
            while "waiting for it" not in said:
                assert not waiting.done()
                said += capsys.readouterr().out
                time.sleep(0.01)
            made = convert_source(first.source, tmp_path / "elsewhere", processes=1)
            made.folder.rename(first.folder)
            before = (first.folder / "set.json").stat()
        found = waiting.result()
    assert f"{first.folder}: is being converted by another process; waiting for it\n" in said
    assert found == find_set(str(few), cache=tmp_path / "cache")
    assert os.path.samestat((found.folder / "set.json").stat(), before)
    assert os.listdir(tmp_path / "cache") == [first.folder.name]


@pytest.mark.slow
def test_trainings_started_together_share_one_conversion(image_folder, tmp_path):
    code = (
        "import sys; from data.convert import ensure_converted; from data.sets import find_set\n"
        "if __name__ == '__main__': print(ensure_converted(find_set(sys.argv[1])).fingerprint)"
    )
    (tmp_path / "ensure.py").write_text(code)
    started = [
        subprocess.Popen(
            [sys.executable, "ensure.py", str(image_folder)],
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": python_path()},
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(3)
    ]
    said = [process.communicate(timeout=200)[0] for process in started]
    assert [process.returncode for process in started] == [0, 0, 0]
    assert len({text.splitlines()[-1] for text in said}) == 1
    assert sum("train: 48 images" in text for text in said) == 1
    assert len(os.listdir(tmp_path / "converted")) == 1


def test_a_file_system_without_locks_converts_without_them(few, tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", refuse)
    (tmp_path / ".out.partial-of_another").mkdir()
    assert convert_source(open_source(str(few)), tmp_path / "out", processes=1).class_names == ("class0", "class1")
    # It may still be running.
    assert sorted(os.listdir(tmp_path)) == [".out.partial-of_another", "images", "out"]


def test_only_leftovers_of_killed_conversions_are_removed(few, tmp_path):
    others = [".other.partial-abc", ".out.partial-b.partial-abc", "out.partial-abc", ".out.partial-"]
    for name in (*others, ".out.partial-abc_12", ".out.partial-4711"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "train.beton").write_bytes(b"half")
    (tmp_path / ".out.lock").touch()
    convert_source(open_source(str(few)), tmp_path / "out", processes=1)
    assert sorted(os.listdir(tmp_path)) == sorted([*others, "images", "out"])


def test_a_set_is_not_lost_when_it_cannot_be_replaced(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine").touch()
    with pytest.raises(FileNotFoundError):
        move_folder(tmp_path / "missing", out, replaced=tmp_path / "replaced")
    assert os.listdir(tmp_path) == ["out"]
    assert os.listdir(out) == ["mine"]


def test_a_set_that_was_half_replaced_by_a_kill_is_restored(tmp_path, few):
    for file in few.rglob("*.jpg"):
        file.write_text("no image")
    kept = tmp_path / ".out.partial-abc" / "replaced"
    kept.mkdir(parents=True)
    (kept / "mine").touch()
    with pytest.raises(DataError, match="none of its"):
        convert_source(open_source(str(few)), tmp_path / "out", processes=1, replace=True)
    assert sorted(os.listdir(tmp_path)) == ["images", "out"]
    assert os.listdir(tmp_path / "out") == ["mine"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_signal_ends_a_conversion_in_one_line(tmp_path, image_folder, number):
    """Also if it reaches all processes, as that of a closed terminal does."""
    # Long enough to be interrupted.
    root = write_class_folders(tmp_path / "images", 2, 300)
    started = subprocess.Popen(
        [sys.executable, "-m", "data.convert", "--data", root, "--out", tmp_path / "out", "--processes", "2"],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    while not list(tmp_path.glob(".out.partial-*/set/train.beton")):
        assert started.poll() is None
        time.sleep(0.01)
    started.send_signal(number) if number == signal.SIGTERM else os.killpg(started.pid, number)
    said = started.communicate(timeout=60)[1]
    assert started.returncode == 130
    stopped = f"{tmp_path / 'out'}: conversion stopped by {number.name}; nothing was left half-done"
    if number == signal.SIGINT:
        stopped = "interrupted"
    # Besides the progress bar.
    assert [line for line in said.splitlines() if line and not line.startswith("convert train")] == [stopped]
    assert os.listdir(tmp_path) == ["images"]
    await_end_of(started.pid)


def test_signal_handlers_are_restored_after_a_conversion(tmp_path):
    """A conversion under nohup continues without its terminal."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        usual = signal.getsignal(signal.SIGTERM)
        with _stopping_on_signals(tmp_path / "out"):
            assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
            with pytest.raises(KeyboardInterrupt, match="out: conversion stopped by SIGTERM"):
                signal.raise_signal(signal.SIGTERM)
        assert signal.getsignal(signal.SIGTERM) == usual
    finally:
        signal.signal(signal.SIGHUP, before)


def on_a_small_disk(folder: Path, script: str) -> subprocess.CompletedProcess:
    """Runs a shell script with a disk of 100 kB at `folder`, visible only to the script."""
    command = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c"]
    mount = f"mount -t tmpfs -o size=100k none {folder}"
    if not shutil.which("unshare") or subprocess.run([*command, mount], capture_output=True).returncode:
        pytest.skip("this system lets nobody mount a disk")
    return subprocess.run([*command, f"{mount} && {script}"], capture_output=True, text=True, cwd=ROOT, timeout=120)


def test_a_full_disk_is_reported_and_existing_files_stay(image_folder, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    (tmp_path / "replace.py").write_text(
        "import sys; from pathlib import Path; from command import exit_on_user_error\n"
        "from data.convert import convert_source; from data.sources import open_source\n"
        "if __name__ == '__main__':\n"
        "    exit_on_user_error(lambda: convert_source(open_source(sys.argv[1]), Path(sys.argv[2]), replace=True))\n"
    )
    done = on_a_small_disk(
        disk,
        f"mkdir {disk}/out && touch {disk}/out/mine && "
        f"PYTHONPATH=.:$PYTHONPATH {sys.executable} {tmp_path}/replace.py {image_folder} {disk}/out; "
        f"echo $?; find {disk} -mindepth 1",
    )
    said = f"error: {disk}/out: the disk is full; free some space first (nothing was left half-done)"
    assert done.stderr.splitlines()[-1] == said
    assert "Traceback" not in done.stderr
    assert done.stdout.splitlines()[-3:] == ["2", f"{disk}/out", f"{disk}/out/mine"]


@pytest.mark.parametrize("kind", ["jpeg", "blocks", "raw"])
@pytest.mark.parametrize("side", [16, 256, 512, 1500, 65500])
def test_the_images_that_a_process_takes_are_bounded_in_bytes(kind, side):
    """Except that a single image may be as large as a page."""
    count = _chunk(Storage(kind, side))
    largest = min(side * side * (3 if kind == "raw" else 1), PAGE_SIZE)
    assert count >= 1
    assert count * largest <= max(_CHUNK_BYTES, largest)
    assert count >= 8 or largest > _CHUNK_BYTES // 8
