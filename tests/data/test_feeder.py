"""The thread that makes batches: its items, how far ahead it runs, and its end."""

import subprocess
import sys
import threading
import time

import pytest
import torch

from data.feeder import fed


def numbers(count, made, ended, fails=False):
    """Yields 0, 1, ...; records in which thread it makes them, and in which it is closed."""
    try:
        for number in range(count):
            made.append(threading.current_thread().name)
            yield number
        if fails:
            raise OSError("no more")
    finally:
        ended.append(threading.current_thread().name)


def feeding() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "feed"]


def without(item) -> list[torch.Tensor]:
    return []


def settled(made: list) -> int:
    """The number of items, once it no longer grows."""
    count = -1
    while count != len(made):
        count = len(made)
        time.sleep(0.2)
    return count


def test_items_come_in_order_from_another_thread():
    made, ended = [], []
    assert list(fed(numbers(50, made, ended), tensors=without)) == list(range(50))
    assert set(made) == {"feed"}
    assert ended == ["feed"]
    assert not feeding()


def test_the_thread_starts_with_the_first_item_and_stays_one_ahead():
    made, ended = [], []
    items = fed(numbers(50, made, ended), tensors=without)
    assert settled(made) == 0
    for taken in (1, 2, 3):
        next(items)
        assert settled(made) == taken + 1
    items.close()
    assert settled(made) == 4
    assert ended == ["feed"]
    assert not feeding()
    with pytest.raises(StopIteration):
        next(items)


def test_a_deleted_iterator_ends_its_thread():
    made, ended = [], []
    items = fed(numbers(50, made, ended), tensors=without)
    next(items)
    assert feeding()
    del items
    assert not feeding()
    assert ended == ["feed"]


def test_an_error_is_raised_after_the_items_before_it():
    made, ended, found = [], [], []
    items = fed(numbers(3, made, ended, fails=True), tensors=without)
    with pytest.raises(OSError, match="no more"):
        found.extend(items)
    # list.extend keeps the items before the error.
    assert found == [0, 1, 2]
    assert not feeding()


def test_an_item_is_not_kept_alive():
    """Its memory is reused for the next item but one."""
    import weakref

    def tensors():
        for number in range(4):
            yield torch.full((3,), number)

    items = fed(tensors(), tensors=without)
    kept = weakref.ref(next(items))
    next(items)
    assert kept() is None
    items.close()


@pytest.mark.slow
@pytest.mark.parametrize("decoder", ["ffcv", "dali", "torchvision"])
def test_a_process_can_exit_within_an_epoch(converted, decoder):
    """While batches are being made and the iterator still exists."""
    code = (
        "from data.loader import open_loader\n"
        f"loader = open_loader({str(converted.beton('train'))!r}, resolution=32, batch_size=4, decoder={decoder!r})\n"
        "batches = loader.epoch(0)\n"
        "next(batches); print('taken')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, "taken\n", "")
