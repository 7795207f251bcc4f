"""Measuring in turns, with real contenders and failing ones."""

import os
import time
from functools import partial
from pathlib import Path

import pytest

from bench import turns
from bench.machine import Copy, MatrixProduct
from bench.turns import Contender, Runner, Work, in_turns


def contender(name: str, build, **more) -> Contender:
    return Contender(build, {"name": name, "group": "", "unit": "TFLOP/s"}, **more)


@pytest.mark.slow
def test_all_have_their_turns_and_failures_have_a_reason():
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
        # It was idle during the turns of the other.
        assert row["turns"][1]["idle_cpu_seconds"] < 0.5 * row["turns"][0]["cpu_seconds"] + 0.1
    # A product of 2048 x 2048 takes 17 GFLOP; its matrices 50 MB.
    assert rows[0]["turns"][0]["amount"] % 0.017179869184 == pytest.approx(0, abs=1e-9)
    assert rows[0]["peak_memory_bytes"] > 50e6


def test_preparation_is_not_timed(monkeypatch):
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


class Alive(Runner):
    """Writes a file named after its process; its facts list the contenders whose processes are alive."""

    def __init__(self, folder: Path, name: str, seconds: float = 0.01):
        self._folder, self._seconds = folder, seconds
        (folder / f"{os.getpid()}.{name}").touch()

    def run(self) -> Work:
        time.sleep(self._seconds)
        return Work(1)

    def facts(self) -> dict:
        return {"seen": sorted(path.suffix[1:] for path in self._folder.iterdir() if runs(int(path.stem)))}


def runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.slow
def test_large_contenders_are_in_memory_one_at_a_time(tmp_path):
    made = [
        contender("small", partial(Alive, tmp_path, "small"), beside=True),
        contender("a", partial(Alive, tmp_path, "a")),
        contender("broken", partial(Alive, tmp_path / "missing", "broken")),
        contender("b", partial(Alive, tmp_path, "b")),
    ]
    rows = in_turns(made, turns=2, seconds=0.02, title="apart", apart=True)
    assert [row.get("seen") for row in rows[1:]] == [["a", "small"], None, ["b", "small"]]
    assert "FileNotFoundError" in rows[2]["not_run"]
    # The small one has turns with each of the others.
    assert [len(row.get("turns", [])) for row in rows] == [6, 2, 0, 2]


@pytest.mark.slow
def test_measuring_ends_at_the_deadline_and_keeps_earlier_turns(tmp_path):
    made = [
        contender("quick", partial(Alive, tmp_path, "quick")),
        contender("slow", partial(Alive, tmp_path, "slow", seconds=60)),
    ]
    started = time.monotonic()
    (quick,) = in_turns(made[:1], turns=1000, seconds=0.02, title="a few", deadline=started + 12)
    assert 12 <= time.monotonic() - started < 15
    assert 0 < len(quick["turns"]) < 1000
    started = time.monotonic()
    quick, slow = in_turns(made, turns=1, seconds=0.02, title="none", hurried=True, deadline=started + 12)
    assert time.monotonic() - started < 15
    assert slow["not_run"] == "the time limit ended before its first turn"
    assert quick["not_run"] == slow["not_run"]


@pytest.mark.slow
def test_clock_and_power_are_sampled_during_turns(tmp_path, monkeypatch):
    """From a program that replaces nvidia-smi and has its output format."""
    script = tmp_path / "nvidia-smi"
    script.write_text("#!/bin/sh\necho '1755, 612.50'\n")
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    (tmp_path / "alive").mkdir()
    made = [contender("a", partial(Alive, tmp_path / "alive", "a"))]
    (row,) = in_turns(made, turns=2, seconds=0.5, title="watched", on_gpu=True)
    assert (row["clock_mhz"], row["watts"]) == (1755, 612.5)
    (row,) = in_turns(made, turns=1, seconds=0.1, title="not watched")
    assert "watts" not in row


def test_idle_is_the_share_of_a_turn_without_work_on_the_gpu(tmp_path):
    taking = turns._Taking([contender("a", partial(Alive, tmp_path, "a"))], 0.1, None, False)
    taking._facts[0] = {"busy_seconds": 0.25}
    taking._measured[0] = [turns.Turn(3, 1.0, 0, 1, 0)]
    assert taking.row(0)["idle"] == pytest.approx(0.25)
    taking._facts[0] = {"busy_seconds": None}
    assert "idle" not in taking.row(0)
