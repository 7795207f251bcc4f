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
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

from bench.process import PATIENCE, CallFailed, Process, cpu_seconds, memory_bytes
from bench.record import figure
from train import nvidia

_SAMPLING_SECONDS = 0.05
OVER = "the time was over before its first turn"


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
    one), `unit`, and more. not_run: why it cannot take part, or "". beside: it takes next to no memory.
    """

    build: Callable[[], Runner]
    row: dict[str, Any]
    not_run: str = ""
    beside: bool = False


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


def in_turns(
    contenders: Sequence[Contender],
    *,
    turns: int,
    seconds: float,
    title: str,
    on_gpu: bool = False,
    apart: bool = False,
    hurried: bool = False,
    deadline: float | None = None,
) -> list[dict[str, Any]]:
    """A row for each contender, in their order, after all have had `turns` timed turns.

    seconds: a turn lasts at least as long; it is one piece of work, or several where they are short.
    on_gpu: the GPU's clock and power are noted in each turn, where the driver knows them.
    apart: only one contender is in memory at a time, besides those marked `beside`, which have their turns with each.
    hurried: their untimed turns, in which most of the compiling is done, are all at once.
    deadline: of time.monotonic(); who has had no turn by then did not run.
    A row holds what the contender's `row` does, and either `not_run`, the reason, or: rate (median, min and max of the
    turns, in units a second), cores (processor time by the clock's), waiting (share of the time), peak_memory_bytes (of
    the untimed turn, on the host), peak_device_memory_bytes (PyTorch's, on a GPU), clock_mhz and watts (means of the
    turns), idle (the share of the time in which nothing ran on the GPU, of runners that know their `busy_seconds`), the
    turns and the runner's facts.
    """
    at_terminal = sys.stderr.isatty()
    beside = [place for place, contender in enumerate(contenders) if contender.beside]
    groups = [list(range(len(contenders)))]
    if apart:
        groups = [[*beside, place] for place in range(len(contenders)) if place not in beside] or [beside]
    with contextlib.ExitStack() as stack:
        taking = _Taking(contenders, seconds, deadline, on_gpu)
        stack.callback(taking.close)
        # In a log file, a line every 30 s.
        total = len(contenders) * 2 + sum(map(len, groups)) * turns
        interval = 0.1 if at_terminal else 30.0
        taking.bar = stack.enter_context(
            tqdm(total=total, desc=title, unit=" turns", mininterval=interval, dynamic_ncols=True, leave=at_terminal)
        )
        # All at once: much of it is reading libraries.
        taking.start()
        for group in groups:
            taking.build([place for place in group if place not in taking.built], hurried=hurried)
            for _, place in itertools.product(range(turns), group):
                taking.turn(place)
            if apart:
                taking.end(place for place in group if place not in beside)
    return [taking.row(place) for place in range(len(contenders))]


class _Taking:
    """Contenders, by their places, with the processes that they run in and what they have done so far."""

    bar: tqdm

    def __init__(self, contenders: Sequence[Contender], seconds: float, deadline: float | None, on_gpu: bool):
        self._contenders, self._seconds, self._deadline, self._on_gpu = contenders, seconds, deadline, on_gpu
        self._failures = {place: each.not_run for place, each in enumerate(contenders) if each.not_run}
        self._facts: list[dict[str, Any]] = [{} for _ in contenders]
        self._measured: list[list[Turn]] = [[] for _ in contenders]
        self._states: list[list[dict[str, float]]] = [[] for _ in contenders]
        self._processes: dict[int, Process] = {}
        self.built: set[int] = set()

    def start(self) -> None:
        """Begins the processes, which load what their contenders are made of, and take no memory on a GPU yet."""
        for place, contender in enumerate(self._contenders):
            if place not in self._failures:
                self._processes[place] = Process()
                self._processes[place].begin(_load, contender.build)

    def build(self, places: Sequence[int], *, hurried: bool) -> None:
        """Builds contenders, all at once, and gives each its untimed turn, all at once where it is hurried."""
        self.built.update(places)
        for place in places:
            self._answered(place, "loading")
            if place not in self._failures:
                self._processes[place].begin(_build, self._contenders[place].build)
        for place in places:
            self._answered(place, "building")
            self.bar.update()
        if hurried:
            for place in places:
                if place not in self._failures:
                    self._processes[place].begin(_warm_up, self._seconds)
        for place in places:
            self._facts[place] = self._answered(place, "first turn", None if hurried else _warm_up) or {}
            self.bar.update()

    def turn(self, place: int) -> None:
        so_far = self._measured[place]
        unit = self._contenders[place].row["unit"]
        rate = f"{figure(so_far[-1].amount / so_far[-1].seconds)} {unit}" if so_far else "measuring"
        # In the midst of the turn, when the clock has settled.
        watch = threading.Timer(0.6 * self._seconds, lambda: self._states[place].append(nvidia.now()))
        watch.daemon = True
        if self._on_gpu and place not in self._failures:
            watch.start()
        turn = self._answered(place, rate, _turn)
        watch.cancel()
        if watch.ident:
            watch.join()  # nvidia-smi may not have answered yet
        if turn:
            so_far.append(turn)
        self.bar.update()

    def end(self, places: Iterable[int]) -> None:
        for place in places:
            if place in self._processes:
                self._processes[place].close()

    def close(self) -> None:
        self.end(list(self._processes))

    def row(self, place: int) -> dict[str, Any]:
        row = self._contenders[place].row
        # Who was stopped after some turns has these.
        if place in self._failures and not (self._failures[place] == OVER and self._measured[place]):
            return row | {"not_run": self._failures[place]}
        row = row | self._facts[place] | _summary(self._measured[place])
        for name in ("clock_mhz", "watts"):
            values = [state[name] for state in self._states[place] if name in state]
            row |= {name: statistics.mean(values)} if values else {}
        if row.get("busy_seconds") is not None:
            row["idle"] = max(1 - row["busy_seconds"] * row["rate"]["median"], 0.0)
        return row

    def _answered(self, place: int, what: str, function: Callable | None = None) -> Any:
        """What the contender's process answers to a call, or None where it has failed, now or before.

        function: takes the seconds of a turn; left out, the call has begun already.
        """
        if place in self._failures:
            return None
        self.bar.set_postfix_str(f"{self._contenders[place].row['name']}: {what}", refresh=sys.stderr.isatty())
        process = self._processes[place]
        left = PATIENCE if self._deadline is None else max(self._deadline - time.monotonic(), 0.0)
        try:
            if function and left:
                process.begin(function, self._seconds)
            return process.answer(min(left, PATIENCE))
        except CallFailed as error:
            over = self._deadline is not None and time.monotonic() >= self._deadline
            self._failures[place] = OVER if over else str(error)
            process.close()
        return None


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


def _load(build: Callable[[], Runner]) -> None:
    """Has loaded, once it is called, the module that the contender comes from, and PyTorch with it."""


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
