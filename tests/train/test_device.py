"""Precision of a device, and the settings of the process."""

import ctypes
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.paths import python_path
from train import TrainError
from train import device as device_module
from train.device import (
    autocast_type,
    device_named,
    precision_on,
    set_tf32_and_allocator,
    set_threads,
    without_deterministic,
)
from train.distributed import Group

CPU = torch.device("cpu")
ROOT = Path(__file__).parents[2]


def test_unsupported_precisions_are_replaced():
    assert precision_on(CPU, "fp32") == "fp32"
    assert precision_on(CPU, "tf32") == "fp32"
    assert precision_on(CPU, "fp16") == "fp32"
    assert precision_on(CPU, "bf16") == precision_on(CPU) in ("bf16", "fp32")


def test_bf16_is_used_if_there_are_units(bf16_units):
    expected = "bf16" if bf16_units else "fp32"
    assert precision_on(CPU) == precision_on(CPU, "bf16") == precision_on(CPU, "auto") == expected
    assert precision_on(CPU, "fp32") == "fp32"


def test_autocast_types():
    assert [autocast_type(name) for name in ("bf16", "fp16", "tf32", "fp32")] == [
        torch.bfloat16,
        torch.float16,
        None,
        None,
    ]


def test_tf32_is_allowed_only_if_requested():
    try:
        for precision in ("tf32", "bf16", "fp32"):
            set_tf32_and_allocator(CPU, precision)
            assert torch.backends.cuda.matmul.allow_tf32 == (precision == "tf32")
            assert torch.backends.cudnn.allow_tf32 == (precision == "tf32")
    finally:
        set_tf32_and_allocator(CPU, "fp32")


@pytest.mark.parametrize("deterministic", [False, True])
def test_deterministic_switches_off_the_search_for_algorithms(deterministic, monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    try:
        set_tf32_and_allocator(torch.device("cuda"), "bf16", deterministic=deterministic)
        assert torch.backends.cudnn.benchmark is not deterministic
        assert torch.backends.cudnn.deterministic is deterministic
        assert torch.are_deterministic_algorithms_enabled() is deterministic
        assert os.environ.get("CUBLAS_WORKSPACE_CONFIG") == (":4096:8" if deterministic else None)
        # On a CPU nothing changes.
        set_tf32_and_allocator(CPU, "bf16", deterministic=not deterministic)
        assert torch.are_deterministic_algorithms_enabled() is deterministic
    finally:
        set_tf32_and_allocator(torch.device("cuda"), "fp32")
        torch.backends.cudnn.benchmark = False
        torch.utils.deterministic.fill_uninitialized_memory = True


def test_an_operator_without_deterministic_algorithm_is_named():
    torch.use_deterministic_algorithms(True)
    try:
        with pytest.raises(RuntimeError) as caught:
            # One of the few such operators on a CPU.
            torch.zeros(4).put_(torch.tensor([1, 1]), torch.ones(2))
    finally:
        torch.use_deterministic_algorithms(False)
    assert without_deterministic(caught.value) == "put_"
    assert not without_deterministic(RuntimeError("CUDA out of memory"))


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="needs glibc")
def test_memory_that_a_step_frees_is_reused():
    """The pages of a freed tensor are reused for the next one, without page faults."""
    code = """
import resource, sys, torch
from train.device import set_tf32_and_allocator
if sys.argv[1] == "kept":
    set_tf32_and_allocator(torch.device("cpu"), "fp32")
faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):  # the allocator needs some until the pieces fit
    before = faults()
    torch.ones(64 << 20, dtype=torch.uint8)
print(faults() - before)
"""
    faults = {
        how: int(subprocess.run([sys.executable, "-c", code, how], capture_output=True, text=True, check=True).stdout)
        for how in ("kept", "handed back")
    }
    assert faults["kept"] < 1000 < faults["handed back"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine whose GPU PyTorch cannot use, or none")
def test_a_gpu_with_an_outdated_driver_is_not_replaced_by_the_cpu(tmp_path, monkeypatch):
    """With files in place of those that the driver of a GPU shows."""
    (tmp_path / "nvidiactl").touch()
    (tmp_path / "version").write_text(
        "NVRM version: NVIDIA UNIX x86_64 Kernel Module  470.57.02  Tue Jul 13 16:14:05 UTC 2021\nGCC version:  gcc 9\n"
    )
    monkeypatch.setattr(device_module, "_DEVICES", tmp_path)
    monkeypatch.setattr(device_module, "_DRIVER", tmp_path / "version")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert device_named("auto") == CPU
    (tmp_path / "nvidia0").touch()
    for name in ("auto", "cuda"):
        with pytest.raises(TrainError, match=rf"^device={name}: .*driver 470\.57\.02.* or use device=cpu$"):
            device_named(name)
    assert device_named("cpu") == CPU
    # A GPU that is hidden from this process is ignored.
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert device_named("auto") == CPU


@pytest.fixture
def threads(monkeypatch):
    """Restores PyTorch's number of threads after the test; unsets OMP_NUM_THREADS."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("torchs", "processors", "beside", "asked", "found"),
    [
        (64, 2, 1, None, 2),  # a container with a limit
        (32, 64, 1, None, 32),  # a core has two processors
        (64, 64, 8, None, 8),
        (64, 2, 8, None, 1),
        (64, 2, 1, 5, 5),
        (1, 2, 1, None, 1),
    ],
)
def test_number_of_computing_threads(threads, monkeypatch, torchs, processors, beside, asked, found):
    monkeypatch.setattr("train.device.processors", lambda: processors)
    monkeypatch.setattr("train.device.group", lambda: Group(world=beside, beside=beside))
    torch.set_num_threads(torchs)
    set_threads(asked)
    assert torch.get_num_threads() == found


def test_omp_num_threads_applies_unless_threads_are_given(threads, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    monkeypatch.setattr("train.device.processors", lambda: 2)
    torch.set_num_threads(7)
    set_threads()
    assert torch.get_num_threads() == 7
    set_threads(3)
    assert torch.get_num_threads() == 3


def test_threads_below_one_are_refused():
    for asked in (0, -1):
        with pytest.raises(TrainError, match=f"threads={asked}: must be at least 1"):
            set_threads(asked)


@pytest.mark.parametrize(
    ("given", "found"),
    [
        ({}, "GOMP_SPINCOUNT = '1000'"),
        ({"GOMP_SPINCOUNT": "7"}, "GOMP_SPINCOUNT = '7'"),
        ({"OMP_WAIT_POLICY": "passive"}, "GOMP_SPINCOUNT = '0'"),
    ],
)
def test_threads_of_commands_spin_for_a_moment_only(given, found):
    """The variable must be set before PyTorch is loaded; the user's own value is kept."""
    environment = {name: value for name, value in os.environ.items() if not name.endswith(("_POLICY", "_SPINCOUNT"))}
    environment |= {"OMP_DISPLAY_ENV": "verbose", "PYTHONPATH": python_path()} | given
    done = subprocess.run(
        [sys.executable, "-m", "train.evaluate", "--help"], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0
    assert found in done.stderr


def test_a_run_computes_with_the_given_number_of_threads(run, threads):
    folder = run("--threads", "2", "--epochs", "1").folder
    (start,) = (json.loads(line) for line in (folder / "starts.jsonl").read_text().splitlines())
    assert start["threads"] == torch.get_num_threads() == 2
