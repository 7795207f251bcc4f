"""Files of results: checked before the work, and written completely or not at all."""

import resource
import signal
import threading
from pathlib import Path

import pytest

from train import TrainError
from train.score.result_file import result_file


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_appears_only_when_it_is_complete(tmp_path):
    path = tmp_path / "new" / "result.json"
    with result_file(path, begins="{") as write:
        write('{"caf\u00e9 \udcff": ')
        assert not path.exists()
        write("1}\n")
    assert path.read_bytes() == b'{"caf\xc3\xa9 \xff": 1}\n'
    assert names(path.parent) == ["result.json"]


def fill(path: Path, text: str, ending: BaseException | None = None) -> None:
    with result_file(path, begins="{") as write:
        write(text)
        if ending:
            raise ending


def test_a_failure_leaves_the_previous_file(tmp_path):
    path = tmp_path / "result.json"
    path.write_text("{1}")
    # Errors of other causes are not changed.
    with pytest.raises(OSError, match="the network is gone"):
        fill(path, "{2", OSError("the network is gone"))
    with pytest.raises(KeyboardInterrupt):
        fill(path, "{2", KeyboardInterrupt())
    assert path.read_text() == "{1}"
    assert names(tmp_path) == ["result.json"]


@pytest.mark.parametrize("size", [2_000, 100_000])
def test_a_full_disk_leaves_the_previous_file(size, tmp_path):
    """A limit on file size simulates a full disk; small files reach it only when buffers are flushed."""
    path = tmp_path / "result.json"
    path.write_text("{1}")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000, limits[1]))
    try:
        with pytest.raises(TrainError, match=r"^OUT=.*json: cannot be written \(.*\); name another file with OUT$"):
            fill(path, "{" * size)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert path.read_text() == "{1}"
    assert names(tmp_path) == ["result.json"]


def test_unwritable_files_are_refused_at_once(tmp_path):
    (tmp_path / "file").write_text("a user's own")
    (tmp_path / "link").symlink_to("file")
    for path, says in [
        (tmp_path, "is a folder; give the name of a file"),
        (tmp_path / "file" / "below", "cannot be written .*; name another file with OUT"),
        (Path("/proc/result.json"), "cannot be written"),
        (tmp_path / "file", "is not an earlier result of this command, and would be overwritten; give another OUT"),
        (tmp_path / "link", "is not an earlier result of this command"),
    ]:
        with pytest.raises(TrainError, match=f"^OUT={path}: {says}"), result_file(path, begins="{"):
            pytest.fail("the work has begun")
    assert names(tmp_path) == ["file", "link"]
    assert (tmp_path / "file").read_text() == "a user's own"


def test_empty_files_links_and_devices(tmp_path):
    (tmp_path / "empty").touch()
    (tmp_path / "link").symlink_to("empty")
    with result_file(tmp_path / "link", begins="{") as write:
        write("{1}")
    assert (tmp_path / "empty").read_text() == "{1}"
    assert (tmp_path / "link").is_symlink()
    with result_file(Path("/dev/null"), begins="{") as write:
        write("{1}")
    assert Path("/dev/null").is_char_device()


def test_one_process_at_a_time_writes_to_a_place(tmp_path, capsys):
    path = tmp_path / "result.json"
    done = threading.Event()

    def second() -> None:
        with result_file(path, begins="{") as write:
            write("{2}")
        done.set()

    thread = threading.Thread(target=second)
    with result_file(path, begins="{") as write:
        write("{1}")
        thread.start()
        assert not done.wait(0.2)
    thread.join(30)
    assert path.read_text() == "{2}"
    assert "is being written by another process; waiting for it" in capsys.readouterr().out
