"""How many processors a process may use, by control groups as found on machines and in containers."""

import os
from pathlib import Path

import pytest

from data import processors as room
from data.decoders.prefetch import default_threads
from data.processors import processors, time_limit


def groups(folder: Path, own: str, files: dict[str, str]) -> tuple[Path, Path]:
    """A mounted tree with these files, and a process's list of its groups."""
    for name, text in files.items():
        (folder / "cgroup" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "cgroup" / name).write_text(text)
    (folder / "own").write_text(own)
    return folder / "cgroup", folder / "own"


V1 = "9:name=systemd:/\n4:memory:/docker/abc\n2:cpu,cpuacct:/docker/abc\n1:cpuset:/docker/abc\n0::/\n"


@pytest.mark.parametrize(
    ("own", "files", "limit"),
    [
        # v2, in a container with its own namespace.
        ("0::/\n", {"cpu.max": "200000 100000\n"}, 2.0),
        ("0::/\n", {"cpu.max": "max 100000\n"}, None),
        ("0::/\n", {"cpu.max": "150000 100000\n"}, 1.5),
        # v2 on the machine itself: the group, or one above it, has a limit.
        ("0::/user.slice/job\n", {"user.slice/job/cpu.max": "50000 100000\n"}, 0.5),
        (
            "0::/user.slice/job\n",
            {"user.slice/cpu.max": "300000 100000\n", "user.slice/job/cpu.max": "max 100000\n"},
            3.0,
        ),
        (
            "0::/user.slice/job\n",
            {"user.slice/cpu.max": "300000 100000\n", "user.slice/job/cpu.max": "800000 100000\n"},
            3.0,
        ),
        ("0::/user.slice/job\n", {"another/cpu.max": "100000 100000\n"}, None),
        # v1: the path is the host's, and the container sees its own group at the root.
        (V1, {"cpu,cpuacct/cpu.cfs_quota_us": "200000\n", "cpu,cpuacct/cpu.cfs_period_us": "100000\n"}, 2.0),
        (V1, {"cpu/docker/abc/cpu.cfs_quota_us": "50000", "cpu/docker/abc/cpu.cfs_period_us": "25000"}, 2.0),
        (V1, {"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, None),
        # Other controllers, broken files, and no limit.
        (V1, {"memory/cpu.cfs_quota_us": "100000\n", "memory/cpu.cfs_period_us": "100000\n"}, None),
        ("0::/\n", {"cpu.max": "what\n"}, None),
        ("0::/\n", {"cpu.max": "100000 0\n"}, None),
        ("", {}, None),
    ],
)
def test_limits(tmp_path, own, files, limit):
    assert time_limit(*groups(tmp_path, own, files)) == limit


def test_without_control_groups_there_is_no_limit(tmp_path):
    assert time_limit(tmp_path / "none", tmp_path / "nothing") is None


@pytest.mark.parametrize(("quota", "count"), [("200000", 2), ("150000", 2), ("10000", 1), ("max", 64), ("9900000", 64)])
def test_a_container_with_two_of_64_processors_has_two(tmp_path, monkeypatch, quota, count):
    mounted, own = groups(tmp_path, "0::/\n", {"cpu.max": f"{quota} 100000\n"})
    monkeypatch.setattr(room, "_CGROUPS", mounted)
    monkeypatch.setattr(room, "_OWN_CGROUPS", own)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(64)))
    assert processors() == default_threads() == count


def test_affinity_is_used_if_it_allows_fewer(tmp_path, monkeypatch):
    mounted, own = groups(tmp_path, "0::/\n", {"cpu.max": "800000 100000\n"})
    monkeypatch.setattr(room, "_CGROUPS", mounted)
    monkeypatch.setattr(room, "_OWN_CGROUPS", own)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {1, 5, 7})
    assert processors() == 3
