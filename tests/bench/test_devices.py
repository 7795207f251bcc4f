"""Several devices: real groups of processes on the CPU, bad inputs, and efficiency from the rates."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import models
from bench import BenchError, devices, images
from bench.__main__ import run
from bench.devices import APART, TOGETHER, TOGETHER_BF16, Devices, add_efficiency
from bench.loop import write_inputs
from bench.pair import Pair
from bench.process import CallFailed, Process, answers
from bench.settings import resolve

ROOT = Path(__file__).parents[2]
SMALL = {"resolution": 32, "batch": 4, "epochs": 1, "steps": 3, "threads": "1", "pairs": "mobilenet0.25:mobilenet0.25"}
TWO = pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two processors")


def settings_of(**asked):
    options = {"quick": True, "device": "cpu", "precision": "fp32", "data": None, "refinery": None, "compile": None}
    return resolve(**options, **SMALL, **dict.fromkeys(("crops", "contenders")), **asked)


def row(name: str, rate: float | None, count: int) -> dict:
    measured = {"not_run": "x"} if rate is None else {"rate": {"median": rate}}
    return {"name": name, "devices": count, "batch": 4 * count} | measured


def rows_of(*rates: float | None) -> list[dict]:
    names = ["device 0 alone", "device 1 alone", APART, TOGETHER, TOGETHER_BF16]
    return [row(name, rate, 1 + ("alone" not in name)) for name, rate in zip(names, rates, strict=True)]


def test_efficiency_and_exchange_follow_from_the_rates():
    rows = rows_of(100.0, 60.0, 140.0, 105.0, 112.0)
    add_efficiency(rows)
    assert [each.get("efficiency") for each in rows] == [None, None, 140 / 160, 105 / 160, 112 / 160]
    assert [each.get("exchange") for each in rows[:3]] == [None] * 3
    assert [each["exchange"] for each in rows[3:]] == [pytest.approx(0.25), pytest.approx(0.2)]
    assert devices._findings(rows) == [
        f"2 devices {APART}: 1.75 times the rate of one alone (efficiency 87.5 %).",
        "2 devices together: 1.31 times the rate of one alone (efficiency 65.6 %).",
        "The exchange takes 25.0 % of a step together.",
        "2 devices together, bf16: 1.40 times the rate of one alone (efficiency 70.0 %).",
        "The exchange takes 20.0 % of a step together, bf16.",
    ]


def test_rows_that_did_not_run_are_not_compared():
    rows = rows_of(100.0, None, 140.0, 105.0, None)
    add_efficiency(rows)
    assert not any("efficiency" in each for each in rows)
    assert [each.get("exchange") for each in rows] == [None, None, None, pytest.approx(0.25), None]
    rows = rows_of(100.0, 60.0, None, 105.0, None)
    add_efficiency(rows)
    assert [each.get("efficiency") for each in rows] == [None, None, None, 105 / 160, None]
    assert not any("exchange" in each for each in rows)


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ({"gpus": 0}, "gpus=0: give the number of devices, at least 1"),
        ({"gpus": -2}, "gpus=-2: give the number"),
        ({"gpus": 10_000}, rf"gpus=10000: this machine has {len(os.sched_getaffinity(0))} processors"),
        ({}, "only=devices: needs several devices; give GPUS=2 or more"),
        ({"gpus": 1}, "only=devices: needs several devices; give GPUS=2"),
    ],
)
def test_wrong_numbers_of_devices_end_in_one_line(asked, says, tmp_path):
    with pytest.raises(BenchError, match=says) as raised:
        run(only="machine,devices", device="cpu", quick=True, out=str(tmp_path / "out"), **asked)
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "out").exists()


def test_a_run_of_all_parts_reports_that_it_skips_devices(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("bench.__main__._PARTS", {"devices": devices.measure})
    run(device="cpu", quick=True, out=str(tmp_path / "out"))
    expected = "devices: skipped; it needs several devices; give GPUS=2 or more (on a CPU: processes)\n"
    assert capsys.readouterr().out == expected


@TWO
@pytest.mark.slow
@pytest.mark.parametrize("reduce", [None, "bf16"])
def test_devices_train_independently_or_together(reduce, converted, tmp_path):
    """Devices of a group see different crops, so that only the exchange can give them the same weights."""
    settings = settings_of(gpus=2)
    pair = Pair(*settings.pairs[0], settings)
    write_inputs(pair, images.find(str(converted.folder), tmp_path, most=24 if reduce else 12), tmp_path)
    with Process() as process:
        amount, ended = process.call(_trained, pair, tmp_path, reduce)
    assert amount == 24
    ((world, how, steps, _),) = set(ended)
    assert (world, how, steps) == ((2, "bf16", 3) if reduce else (1, "sum", 3))


def _trained(pair, folder, reduce):
    """Returns the images of an epoch on two devices, and _ended() of each."""
    group = Devices(pair, folder, 1, [0, 1], reduce)
    amount = group.run().amount
    for process in group._processes:
        process.begin(_ended)
    return amount, answers(group._processes)


def _ended():
    trainer = devices._looping._trainer
    (student,) = trainer.students
    found = torch.cat([weight.detach().flatten() for weight in student.network.parameters()])
    digest = hashlib.sha256(found.numpy().tobytes()).hexdigest()
    return trainer.job.group.world, trainer.job.config.reduce, trainer.loader.steps, digest


@TWO
@pytest.mark.slow
def test_a_lost_process_ends_the_calls_of_the_others(converted, tmp_path):
    settings = settings_of(gpus=2)
    pair = Pair(*settings.pairs[0], settings)
    write_inputs(pair, images.find(str(converted.folder), tmp_path, most=24), tmp_path)
    with Process() as process, pytest.raises(CallFailed, match="was killed by SIGABRT|of another device has ended"):
        process.call(_one_lost, pair, tmp_path)


def _one_lost(pair, folder):
    one, other = Devices(pair, folder, 1, [0, 1], "sum")._processes
    other.begin(os.abort)
    one.begin(devices._epoch)
    return answers([one, other])


@TWO
@pytest.mark.slow
def test_two_processes_are_measured_end_to_end(converted, tmp_path):
    words = [word for name, value in SMALL.items() for word in (f"--{name}", str(value))]
    options = ["--only", "devices", "--gpus", "2", "--device", "cpu", "--data", str(converted.folder)]
    done = subprocess.run(
        [sys.executable, "-m", "bench", "--quick", *options, *words, "--out", str(tmp_path / "results")],
        cwd=ROOT,
        env={name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr
    (path,) = (tmp_path / "results").glob("*.json")
    record = json.loads(path.read_text())
    assert record["settings"]["gpus"] == 2
    rows = {each["name"]: each for each in record["rows"]}
    assert list(rows) == ["device 0 alone", "device 1 alone", APART, TOGETHER, TOGETHER_BF16]
    assert all("not_run" not in each for each in rows.values()), rows
    # An epoch has the same number of steps in all rows: 3, of 4 images per device.
    assert [each["turns"][0]["amount"] % (12 * each["devices"]) for each in rows.values()] == [0] * 5
    assert [each["batch"] for each in rows.values()] == [4, 4, 8, 8, 8]
    rates = {name: each["rate"]["median"] for name, each in rows.items()}
    alone = rates["device 0 alone"] + rates["device 1 alone"]
    assert rows[TOGETHER]["efficiency"] == pytest.approx(rates[TOGETHER] / alone)
    assert rows[TOGETHER]["exchange"] == pytest.approx(1 - rates[TOGETHER] / rates[APART])
    weights = sum(weight.numel() for weight in models.build("mobilenet0.25", 1000).parameters())
    assert f"{weights:,} gradients" in "\n".join(record["notes"])
    assert "| together " in done.stdout
