"""Output of names that other people chose, and how commands end on errors."""

import errno
import io
import json
import os
import re
import resource
import signal
import subprocess
import sys
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tqdm import tqdm

from command import Escaped, UserError, exit_on_user_error, printable, run_command
from data.originals import Originals
from data.sources import open_source
from tests.pictures import write_class_folders
from train.report.analysis import readable
from train.runs import table_text

ROOT = Path(__file__).parents[1]
# Clears the screen, sets the window's title, reverses text, has a byte that is not text, and starts a line.
NASTY = "cat\x1b[2J\x1b]0;owned\x07\u202edog\x9b1m\udcff\nerror: none"
SHOWN = r"cat\x1b[2J\x1b]0;owned\x07\u202edog\x9b1m\xff\x0aerror: none"


def acting(text: str) -> set[str]:
    """The control characters of a text, except newlines and tabs."""
    kinds = {"Cc", "Cs", "Zl", "Zp"}
    turning = {"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"}
    return {
        character
        for character in text
        if unicodedata.category(character) in kinds or unicodedata.bidirectional(character) in turning
    } - {"\n", "\t"}


def test_printable_escapes_names():
    assert printable(NASTY) == SHOWN
    assert printable("Käse 日本 עברית 👩‍🔬 [x] 100 %") == "Käse 日本 עברית 👩‍🔬 [x] 100 %"


@given(st.text() | st.text("\x00\x1b\r\n\t[A\x9b\u202e\u2066\ud800\udcffäx", max_size=20))
def test_no_text_controls_a_terminal(text):
    stream, with_bars = io.StringIO(newline=""), io.StringIO(newline="")
    Escaped(stream).write(text)
    assert not acting(stream.getvalue())
    Escaped(with_bars, bars=True).write(f"convert {text}")
    assert not acting(with_bars.getvalue())
    line = printable(text)
    assert not acting(line)
    assert "\n" not in line
    assert printable(line) == line
    plain = "".join(character for character in text if character not in acting(text))
    assert stream.getvalue() == text if plain == text else len(stream.getvalue()) > len(text)


def test_progress_bars_are_as_before():
    def drawn(stream) -> str:
        with (
            tqdm(total=3, file=stream, mininterval=0, ncols=40, bar_format="{desc}{n}") as bar,
            tqdm(total=3, file=stream, position=1, mininterval=0, ncols=40, bar_format="{desc}{n}") as below,
        ):
            for _ in range(3):
                bar.update()
                below.update()
        return stream.getvalue()

    assert "\x1b[A" in drawn(io.StringIO())
    assert drawn(Escaped(io.StringIO(), bars=True)) == drawn(io.StringIO())


def test_errors_and_tables_are_shown_as_one_line(capfd):
    with pytest.raises(SystemExit) as ended:
        exit_on_user_error(lambda: (_ for _ in ()).throw(UserError(f"{NASTY}: no such class")))
    assert ended.value.code == 2
    assert capfd.readouterr().err == f"error: {SHOWN}: no such class\n"
    exit_on_user_error(lambda: print(NASTY.replace("\n", ""), file=sys.stderr))
    assert capfd.readouterr().err == SHOWN.replace(r"\x0a", "") + "\n"
    assert table_text([("class",), (NASTY,)]).splitlines() == ["class", SHOWN]
    assert readable([NASTY, "b"]) == (SHOWN, "b")


def test_names_of_files_and_classes_do_not_control_the_terminal(tmp_path):
    """Through whole commands: folders, classes, broken images, archives."""
    root = tmp_path / "set\x1b[31m"
    write_class_folders(root, 2, 3, side=20)
    (root / "class0").rename(root / NASTY)
    (root / NASTY / f"{NASTY}.jpg").write_bytes(b"no image")
    command = [sys.executable, "-m", "data.convert", "--data", root, "--out", tmp_path / "out"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, timeout=120)
    text = (done.stdout + done.stderr).decode(errors="surrogateescape")
    assert done.returncode == 0, text
    assert not acting(text.replace("\r", ""))
    assert SHOWN in text
    assert not any(line.startswith("error: none") for line in text.splitlines())
    assert json.loads((tmp_path / "out" / "set.json").read_text())["name"] == "set\x1b[31m"


