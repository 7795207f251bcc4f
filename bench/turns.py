"""Turn-taking: every contender is built in a process of its own; then all take turns in one run.

So a machine whose speed drifts is unfair to none, and libraries that set threads for the whole process do not meet. One
untimed turn each comes first.
"""

import contextlib
import itertools
import statistics
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

from bench.process import CallFailed, Process, cpu_seconds, memory_bytes
from bench.record import figure

_SAMPLING_SECONDS = 0.05


class Work(NamedTuple):
    """A piece of work. amount: how much was done, in the unit of the row. waited_seconds: of it, for data.

    untimed_seconds: what of it was preparation that does not count.
    """

    amount: float
    waited_seconds: float = 0.0
    untimed_seconds: float = 0.0


class Runner:
    """What works in a contender's process, and is idle between turns. `device`: cpu or cuda, what it works on."""

    device = "cpu"

    def run(self) -> Work:
        """A piece of work, on a GPU long enough that waiting for its end costs nothing."""
        raise NotImplementedError

    def facts(self) -> dict[str, Any]:
        """What its row says besides, after the untimed turn."""
        return {}


@dataclass(frozen=True)
class Contender:
    """Who takes turns. build makes its Runner, over there: it must be picklable.

    row: what its row says before anything is measured: `name`, `group` (of rows that belong together, "" where there is
    one), `unit`, and more. not_run: why it cannot take part, or "".
    """

    build: Callable[[], Runner]
    row: dict[str, Any]
    not_run: str = ""


@dataclass(frozen=True)
class Turn:
    """One turn as the contender's process measured it.

    cpu_seconds: of the process and its workers. idle_cpu_seconds: what they used while others had their turns before.
    """

    amount: float
    seconds: float
    waited_seconds: float
    cpu_seconds: float
    idle_cpu_seconds: float


def in_turns(contenders: Sequence[Contender], *, turns: int, seconds: float, title: str) -> list[dict[str, Any]]:
    """A row for each contender, in their order, after all have had `turns` timed turns.

    seconds: a turn lasts at least as long; it is one piece of work, or several where they are short.
    A row holds what the contender's `row` does, and either `not_run`, the reason, or: rate (median, min and max of the
    turns, in units a second), cores (processor time by the clock's), waiting (share of the time), peak_memory_bytes (of
    the untimed turn, on the host), peak_device_memory_bytes (PyTorch's, on a GPU), the turns and the runner's facts.
    """
    failures = {place: contender.not_run for place, contender in enumerate(contenders) if contender.not_run}
    facts: list[dict[str, Any]] = [{} for _ in contenders]
    measured: list[list[Turn]] = [[] for _ in contenders]
    processes: dict[int, Process] = {}
    at_terminal = sys.stderr.isatty()
    with contextlib.ExitStack() as stack:
        total = len(contenders) * (turns + 2)
        # In a log file, a line every 30 s.
        interval = 0.1 if at_terminal else 30.0
        bar = stack.enter_context(
            tqdm(total=total, desc=title, unit=" turns", mininterval=interval, dynamic_ncols=True, leave=at_terminal)
        )

        def answered(place: int, what: str, function: Callable | None = None):
            """What the contender's process answers to a call, or None where it has failed, now or before.

            function: takes the seconds of a turn; left out, the call has begun already.
            """
            answer = None
            if place not in failures:
                bar.set_postfix_str(f"{contenders[place].row['name']}: {what}", refresh=at_terminal)
                try:
                    process = processes[place]
                    answer = process.call(function, seconds) if function else process.answer()
                except CallFailed as error:
                    failures[place] = str(error)
                    processes[place].close()
            bar.update()
            return answer

        # All at once: much of it is reading libraries.
        for place, contender in enumerate(contenders):
            if place not in failures:
                processes[place] = stack.enter_context(Process())
                processes[place].begin(_build, contender.build)
        for place in range(len(contenders)):
            answered(place, "building")
        for place in range(len(contenders)):
            facts[place] = answered(place, "first turn", _warm_up) or {}
        for _, place in itertools.product(range(turns), range(len(contenders))):
            so_far = measured[place]
            unit = contenders[place].row["unit"]
            rate = f"{figure(so_far[-1].amount / so_far[-1].seconds)} {unit}" if so_far else "measuring"
            turn = answered(place, rate, _turn)
            if turn:
                so_far.append(turn)
    return [
        contender.row
        | ({"not_run": failures[place]} if place in failures else facts[place] | _summary(measured[place]))
        for place, contender in enumerate(contenders)
    ]


def _summary(turns: list[Turn]) -> dict[str, Any]:
    rates = [turn.amount / turn.seconds for turn in turns]
    seconds = sum(turn.seconds for turn in turns)
    return {
        "rate": {"median": statistics.median(rates), "min": min(rates), "max": max(rates)},
        "cores": sum(turn.cpu_seconds for turn in turns) / seconds,
        "waiting": sum(turn.waited_seconds for turn in turns) / seconds,
        "turns": [asdict(turn) for turn in turns],
    }


# ---- what runs in a contender's process, one contender each

_runner: Runner
_cpu_at_end: float


def _build(build: Callable[[], Runner]) -> None:
    global _runner, _cpu_at_end
    _runner = build()
    _cpu_at_end = cpu_seconds()


def _warm_up(least: float) -> dict[str, Any]:
    """A turn in which all is compiled and started that starts late; its peak memory, and the runner's facts."""
    peaks = [memory_bytes()]
    done = threading.Event()

    def sample() -> None:
        while not done.wait(_SAMPLING_SECONDS):
            peaks.append(memory_bytes())

    sampler = threading.Thread(target=sample)
    sampler.start()
    try:
        _turn(least)
    finally:
        done.set()
        sampler.join()
    memory: dict[str, Any] = {"peak_memory_bytes": max((peak for peak in peaks if peak), default=None)}
    if _runner.device != "cpu":
        memory["peak_device_memory_bytes"] = torch.cuda.max_memory_reserved()
    return memory | _runner.facts()


def _turn(least: float) -> Turn:
    global _cpu_at_end
    started_cpu, started = cpu_seconds(), time.perf_counter()
    amount, seconds, waited, untimed = 0.0, 0.0, 0.0, 0.0
    while seconds < least:
        done = _runner.run()
        if _runner.device != "cpu":
            torch.cuda.synchronize()
        amount, waited = amount + done.amount, waited + done.waited_seconds
        untimed += done.untimed_seconds
        seconds = time.perf_counter() - started - untimed
    ended_cpu = cpu_seconds()
    idle, _cpu_at_end = started_cpu - _cpu_at_end, ended_cpu
    return Turn(amount, seconds, waited, ended_cpu - started_cpu, idle)
