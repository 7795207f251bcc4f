"""Several processes: the same images, parts and weights for any number of them, and a common end."""

import copy
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import models
from data.beton import Beton
from data.loader import open_loader
from kernels.normalise import Normalise
from tests.paths import python_path
from tests.train.conftest import TINY
from train import TrainError
from train.config import OptimizerConfig, parse
from train.distributed import ALONE, _added_in_pairs, _buckets, joined
from train.job import check, resolve
from train.labels.ground_truth import GroundTruth
from train.launch import on_devices
from train.step import Step
from train.student import LOSS, Student

ROOT = Path(__file__).parents[2]
IMAGENET = models.normalisation("resnet18")
CPU = torch.device("cpu")


@pytest.mark.parametrize("copies", [1, 2])
def test_the_parts_of_a_step_are_the_same_for_any_number_of_devices(converted, copies):
    def parts(world):
        """The images, copies and crops of each step and part."""
        options = {"resolution": 32, "batch_size": 8 // world, "seed": 3, "copies": copies, "world": world}
        loaders = [open_loader(converted.beton("train"), rank=rank, **options) for rank in range(world)]
        found = {}
        for rank, loader in enumerate(loaders):
            for step, batch in enumerate(loader.epoch(1)):
                for number in range(4 // world):
                    part = batch.part(number, 4 // world)
                    assert part.crops.is_contiguous(memory_format=torch.channels_last)
                    found[step, rank + number * world] = part
        return found

    alone = parts(1)
    assert len(alone) == 4 * 6 * copies
    for world in (2, 4):
        for place, part in parts(world).items():
            for name in ("indices", "copies", "labels", "boxes", "crops"):
                assert torch.equal(getattr(part, name), getattr(alone[place], name)), (place, name)


def student():
    torch.manual_seed(0)
    network = models.build("mobilenet0.25", 3)
    return Student("mobilenet0.25", network, OptimizerConfig(lr=0.1), normalisation=IMAGENET, device=CPU)


@pytest.mark.parametrize("how", ["sum", "tree"])
def test_each_part_has_its_own_batch_statistics(converted, how):
    """Recomputed: the mean of the gradients of 4 crops each; running statistics of the first part only."""
    batch = next(open_loader(converted.beton("train"), resolution=32, batch_size=16).epoch(0))
    ours = student()
    plain = copy.deepcopy(ours.network).train()
    step = Step([ours], GroundTruth(3), device=CPU, autocast=None, compiled=False, replicas=4, reduce=how)
    step(batch)
    losses = []
    for part in range(4):
        network = plain if part == 0 else copy.deepcopy(plain)
        mine = slice(part, None, 4)
        logits = network(Normalise(IMAGENET)(batch.crops[mine]))
        losses.append(torch.nn.functional.cross_entropy(logits, batch.labels[mine]))
        gradients = torch.autograd.grad(losses[-1], list(network.parameters()))
        for weight, gradient in zip(plain.parameters(), gradients, strict=True):
            weight.grad = gradient / 4 if weight.grad is None else weight.grad + gradient / 4
    torch.optim.SGD(plain.parameters(), lr=0.1, momentum=0.9).step()
    torch.testing.assert_close(ours.sums[LOSS] / 16, torch.stack(losses).mean().double())
    for (name, mine), theirs in zip(ours.network.state_dict().items(), plain.state_dict().values(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6, msg=name)


@given(st.lists(st.floats(-100, 100, width=32), min_size=1, max_size=9))
def test_the_fixed_tree_is_a_sum(values):
    found = _added_in_pairs([torch.tensor([value], dtype=torch.float64) for value in values])
    torch.testing.assert_close(found, torch.tensor([sum(values)], dtype=torch.float64))


def test_gradients_keep_their_layout_when_exchanged_in_buckets(monkeypatch):
    monkeypatch.setattr("train.distributed._BUCKET", 100)
    gradients = [
        torch.randn(4, 3, 3, 3).contiguous(memory_format=torch.channels_last),
        torch.randn(5),
        torch.randn(200),
        torch.randn(3, dtype=torch.float64),
        torch.randn(()),
    ]
    assert _buckets(gradients) == [[0], [1], [2], [3], [4]]
    assert _buckets(gradients[1:2] * 3) == [[0, 1, 2]]
    for how in ("sum", "tree"):
        parts = [gradients, [2 * each for each in gradients]] if how == "tree" else [[3 * each for each in gradients]]
        for made, given_ in zip(ALONE.reduce_gradients(parts, how=how), gradients, strict=True):
            torch.testing.assert_close(made, 3 * given_)
            assert made.stride() == given_.stride()


_EXCHANGE = """
import os
import torch
from train import distributed
distributed._BUCKET, distributed._MOMENT = 100, 0.1
with distributed.joined("cpu") as group:
    def parts(rank):
        return [torch.arange(float(size)) % 100 + rank for size in (7, 90, 150, 1, 99, 20)]
    expected = [one + two for one, two in zip(parts(0), parts(1))]
    for how in ("sum", "bf16", "tree"):
        made = group.reduce_gradients([parts(group.rank)], how=how)
        assert all(torch.equal(*both) for both in zip(made, expected)), (how, made)
        assert {each.dtype for each in made} == {torch.float32}
    half = group.reduce_gradients([[torch.tensor([1 + 2**-12])]], how="bf16")
    assert half[0].tolist() == [2.0], half
    group.wait()
    if group.rank:
        os._exit(0)
    group.reduce_gradients([parts(0)], how="sum")
"""


def test_buckets_are_summed_and_a_lost_process_ends_the_others_silently():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", _EXCHANGE],
            env=os.environ | common | {"RANK": rank, "LOCAL_RANK": rank, "PYTHONPATH": python_path()},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in ("0", "1")
    ]
    ended = [(*process.communicate(timeout=100), process.returncode) for process in processes]
    assert ended[1] == ("", "", 0)
    assert ended[0][0] == ""
    assert ended[0][2] == 1
    assert "Traceback" not in ended[0][1]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--gpus", "0"], "gpus=0: give the number of devices, at least 1"),
        (["--gpus=many"], "gpus=many: give the number"),
        (["--gpus"], "gpus=: give the number"),
        (["--gpus", "2", "--max-restarts=-1"], "max_restarts=-1: give how often the processes are started again"),
    ],
)
def test_wrong_numbers_of_devices(words, says):
    with pytest.raises(TrainError, match=says):
        on_devices("train", words, parse, lambda config: None)


def test_one_device_is_this_process():
    seen = []
    on_devices("train", ["--epochs", "3", "--gpus", "1", "--batch=8"], parse, seen.append)
    assert (seen[0].epochs, seen[0].batch) == (3, 8)


def test_a_port_that_is_taken(monkeypatch):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = str(other.getsockname()[1])
        for name, value in {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "MASTER_PORT": port}.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
        with (
            pytest.raises(TrainError, match=rf"2 processes at 127.0.0.1:{port} \(.*give a port that is free"),
            joined("cpu"),
        ):
            pass


def test_restarts_without_a_separate_store_are_refused(monkeypatch):
    for name, value in {
        "WORLD_SIZE": "2",
        "TORCHELASTIC_MAX_RESTARTS": "1",
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }.items():
        monkeypatch.setenv(name, value)
    with (
        pytest.raises(TrainError, match="type TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in front of torchrun"),
        joined("cpu"),
    ):
        pass


@pytest.mark.slow
@pytest.mark.parametrize(
    ("difference", "says"),
    [
        ("distributed._versions = lambda: {'PyTorch': f'2.{rank}'}", "PyTorch: rank 1 has 2.1 and rank 0 has 2.0"),
        (
            "distributed._versions = lambda: {'code': 'same'} | ({'more': 1} if rank else {})",
            "more: rank 1 has 1 and rank 0 has None",
        ),
        ("data = {'fingerprint': rank}", "data: rank 1 has {'fingerprint': 1} and rank 0 has {'fingerprint': 0}"),
    ],
)
def test_processes_that_differ(difference, says):
    """The first process prints one line and all end, for different versions and for different data."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    program = f"""
import os
from command import exit_on_user_error
from train import distributed
rank = int(os.environ["RANK"])
data = None
{difference}
def work():
    with distributed.joined("cpu") as group:
        group.check_same({{"data": data}})
exit_on_user_error(work)
"""
    environment = os.environ | {"PYTHONPATH": python_path(), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", program],
            env=environment | {"WORLD_SIZE": "2", "RANK": rank, "LOCAL_RANK": rank},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in ("0", "1")
    ]
    said = [process.communicate(timeout=60)[1] for process in processes]
    assert [process.returncode for process in processes] == [2, 1]
    assert said == [f"error: {says}; it must be the same on all machines\n", ""]


def test_replicas_are_part_of_a_runs_identity(converted):
    def identity(*words):
        config = parse([*TINY, "--data", str(converted.folder), *words])
        data, (labels,) = check([config])
        return resolve(config, data, labels).identity

    assert "replicas" not in identity()
    assert identity() == identity("--replicas", "1", "--reduce", "tree")
    assert identity("--replicas", "4")["replicas"] == 4
    assert identity("--replicas", "4") == identity("--replicas", "4", "--reduce", "tree")
    assert identity("--replicas", "4") != identity("--replicas", "4", "--reduce", "bf16")
    with pytest.raises(TrainError, match="batch=16: is not a multiple of replicas=5"):
        identity("--replicas", "5")


def start(folder: Path, *words: str, module=("train",), more=None) -> subprocess.Popen:
    command = [sys.executable, "-m", *module, *TINY, "--data", str(folder), *words]
    environment = {name: value for name, value in os.environ.items() if name != "TYPED_COMMAND"}
    return subprocess.Popen(
        command,
        env=environment | {"PYTHONPATH": python_path(), "OMP_NUM_THREADS": "1"} | (more or {}),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def children(process: subprocess.Popen) -> list[str]:
    command = ["pgrep", "-P", str(process.pid)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()


def finished(process: subprocess.Popen) -> str:
    out, _ = process.communicate(timeout=200)
    assert process.returncode == 0, out
    return out


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return torch.load(folder / "last.pt", weights_only=True)["model"]


@pytest.mark.slow
def test_two_processes_end_with_the_weights_of_one(run, converted, tmp_path):
    """Bit for bit if gradients are added in a fixed tree; with several students, mixing and batch statistics."""
    words = ["--replicas", "4", "--reduce", "tree", "--augment.cutmix", "0.5", "--epochs", "1", "--copies", "2"]
    alone = run(*words, "--out", str(tmp_path / "one"))
    out = finished(start(converted.folder, *words, "--gpus", "2", "--out", str(tmp_path / "two")))
    assert out.count("finished: top-1") == 1
    assert "48 images to train on, 15 for validation" in out
    one, two = weights(alone.folder), weights(tmp_path / "two")
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert (tmp_path / "two" / "identity.json").read_text() == (tmp_path / "one" / "identity.json").read_text()
    lines = [
        re.sub(r'"(images_per|waiting)[^,]*,', "", (tmp_path / n / "metrics.jsonl").read_text()) for n in ("one", "two")
    ]
    assert lines[0] == lines[1]


@pytest.mark.slow
def test_any_number_of_devices(converted, tmp_path, run):
    """Equal up to the order of sums by default; the refinery is trained first, several students together."""
    common = ["--replicas", "4", "--refinery", "resnet18", "--labels.bn", "batch", "--recipe", "quick"]
    found = {}
    for world in (1, 2, 4):
        runs = tmp_path / f"runs{world}"
        words = [*common, "--model", "mobilenet0.25 mobilenet0.5", "--runs", str(runs), "--gpus", str(world)]
        out = finished(start(converted.folder, *words))
        assert out.count("finished: top-1") == 3
        found[world] = {path.parent.name: weights(path.parent) for path in sorted(runs.rglob("last.pt"))}
    for world in (2, 4):
        assert found[world].keys() >= {name for name in found[1] if name.startswith("resnet18")}
        for name, model in found[1].items():
            if name.startswith("resnet18"):
                for key, value in model.items():
                    torch.testing.assert_close(value, found[world][name][key], rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_a_stop_ends_all_processes_and_another_number_continues(converted, tmp_path):
    words = ["--replicas", "4", "--reduce", "tree", "--epochs", "30"]
    finished(start(converted.folder, *words, "--out", str(tmp_path / "whole")))
    stopped = start(converted.folder, *words, "--gpus", "2", "--out", str(tmp_path / "parts"))
    while not (tmp_path / "parts" / "last.pt").is_file():
        time.sleep(0.1)
    stopped.send_signal(signal.SIGINT)
    out, _ = stopped.communicate(timeout=60)
    assert stopped.returncode == 130
    assert out.count("to continue, type again:\n  python -m train --model") == 1
    assert "--gpus 2 --out" in out
    assert "Traceback" not in out
    out = finished(start(converted.folder, *words, "--gpus", "4", "--out", str(tmp_path / "parts")))
    assert "continuing in epoch" in out
    assert "devices was 2 and is 4" in out
    one, two = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.slow
@pytest.mark.parametrize("machines", [1, 2])
def test_a_killed_and_restarted_process_changes_no_bits(run, converted, tmp_path, machines):
    """By --gpus with --max-restarts, and by torchrun's agents of two machines."""
    words = ["--replicas", "4", "--reduce", "tree", "--epochs", "20"]
    again = ["--max-restarts", "2"]
    folder = tmp_path / "again"
    if machines == 1:
        agents = [start(converted.folder, *words, "--gpus", "2", *again, "--out", str(folder))]
    else:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            endpoint = f"localhost:{free.getsockname()[1]}"
        torchrun = ["torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1", *again, "--rdzv-backend", "c10d"]
        torchrun += ["--rdzv-endpoint", endpoint, "-m", "train"]
        shared = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
        agents = [start(converted.folder, *words, "--out", str(folder), module=torchrun, more=shared) for _ in range(2)]
    while not (folder / "last.pt").is_file():
        time.sleep(0.1)
        assert all(agent.poll() is None for agent in agents)
    os.kill(int(children(agents[-1])[-1]), signal.SIGKILL)
    said = "".join(finished(agent) for agent in agents)
    assert said.count("continuing in epoch") == 1
    assert said.count("finished: top-1") == 1
    alone = run(*words, "--out", str(tmp_path / "one"))
    one, two = weights(alone.folder), weights(folder)
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.slow
def test_a_killed_process_ends_all_with_one_line(converted, tmp_path):
    process = start(converted.folder, "--epochs", "500", "--gpus", "2", "--out", str(tmp_path / "run"))
    while not (tmp_path / "run" / "last.pt").is_file():
        time.sleep(0.1)
    os.kill(int(children(process)[-1]), signal.SIGKILL)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 2
    assert "error: a process was ended by signal 9; the same command continues from the last checkpoint" in out
    assert "Traceback" not in out


@pytest.mark.slow
def test_a_failing_process_prints_why_and_all_end(converted, tmp_path):
    """A damaged image that only one process reads; and a loss that is not finite, which all processes see."""
    broken = tmp_path / "set"
    shutil.copytree(converted.folder, broken)
    beton = Beton(broken / "train.beton")
    data = bytearray((broken / "train.beton").read_bytes())
    data[int(beton.starts[5]) + 300] ^= 1
    (broken / "train.beton").write_bytes(data)
    process = start(broken, "--gpus", "2", "--out", str(tmp_path / "run"))
    out, _ = process.communicate(timeout=100)
    assert process.returncode == 2
    assert out.count("error:") == 1
    assert "train.beton: image 5 is damaged" in out
    assert "Traceback" not in out
    process = start(converted.folder, "--gpus", "2", "--optimizer.lr", "1e30", "--out", str(tmp_path / "far"))
    out, _ = process.communicate(timeout=100)
    assert process.returncode == 2
    assert out.count("error:") == 1
    assert "no longer finite in epoch" in out
