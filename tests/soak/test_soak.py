"""The soak in small, and that its verdict notices what it is there for; `make soak` is an hour of it."""

import gc
import json
import mmap
import os
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from command import UserError
from tests.soak import usage, verdict
from tests.soak.__main__ import run, soak
from tests.soak.usage import Usage
from tests.soak.verdict import Round

ROOT = Path(__file__).parents[2]


def check_flat(printed: str, out: Path, names: list[str], trained: int) -> None:
    """trained: networks, in all rounds of these configurations, one of each."""
    assert printed.splitlines()[-1].endswith(": flat")
    rounds = [json.loads(line) for line in (out / "rounds.jsonl").read_text().splitlines()]
    assert len(rounds) >= 4 * len(names)
    assert [each["configuration"] for each in rounds] == names * (len(rounds) // len(names))
    found = json.loads((out / "verdict.json").read_text())
    assert (found["rounds"], found["growing"]) == (len(rounds), [])
    # The standing training has done as many epochs, and each round those of its own.
    log = (out / "trainings.log").read_text()
    assert f"epoch {len(rounds)}/1000000: loss" in log
    assert log.count("epoch 3/3: loss") == len(rounds) // len(names) * trained


def test_a_few_trainings_leave_nothing_behind(tmp_path, capsys):
    run(minutes=0, only="jpeg-ffcv", out=str(tmp_path))
    check_flat(capsys.readouterr().out, tmp_path, ["jpeg-ffcv"], trained=1)


@pytest.mark.slow
def test_a_short_soak_is_flat(tmp_path):
    pytest.importorskip("nvidia.dali")
    names = ["jpeg-torchvision", "raw-dali", "blocks-ffcv"]
    words = ["-m", "tests.soak", "--minutes", "0", "--only", ",".join(names), "--out", str(tmp_path)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *words], capture_output=True, text=True, cwd=ROOT, env=environment, timeout=280
    )
    assert done.returncode == 0, done.stdout + done.stderr
    check_flat(done.stdout, tmp_path, names, trained=2 + 1 + 2)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"minutes": -1.0}, "minutes=-1: must not be below 0"),
        ({"only": "jpeg-ffcv,jpg"}, "only=jpg: unknown; there are jpeg-ffcv, "),
        ({"out": __file__}, "cannot be written"),
    ],
)
def test_slips_are_named(options, says):
    with pytest.raises(UserError, match=says):
        run(**options)


# What is planted stays in here.
KEPT: list[object] = []


def keep_memory() -> None:
    KEPT.append(np.ones(200 << 10, np.uint8))


def keep_pages() -> None:
    """Memory that is not malloc's."""
    KEPT.append(mmap.mmap(-1, 200 << 10))
    KEPT[-1][:] = bytes([1]) * (200 << 10)  # type: ignore[index]


def keep_handle() -> None:
    KEPT.append(open(os.devnull))  # noqa: SIM115


def keep_region() -> None:
    # Each with another protection than its neighbour, or the system would merge them to one.
    KEPT.append(mmap.mmap(-1, 4096, prot=mmap.PROT_READ if len(KEPT) % 2 else mmap.PROT_READ | mmap.PROT_WRITE))


