"""Runs tests against a file with a mistake, in a copy of the code."""

import importlib
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import NoReturn

import pytest
from hypothesis import Phase, settings

from command import UserError

# A test that takes longer hangs: quick tests take seconds, even on a busy machine.
_SECONDS_OF_A_TEST = 120

# Libraries that most tests load; loading takes longer than most tests.
_LIBRARIES = ("torch", "torchvision", "timm", "numba", "scipy", "PIL.Image", "jsonargparse")


def copy_tree(root: Path, to: Path) -> Path:
    """Copies the tracked and new files of a working tree in their current state, except ignored ones. Returns `to`."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=root,
        capture_output=True,
        text=True,
    )
    if listed.returncode:
        raise UserError(f"{root}: {listed.stderr.strip() or 'git cannot list its files'}")
    for name in filter(None, listed.stdout.split("\0")):
        # Skips deleted files that are still in the index, and links to folders.
        if (root / name).is_file():
            (to / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(root / name, to / name)
    return to


def stages_of(path: Path, root: Path) -> list[list[Path]]:
    """Returns the tests of a file or folder in groups, in the order in which they are run.

    First the test file of the same name (tests/data/test_plan.py for data/plan.py), then those that import the module,
    then the others of the same top-level folder, so that most mistakes are detected within seconds.
    """
    room, *inner = path.relative_to(root).with_suffix("").parts
    module = ".".join([room, *(part for part in inner if part != "__init__")])
    own = f"test_{module.rpartition('.')[2]}"
    parent, _, name = module.rpartition(".")
    imports = re.compile(rf"\b{re.escape(module)}\b|from {re.escape(parent)} import [\w\s,(]*\b{re.escape(name)}\b")
    stages: list[list[Path]] = [[], [], []]
    for test in sorted((root / "tests" / room).rglob("test_*.py")):
        stages[0 if test.stem == own else 1 if imports.search(test.read_text()) else 2].append(test)
    return [stage for stage in stages if stage]


@dataclass(frozen=True)
class End:
    """The outcome of a mutant. by: the test that failed. hung: whether tests took too long. output: pytest's output."""

    caught: bool
    by: str = ""
    hung: bool = False
    output: str = ""


class Trial:
    """Runs the quick tests of a copy of the code, stage by stage, until one detects a mistake.

    root: the copy. stages: test files, relative to it; a stage is run if those before it have passed.
    """

    def __init__(self, root: Path, stages: Sequence[Sequence[Path]]):
        self._root, self._stages = root, stages
        # Seconds that each stage takes without a mistake.
        self._usual: dict[int, float] = {}
        # One thread, since others do not survive a fork.
        os.environ |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
        for name in _LIBRARIES:
            importlib.import_module(name)

    def end_of(self, file: Path, code: str) -> End:
        """Runs the tests with `code` as the content of `file` (relative to the copy), which is then restored.

        Raises UserError if the tests fail without a mistake.
        """
        before = (self._root / file).read_text()
        for number, tests in enumerate(self._stages):
            if number not in self._usual:
                began = time.monotonic()
                end = self._tried(tests)
                if end.caught:
                    print(end.output, flush=True)
                    raise UserError(f"without a mistake, the tests fail too: {end.by}")
                self._usual[number] = time.monotonic() - began
            try:
                (self._root / file).write_text(code)
                if "njit" in before:
                    # Numba's cache checks the file of a function, but not the files of functions that it calls.
                    self._forget_compiled()
                end = self._tried(tests, 60 + 3 * self._usual[number])
            finally:
                (self._root / file).write_text(before)
            if end.caught:
                return end
        return End(caught=False)

    def _forget_compiled(self) -> None:
        for made in self._root.rglob("*.nb[ic]"):
            made.unlink()

    def _tried(self, tests: Sequence[Path], seconds: float = float("inf")) -> End:
        """Runs tests in a fork of this process, which has already loaded the libraries."""
        with tempfile.TemporaryFile("w+", errors="replace") as output:
            sys.stdout.flush()
            child = os.fork()
            if not child:
                self._run(tests, output.fileno())
            ends = time.monotonic() + seconds
            try:
                ended, status = os.waitpid(child, os.WNOHANG)
                while not ended and time.monotonic() < ends:
                    time.sleep(0.05)
                    ended, status = os.waitpid(child, os.WNOHANG)
            finally:
                # Also ends processes that the tests have started, and runs if this process is interrupted.
                with suppress(ProcessLookupError):
                    os.killpg(child, signal.SIGKILL)
            if not ended:
                os.waitpid(child, 0)
                return End(caught=True, by="by taking too long", hung=True)
            output.seek(0)
            text = output.read()
        code = os.waitstatus_to_exitcode(status)
        # No tests are collected if all are slow or need a GPU.
        if code in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):
            return End(caught=False)
        failed = re.search(r"^(?:FAILED|ERROR) (.*?)(?: - |$)", text, re.MULTILINE)
        by = f"by {failed[1]}" if failed else f"with status {code}"
        return End(caught=True, by=by, hung="Failed: Timeout (>" in text, output=text)

    def _run(self, tests: Sequence[Path], output: int) -> NoReturn:
        """Runs pytest in the forked process and exits. The copy's modules must not be loaded before."""
        status = 1
        try:
            os.setsid()
            os.dup2(output, 1)
            os.dup2(output, 2)
            sys.stdout, sys.stderr = sys.__stdout__, sys.__stderr__
            os.chdir(self._root)
            original = Path(__file__).parents[2]
            for name in [name for name in sys.modules if name.partition(".")[0] in ("command", "tests")]:
                del sys.modules[name]
            # Multiprocessing would load the main module again in processes that the tests start.
            sys.modules["__main__"] = ModuleType("__main__")
            sys.path[:] = [str(self._root), *(path for path in sys.path if path and Path(path).resolve() != original)]
            # Python's bytecode cache does not notice changes within a second.
            sys.dont_write_bytecode = True
            os.environ |= {"PYTHONPATH": str(self._root), "PYTHONDONTWRITEBYTECODE": "1"}
            # One failure is enough: hypothesis takes much longer to shrink it.
            phases = [Phase.explicit, Phase.reuse, Phase.generate]
            settings.register_profile("first failure", deadline=None, phases=phases)
            words = [
                "--hypothesis-profile",
                "first failure",
                "-x",
                "-q",
                "--tb=line",
                "-m",
                "not slow and not gpu",
                "-p",
                "no:cacheprovider",
            ]
            status = pytest.main([*words, f"--timeout={_SECONDS_OF_A_TEST}", *map(str, tests)])
        finally:
            sys.stdout.flush()
            os._exit(status)
