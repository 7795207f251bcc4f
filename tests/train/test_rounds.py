"""Labels and maps by several processes: the same bytes for any number of them, and a common end."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from data.beton import Beton
from tests.paths import python_path
from tests.train.conftest import TINY
from train import TrainError
from train.chain import main as chain_main
from train.config import parse
from train.distributed import Group
from train.interrupt import Stop
from train.job import check, resolve
from train.label import Labeller, LabelOptions
from train.label import main as label_main
from train.labels.store import open_store
from train.maps import main as maps_main
from train.rounds import own_blocks
from train.tables.command import main as tables_main

ROOT = Path(__file__).parents[2]
EXACT = LabelOptions("exact")
# 48 images in batches of 20: three blocks, of which the last is filled up from the first.
BATCH = ("--batch", "20")


@pytest.mark.parametrize("world", [2, 3, 4])
def test_whole_batches_are_distributed(converted, refinery, world):
    words = [*TINY, *BATCH, "--copies", "2", "--data", str(converted.folder), "--refinery", str(refinery)]
    config = parse(words)
    data, (labels,) = check([config])
    job = resolve(config, data, labels)
    alone = [[batch.crops.clone(), batch.indices] for batch in Labeller(job, EXACT)._batches(1)]
    assert [len(indices) for _, indices in alone] == [20, 20, 20, 20, 8, 8]
    found = {}
    for rank in range(world):
        labeller = Labeller(job, EXACT, Group(rank, world))
        own = own_blocks(labeller.loader, Group(rank, world))
        places = [2 * block + copy for block in own for copy in range(2)]
        found |= dict(zip(places, [[each.crops.clone(), each.indices] for each in labeller._batches(1)], strict=True))
    assert sorted(found) == list(range(6))
    for place, parts in found.items():
        assert all(torch.equal(mine, theirs) for mine, theirs in zip(parts, alone[place], strict=True)), place


@pytest.mark.parametrize("main", [label_main, maps_main, chain_main, tables_main])
def test_a_wrong_number_of_devices_is_refused(main, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train", "--gpus", "some"])
    with pytest.raises(TrainError, match="gpus=some: give the number of devices, at least 1"):
        main()


def start(module: str, *words: str, launcher: tuple[str, ...] = ()) -> subprocess.Popen:
    environment = {name: value for name, value in os.environ.items() if name != "TYPED_COMMAND"}
    return subprocess.Popen(
        [sys.executable, "-m", *launcher, *(["-m"] if launcher else []), module, *words],
        env=environment | {"PYTHONPATH": python_path(), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def ended(process: subprocess.Popen, status: int = 0) -> str:
    out, _ = process.communicate(timeout=300)
    assert process.returncode == status, out
    assert "Traceback" not in out
    return out


@pytest.fixture
def asked(converted, refinery) -> list[str]:
    tiny = [*("--resolution", "32", "--device", "cpu", "--precision", "fp32"), *BATCH]
    return [*tiny, "--data", str(converted.folder), "--refinery", str(refinery)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("module", "words"),
    [
        ("train.label", ["--epochs", "2", "--format", "exact", "--copies", "2"]),
        ("train.label", ["--epochs", "1", "--labels.bn", "running"]),
        ("train.maps", ["--map_resolution", "96"]),
    ],
    ids=["exact, batch statistics", "packed, running statistics", "maps"],
)
def test_any_number_of_processes_writes_the_bytes_of_one(asked, tmp_path, module, words):
    for world in ("1", "2", "4"):
        out = ended(start(module, *asked, *words, "--out", str(tmp_path / world), "--gpus", world))
        assert out.count("\nfinished") == 1
    names = sorted(path.name for path in (tmp_path / "1").iterdir())
    assert len(names) == 1 + open_store(tmp_path / "1").epochs
    for world in ("2", "4"):
        assert sorted(path.name for path in (tmp_path / world).iterdir()) == names
        for name in names[:-1] if names[-1] == "labels.json" else names[1:]:
            assert (tmp_path / world / name).read_bytes() == (tmp_path / "1" / name).read_bytes()
        store = open_store(tmp_path / world)
        assert store.description == open_store(tmp_path / "1").description
        for epoch in range(store.epochs):
            assert store.rows(epoch).any(axis=1).all()  # the digest matches, and every row was written


@pytest.mark.slow
def test_each_machine_fills_its_own_file(asked, tmp_path):
    """Two launchers, as on two machines: one file each, without leftovers of a killed one."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    words = [*asked, "--epochs", "2", "--format", "exact", "--out"]
    ended(start("train.label", *words, str(tmp_path / "one")))
    folder = tmp_path / "labels"
    folder.mkdir()
    left = np.full((tmp_path / "one" / "epoch-0000.labels").stat().st_size, 255, np.uint8)
    for name in (".epoch-0000.partial", ".epoch-0000.1.partial"):
        left.tofile(folder / name)
    nodes = [
        start(
            "train.label",
            *words,
            str(folder),
            launcher=(
                *("torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1", "--rdzv-id", "labels"),
                *("--rdzv-backend", "c10d", "--rdzv-endpoint", f"localhost:{port}"),
            ),
        )
        for _ in range(2)
    ]
    assert sum(ended(node).count("finished: 2 epochs") for node in nodes) == 1
    for epoch in range(2):
        assert np.array_equal(open_store(folder).rows(epoch), open_store(tmp_path / "one").rows(epoch))
    assert sorted(path.name for path in folder.iterdir()) == ["epoch-0000.labels", "epoch-0001.labels", "labels.json"]


