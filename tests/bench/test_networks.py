"""The parts that run networks: small pairs that run for real, and the notes computed from their rates."""

import gzip
import json
import logging
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import models
from bench import BenchError, batches, networks, refinery_cost
from bench.__main__ import _FLAGS, _deadlines, _default_parts
from bench.baseline import Baseline
from bench.compiler import CompilerNotes
from bench.contenders import CONTENDERS
from bench.limit import COPIES, PRODUCTS, demand_note, with_shares
from bench.networks import BARE, OPTIMIZER, REFINERY, STEP, STUDENT, Optimizing, RefineryForward, Stepping, StudentPass
from bench.pair import Pair
from bench.pooling import Pooling
from bench.settings import resolve
from bench.task import Task
from bench.trace import trace
from bench.turns import OVER
from command import with_flags
from data.sources import image_files
from models.fused_resnet import FusedResNet
from models.own_depthwise import has_depthwise, with_own_depthwise
from train.runs.environment import environment
from train.student import CROPS

ROOT = Path(__file__).parents[2]
SMALL = {
    "resolution": 32,
    "batch": 4,
    "epochs": 1,
    "crops": 8,
    "steps": 2,
    "threads": "1",
    "contenders": "ours torchvision x4",
    "pairs": "mobilenet0.25:mobilenet0.25",
}
PARTS = ("machine", "loaders", "networks", "loop", "refinery_cost", "pooling")
WORDS = [word for name, value in SMALL.items() for word in (f"--{name}", str(value))]


@pytest.fixture
def settings():
    return resolve(
        quick=True, device="cpu", precision="fp32", data=None, refinery=None, compile=None, gpus=None, **SMALL
    )


@pytest.fixture
def pair(settings):
    return Pair(*settings.pairs[0], settings)


@pytest.fixture
def trained(settings, converted, tmp_path):
    """Settings with a refinery of random weights for the converted set."""
    torch.manual_seed(0)
    file = tmp_path / "refinery.pt"
    torch.save(models.build("mobilenet0.25", 3).state_dict(), file)
    return replace(settings, refinery=f"mobilenet0.25:{file}", data=str(converted.folder))


