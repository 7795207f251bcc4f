"""Calls functions in a separate interpreter, and measures the CPU time and memory of a tree of processes.

Packages that set threads for the whole process (FFCV) or keep their own (DALI) must not share a process.
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
# Seconds without an answer after which a process is taken to hang.
PATIENCE = 1200


class CallFailed(Exception):
    """A call in another process failed; the message is one line with the reason."""


class Process:
    """A new interpreter that runs one function after the other and is idle between them.

    It leads a new session: Ctrl-C does not reach it, and close() kills it with all its descendants, including those in
    other sessions.
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
        """Returns function(*arguments), called in the process. Raises CallFailed if it raises, dies or hangs."""
        self.begin(function, *arguments)
        return self.answer()

    def begin(self, function: Callable[..., Any], *arguments: Any) -> None:
        """Begins a call; answer() must be called before the next one."""
        with contextlib.suppress(OSError):  # the process has died: answer() reports it
            self._connection.send((function, arguments))

    def answer(self, patience: float = PATIENCE) -> Any:
        """Waits for the call begun before, at most `patience` seconds. Returns its result, or raises as call()."""
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
        return next((line for line in reversed(lines) if line.strip()), "it printed nothing")


def answers(processes: Sequence[Process]) -> list[Any]:
    """Waits for the calls begun in several processes. Returns their results in the order of the processes.

    Raises CallFailed as soon as one fails, since others may wait for it forever.
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
        except EOFError:  # the calling process has ended
            return
        try:
            answer, failure = function(*arguments), ""
        except Exception as error:
            traceback.print_exc()
            answer, failure = None, _one_line(error)
        connection.send((answer, failure))


def _one_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if "encountered:" in lines[:-1]:  # DALI names the operator before the cause
        cause = lines[lines.index("encountered:") + 1]
    elif any(line.startswith(("Traceback", "Original Traceback")) for line in lines):
        return lines[-1]  # an error in a DataLoader's worker, with its type
    else:
        cause = lines[0] if lines else ""
    return f"{type(error).__name__}: {cause}"


def cpu_seconds() -> float:
    """Returns the processor time of this process and its descendants so far, ended ones included, to 10 ms."""
    return sum(sum(map(int, _stat(pid)[11:15])) for pid in _tree(os.getpid())) / _TICKS


def memory_bytes() -> int | None:
    """Returns the memory in use by this process and its descendants, with shared pages once and without mapped files.

    Returns None if the system does not report it.
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
    """Returns the fields of /proc/PID/stat after the name, which may contain spaces: state, parent, ..."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()


if __name__ == "__main__":
    _serve(Connection(int(sys.argv[1])))
