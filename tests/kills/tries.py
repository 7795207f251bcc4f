"""The commands that are killed: forks of this process, and make with its program.

A fork inherits all imports: it starts in a tenth of a second instead of several seconds.
"""

import functools
import importlib
import multiprocessing
import os
import re
import runpy
import signal
import subprocess
import sys
import time
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from tests.paths import python_path

ROOT = Path(__file__).parents[2]

# Python's audit events for changes of files; an `open` counts if it is for writing.
_CALLS = ("open", "os.rename", "os.link", "os.remove", "os.rmdir", "os.mkdir", "os.truncate")
_FOR_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT
# Seconds within which the processes started by a killed one must have ended, and a command.
_PATIENCE, _LONGEST = 20, 240


class Unlike(AssertionError):
    """A killed command has not ended like one that was never killed."""


@dataclass
class Whole:
    """A complete command. points: how often it reached each call that changes a file, with the file.

    seconds: its duration. parts: the seconds of each call of the traced function; for make, the seconds until its
    folder changes, and those from then on.
    """

    points: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0
    parts: list[float] = field(default_factory=list)

    def hasten(self, seconds: float) -> None:
        """Reduces the expected duration to a shorter one."""
        shorter = min(seconds / self.seconds, 1)
        self.seconds, self.parts = shorter * self.seconds, [shorter * part for part in self.parts]


@dataclass
class Aim:
    """When to kill a command.

    point, time: at that call, when it is reached for the first, second, ... time; without a point, at a moment.
    during: MODULE:FUNCTION, to which kills are limited. part: the call of it (0, 1, ...) that the moment is in. share:
    the share of the duration of this call, or of the command, that has passed by then. late, group: for make, as in
    `survive`.
    """

    during: str | None = None
    point: str = ""
    time: int = 0
    part: int = 0
    share: float = 0.0
    late: bool = False
    group: bool = False


class Try:
    """A command in its own session. seconds: its duration, if it ended before it was to be killed."""

    session: int
    seconds: float = 0.0

    def __init__(self, words: Sequence[str], folder: Path, aim: Aim):
        raise NotImplementedError

    def end(self) -> Whole:
        """Waits for the end. Returns the result, without the duration of the whole."""
        raise NotImplementedError

    def killed(self, whole: Whole) -> str | None:
        """Kills at the aim. Returns the kind of kill, or None if the command ended before."""
        raise NotImplementedError


class Fork(Try):
    def __init__(self, words: Sequence[str], folder: Path, aim: Aim):
        threads = len(os.listdir("/proc/self/task"))
        if threads > 1:
            raise RuntimeError(f"{threads} threads: none but the main one may have begun before a process is forked")
        context = multiprocessing.get_context("fork")
        self._words, self._aim = words, aim
        self._began = time.monotonic()
        self._log = folder.with_name(f"{folder.name}.log")
        self._reports, reporter = context.Pipe(duplex=False)
        self._process = context.Process(target=_run, args=(words, folder, aim, reporter, self._log))
        self._process.start()
        reporter.close()
        self.session = self._process.pid or 0

    def end(self) -> Whole:
        whole = Whole()
        for kind, value in self._reported(_LONGEST):
            if kind == "out":
                whole.parts.append(value)
            elif kind == "end":
                whole.points = value
        self._process.join(_LONGEST)
        if self._process.exitcode != 0:
            self._process.kill()
            raise Unlike(f"{' '.join(self._words)}: ended with {self._process.exitcode}:\n{self._log.read_text()}")
        return whole

    def killed(self, whole: Whole) -> str | None:
        aim, last = self._aim, None
        if aim.point:
            *_, last = [("", ""), *self._reported(_LONGEST)]
        elif aim.during:
            entered = (kind for kind, _ in self._reported(_LONGEST) if kind == "in")
            # If the command ends before, all its reports have arrived, and there is nothing left to kill.
            for _ in range(aim.part + 1):
                next(entered, None)
            self._process.join(aim.share * whole.parts[aim.part])
        else:
            self._process.join(aim.share * whole.seconds)
        if not aim.point:
            self.seconds = time.monotonic() - self._began
            self._process.kill()
        self._process.join(_LONGEST)
        if self._process.exitcode != -signal.SIGKILL:
            self.end()
            return None
        if last:
            kind = f"at {last[1]}"
        else:
            left = [kind for kind, _ in self._reported(0)]
            kind = "at a moment" if not aim.during or "out" not in left else "at a moment soon after"
        return f"{kind}, {aim.during.rpartition(':')[2]}" if aim.during else kind

    def _reported(self, seconds: float) -> Iterator[tuple[str, Any]]:
        """Yields the command's reports until it ends, for at most this long."""
        until = time.monotonic() + seconds
        while self._reports.poll(max(until - time.monotonic(), 0)):
            try:
                yield self._reports.recv()
            except EOFError:
                return


