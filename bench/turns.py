"""Measures contenders in alternating turns, each in a separate process.

Alternating turns spread slow changes of the machine's speed evenly; separate processes keep libraries that set threads
for the whole process apart. Each contender has one untimed turn first.
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
OVER = "the time limit ended before its first turn"


class Work(NamedTuple):
    """A piece of work. amount: in the unit of the row, without "/s". waited_seconds: time spent waiting for data.

    untimed_seconds: time spent on preparation, which is subtracted.
    """

    amount: float
    waited_seconds: float = 0.0
    untimed_seconds: float = 0.0


class Runner:
    """Does the work in a contender's process; idle between turns. device: cpu or cuda."""

    device = "cpu"

    def run(self) -> Work:
        """Does a piece of work; on a GPU long enough that synchronizing afterwards costs little."""
        raise NotImplementedError

    def facts(self) -> dict[str, Any]:
        """Returns further entries of its row; called after the untimed turn."""
        return {}


@dataclass(frozen=True)
class Contender:
    """A participant in a measurement. build: makes its Runner, in its process; must be picklable.

    row: entries of its row that are known before measuring: `name`, `group` (for rows that belong together, "" if there
    is only one), `unit`, and others. not_run: why it cannot run, or "". beside: whether it needs so little memory that
    it may be loaded together with others.
    """

    build: Callable[[], Runner]
    row: dict[str, Any]
    not_run: str = ""
    beside: bool = False


@dataclass(frozen=True)
class Turn:
    """One turn, as measured in the contender's process.

    cpu_seconds: processor time of the process and its workers. idle_cpu_seconds: their processor time between the
    previous turn and this one.
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
    """Measures contenders, with `turns` timed turns each, and returns a row for each, in their order.

    seconds: minimum length of a turn; a turn repeats pieces of work until then.
    on_gpu: record the GPU's clock and power in each turn, if the driver reports them.
    apart: load only one contender at a time, together with those marked `beside`, which have turns with each.
    hurried: run all untimed turns, which do most of the compiling, at the same time.
    deadline: end of measuring, in seconds of time.monotonic(); contenders without a turn by then are not run.

    A row contains the contender's `row`, and either `not_run`, the reason, or: rate (median, min and max of the turns,
    in units per second), cores (processor time divided by elapsed time), waiting (share of the time),
    peak_memory_bytes (on the host, in the untimed turn), peak_device_memory_bytes (PyTorch's, on a GPU), clock_mhz and
    watts (means of the turns), idle (share of the time in which nothing ran on the GPU, for runners whose facts have
    `busy_seconds`), turns (each a Turn as a dict), and the runner's facts.
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
        # All at once: most of the time is spent reading libraries.
        taking.start()
        for group in groups:
            taking.build([place for place in group if place not in taking.built], hurried=hurried)
            for _, place in itertools.product(range(turns), group):
                taking.turn(place)
            if apart:
                taking.end(place for place in group if place not in beside)
    return [taking.row(place) for place in range(len(contenders))]


class _Taking:
    """The contenders, by their indices, with their processes and their results so far."""

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
        """Starts the processes, which load the contenders' libraries but use no GPU memory yet."""
        for place, contender in enumerate(self._contenders):
            if place not in self._failures:
                self._processes[place] = Process()
                self._processes[place].begin(_load, contender.build)

    def build(self, places: Sequence[int], *, hurried: bool) -> None:
        """Builds contenders at the same time and runs their untimed turns, with `hurried` also at the same time."""
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
        # In the middle of the turn, after the clock has settled.
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
        # A contender that was stopped after some turns keeps them.
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
        """Returns the result of a call in the contender's process, or None if it fails or has failed before.

        function: called with the seconds of a turn; None if the call has begun already.
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


# ---- functions that run in a contender's process

_runner: Runner
_cpu_at_end: float


def _load(build: Callable[[], Runner]) -> None:
    """Does nothing: unpickling its argument imports the contender's module, and PyTorch with it."""


def _build(build: Callable[[], Runner]) -> None:
    global _runner, _cpu_at_end
    _runner = build()
    _cpu_at_end = cpu_seconds()


def _warm_up(least: float) -> dict[str, Any]:
    """Runs a turn, in which libraries start and code is compiled. Returns peak memory and the runner's facts."""
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
