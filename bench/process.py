"""Functions called in an interpreter of their own, and what a tree of processes uses.

Packages that set threads for the whole process (FFCV) or keep some of their own (DALI) must not meet in one.
"""

import contextlib
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from command import safe_path

_TICKS = os.sysconf("SC_CLK_TCK")
# Seconds without an answer after which a process counts as hanging.
PATIENCE = 1200


class CallFailed(Exception):
    """A call in the other process failed: one line that says why."""


class Process:
    """A fresh interpreter that runs one function after the other and is idle between them.

    It leads a session of its own: Ctrl-C does not reach it, and close() ends it with all its children, those with a
    session of their own among them.
    """

    def __init__(self):
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 (closed with the process)
        self._connection, theirs = multiprocessing.Pipe()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, *safe_path(), "-m", f"{__package__}.process", str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=self._log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def __enter__(self) -> "Process":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """function(*arguments) over there. Raises CallFailed if it raised, if the process died, or if it hangs."""
        self.begin(function, *arguments)
        return self.answer()

    def begin(self, function: Callable[..., Any], *arguments: Any) -> None:
        """Begins a call, whose answer() is to be asked for before the next one."""
        with contextlib.suppress(OSError):  # of a dead process, as answer() will say
            self._connection.send((function, arguments))

    def answer(self, patience: float = PATIENCE) -> Any:
        """What the call that was begun returns, once it does, in so many seconds. Raises CallFailed as call() does."""
        try:
            if not self._connection.poll(patience):
                raise CallFailed(f"no answer within {patience:.0f} s")
            answer, failure = self._connection.recv()
        except (EOFError, OSError):
            status = self._process.wait()
            died = f"was killed by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"
            raise CallFailed(f"the process {died}: {self._last_words()}") from None
        if failure:
            raise CallFailed(failure)
        return answer

    def close(self) -> None:
        if self._log.closed:
            return
        apart = list(_tree(self._process.pid))
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        for pid in apart:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._process.wait()
        self._connection.close()
        self._log.close()

    def _last_words(self) -> str:
        self._log.seek(0)
        lines = self._log.read().decode(errors="replace").split("\n")
        return next((line for line in reversed(lines) if line.strip()), "it said nothing")


def answers(processes: Sequence[Process]) -> list[Any]:
    """What the calls that were begun return, in the order of the processes.

    Raises CallFailed as soon as one fails: others may then wait for it in vain.
    """
    found: dict[Connection, Any] = {}
    of = {process._connection: process for process in processes}
    while len(found) < len(of):
        ready = wait([connection for connection in of if connection not in found], PATIENCE)
        if not ready:
            raise CallFailed(f"no answer within {PATIENCE} s")
        for connection in ready:
            assert isinstance(connection, Connection)
            found[connection] = of[connection].answer()
    return [found[connection] for connection in of]


def _serve(connection: Connection) -> None:
    while True:
        try:
            function, arguments = connection.recv()
        except EOFError:  # the asking process has ended
            return
        try:
            answer, failure = function(*arguments), ""
        except Exception as error:
            traceback.print_exc()
            answer, failure = None, _one_line(error)
        connection.send((answer, failure))


def _one_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if "encountered:" in lines[:-1]:  # DALI puts the operator's place in front of the cause
        cause = lines[lines.index("encountered:") + 1]
    elif any(line.startswith(("Traceback", "Original Traceback")) for line in lines):
        return lines[-1]  # the error of a DataLoader's worker, type and all
    else:
        cause = lines[0] if lines else ""
    return f"{type(error).__name__}: {cause}"


def cpu_seconds() -> float:
    """Processor time of this process and its descendants so far, to 10 ms; of those already gone as well."""
    return sum(sum(map(int, _stat(pid)[11:15])) for pid in _tree(os.getpid())) / _TICKS


def memory_bytes() -> int | None:
    """Memory of this process and its descendants now: shared pages once, mapped files left out.

    None where the system does not tell.
    """
    total = 0
    for pid in _tree(os.getpid()):
        found = 0
        with contextlib.suppress(OSError):  # a process that has just ended
            for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
                if line.startswith(("Pss_Anon:", "Pss_Shmem:")):
                    found += int(line.split()[1]) << 10
        if pid == os.getpid() and not found:
            return None
        total += found
    return total


def _tree(root: int) -> Iterator[int]:
    parents = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            with contextlib.suppress(OSError):
                parents[int(entry)] = int(_stat(int(entry))[1])
    found = [root]
    for pid in found:
        yield pid
        found += [child for child, parent in parents.items() if parent == pid]


def _stat(pid: int) -> list[str]:
    """The fields of /proc/PID/stat after the name (which may hold anything): state, parent, ..."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()


if __name__ == "__main__":
    _serve(Connection(int(sys.argv[1])))
