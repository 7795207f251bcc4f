"""How many processors this process may use: in a container often far fewer than the machine has."""

import math
import os
from collections.abc import Iterator
from pathlib import Path

_CGROUPS = Path("/sys/fs/cgroup")
_OWN_CGROUPS = Path("/proc/self/cgroup")


def processors() -> int:
    """The processors that this process may run on, or fewer if its control groups allow less time; at least 1.

    Fractions are rounded up.
    """
    count = len(os.sched_getaffinity(0))
    limit = time_limit(_CGROUPS, _OWN_CGROUPS)
    return count if limit is None else max(min(count, math.ceil(limit)), 1)


def time_limit(mounted: Path, own: Path) -> float | None:
    """Processor seconds per second that control groups (v1 or v2) allow a process; None: no limit.

    mounted: where they are mounted, e.g. /sys/fs/cgroup. own: the list of the process's groups, e.g. /proc/self/cgroup.
    """
    limits = [limit for folder in _folders(mounted, own) if (limit := _limit_of(folder)) is not None]
    return min(limits, default=None)


def _folders(mounted: Path, own: Path) -> Iterator[Path]:
    """The groups of the process and their parents, each of which may have a limit."""
    try:
        lines = own.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers:
            roots = [mounted, mounted / "unified"]
        elif "cpu" in controllers.split(","):
            roots = [mounted / controllers, mounted / "cpu"]
        else:
            continue
        # In a container the path may be the host's, and only its end, or nothing, may be mounted here.
        parts = Path(path).parts[1:]
        for root in roots:
            yield from (root.joinpath(*parts[:length]) for length in range(len(parts) + 1))


def _limit_of(folder: Path) -> float | None:
    try:
        if (folder / "cpu.max").is_file():
            quota, period = (folder / "cpu.max").read_text().split()
        else:
            quota, period = ((folder / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
        # No limit is "max" in v2 and -1 in v1.
        limit = float(quota) / float(period) if quota != "max" else -1.0
    except (OSError, ValueError, ZeroDivisionError):
        return None
    return limit if limit > 0 else None
