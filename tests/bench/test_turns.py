"""Taking turns: real contenders, a failing one among them."""

import time
from functools import partial

import pytest

from bench import turns
from bench.machine import Copy, MatrixProduct
from bench.turns import Contender, Runner, Work, in_turns


def contender(name: str, build, **more) -> Contender:
    return Contender(build, {"name": name, "group": "", "unit": "TFLOP/s"}, **more)


@pytest.mark.slow
def test_all_take_turns_and_those_that_fail_say_why():
    product = partial(MatrixProduct, "cpu", "fp32", 1e12)
    rows = in_turns(
        [
            contender("product", product),
            contender("fails", partial(MatrixProduct, "cpu", "fp32", 0.0)),
            contender("copy", partial(Copy, "cpu", from_host=False)),
            contender("left out", product, not_run="no such unit"),
        ],
        turns=2,
        seconds=0.1,
        title="a few",
    )
    assert [row["name"] for row in rows] == ["product", "fails", "copy", "left out"]
    assert "ZeroDivisionError" in rows[1]["not_run"]
    assert rows[3]["not_run"] == "no such unit"
    for row in (rows[0], rows[2]):
        assert len(row["turns"]) == 2
        rates = [turn["amount"] / turn["seconds"] for turn in row["turns"]]
        assert row["rate"] == pytest.approx({"median": sum(rates) / 2, "min": min(rates), "max": max(rates)})
        assert all(turn["seconds"] >= 0.1 for turn in row["turns"])
        assert row["waiting"] == 0
        # While the other had its turn, it rested.
        assert row["turns"][1]["idle_cpu_seconds"] < 0.5 * row["turns"][0]["cpu_seconds"] + 0.1
    # A product of 2048 x 2048 takes 17 GFLOP; its matrices 50 MB.
    assert rows[0]["turns"][0]["amount"] % 0.017179869184 == pytest.approx(0, abs=1e-9)
    assert rows[0]["peak_memory_bytes"] > 50e6


def test_preparation_does_not_count(monkeypatch):
    class Prepared(Runner):
        def run(self) -> Work:
            started = time.perf_counter()
            time.sleep(0.05)
            prepared = time.perf_counter() - started
            time.sleep(0.01)
            return Work(1, untimed_seconds=prepared)

    monkeypatch.setattr(turns, "_runner", Prepared(), raising=False)
    monkeypatch.setattr(turns, "_cpu_at_end", 0.0, raising=False)
    turn = turns._turn(0.025)
    assert 2 <= turn.amount <= 3
    assert turn.seconds < 0.05 * turn.amount
