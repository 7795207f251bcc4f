"""Uncached files: eviction from the page cache, read-ahead, and the table's ratios."""

import json
import os
from functools import partial

import numpy as np
import pytest

from bench import BenchError, cold, images
from bench.__main__ import run
from bench.cold import _STORAGES, Reading, _Epochs, _with_ratios, cached_share
from data.beton import Beton
from tests.pictures import photograph

BATCH = 8


@pytest.fixture(params=sorted(_STORAGES))
def path(request, tmp_path):
    """A stored file of 40 images."""
    files = [str(tmp_path / f"{i}.jpg") for i in range(5)]
    for i, file in enumerate(files):
        photograph(i, 300, 200 + i).save(file)
    images.write_converted(tmp_path / "set.beton", images.spread(files, 40), _STORAGES[request.param])
    return tmp_path / "set.beton"


def epochs(path, **reading) -> _Epochs:
    return _Epochs(Reading("any", **reading), path, resolution=32, batch=BATCH, threads=2)


@pytest.mark.slow
def test_a_cold_epoch_starts_uncached_and_a_warm_one_cached(path):
    beton = Beton(path)
    warm = epochs(path, order="random", cold=False)
    assert warm.run().amount == 40
    assert warm.facts() == {"cached": cached_share(beton), "bytes_per_image": beton.lengths.mean()}
    everything = cached_share(beton)
    assert everything > 0
    warm._unmap()
    for order in ("random", "quasi-random", None):
        runner = epochs(path, order=order, cold=True, ahead=order == "random")
        try:
            work = runner.run()
        except BenchError as error:  # a file system in memory
            assert "set TMPDIR" in str(error)
            pytest.skip("the temporary folder is not on a disk")
        assert work.amount == 40
        assert work.untimed_seconds > 0
        # The system may read more than the images' pages.
        assert cached_share(beton) > 0.1 * everything
        assert runner.facts()["cached"] < 0.05


def test_pages_that_stay_cached_are_an_error(path, monkeypatch):
    monkeypatch.setattr(os, "posix_fadvise", lambda *_: None)
    np.sum(Beton(path).bytes)
    with pytest.raises(BenchError, match="stay in memory: set TMPDIR"):
        epochs(path, order="random", cold=True).run()


def test_every_image_is_requested_once_and_before_its_batch(path, monkeypatch):
    monkeypatch.setattr(cold, "_READ_AHEAD", 2)
    asked: list[tuple[int, int]] = []
    monkeypatch.setattr(os, "posix_fadvise", lambda file, start, length, advice: asked.append((start, length)))
    beton = Beton(path)
    counts = []
    wanted = []
    runner = epochs(path, order="quasi-random", cold=False, ahead=True)
    for request in runner._requests(0):
        runner._asking.submit(int).result()  # waits for earlier requests
        counts.append(len(asked))
        wanted += list(zip(beton.starts[request.indices], beton.lengths[request.indices], strict=True))
    assert counts == [16, 24, 32, 40, 40]
    assert asked == wanted
    assert len(set(asked)) == 40
    del asked[:]
    list(epochs(path, order="random", cold=False)._requests(0))
    assert asked == []


def test_cold_rows_are_compared_with_warm_rows_and_with_no_read_ahead():
    def row(reading: Reading, rate: float) -> dict:
        return reading.row | {"rate": {"median": rate}}

    random = partial(Reading, "jpeg", "random")
    rows = [
        row(random(cold=False), 100),
        row(random(cold=True), 50),
        row(random(cold=True, ahead=True), 75),
        row(Reading("jpeg", None, cold=True), 900),
        random(cold=True).row | {"reads": "blocks", "not_run": "the disk is full"},
    ]
    ratios = [(row.get("of_warm"), row.get("gained")) for row in _with_ratios(rows)]
    assert ratios == [(None, None), (0.5, None), (0.75, 1.5), (None, None), (None, None)]
    assert len({(row["group"], row["name"]) for row in rows[:4]}) == 4


@pytest.mark.slow
def test_the_part_runs_end_to_end(tmp_path):
    out = tmp_path / "out"
    run(only="cold", quick=True, crops=16, batch=8, epochs=1, resolution=32, out=str(out))
    (record,) = (json.loads(path.read_text()) for path in out.glob("*-cold-*.json"))
    assert len(record["rows"]) == 14
    assert record["settings"]["crops"] == 128
    assert all(row["cached"] > 0.2 for row in record["rows"][:4])
    # The other rows are not run if the temporary folder is in memory.
    assert all(row["cached"] < 0.05 and row["rate"] for row in record["rows"][4:] if "not_run" not in row)
