"""Commands under kills, in small; `make kills` does more of it. And that the harness notices what it is there for."""

import os
import subprocess
import sys

import pytest

from tests.kills.tries import ROOT


@pytest.mark.parametrize("kills", [2, pytest.param(12, marks=pytest.mark.slow)])
def test_conversions_survive_kills(kills):
    words = ["-m", "tests.kills", "--only", "conversion", "--kills", str(kills)]
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, cwd=ROOT, timeout=280)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("conversion: the same files in the end; kills: ")


COMMANDS = {
    # Goes on from what is there, and shows nothing that is not complete.
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
def test_the_harness_notices(tmp_path, command, found):
    lines = "\n".join(line[8:] for line in COMMANDS[command].splitlines())
    (tmp_path / f"{command}.py").write_text(
        "import os, subprocess, time\nif __name__ == '__main__':\n" + lines.replace("\n", "\n    ")
    )
    (tmp_path / "script.py").write_text(
        "import pathlib, sys; from tests.kills import harness, tries; tries._PATIENCE = 1\n"
        f"print(harness.survive([{command!r}], pathlib.Path(sys.argv[1]), compare=['result'], kills=40, seed=0))\n"
    )
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{tmp_path}"}
    words = [sys.executable, str(tmp_path / "script.py"), str(tmp_path / "run")]
    done = subprocess.run(words, capture_output=True, text=True, env=environment, timeout=120)
    if found:
        assert done.returncode
        assert found in done.stderr
    else:
        assert done.returncode == 0, done.stderr
        assert all(kind in done.stdout for kind in ("at a moment", "at open", "at os.rename"))
