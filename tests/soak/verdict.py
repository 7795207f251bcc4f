"""Whether the usage of many rounds is flat, and the figures that say so.

Rounds are compared with rounds of the same configuration only. The first rounds, in which libraries load and caches
fill, do not count: a fifth of all, and at least one of each configuration.

- threads, handles, children: for each configuration, the median of the last third must not exceed that of the first.
- memory and regions of mapped memory: Theil and Sen's slope over all rounds, each less the median of its configuration,
  must be below a limit an hour, and so must the upper end of its 95 % interval.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median, median_low

import numpy as np
from scipy.stats import theilslopes

from tests.soak.usage import Usage

COUNTS = ("threads", "handles", "children")
# What may be added in an hour, at most: MiB, and regions. A round that leaves a hundredth of a MiB, or a file mapped,
# each time adds some times as much.
LIMITS = {"memory": 16.0, "regions": 60.0}
WARM_UP = 1 / 5
# Rounds of each configuration that count, at least: one in each third.
LEAST = 3


@dataclass(frozen=True)
class Round:
    """configuration: its name. seconds: since the first round began. usage: when it had ended."""

    configuration: str
    seconds: float
    usage: Usage


@dataclass(frozen=True)
class Slope:
    """Growth an hour: Theil and Sen's slope, its 95 % interval, and for comparison that of least squares."""

    robust: float
    low: float
    high: float
    least_squares: float


def measured(rounds: Sequence[Round]) -> list[Round]:
    """The rounds after the warm-up."""
    configurations = {each.configuration for each in rounds}
    return list(rounds[max(round(WARM_UP * len(rounds)), len(configurations)) :])


def enough(rounds: Sequence[Round], configurations: int) -> bool:
    """Whether each configuration has the rounds that a verdict needs."""
    counted = [each.configuration for each in measured(rounds)]
    return len(set(counted)) == configurations and min(map(counted.count, counted)) >= LEAST


def slope(rounds: Sequence[Round], what: str) -> Slope:
    """Of these rounds, each less the median of its configuration."""
    values = of_configurations(rounds, what)
    usual = {name: median(found) for name, found in values.items()}
    y = np.array([getattr(each.usage, what) - usual[each.configuration] for each in rounds])
    hours = np.array([each.seconds / 3600 for each in rounds])
    robust, _, low, high = theilslopes(y, hours, 0.95)
    return Slope(float(robust), float(low), float(high), float(np.polyfit(hours, y, 1)[0]))


def of_configurations(rounds: Sequence[Round], what: str) -> dict[str, list[float]]:
    """A value of all rounds, in order, by configuration."""
    found: dict[str, list[float]] = {}
    for each in rounds:
        found.setdefault(each.configuration, []).append(getattr(each.usage, what))
    return found


def thirds(values: Sequence[float]) -> tuple[float, float]:
    """The median of the first third of the values, and of the last."""
    third = max(len(values) // 3, 1)
    return median_low(values[:third]), median_low(values[-third:])


def growing(rounds: Sequence[Round], limits: dict[str, float] = LIMITS) -> list[str]:
    """What is not flat, a line for each; empty where all is. limits: see LIMITS."""
    counted = measured(rounds)
    found = []
    for what in COUNTS:
        for name, values in of_configurations(counted, what).items():
            first, last = thirds(values)
            if last > first:
                found.append(f"{what} of {name}: {first} at first, {last} in the end")
    for what, limit in limits.items():
        growth = slope(counted, what)
        if not growth.high < limit:
            found.append(f"{what}: {described(growth)} an hour; less than {limit:g} counts as flat")
    return found


def described(growth: Slope) -> str:
    return f"{growth.robust:+.1f} ({growth.low:+.1f} to {growth.high:+.1f}; least squares {growth.least_squares:+.1f})"


def table(rounds: Sequence[Round]) -> list[str]:
    """Of each configuration, the first third of its measured rounds and the last: medians."""
    counted = measured(rounds)
    columns = ("memory", "allocated", "resident", *COUNTS, "regions")
    lines = [f"{'median of first -> last third':31}" + "".join(f"{column:>18}" for column in ("rounds", *columns))]
    for name in sorted({each.configuration for each in counted}):
        own = [each for each in counted if each.configuration == name]
        cells = [f"{len(own):18}"]
        for column in columns:
            first, last = thirds([getattr(each.usage, column) for each in own])
            number = ".1f" if column in ("memory", "allocated", "resident") else "d"
            cells.append(f"{f'{first:{number}} -> {last:{number}}':>18}")
        lines.append(f"{name:31}" + "".join(cells))
    for what in ("memory", "allocated", "resident", "regions"):
        lines.append(f"{what} an hour: {described(slope(counted, what))}")
    first, last = counted[0].usage.peak, counted[-1].usage.peak
    lines.append(f"peak memory: {first:.1f} MiB after the warm-up, {last:.1f} MiB in the end")
    return lines
