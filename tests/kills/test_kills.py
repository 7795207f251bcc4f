"""A few kills of each case (`make kills` does more), and tests of the harness itself."""

import os
import re
import subprocess
import sys

import pytest
import torch

from tests.kills.runs import content
from tests.kills.tries import ROOT
from tests.paths import python_path


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "kills"),
    [("conversion", 12), ("training", 7), ("validation", 7), ("labels", 4), ("maps", 2), ("make", 4)],
)
def test_commands_survive_kills(case, kills):
    words = ["-m", "tests.kills", "--only", case, "--kills", str(kills)]
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, cwd=ROOT, timeout=290)
    assert done.returncode == 0, done.stderr
    assert f"\n{case}: the same files in the end; kills: " in done.stdout


def test_everything_of_a_run_except_times_is_compared(tmp_path):
    def state(**changes):
        values = {
            "model": {"weight": torch.ones(3)},
            "progress": {"epoch": 1, "seconds": 1.5},
            "metrics": [{"top1": 3.0}],
        }
        return values | changes

    def digest(values) -> bytes:
        torch.save(values, tmp_path / "last.pt")
        return content(tmp_path / "last.pt")

    whole = digest(state())
    assert digest(state(progress={"epoch": 1, "seconds": 2.5})) == whole
    changes: list[dict] = [
        {"model": {"weight": torch.tensor([1, 1, 1.0000001])}},
        {"model": {"weight": torch.ones(3, 1)}},
        {"model": {"weight": torch.ones(3).double()}},
        {"model": {"weight": torch.tensor([1, -0.0, 1])}},
        {"model": {"other": torch.ones(3)}},
        {"progress": {"epoch": 2, "seconds": 1.5}},
        {"metrics": [{"top1": 3.0000001}]},
        {"metrics": []},
        {"more": None},
    ]
    found = [digest(state(**each)) for each in changes]
    assert len({whole, *found}) == len(changes) + 1
    lines = tmp_path / "metrics.jsonl"
    for text, same in (('{"top1": 1, "waiting": 0.5}', True), ('{"top1": 2, "waiting": 0.4}', False)):
        lines.write_text('{"top1": 1, "waiting": 0.4}\n')
        before = content(lines)
        lines.write_text(f"{text}\n")
        assert (content(lines) == before) == same


COMMANDS = {
    # Continues from existing files, and never shows incomplete ones.
    "careful": """
        if not os.path.exists("result"):
            with open("partial", "w") as file:
                file.write("first"); file.flush(); time.sleep(0.05); file.write("second")
            os.replace("partial", "result")
    """,
    "in_place": """
        if not os.path.exists("result"):
            with open("result", "w") as file:
                file.write("first"); file.flush(); time.sleep(0.05); file.write("second")
    """,
    "careless_before": """
        import part
        if not os.path.exists("other"):
            with open("other", "w") as file:
                file.write("first"); file.flush(); time.sleep(0.05); file.write("second")
        if not os.path.exists("result"):
            part.work()
            time.sleep(0.05)
    """,
    "untidy": """
        if not os.path.exists("result"):
            partial = f"partial-{os.getpid()}"
            with open(partial, "w") as file:
                file.write("first"); file.flush(); time.sleep(0.05); file.write("second")
            os.replace(partial, "result")
    """,
    "orphaned": """
        if not os.path.exists("result"):
            left = subprocess.Popen(["sleep", "5"])
            time.sleep(0.05)
            with open("partial", "w") as file:
                file.write("result")
            os.replace("partial", "result")
            left.kill(); left.wait()
    """,
    "failing": """
        if os.path.exists("partial"):
            raise SystemExit(3)
        with open("partial", "w") as file:
            time.sleep(0.05)
        os.replace("partial", "result")
    """,
}


def survive(tmp_path, command: str, kills: int = 40, **options) -> subprocess.CompletedProcess:
    """Kills one of the commands this many times, from a separate process, which prints the kinds of kills."""
    lines = "\n".join(line[8:] for line in COMMANDS[command].splitlines())
    (tmp_path / f"{command}.py").write_text(
        "import os, subprocess, time\nif __name__ == '__main__':\n" + lines.replace("\n", "\n    ")
    )
    (tmp_path / "script.py").write_text(
        "import pathlib, sys; from tests.kills import harness, tries; tries._PATIENCE = 1\n"
        f"words = {options.pop('words', [command])!r}\n"
        "folder, compare = pathlib.Path(sys.argv[1]), ['result', 'other']\n"
        f"print(harness.survive(words, folder, compare=compare, kills={kills}, seed=0, **{options!r}))\n"
    )
    environment = os.environ | {"PYTHONPATH": f"{python_path()}:{tmp_path}"}
    words = [sys.executable, str(tmp_path / "script.py"), str(tmp_path / "run")]
    return subprocess.run(words, capture_output=True, text=True, env=environment, timeout=120)


@pytest.mark.parametrize(
    ("command", "found"),
    [
        ("careful", None),
        ("in_place", "these differ: result"),
        ("untidy", "these differ: partial-"),
        ("orphaned", "1 processes are left: "),
        ("failing", "ended with 3"),
    ],
)
def test_the_harness_detects_bad_commands(tmp_path, command, found):
    done = survive(tmp_path, command)
    if found:
        assert done.returncode
        assert found in done.stderr
    else:
        assert done.returncode == 0, done.stderr
        assert all(kind in done.stdout for kind in ("at a moment", "at open", "at os.rename"))
        # Each opening, renaming, ... of each file.
        reached, points = map(int, re.search(r"at (\d+) of (\d+) points", done.stdout).groups())
        assert reached == points == 2


def test_kills_can_be_limited_to_a_part_of_a_command(tmp_path):
    """Outside of that part, this command survives no kill."""
    (tmp_path / "part.py").write_text(
        "import os, time\n"
        "def work():\n"
        "    with open('partial', 'w') as file:\n"
        "        file.write('first'); file.flush(); time.sleep(0.05); file.write('second')\n"
        "    os.replace('partial', 'result')\n"
    )
    done = survive(tmp_path, "careless_before", kills=12, during="part:work")
    assert done.returncode == 0, done.stderr
    kinds = re.findall(r"'([^']*)': \d+", done.stdout)
    assert {"at a moment, work", "at open, work", "at os.rename, work"} <= set(kinds)
    assert all("work" in kind for kind in kinds if kind != "ended before")
    done = survive(tmp_path, "careless_before")
    assert "these differ: other" in done.stderr


@pytest.mark.parametrize(("command", "found"), [("careful", None), ("in_place", "these differ: result")])
def test_make_and_what_it_runs_are_killed(tmp_path, command, found):
    (tmp_path / "Makefile").write_text(f"all:\n\t@exec {sys.executable} {tmp_path / command}.py\n")
    done = survive(tmp_path, command, kills=20, words=["make", "-s", "-f", str(tmp_path / "Makefile")])
    if found:
        assert found in done.stderr
    else:
        assert done.returncode == 0, done.stderr
        for when in ("at a moment", "after a change"):
            assert f"{when}, make and all below it" in done.stdout
            assert f"{when}, the program below make" in done.stdout
