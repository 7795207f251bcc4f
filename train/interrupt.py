"""An orderly stop of a run on Ctrl-C or SIGTERM."""

import signal
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
    """Turns Ctrl-C and SIGTERM into a request to stop after the present step; a second one ends at once."""
    stop = Stop()

    def request(number: int, frame: Any) -> None:
        if stop.requested:
            raise KeyboardInterrupt
        stop.requested = True
        tqdm.write("stopping after this step ...")

    before = {number: signal.signal(number, request) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
