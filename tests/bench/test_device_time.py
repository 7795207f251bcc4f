"""GPU time from a profiler's events, and values from the driver; without a GPU, events and driver are made up."""

import os
from types import SimpleNamespace

import pytest
import torch
from torch.autograd import DeviceType
from torch.autograd.profiler_util import FunctionEventAvg

from bench.device_time import busy_seconds, covered
from bench.record import table
from bench.trace import most_expensive
from tests.bench.test_record import RECORD
from train import nvidia


def average(key: str, device: DeviceType, on_device: float, on_host: float = 0, **more) -> FunctionEventAvg:
    event = FunctionEventAvg()
    event.key, event.count, event.device_type = key, 2, device
    event.self_device_time_total, event.self_cpu_time_total = on_device, on_host
    vars(event).update({"is_user_annotation": False} | more)
    return event


def test_time_on_the_device_counts_once():
    """Operators on the host include the time of their kernels, and named ranges that of all kernels in them."""
    events = [
        average("aten::mm", DeviceType.CPU, 3000, 500),
        average("gemm(float*, int)", DeviceType.CUDA, 3000),
        average("aten::relu", DeviceType.CPU, 1000, 700),
        average("relu", DeviceType.CUDA, 1000),
        average("Optimizer.step", DeviceType.CUDA, 4000, is_user_annotation=True),
    ]
    assert most_expensive(events, on_gpu=True) == [["gemm", "2", "3.00", "75.0 %"], ["relu", "2", "1.00", "25.0 %"]]
    assert most_expensive(events[::2], on_gpu=False)[0] == ["aten::relu", "2", "0.70", "58.3 %"]


def test_overlapping_spans_count_once():
    assert covered([]) == 0
    assert covered([(5, 6), (0, 2), (1, 3), (1.5, 2)]) == 4
    assert covered([(0, 10), (1, 2), (9, 11)]) == 11


@pytest.fixture
def driver(tmp_path, monkeypatch):
    """Replaces nvidia-smi by a program that prints a text and writes its arguments to the file `asked`."""

    def say(text: str) -> None:
        script = tmp_path / "nvidia-smi"
        script.write_text(f"#!/bin/sh\necho \"$*\" > {tmp_path}/asked\ncat <<'E'\n{text}\nE\n")
        script.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")

    return say


def test_values_that_the_driver_does_not_report_are_missing(driver, tmp_path):
    driver("580.159.03, NVIDIA H200, 143771, 700.00, 1980, 3201\n580.159.03, NVIDIA H200, 143771, [N/A], 1980, 3201")
    one, other = nvidia.gpus()
    assert one == {
        "driver": "580.159.03",
        "name": "NVIDIA H200",
        "memory_mib": 143771,
        "power_limit_watts": 700,
        "max_clock_mhz": 1980,
        "max_memory_clock_mhz": 3201,
    }
    assert other["power_limit_watts"] is None
    asked = (tmp_path / "asked").read_text()
    assert "--query-gpu=driver_version,name,memory.total,power.limit,clocks.max.sm,clocks.max.memory" in asked
    driver("1755, 600.5\n1745, [Not Supported]")
    assert nvidia.now() == {"clock_mhz": 1750, "watts": 600.5}
    driver("No devices were found")
    assert (nvidia.gpus(), nvidia.now()) == ([], {})


def test_only_visible_gpus_are_queried(tmp_path, monkeypatch):
    """All GPUs are queried if the driver does not know the visible ones by these identifiers."""
    script = tmp_path / "nvidia-smi"
    answers = "*--id=GPU-1a,GPU-2b*) echo 1000, 500;; *--id*) exit 6;; *) echo 9, 9;;"
    script.write_text(f'#!/bin/sh\ncase "$*" in {answers} esac\n')
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    known = ["1a", "GPU-2b"]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(known))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda number: SimpleNamespace(uuid=known[number]))
    assert nvidia.now() == {"clock_mhz": 1000, "watts": 500}
    known[1] = "MIG-3"
    assert nvidia.now() == {"clock_mhz": 9, "watts": 9}


def test_a_table_names_driver_clocks_and_power():
    found = {
        "date": "2026-11-22",
        "commit": "",
        "device": "NVIDIA H200",
        "cpu": {"model": "A", "cores": 2, "simd": ["avx2"]},
        "memory_bytes": 2**31,
        "load_average": 0.1,
        "command": "make bench",
        "threads": 2,
        "compiler": None,
        "versions": {"torch": "2", "cudnn": "9.12.0"},
    }
    gpu = {
        "driver": "580.1",
        "name": "NVIDIA H200",
        "memory_mib": 143771.0,
        "power_limit_watts": None,
        "max_clock_mhz": 1980.0,
        "max_memory_clock_mhz": 3201.0,
    }
    text = table(RECORD, found | {"gpus": [gpu, gpu]})
    assert "NVIDIA H200 (2 of them, driver 580.1, 143771 MiB, up to 1980 MHz, memory 3201 MHz); A, 2 cores" in text
    assert "cudnn 9.12.0" in text
    assert "NVIDIA H200; A, 2 cores" in table(RECORD, found)


@pytest.mark.gpu
def test_the_profiler_sees_products():
    x = torch.randn(4096, 4096, device="cuda")

    def work() -> None:
        for _ in range(10):
            x @ x

    work()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    work()
    end.record()
    torch.cuda.synchronize()
    busy = busy_seconds(work)
    assert busy is not None
    assert busy == pytest.approx(start.elapsed_time(end) / 1000, rel=0.3)
    assert nvidia.now()["clock_mhz"] > 0
