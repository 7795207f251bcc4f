"""Calls in separate interpreters, and the CPU time and memory of a tree of processes."""

import math
import mmap
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from bench.process import CallFailed, Process, answers, cpu_seconds, memory_bytes


def runs(pid: int) -> bool:
    """Whether a process is alive, that is, neither gone nor a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_calls_run_in_another_process_one_after_the_other():
    with Process() as process:
        pids = {process.call(os.getpid) for _ in range(3)}
        assert len(pids) == 1
        assert pids != {os.getpid()}
        assert process.call(math.gcd, 12, 18) == 6


def test_a_failed_call_gives_the_reason_and_the_process_continues():
    with Process() as process:
        with pytest.raises(CallFailed, match="ValueError: math domain error"):
            process.call(math.log, -1.0)
        assert process.call(math.sqrt, 4.0) == 2


def test_a_dead_process_is_reported():
    with Process() as process, pytest.raises(CallFailed, match="was killed by SIGABRT"):
        process.call(os.abort)


def test_close_ends_the_children_too():
    with Process() as process:
        child = process.call(os.spawnlp, os.P_NOWAIT, "sleep", "sleep", "60")
        assert runs(child)
    deadline = time.monotonic() + 5
    while runs(child) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not runs(child)


def test_the_first_failure_of_several_calls_is_raised_immediately():
    with Process() as slow, Process() as fast:
        slow.begin(time.sleep, 60)
        fast.begin(int, "no number")
        started = time.monotonic()
        with pytest.raises(CallFailed, match="ValueError"):
            answers([slow, fast])
        assert time.monotonic() - started < 30
    with Process() as one, Process() as other:
        one.begin(pow, 2, 3)
        other.begin(pow, 2, 4)
        assert answers([other, one]) == [16, 8]


def _nested() -> int:
    global _kept
    _kept = Process()
    return _kept.call(os.getpid)


def test_close_ends_nested_processes_too():
    with Process() as process:
        child = process.call(_nested)
        assert runs(child)
    deadline = time.monotonic() + 5
    while runs(child) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not runs(child)


def test_processor_time_counts_living_and_ended_children():
    burn = "import time\nwhile time.process_time() < 0.4: pass\nprint('burnt', flush=True)\ninput()"
    before = cpu_seconds()
    with subprocess.Popen([sys.executable, "-c", burn], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout
        assert child.stdout.readline() == b"burnt\n"
        assert 0.35 < cpu_seconds() - before < 1.5
    assert 0.35 < cpu_seconds() - before < 1.5


def test_memory_counts_what_is_used_but_not_mapped_files(tmp_path):
    file = tmp_path / "bytes"
    file.write_bytes(bytes(64 << 20))
    before = memory_bytes()
    if before is None:
        pytest.skip("this system does not report the memory of a process by kind")
    mapped = np.memmap(file, dtype=np.uint8, mode="r")
    assert not mapped.any()
    after_mapping = memory_bytes()
    assert after_mapping is not None
    assert after_mapping - before < 32 << 20
    # Much more than other threads of the process may free meanwhile; and a new mapping, since a new array may reuse
    # memory that earlier tests have freed.
    used = np.frombuffer(mmap.mmap(-1, 256 << 20), dtype=np.uint8)
    used[:] = 1
    after_use = memory_bytes()
    assert after_use is not None
    assert after_use - after_mapping > 248 << 20
    assert used[0] == 1