class Waiting(threading.Thread):
    """A thread that is left waiting."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.end = threading.Event()
        self.run = self.end.wait  # type: ignore[method-assign]
        self.start()


def keep_thread() -> None:
    KEPT.append(Waiting())


def keep_child() -> None:
    KEPT.append(subprocess.Popen(["sleep", "60"]))


@pytest.fixture
def quick_looks(monkeypatch):
    """Collections that pass over what other tests have left, and no long wait for threads that other tests end."""
    monkeypatch.setattr(usage, "_BETWEEN", 0.001)
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()
    for kept in KEPT:
        if isinstance(kept, Waiting):
            kept.end.set()
            kept.join()
        elif isinstance(kept, subprocess.Popen):
            kept.kill()
            kept.wait()
        elif hasattr(kept, "close"):
            kept.close()
    KEPT.clear()


def rounds_with(leak, every: int = 1) -> list[Round]:
    """Rounds of two configurations, as if each had taken five seconds; one of them leaks every so many times."""
    calls = 0

    def leaking() -> None:
        nonlocal calls
        calls += 1
        if leak and calls % every == 0:
            leak()

    under_way = soak({"sound": lambda: None, "leaking": leaking}, minutes=60)
    return [replace(next(under_way), seconds=5.0 * number) for number in range(1, 61)]


@pytest.mark.usefixtures("quick_looks")
@pytest.mark.parametrize(
    ("leak", "every", "what"),
    [
        (None, 1, None),
        (keep_memory, 1, "allocated"),
        (keep_pages, 1, "memory"),
        (keep_handle, 8, "handles"),
        (keep_thread, 8, "threads"),
        (keep_child, 8, "children"),
        (keep_region, 1, "regions"),
    ],
)
def test_planted_leaks_are_noticed(leak, every, what, monkeypatch):
    # Of the five minutes that are played: as much an hour as in the real thing.
    monkeypatch.setattr(verdict, "LIMITS", {name: limit / 12 for name, limit in verdict.LIMITS.items()})
    found = {line.split(":")[0].split(" of ")[0] for line in verdict.growing(rounds_with(leak, every))}
    # Memory and regions may come with it: a thread has a stack.
    assert found >= ({what} if what else set())
    assert found & {*verdict.COUNTS} <= {what}
    assert what or not found


def made(memory=lambda round: 0.0, *, rounds: int = 700, hours: float = 1.0, **counts) -> list[Round]:
    """Rounds of seven configurations, each of which has a memory of its own."""
    usual = Usage(500, 900, 1000, 200, 0, threads=6, handles=12, children=2, regions=1500)
    return [
        Round(
            f"c{number % 7}",
            3600 * hours * (number + 1) / rounds,
            replace(
                usual,
                memory=500 + 10 * (number % 7) + memory(number),
                **{name: getattr(usual, name) + count(number) for name, count in counts.items()},
            ),
        )
        for number in range(rounds)
    ]


def test_what_libraries_load_in_the_first_rounds_does_not_count():
    assert verdict.growing(made(lambda number: min(number, 100) * 5.0)) == []
    assert verdict.growing(made(threads=lambda number: number > 100, regions=lambda number: number > 100)) == []


def test_noise_is_flat_and_a_small_growth_in_it_is_not():
    noise = np.random.default_rng(0).normal(0, 8, 700)
    # Now and then a round that needs much, which the slope must not follow.
    noise[::50] += 300
    assert verdict.growing(made(lambda number: noise[number])) == []
    (found,) = verdict.growing(made(lambda number: noise[number] + 40 * number / 700))
    assert found.startswith("memory: +")


@pytest.mark.parametrize(
    ("an_hour", "hours", "grows"), [(40, 1, True), (20, 1, False), (40, 5, True), (80, 0.25, False)]
)
def test_the_limit_is_that_of_an_hour_or_of_a_shorter_run(an_hour, hours, grows):
    found = verdict.growing(made(lambda number: an_hour * hours * number / 700, hours=hours))
    assert bool(found) == grows


def test_one_configuration_that_grows_is_found_and_named():
    found = verdict.growing(made(handles=lambda number: number // 200 if number % 7 == 3 else 0))
    assert found == ["handles of c3: 13 at first, 15 in the end"]
    # A late one in all.
    assert len(verdict.growing(made(threads=lambda number: number > 500))) == 7


def test_growth_of_least_squares_is_in_units_of_an_hour():
    growth = verdict.slope(made(lambda number: 3.5 * number / 700, hours=0.5), "memory")
    assert growth.least_squares == pytest.approx(7, rel=0.01)
    assert growth.robust == pytest.approx(7, rel=0.01)
    assert growth.low <= growth.robust <= growth.high


def test_a_verdict_needs_rounds_of_each_configuration():
    assert not verdict.enough(made(rounds=20), 7)
    assert verdict.enough(made(rounds=28), 7)
    assert not verdict.enough([each for each in made(rounds=28) if each.configuration != "c0"], 7)
