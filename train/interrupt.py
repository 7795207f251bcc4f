"""Clean stop of a run on Ctrl-C, SIGTERM, or when its terminal is closed (SIGHUP)."""

import os
import signal
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from tqdm import tqdm


class Interrupted(KeyboardInterrupt):
    """The user stopped the run; its checkpoint is written. The message says how to continue."""


@dataclass
class Stop:
    requested: bool = False


@contextmanager
def stop_on_signal() -> Iterator[Stop]:
    """Turns Ctrl-C, SIGTERM and SIGHUP into a request to stop after the current step; a second one ends immediately.

    A closed terminal may send SIGHUP several times, which counts as one. If it is ignored (nohup), it stays ignored.
    """
    stop = Stop()

    def request(number: int, frame: Any) -> None:
        if number == signal.SIGHUP:
            _leave_terminal()
        if stop.requested:
            if number == signal.SIGHUP:
                return
            raise KeyboardInterrupt
        stop.requested = True
        tqdm.write("stopping after this step ...")

    numbers = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        numbers.append(signal.SIGHUP)
    before = {number: signal.signal(number, request) for number in numbers}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _leave_terminal() -> None:
    """Discards output to a terminal or a pipe that is gone, where printing would fail."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for number in (1, 2):
        if not stat.S_ISREG(os.fstat(number).st_mode):
            os.dup2(nowhere, number)
    os.close(nowhere)
