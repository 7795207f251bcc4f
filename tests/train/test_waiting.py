"""The time in which a training waits for its data."""

import time

import pytest
import torch

from train.waiting import Waiting


def test_waiting_on_a_cpu_is_the_time_of_fetching():
    waiting = Waiting(torch.device("cpu"))
    for seconds in (0.05, 0.1):
        with waiting.measured():
            time.sleep(seconds)
        time.sleep(0.05)  # a step
    assert 0.15 <= waiting.taken() < 0.19
    assert waiting.taken() == 0


@pytest.mark.gpu
def test_waiting_on_a_gpu_is_its_idle_time():
    """Fetching while the device is still busy with the previous step does not count as waiting."""
    waiting, work = Waiting(torch.device("cuda")), torch.randn(4096, 4096, device="cuda")

    def step(products: int) -> float:
        started = time.perf_counter()
        for _ in range(products):
            work @ work
        torch.cuda.synchronize()
        return time.perf_counter() - started

    step(3)
    products = int(0.4 / (step(20) / 20))
    for _ in range(products):
        work @ work
    with waiting.measured():
        time.sleep(0.1)
    torch.cuda.synchronize()
    assert waiting.taken() < 0.03
    with waiting.measured():
        time.sleep(0.1)
    torch.cuda.synchronize()
    assert 0.09 < waiting.taken() < 0.2