def _run(words: Sequence[str], folder: Path, aim: Aim, reporter: Connection, log: Path) -> None:
    """Runs the command in the fork, until its end or the call at which it is killed."""
    os.setsid()
    with open(log, "wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.chdir(folder)
    os.environ["PYTHONPATH"] = python_path()
    points: Counter[str] = Counter()
    inside = not aim.during

    def call(name: str, path: str) -> None:
        if not inside or not path.startswith(f"{folder}/"):
            return
        # Names that differ only in times, process numbers, keys of runs and tempfile's letters are the same file.
        point = f"{name} {re.sub('-[a-z0-9_]{8}(?=/|$)|[0-9]+', '#', path.removeprefix(f'{folder}/'))}"
        points[point] += 1
        if point == aim.point and points[point] == aim.time:
            reporter.send(("killed", name))
            os.kill(os.getpid(), signal.SIGKILL)

    def hook(event: str, arguments: tuple) -> None:
        changes = event in _CALLS and (event != "open" or arguments[2] & _FOR_WRITING)
        if changes and not isinstance(arguments[0], int):
            call(event, os.path.abspath(os.fsdecode(arguments[0])))

    sys.addaudithook(hook)
    fsync = os.fsync

    def counted_fsync(file) -> None:
        number = file if isinstance(file, int) else file.fileno()
        call("os.fsync", os.readlink(f"/proc/self/fd/{number}") + "/")
        fsync(file)

    os.fsync = counted_fsync
    if aim.during:
        module, function = aim.during.split(":")
        *outer, name = function.split(".")
        owner = functools.reduce(getattr, outer, importlib.import_module(module))
        original = getattr(owner, name)

        @functools.wraps(original)
        def looked_at(*arguments: Any, **options: Any) -> Any:
            nonlocal inside
            inside = True
            reporter.send(("in", None))
            began = time.monotonic()
            try:
                return original(*arguments, **options)
            finally:
                reporter.send(("out", time.monotonic() - began))
                inside = False

        setattr(owner, name, looked_at)
    sys.argv = list(words)
    warnings.simplefilter("ignore")
    try:
        runpy.run_module(words[0], run_name="__main__", alter_sys=True)
    except SystemExit as end:
        if end.code:
            raise
    reporter.send(("end", points))


class Command(Try):
    def __init__(self, words: Sequence[str], folder: Path, aim: Aim):
        self._words, self._folder, self._aim = words, folder, aim
        self._log = folder.with_name(f"{folder.name}.log")
        self._before = _stamps(folder)
        self._began = time.monotonic()
        clean = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
        with open(self._log, "wb") as log:
            self._process = subprocess.Popen(
                words, cwd=folder, env=clean, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )
        self.session = self._process.pid

    def end(self) -> Whole:
        began = time.monotonic()
        self._await_change()
        changed = time.monotonic()
        if self._process.wait(_LONGEST) != 0:
            raise Unlike(f"{' '.join(self._words)}: ended with {self._process.returncode}:\n{self._log.read_text()}")
        return Whole(parts=[changed - began, time.monotonic() - changed])

    def killed(self, whole: Whole) -> str | None:
        if self._aim.late:
            self._await_change()
        try:
            self._process.wait(self._aim.share * (whole.parts[1] if self._aim.late else whole.seconds))
        except subprocess.TimeoutExpired:
            pass
        else:
            self.seconds = time.monotonic() - self._began
            self.end()
            return None
        when = "after a change" if self._aim.late else "at a moment"
        programs = [int(found.split()[0]) for found in _members(self.session) if "(python" in found]
        if self._aim.group or not programs:
            os.killpg(self.session, signal.SIGKILL)
            self._process.wait()
            return f"{when}, make and all below it"
        with suppress(ProcessLookupError):
            # Its children have higher numbers.
            os.kill(min(programs), signal.SIGKILL)
        # make ends when its program has.
        return f"{when}, the program below make" if self._process.wait(_LONGEST) else None

    def _await_change(self) -> None:
        """Waits until the command changes its folder, or ends."""
        while self._process.poll() is None and _stamps(self._folder) == self._before:
            time.sleep(0.01)


def await_end_of(session: int) -> None:
    """Waits until no process of a session is left. Raises Unlike if one stays."""
    waited_since = time.monotonic()
    while left := _members(session):
        if time.monotonic() - waited_since > _PATIENCE:
            raise Unlike(f"{len(left)} processes are left: {', '.join(left)}")
        time.sleep(0.02)


def _members(session: int) -> list[str]:
    """Number and command of each living process of a session."""
    found = []
    for entry in os.scandir("/proc"):
        if entry.name.isdecimal():
            try:
                # The command, in brackets, may hold any text; it is followed by state, parent, group, session.
                command, _, rest = Path(entry.path, "stat").read_text().rpartition(")")
            except OSError:
                continue
            state, _, _, its_session = rest.split()[:4]
            if int(its_session) == session and state not in "ZX":
                found.append(f"{command})")
    return found


def _stamps(folder: Path) -> set[tuple[str, int]]:
    """The names below a folder, with the times at which they were changed."""
    found = set()
    for path in folder.rglob("*"):
        with suppress(OSError):
            found.add((str(path), path.stat().st_mtime_ns))
    return found
