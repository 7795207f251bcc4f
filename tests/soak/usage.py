"""What this process has of the system at a moment."""

import ctypes
import gc
import os
import time
from dataclasses import dataclass
from pathlib import Path

# Threads of a pool end some time after the pool is gone: looks in a row that must agree, and seconds to wait for them.
_AGREEING, _BETWEEN, _LONGEST = 5, 0.02, 3.0


@dataclass(frozen=True)
class Usage:
    """memory: MiB of the process's own, anonymous and shared with no file. resident: with the pages of mapped files.

    peak: MiB resident, at most, until now. allocated: MiB that malloc has given to the program and not got back; what
    lies free in between counts in `memory` alone (0 elsewhere than on glibc). uncollected: MiB of `memory` that a
    collection of garbage gave back to the system. threads, handles (open files), children (living processes), regions
    (of mapped memory): how many.
    """

    memory: float
    resident: float
    peak: float
    allocated: float
    uncollected: float
    threads: int
    handles: int
    children: int
    regions: int


def measure() -> Usage:
    """The usage after a collection of garbage, once threads that are about to end have ended."""
    before = _memory(_status())
    gc.collect()
    _settle()
    status = _status()
    memory = _memory(status)
    return Usage(
        memory=memory,
        resident=status["VmRSS"] / 1024,
        peak=status["VmHWM"] / 1024,
        allocated=_allocated() / 2**20,
        uncollected=before - memory,
        threads=_threads(),
        handles=len(os.listdir("/proc/self/fd")) - 1,  # without the one that reads the folder
        children=sum(len(Path(task.path, "children").read_text().split()) for task in os.scandir("/proc/self/task")),
        regions=len(Path("/proc/self/maps").read_bytes().splitlines()),
    )


def _memory(status: dict[str, int]) -> float:
    return (status["RssAnon"] + status["RssShmem"]) / 1024


class _Mallinfo(ctypes.Structure):
    """What glibc's mallinfo2 returns, from its malloc.h."""

    _fields_ = tuple(
        (name, ctypes.c_size_t)
        for name in (
            *("arena", "ordblks", "smblks", "hblks", "hblkhd"),
            *("usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"),
        )
    )


def _allocated() -> int:
    """Bytes that malloc has given to the program, in all its arenas and by mmap."""
    library = ctypes.CDLL(None)
    if not hasattr(library, "mallinfo2"):
        return 0
    library.mallinfo2.restype = _Mallinfo
    found = library.mallinfo2()
    return int(found.uordblks + found.hblkhd)


def _status() -> dict[str, int]:
    """The numbers of /proc/self/status; memory in KiB."""
    lines = (line.split() for line in Path("/proc/self/status").read_text().splitlines())
    return {words[0].rstrip(":"): int(words[1]) for words in lines if len(words) > 1 and words[1].isdecimal()}


def _threads() -> int:
    return len(os.listdir("/proc/self/task"))


def _settle() -> None:
    since, seen = time.monotonic(), [_threads()]
    while len(seen) < _AGREEING or len(set(seen[-_AGREEING:])) > 1:
        if time.monotonic() - since > _LONGEST:
            return
        time.sleep(_BETWEEN)
        seen.append(_threads())