def bench(*words: str, out: Path, timeout: int = 280) -> dict[str, dict]:
    """Runs the command with small sizes. Returns each part's record."""
    done = subprocess.run(
        [sys.executable, "-m", "bench", "--quick", *WORDS, *words, "--out", str(out)],
        cwd=ROOT,
        # Networks this small would spend most of the time synchronizing with a second thread.
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    assert done.returncode == 0, done.stderr
    records = [json.loads(path.read_text()) for path in out.glob("*.json")]
    return {record["part"]: record for record in records}


def test_operations_are_counted_as_published(settings):
    pair = Pair("resnet18", "resnet18", replace(settings, resolution=224))
    forward, training = (demand.flops for demand in pair.demands())
    assert forward == pytest.approx(2 * 1.814e9, rel=0.01)  # multiply-adds of torchvision's documentation
    # Backward takes twice as many operations, without the gradient with respect to the image.
    stem = 2 * 64 * 3 * 7 * 7 * 112 * 112
    assert training == pytest.approx(3 * forward - stem, rel=1e-3)


def test_a_pair_that_cannot_take_the_resolution_is_not_run(settings):
    pair = Pair("mobilenet0.25", "alexnet", settings)
    assert "alexnet: resolution=32 is too small" in pair.why_not()
    assert all(contender.not_run == pair.why_not() for contender in networks._contenders(pair))


def test_a_step_that_was_not_recorded_is_not_measured_as_cuda_graphs(pair):
    runner = Stepping(pair, networks=False, cuda_graphs=True)
    runner.run()
    with pytest.raises(BenchError, match="could not be recorded"):
        runner.facts()


@pytest.mark.parametrize("build", [RefineryForward, StudentPass, Optimizing])
def test_parts_of_a_step_run_one_batch_at_a_time(pair, build):
    assert build(pair).run().amount == 4


def test_own_kernels_are_measured_on_a_gpu_if_they_support_the_network(settings):
    def rows(refinery: str, student: str, **changed) -> dict[str, dict]:
        pair = Pair(refinery, student, replace(settings, **({"device": "cuda", "precision": "bf16"} | changed)))
        return {contender.row["name"]: contender.row for contender in networks._by_own_kernels(pair)}

    found = rows("resnet50", "resnet18")
    assert list(found) == [networks.FUSED, networks.FUSED_APART]
    assert 0 < found[networks.FUSED]["bytes"] < found[networks.FUSED_APART]["bytes"]
    found = rows("resnet18", "mobilenet0.25")
    assert list(found) == [networks.OWN_DEPTHWISE]
    own = replace(settings, precision="bf16")
    assert 0 < found[networks.OWN_DEPTHWISE]["bytes"] < Pair("resnet18", "mobilenet0.25", own).demands()[1].bytes
    assert not rows("resnet50", "mobilenet0.25", device="cpu")
    assert not rows("resnet50", "mobilenet0.25", precision="fp32")
    assert not rows("resnet18", "resnet18")


def test_a_student_with_own_kernels_runs_by_their_definition_on_a_cpu(pair):
    own = StudentPass(pair, rewritten=with_own_depthwise)
    assert has_depthwise(models.build(pair.student, 10))
    assert not has_depthwise(own._network)
    assert own.run().amount == 4


def test_a_fused_refinery_gives_the_same_labels(settings, converted, tmp_path, monkeypatch):
    """On a CPU, by the PyTorch code that defines its kernels; in float32, so that rounding is negligible."""
    torch.manual_seed(0)
    file = tmp_path / "refinery.pt"
    torch.save(models.build("resnet50", 3).state_dict(), file)
    asked = replace(settings, refinery=f"resnet50:{file}", data=str(converted.folder))
    monkeypatch.setattr(refinery_cost, "_reference", [])
    refinery_cost._differences(asked, "batch", 1.0)
    assert refinery_cost._differences(asked, *refinery_cost._FUSED)["divergence"] == pytest.approx(0, abs=1e-6)
    labelling = refinery_cost.Labelling(asked, *refinery_cost._FUSED)
    assert isinstance(labelling._labels.network, FusedResNet)
    # It is measured on a GPU only.
    trained = refinery_cost._opened(asked)[0]
    assert refinery_cost._FUSED in refinery_cost._options(replace(asked, device="cuda", precision="bf16"), trained)
    assert refinery_cost._FUSED not in refinery_cost._options(asked, trained)


@pytest.mark.parametrize("real", [True, False])
def test_a_step_trains_on_its_batch(pair, real):
    stepping = Stepping(pair, networks=real)
    (student,) = stepping._step.students
    before = [weight.clone() for weight in student.network.parameters()]
    assert stepping.run().amount == 4
    assert student.sums[CROPS] == 4
    moved = [not torch.equal(weight, old) for weight, old in zip(student.network.parameters(), before, strict=True)]
    assert moved.count(True) > len(moved) / 2


def test_shares_of_limits_and_of_work_outside_networks():
    def row(name: str, rate: float, flops: float | None, size: float | None) -> dict:
        return {"name": name, "batch": 10, "flops": flops, "bytes": size, "rate": {"median": rate}}

    rows = [
        row(PRODUCTS, 1000, 3e9, 3e8),  # 3 TFLOP/s
        row(COPIES, 500, 3e9, 3e8),  # 150 GB/s
        row(REFINERY, 500, 1e9, 2e8),
        row(STUDENT, 200, 2e9, 1e8),
        row(OPTIMIZER, 10_000, None, None),
        row(BARE, 5000, None, None),
        row(STEP, 125, 3e9, 3e8),
        {"name": "another", "not_run": "x", "flops": 1e9, "bytes": 1e8},
    ]
    found = with_shares(rows)
    assert {row["name"]: row["share_of_flops"] for row in found if "share_of_flops" in row} == {
        REFINERY: pytest.approx(500 / 3000),
        STUDENT: pytest.approx(400 / 3000),
        STEP: pytest.approx(0.125),
    }
    assert {row["name"]: row["share_of_bytes"] for row in found if "share_of_bytes" in row} == {
        REFINERY: pytest.approx(100 / 150),
        STUDENT: pytest.approx(20 / 150),
        STEP: pytest.approx(37.5 / 150),
    }
    (note,) = demand_note({row["name"]: row for row in rows[:2]})
    assert "3 GFLOP and 300 MB per image" in note
    assert "3 TFLOP/s, for 1000 images/s, and copies 150 GB/s, for 500 images/s: at most 500 images/s" in note
    limit, rest = networks._findings("a → b", rows)
    assert limit == f"a → b: {note}"
    # A step of 80 ms: refinery 20, student 50; optimizer 1, normalise, loss and metrics 2.
    assert "takes 3.8 % of a step, measured alone" in rest
    assert rest.endswith("beyond that of the two networks measured alone is 12.5 %.")


def test_messages_of_the_compiler_are_collected():
    notes = CompilerNotes()
    log = logging.getLogger("torch._inductor.graph")
    log.debug("Skipped layout opt because only a few conv")
    log.debug("lowering 17 nodes")
    logging.getLogger("torch._inductor.utils").warning("Not enough SMs\nto go on")
    log.debug("Skipped layout opt because only a few conv")
    assert notes.found()["said"] == ["Skipped layout opt because only a few conv", "Not enough SMs"]


@pytest.mark.slow
def test_a_compiled_step_reports_graph_breaks(settings):
    stepping = Stepping(Pair(*settings.pairs[0], replace(settings, compiled=True)), networks=True)
    assert stepping.run().amount == 4
    assert stepping.facts()["compiler"]["graph_breaks"] == 0


@pytest.fixture
def on_gpu(monkeypatch):
    """A function that returns settings as on a machine with a GPU, which need not exist."""
    monkeypatch.setattr("bench.settings.device_named", lambda name: torch.device("cuda"))
    monkeypatch.setattr("bench.settings.precision_on", lambda device, asked: "bf16")
    monkeypatch.setattr("bench.settings.torch.cuda.device_count", lambda: 1)
    names = ("resolution", "batch", "epochs", "crops", "steps", "contenders", "pairs", "compile", "threads", "gpus")

    def of(**asked):
        options = dict.fromkeys(names) | {"precision": "auto", "data": None, "refinery": None, "quick": True} | asked
        return resolve(device="cuda", **options)

    return of


def test_a_quick_bench_on_a_gpu_has_the_usual_sizes(on_gpu):
    quick, usual = on_gpu(), on_gpu(quick=False)
    for each in (quick, usual):
        assert (each.resolution, each.batch, each.compiled, each.precision) == (224, 256, True, "bf16")
    assert [student for _, student in quick.pairs] == ["mobilenet", "resnet18", "resnet50"]
    assert quick.arrangement == {"apart": False, "hurried": True}
    assert usual.arrangement == {"apart": True, "hurried": False}
    assert _default_parts(quick) == ["networks", "loop", "loaders"]
    assert "batches" in _default_parts(usual)
    assert all(name in CONTENDERS for name in quick.contenders)


def test_each_part_has_its_share_of_the_time():
    now = time.monotonic()
    ends = _deadlines(["networks", "loop", "loaders"], 3.5)
    assert [end - now for end in ends.values()] == pytest.approx([105, 168, 210], abs=1)
    assert [end - now for end in _deadlines(["machine"], 2).values()] == pytest.approx([120], abs=1)


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_quick_bench_on_a_gpu_measures_only_whole_steps(on_gpu):
    """Without a GPU, checks only the names of the contenders, none of which can run."""
    settings = replace(on_gpu(pairs="mobilenet0.25:mobilenet0.25,resnet18:mobilenet0.25", resolution=32), batch=4)
    record = networks.measure(settings)
    assert [row["name"] for row in record.rows] == [PRODUCTS, COPIES, STEP] * 2
    assert [row["group"] for row in record.rows[::3]] == [str(Pair(*names, settings)) for names in settings.pairs]
    assert all("CUDA" in row["not_run"] or "NVIDIA" in row["not_run"] for row in record.rows)
    assert [column.head for column in record.figures[-3:]] == ["idle", "MHz", "W"]


@pytest.mark.slow
def test_batches_of_several_sizes_are_measured(tmp_path):
    record = bench("--only", "batches", out=tmp_path / "results")["batches"]
    names = [row["name"] for row in record["rows"]]
    assert names == [
        PRODUCTS,
        COPIES,
        *(f"{size} crops{how}" for size in (2, 4, 8, 16) for how in ("", ", CUDA graphs")),
    ]
    rows = {row["name"]: row for row in record["rows"]}
    assert all(rows[f"{size} crops, CUDA graphs"]["not_run"] == "needs a GPU" for size in (2, 4, 8, 16))
    for size in (2, 4, 8, 16):
        assert rows[f"{size} crops"]["turns"][0]["amount"] % size == 0
    # With fewer images, each has a larger share of the weights' bytes.
    assert rows["2 crops"]["bytes"] > rows["16 crops"]["bytes"]


def test_the_gain_from_cuda_graphs():
    def row(rate: float) -> dict:
        return {"rate": {"median": rate}}

    rows = {"4 crops": row(100), "4 crops, CUDA graphs": row(125), "8 crops": row(100)}
    assert batches._findings(rows, [4, 8]) == ["4 crops: 1.250 times as fast with CUDA graphs."]


def test_the_baseline_trains_as_the_original_did(pair, image_folder):
    files = [str(file) for file in image_files(image_folder / "train").files][:10]
    baseline = Baseline(pair, files, workers=1)
    before = [weight.clone() for weight in baseline._student.parameters()]
    running = [buffer.clone() for buffer in baseline._refinery.buffers()]
    weights = [weight.clone() for weight in baseline._refinery.parameters()]
    work = baseline.run()
    assert work.amount == 8  # full batches only
    assert work.waited_seconds > 0
    assert any(not torch.equal(new, old) for new, old in zip(baseline._student.parameters(), before, strict=True))
    assert all(torch.equal(new, old) for new, old in zip(baseline._refinery.parameters(), weights, strict=True))
    assert any(not torch.equal(new, old) for new, old in zip(baseline._refinery.buffers(), running, strict=True))


def test_options_of_a_refinery_are_compared_with_its_labels(trained, monkeypatch):
    monkeypatch.setattr(refinery_cost, "_reference", [])
    assert refinery_cost._differences(trained, "batch", 1.0) == {
        "agreement": 1.0,
        "divergence": pytest.approx(0, abs=1e-7),
    }
    assert refinery_cost._differences(trained, "batch", 1.0)["divergence"] == pytest.approx(0, abs=1e-6)
    for option in (("averaged", 1.0), ("running", 1.0), ("batch", 0.5)):
        found = refinery_cost._differences(trained, *option)
        assert found["divergence"] > 1e-6
        assert 0 <= found["agreement"] <= 1


def test_students_learn_together_or_each_alone(trained):
    for together, steps in ((True, 1), (False, 3)):
        teaching = refinery_cost.Teaching(trained, together)
        assert len(teaching._steps) == steps
        assert teaching.run().amount == 4
        students = [student for step in teaching._steps for student in step.students]
        assert [float(student.sums[CROPS]) for student in students] == [4, 4, 4]


def test_labels_are_pooled_in_two_ways(settings):
    """Both give the same labels for the same maps."""
    labels = []
    for dense in (True, False):
        pooling = Pooling(settings, dense)
        assert pooling.run().amount % 256 == 0
        labels.append(pooling._pool(*pooling._map, 1000))
    torch.testing.assert_close(labels[0], labels[1], rtol=1e-4, atol=1e-6)


def test_refinery_cost_without_a_refinery_names_what_is_missing(settings, tmp_path):
    (row,) = refinery_cost.measure(settings).rows
    assert "REFINERY=" in row["not_run"]
    (row,) = refinery_cost.measure(replace(settings, refinery=str(tmp_path), data=str(tmp_path))).rows
    assert str(tmp_path) in row["not_run"]


def test_a_profile_is_a_trace_and_a_table_of_operators(settings, tmp_path, capsys):
    path = trace(settings, environment("cpu"), tmp_path)
    assert path.name.endswith(".trace.json.gz")
    with gzip.open(path) as file:
        events = json.load(file)["traceEvents"]
    assert any("convolution" in event["name"] for event in events)
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert len(rows) == 1 + 10
    spent = [float(line.split("|")[3]) for line in rows[1:]]
    assert spent == sorted(spent, reverse=True)


def test_flags_need_no_value():
    words = ["--quick", "--only", "loop", "--profile", "false", "--quick"]
    assert with_flags(words, _FLAGS) == ["--quick=true", "--only", "loop", "--profile", "false", "--quick=true"]
    assert with_flags([], _FLAGS) == []


@pytest.mark.slow
def test_the_loop_is_measured_beside_its_step_and_the_baseline(converted, tmp_path):
    record = bench("--only", "loop", "--data", str(converted.folder), out=tmp_path / "results")["loop"]
    rows = {row["name"]: row for row in record["rows"]}
    assert list(rows) == [PRODUCTS, COPIES, "baseline", "step", "loop"]
    rates = {name: row["rate"]["median"] for name, row in rows.items()}
    for name in ("baseline", "loop"):
        assert 0 < rows[name]["waiting"] < 1
        assert rows[name]["share_of_flops"] == pytest.approx(rates[name] / rates[PRODUCTS])
        assert rows[name]["share_of_bytes"] == pytest.approx(rates[name] / rates[COPIES])
        assert all(turn["amount"] % 8 == 0 for turn in rows[name]["turns"])
    notes = "\n".join(record["notes"])
    assert f"The loop reaches {100 * rates['loop'] / rates['step']:.1f} % of the bare step" in notes
    assert f"The loop is {rates['loop'] / rates['baseline']:.2f} times as fast as the baseline" in notes


@pytest.mark.slow
def test_every_part_runs(trained, tmp_path):
    words = ("--refinery", trained.refinery, "--data", trained.data)
    check_every_part(bench(*words, "--only", ",".join(PARTS), out=tmp_path / "results"), PARTS)


@pytest.mark.gpu
@pytest.mark.timeout(450)
def test_every_part_runs_compiled_on_a_gpu(trained, tmp_path):
    parts = (*PARTS, "batches")
    words = ("--device", "cuda", "--compile", "always", "--refinery", trained.refinery, "--data", trained.data)
    records = bench(*words, "--only", ",".join(parts), "--minutes", "7", out=tmp_path / "results", timeout=440)
    check_every_part(records, parts)
    steps = [row for row in records["networks"]["rows"] if row["name"] == STEP]
    assert all(row["peak_device_memory_bytes"] > 0 and "compiler" in row for row in steps)
    for row in (*steps, *(row for row in records["loop"]["rows"] if row["name"] == "loop")):
        assert 0 <= row["idle"] < 1
        assert row["watts"] > 0


@pytest.mark.gpu
@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", [name for name in CONTENDERS if " alone" in name])
def test_what_bounds_loaders_is_delivered_to_a_gpu(settings, converted, name):
    task = Task([], converted.beton("train"), 32, 4, 4, 1, "cuda")
    made = list(CONTENDERS[name].build(task).epoch(0))
    assert [batch.shape for batch in made] == [(4, 3, 32, 32)] * 4
    assert all(batch.is_cuda for batch in made)


def check_every_part(
    records: dict[str, dict],
    parts: Sequence[str],
) -> None:
    assert set(records) == set(parts)
    for record in records.values():
        assert record["environment"] == records["machine"]["environment"]
        assert [row for row in record["rows"] if row.get("not_run", OVER) != OVER] == []
    labels = [row for row in records["refinery_cost"]["rows"] if row["group"] == "labels"]
    assert labels[0]["agreement"] == 1
    assert all(row["gain"] > 0 for row in records["refinery_cost"]["rows"] if "not_run" not in row)