def test_unreadable_images_are_listed_as_one_line_each(tmp_path, capfd):
    root = write_class_folders(tmp_path / "set", 2, 3, side=20)
    (root / "class0" / f"{NASTY}.jpg").write_bytes(b"no image")
    source = open_source(str(root), whole=True)
    list(Originals(source.val, source.class_names, resolution=16, batch_size=4, threads=1).epoch())
    (line,) = capfd.readouterr().err.splitlines()
    assert line.endswith(f"{SHOWN}.jpg: cannot identify image file")


# ---- the end


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        MemoryError("Unable to allocate 3.1 TiB"),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
        RuntimeError("can't start new thread"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."),
    ],
)
def test_a_lack_of_memory_ends_in_one_line(error, capfd):
    def work():
        raise error

    with pytest.raises(SystemExit) as ended:
        exit_on_user_error(work)
    assert ended.value.code == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("error: out of memory: ")


@pytest.mark.parametrize("error", [ValueError("bad"), OSError(errno.ENOENT, "no such file"), RuntimeError("shape")])
def test_no_other_error_is_hidden(error):
    def work():
        raise error

    with pytest.raises(type(error)):
        exit_on_user_error(work)


def test_libraries_that_do_not_fit_in_memory_end_in_one_line():
    def limit():
        resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))

    command = [sys.executable, "-m", "train", "--print_config"]
    done = subprocess.run(command, cwd=ROOT, preexec_fn=limit, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: out of memory: ")
    assert "failed to map" in line


def test_help_is_plain_text(capsys):
    def command(folder: str = "runs") -> None:
        """Does nothing."""

    with pytest.raises(SystemExit) as ended:
        run_command(command, prog="command", words=["--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    assert "--print_config[=flags]" in text
    assert "x08" not in text


def commands() -> list[str]:
    """The modules behind make's verbs that take options."""
    modules = re.findall(r"^runs\.\S+ +:= ([\w.]+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    return [module for module in modules if module != "bench.compare"]


@pytest.mark.slow
@pytest.mark.parametrize("module", [*commands(), "train.maps import", "train.maps export", "train.maps show"])
def test_help_of_every_command_is_plain_text_and_the_same_everywhere(module):
    words = [sys.executable, "-m", *module.split(), "--help"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"usage: python -m {module}")
    assert not acting(done.stdout)
    for wrong in ("\\x", " at 0x", "lambda", str(ROOT)):
        assert wrong not in done.stdout


def ended_while_importing(words: list[str], module: str) -> tuple[int, list[str]]:
    """The exit status and output after Ctrl-C just after the program has imported this module."""
    command = [sys.executable, "-X", "importtime", *words]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as program:
        assert program.stderr
        assert program.stdout
        for line in program.stderr:
            if line.rstrip().endswith(f"| {module}") or line.split("|")[-1].strip() == module:
                break
        os.kill(program.pid, signal.SIGINT)
        rest = [line for line in program.stderr if not line.startswith("import time:")]
        said = program.stdout.read()
        return program.wait(60), [line for line in [*rest, *said.splitlines()] if line.strip()]


@pytest.mark.parametrize(
    ("program", "modules"),
    [
        ("train", ["command", "numpy", "torch._C", "torch"]),
        ("data.convert", ["command", "numpy", "numba", "data.sets"]),
        ("train.report", ["command", "torch.nn", "train.runs"]),
    ],
)
def test_ctrl_c_while_a_command_loads_is_quiet(program, modules):
    for module in modules:
        status, said = ended_while_importing(["-m", program, "--help"], module)
        assert status == 130, module
        assert [line.strip() for line in said] == ["interrupted"], module
