"""Whether the usage of many rounds is flat, and the figures that say so.

Rounds are compared with rounds of the same configuration only. The first rounds, in which libraries load and caches
fill, do not count: a fifth of all, and at least one of each configuration.

- threads, handles, children: for each configuration, the median of the last third must not exceed that of the first.
- memory, the part of it that malloc has given out (allocated), and regions of mapped memory: what Theil and Sen's slope
  over all rounds, each less the median of its configuration, adds in an hour (or in the whole run, where that is
  shorter) must be below a limit, even if the slope is the highest of its 95 % interval.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median, median_low

import numpy as np
from scipy.stats import theilslopes

from tests.soak.usage import Usage

COUNTS = ("threads", "handles", "children")
# What may be added in an hour, or in the whole of a shorter run: MiB, and regions. An hour has some 1000 rounds, of
# which a leak of 10 KiB each, or of a file that stays mapped, adds more. Memory may add more than what malloc has given
# out: what a step frees is kept for the next (train/device.py), and comes to lie in more and more pieces for a while.
LIMITS = {"allocated": 8.0, "memory": 32.0, "regions": 60.0}
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


def growing(rounds: Sequence[Round]) -> list[str]:
    """What is not flat, a line for each; empty where all is."""
    counted = measured(rounds)
    found = []
    for what in COUNTS:
        for name, values in of_configurations(counted, what).items():
            first, last = thirds(values)
            if last > first:
                found.append(f"{what} of {name}: {first} at first, {last} in the end")
    hours = min(rounds[-1].seconds / 3600, 1.0)
    for what, limit in LIMITS.items():
        growth = slope(counted, what)
        if not growth.high * hours < limit:
            found.append(
                f"{what}: {described(growth)} an hour, up to {growth.high * hours:.1f} in {60 * hours:.0f} minutes; "
                f"below {limit:g} is flat"
            )
    return found


def described(growth: Slope) -> str:
    return f"{growth.robust:+.1f} ({growth.low:+.1f} to {growth.high:+.1f}; least squares {growth.least_squares:+.1f})"


def table(rounds: Sequence[Round]) -> list[str]:
    """Of each configuration, the first third of its measured rounds and the last: medians."""
    counted = measured(rounds)
    columns = {"memory": ".1f", "allocated": ".1f", "resident": ".1f"} | dict.fromkeys([*COUNTS, "regions"], "d")
    rows = [["", "rounds", *columns]]
    for name in sorted({each.configuration for each in counted}):
        own = [each.usage for each in counted if each.configuration == name]
        ends = {column: thirds([getattr(usage, column) for usage in own]) for column in columns}
        rows.append(
            [
                name,
                str(len(own)),
                *(f"{ends[column][0]:{how}} -> {ends[column][1]:{how}}" for column, how in columns.items()),
            ]
        )
    widths = [max(map(len, cells)) for cells in zip(*rows, strict=True)]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    for what in ("memory", "allocated", "resident", "regions"):
        lines.append(f"{what} an hour: {described(slope(counted, what))}")
    first, last = counted[0].usage.peak, counted[-1].usage.peak
    lines.append(f"peak resident: {first:.1f} MiB after the warm-up, {last:.1f} MiB in the end")
    return ["After the warm-up, medians of the first third of the rounds and of the last; memory in MiB:", *lines]
