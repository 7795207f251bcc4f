"""Kills a command at random moments and at chosen calls, begins it again, and compares what it leaves in the end.

Each try is a fork of this process, which has imported everything already: a tenth of a second instead of several.
"""

import hashlib
import importlib
import multiprocessing
import os
import random
import runpy
import shutil
import signal
import sys
import time
import warnings
from collections import Counter
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path

ROOT = Path(__file__).parents[2]

# Kills in a row before the command is left to end, at most.
_IN_A_ROW = 4
# What a process does to files, as Python's audit events name it; an `open` counts if it is one for writing.
_CALLS = ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate")
_FOR_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT
# Seconds until the processes that a killed one has started must have ended, and a command.
_PATIENCE, _LONGEST = 20, 600


class Unlike(AssertionError):
    """A command that was killed has not ended as one that never was."""


def survive(
    words: Sequence[str], folder: Path, *, compare: Sequence[str], kills: int, seed: int, start: Path | None = None
) -> Counter[str]:
    """Kills a command so many times in all, in rounds of a few kills, after which it may end. Returns kills by kind.

    words: a module and its options, as behind `python -m`; the same command must go on, or begin again, after a kill,
    and do nothing when all is done. folder: where it runs, empty at the start of a round, or a copy of `start`.
    compare: patterns of the files below the folder that must in the end have the bytes of a command that was never
    killed; of all others, the names must be the same.
    Half of the kills come at a moment, and half at one of the calls that open for writing, move, remove or sync files
    in the folder, each drawn evenly from the duration and the calls of a whole command. The next try follows at once.
    Raises Unlike for other files in the end, for a command that fails, and for processes that outlive it.
    """
    draw = random.Random(seed)
    counts: Counter[str] = Counter()
    calls, seconds = once(words, _fresh(folder, start))
    whole = _files(folder, compare)
    if not any(whole.values()):
        raise Unlike(f"{' '.join(words)}: makes no file like {', '.join(compare)}")
    done = 0
    while done < kills:
        _fresh(folder, start)
        tries = []
        for _ in range(min(draw.randint(1, _IN_A_ROW), kills - done)):
            at_call = draw.randint(1, calls) if done % 2 else 0
            tries.append(_Try(words, folder, at_call))
            kind = tries[-1].killed(None if at_call else draw.uniform(0, seconds))
            counts[kind or "ended before"] += 1
            done += bool(kind)
            if not kind:
                break
        else:
            tries.append(_Try(words, folder))
            tries[-1].end()
        for each in tries:
            await_end_of(each.session)
        found = _files(folder, compare)
        if found != whole:
            names = sorted(name for name in {*found, *whole} if found.get(name, 0) != whole.get(name, 0))
            raise Unlike(f"{' '.join(words)}: after {done} kills (seed {seed}) these differ: {', '.join(names)}")
    return counts


def once(words: Sequence[str], folder: Path) -> tuple[int, float]:
    """Runs a command in a folder to its end, in a fork. Returns its calls and seconds; raises Unlike if it fails."""
    importlib.import_module(words[0])
    folder.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    whole = _Try(words, folder)
    calls = whole.end()
    seconds = time.monotonic() - began
    await_end_of(whole.session)
    return calls, seconds


class _Try:
    """A fork that runs the command, as the leader of a session of its own."""

    def __init__(self, words: Sequence[str], folder: Path, kill_at: int = 0):
        threads = len(os.listdir("/proc/self/task"))
        if threads > 1:
            raise RuntimeError(f"{threads} threads: none but the main one may have begun before a process is forked")
        context = multiprocessing.get_context("fork")
        self._words = words
        self._log = folder.with_name(f"{folder.name}.log")
        self._reports, reporter = context.Pipe(duplex=False)
        self._process = context.Process(target=_run, args=(words, folder, kill_at, reporter, self._log))
        self._process.start()
        reporter.close()
        self.session = self._process.pid or 0

    def end(self) -> int:
        """Waits for the end. Returns how many calls there were."""
        self._process.join(_LONGEST)
        if self._process.exitcode != 0:
            self._process.kill()
            raise Unlike(f"{' '.join(self._words)}: ended with {self._process.exitcode}:\n{self._log.read_text()}")
        return int(self._reports.recv())

    def killed(self, after: float | None) -> str | None:
        """Kills after so many seconds (None: at the call it was begun with). Returns the kind of kill, or None.

        None is for a command that has ended before.
        """
        self._process.join(_LONGEST if after is None else after)
        if self._process.exitcode is None:
            self._process.kill()
            self._process.join()
        if self._process.exitcode == -signal.SIGKILL:
            return f"at {self._reports.recv()}" if after is None else "at a moment"
        self.end()
        return None


def _run(words: Sequence[str], folder: Path, kill_at: int, reporter: Connection, log: Path) -> None:
    """In the fork: the command, until its end or the call at which it is killed."""
    os.setsid()
    with open(log, "wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.chdir(folder)
    os.environ["PYTHONPATH"] = str(ROOT)
    calls = 0

    def call(name: str) -> None:
        nonlocal calls
        calls += 1
        if calls == kill_at:
            reporter.send(name)
            os.kill(os.getpid(), signal.SIGKILL)

    def hook(event: str, arguments: tuple) -> None:
        if event in _CALLS and not isinstance(arguments[0], int):
            path = os.path.abspath(os.fsdecode(arguments[0]))
            if path.startswith(f"{folder}/") and (event != "open" or arguments[2] & _FOR_WRITING):
                call(event)

    sys.addaudithook(hook)
    fsync = os.fsync

    def counted_fsync(file) -> None:
        call("os.fsync")
        fsync(file)

    os.fsync = counted_fsync
    sys.argv = list(words)
    warnings.simplefilter("ignore")
    try:
        runpy.run_module(words[0], run_name="__main__", alter_sys=True)
    except SystemExit as end:
        if end.code:
            raise
    reporter.send(calls)


def _fresh(folder: Path, start: Path | None) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    if start:
        shutil.copytree(start, folder)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _files(folder: Path, compare: Sequence[str]) -> dict[str, str]:
    """All names below the folder, with a digest of those files that are to be compared."""
    compared = {path for pattern in compare for path in folder.glob(pattern)}
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() if path in compared else ""
        for path in folder.rglob("*")
    }


def await_end_of(session: int) -> None:
    """Waits until no process of a session is left. Raises Unlike where one stays."""
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
                # The command, in brackets, may hold anything; behind it: state, parent, group, session.
                command, _, rest = Path(entry.path, "stat").read_text().rpartition(")")
            except OSError:
                continue
            state, _, _, its_session = rest.split()[:4]
            if int(its_session) == session and state not in "ZX":
                found.append(f"{command})")
    return found