@pytest.mark.slow
def test_a_killed_process_ends_all_and_finished_epochs_are_kept(asked, tmp_path):
    words = [*asked, "--out", str(tmp_path / "labels"), "--gpus", "2"]
    process = start("train.label", *words, "--epochs", "5000")
    while not (tmp_path / "labels" / "epoch-0001.labels").is_file():
        time.sleep(0.1)
    children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=True).stdout
    os.kill(int(children.split()[-1]), signal.SIGKILL)
    out = ended(process, 2)
    assert "error: a process was ended by signal 9; finished epochs are kept" in out
    assert out.count("error:") == 1
    assert "to continue" not in out
    store = open_store(tmp_path / "labels")
    assert store.epochs >= 2
    before = [path.stat().st_mtime_ns for path in sorted(store.folder.glob("*.labels"))]
    ended(start("train.label", *words, "--epochs", str(store.epochs + 1)))
    assert [path.stat().st_mtime_ns for path in sorted(store.folder.glob("*.labels"))][:-1] == before


@pytest.mark.slow
def test_a_stop_of_one_process_stops_all(asked, tmp_path):
    process = start("train.label", *asked, "--epochs", "5000", "--out", str(tmp_path / "labels"), "--gpus", "2")
    while not (tmp_path / "labels" / "epoch-0000.labels").is_file():
        time.sleep(0.1)
    children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=True).stdout
    os.kill(int(children.split()[-1]), signal.SIGTERM)
    out = ended(process, 130)
    assert out.count("to continue, type again:\n  python -m train.label --resolution") == 1
    assert not list((tmp_path / "labels").glob(".*"))


@pytest.mark.slow
def test_a_failing_process_prints_why_and_all_end(asked, converted, tmp_path):
    """A damaged image that only one process reads."""
    broken = tmp_path / "set"
    shutil.copytree(converted.folder, broken)
    data = bytearray((broken / "train.beton").read_bytes())
    data[int(Beton(broken / "train.beton").starts[25]) + 300] ^= 1
    (broken / "train.beton").write_bytes(data)
    for module, out in (("train.label", "labels"), ("train.maps", "maps")):
        words = [*asked, "--data", str(broken), "--out", str(tmp_path / out), "--gpus", "2"]
        said = ended(start(module, *words), 2)
        assert said.count("error:") == 1
        assert "train.beton: image 25 is damaged" in said
        assert not [*tmp_path.glob(f"{out}/*.labels"), *tmp_path.glob(f"{out}/*.maps")]


def test_a_single_process_counts_all_crops(converted, refinery, capsys):
    config = parse([*TINY, *BATCH, "--data", str(converted.folder), "--refinery", str(refinery)])
    data, (labels,) = check([config])
    rows = np.zeros((48, 12), np.uint8)
    Labeller(resolve(config, data, labels), EXACT).label_epoch(0, rows, Stop(), "labels")
    assert rows.any(axis=1).all()
    assert " 48/48 " in capsys.readouterr().err


@pytest.mark.slow
def test_a_chain_by_two_processes(converted, tmp_path):
    words = ["--resolution", "32", "--batch", "16", "--epochs", "1", "--device", "cpu", "--recipe", "quick"]
    models = ["--models", "resnet18 mobilenet0.25", "--runs", str(tmp_path), "--data", str(converted.folder)]
    said = ended(start("train.chain", *words, *models, "--gpus", "2"))
    assert said.count("chain.txt, chain.json, chain.png") == 1
    assert len(list(tmp_path.rglob("chain.json"))) == 1
