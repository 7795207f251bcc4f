"""Recorded steps: the same bits as plain ones, whatever changes from step to step, without waiting for the device."""

import copy
import sys
from collections import Counter
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import models
from data.loader import CropBatch, Pairing
from tests.train.recording import capture
from train.augment import Augment, AugmentConfig
from train.config import OptimizerConfig
from train.labels.ground_truth import GroundTruth
from train.labels.refinery import Refinery
from train.recorded import Recorder, Undone
from train.step import Step, forget_compiled_steps
from train.student import LOSS, Student

IMAGENET = models.normalisation("resnet18")
CPU = torch.device("cpu")


class Tiny(nn.Module):
    """All kinds of state in one small network: running statistics, counters, dropout."""

    def __init__(self, channels: int = 8):
        super().__init__()
        self.conv1 = nn.Conv2d(3, channels, 3, stride=2, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 1)
        self.bn2 = nn.BatchNorm2d(channels)
        self.dropout = nn.Dropout(0.2)
        self.head = nn.Linear(channels, 3)

    def forward(self, x):
        x = self.bn1(self.conv1(x)).relu()
        return self.head(self.dropout(self.bn2(self.conv2(x)).relu().mean((2, 3))))


def batch(number: int, *, side: int = 16, count: int = 8) -> CropBatch:
    drawn = torch.Generator().manual_seed(number)
    crops = torch.randint(0, 256, (count, 3, side, side), dtype=torch.uint8, generator=drawn)
    return CropBatch(
        crops=crops.contiguous(memory_format=torch.channels_last),
        labels=torch.randint(0, 3, (count,), generator=drawn),
        indices=torch.arange(count),
        copies=torch.zeros(count, dtype=torch.int64),
        epoch=number,
        boxes=torch.zeros(count, 4, dtype=torch.int32),
        sizes=torch.full((count, 2), side, dtype=torch.int32),
        flips=torch.zeros(count, dtype=torch.bool),
    )


def student_of(number: int = 0, *, kind: str = "sgd", ema: float = 0.9, autocast: torch.dtype | None = None) -> Student:
    torch.manual_seed(number)
    config = OptimizerConfig(kind=kind, lr=0.05 / (number + 1))
    network = Tiny(8 + 4 * number)
    made = Student(f"tiny{number}", network, config, normalisation=IMAGENET, device=CPU, ema=ema, autocast=autocast)
    if made.scaler:
        made.scaler.update(2.0**40)  # so that the first steps are skipped
    return made


def step_of(*, students: int = 1, kind: str = "sgd", ema: float = 0.9, autocast=None, labels=None, **options) -> Step:
    made = [student_of(number, kind=kind, ema=ema, autocast=autocast) for number in range(students)]
    torch.manual_seed(77)
    labels = labels or Refinery(Tiny(), IMAGENET, dtype=autocast or torch.float32)
    options = {"compiled": False} | options
    return Step(made, labels, device=CPU, autocast=autocast, **options)


def take(step: Step, numbers, sides=(16, 24)) -> None:
    """Runs steps with these numbers, with a different learning rate in each, on crops of alternating sizes."""
    for number in numbers:
        for student in step.students:
            student.set_rate(1 / number)
        step(batch(number, side=sides[number % len(sides)]), number // 4, number % 4, number)


def state(step: Step) -> list[torch.Tensor]:
    """All tensors that a step writes to, and the generator of its dropout."""
    return [*(tensor.detach().clone() for tensor in step._written()), torch.get_rng_state()]


def same(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return len(one) == len(other) and all(torch.equal(*pair) for pair in zip(one, other, strict=True))


def of_students(step: Step) -> list[torch.Tensor]:
    return [*(tensor.detach().clone() for student in step.students for tensor in student.tensors())]


CUTMIX = AugmentConfig(cutmix=0.5, color_jitter=0.4)

CASES = {
    "sgd": {},
    "no average": {"ema": 0.0},
    "adamw": {"kind": "adamw"},
    "bf16": {"autocast": torch.bfloat16},
    "scaler": {"autocast": torch.float16},
    "scaler and adamw": {"autocast": torch.float16, "kind": "adamw"},
    "students": {"students": 3},
    "jitter": {"jitter": 1.0},
    "augmented": {"augment": Augment(CUTMIX, seed=1, epochs=9, device=CPU)},
    "replicas": {"replicas": 2},
    "tree": {"replicas": 4, "reduce": "tree"},
    "augmented replicas": {"replicas": 2, "augment": Augment(CUTMIX, seed=1, epochs=9, device=CPU)},
}


@pytest.mark.parametrize("case", CASES)
def test_recorded_steps_equal_plain_steps_bit_for_bit(case):
    """Learning rates, shares of the average, crops, draws and dropout differ from step to step; scales are halved."""
    eager, recorded = (step_of(**CASES[case], **more) for more in ({}, {"cuda_graphs": True, "capture": capture}))
    states = []
    for step in (eager, recorded):
        torch.manual_seed(5)
        take(step, range(1, 10))
        states.append([*of_students(step), torch.get_rng_state()])
        assert step.students[0].sums[LOSS] > 0
    assert same(*states)
    if eager.students[0].scaler:
        assert eager.students[0].scale < 2.0**40


def test_each_shape_is_recorded_once():
    taken = []

    def counted(function):
        taken.append(function)
        return capture(function)

    step = step_of(cuda_graphs=True, capture=counted)
    take(step, range(1, 9), sides=(16, 24, 32))
    assert len(taken) == 3


def test_paired_crops_and_labels_on_disk_are_inputs_too():
    pairing = Pairing("center", 16)

    class OnDisk(GroundTruth):
        def forward(self, batch):
            return super().forward(
                replace(batch, labels=(batch.labels_on_disk + batch.paired[pairing][:, 0, 0, 0]) % 3)
            )

    states = []
    for options in ({}, {"cuda_graphs": True, "capture": capture}):
        step = step_of(labels=OnDisk(3), **options)
        torch.manual_seed(5)
        for number in range(1, 5):
            own = batch(number)
            step(replace(own, labels_on_disk=own.labels + number, paired={pairing: own.crops + number}), number=number)
        states.append(of_students(step))
    assert same(*states)


def test_a_checkpoint_is_restored_into_the_tensors_that_the_graph_reads(monkeypatch):
    """Also into students that were never recorded, and vice versa: it does not depend on graphs."""
    monkeypatch.setattr(Student, "_description", lambda self: {})
    for kind, autocast in (("sgd", torch.float16), ("adamw", None)):
        options = {"kind": kind, "autocast": autocast}
        recorded = step_of(**options, cuda_graphs=True, capture=capture)
        plain, fresh = step_of(**options), step_of(**options, cuda_graphs=True, capture=capture)
        torch.manual_seed(5)
        take(recorded, range(1, 6))
        saved = [copy.deepcopy(student.state()) for student in recorded.students]
        take(recorded, range(6, 12))
        ends = []
        for step in (recorded, plain, fresh):
            for student, kept in zip(step.students, saved, strict=True):
                student.restore(copy.deepcopy(kept))
                assert student.lr == pytest.approx(0.05 / 5)
            torch.manual_seed(6)
            take(step, range(6, 9))
            ends.append(of_students(step))
        assert same(ends[0], ends[1])
        assert same(ends[0], ends[2])
        # The optimizer's state in a checkpoint has the same numbers and tensors as without recording.
        assert saved[0]["optimizer"]["param_groups"][0]["lr"] == pytest.approx(0.05 / 5, rel=1e-15)
        assert not saved[0]["optimizer"]["param_groups"][0].get("capturable")


@pytest.mark.parametrize(
    ("case", "good"),
    [("sgd", 0), ("sgd", 1), ("scaler and adamw", 0), ("students", 0), ("replicas", 0), ("replicas", 2), ("tree", 1)],
)
def test_a_failed_recording_changes_nothing_and_steps_run_unrecorded(case, good, capsys):
    """good: the number of recordings that succeed before one fails."""
    done = []

    def failing(function):
        if len(done) < good:
            done.append(function)
            return capture(function)
        function()
        raise RuntimeError("operation not permitted when stream is capturing")

    step, eager = step_of(**CASES[case], cuda_graphs=True, capture=failing), step_of(**CASES[case])
    for each in (step, eager):
        torch.manual_seed(5)
        take(each, range(1, 6))
    said = capsys.readouterr().out
    assert said.count("cuda_graphs: the step is not recorded and its kernels are launched one by one (operation") == 1
    assert same(of_students(step), of_students(eager))


def test_a_step_with_a_read_by_the_host_is_not_recorded(capsys):
    class Reading(GroundTruth):
        def forward(self, batch):
            assert batch.labels.sum().item() >= 0
            return super().forward(batch)

    step = step_of(labels=Reading(3), cuda_graphs=True, capture=capture)
    take(step, range(1, 3))
    assert "(operation not permitted when stream is capturing)" in capsys.readouterr().out


def test_adamp_and_cpus_are_not_recorded(capsys):
    step_of(kind="adamp", cuda_graphs=True, capture=capture)
    assert "(AdamP reads from the device in each step)" in capsys.readouterr().out
    step_of(cuda_graphs=True)
    assert "(the device is a CPU)" in capsys.readouterr().out
    step_of()
    assert not capsys.readouterr().out


def test_the_warm_up_restores_all_tensors_and_generators():
    for options in ({"kind": "adamw"}, {"autocast": torch.float16}, {"replicas": 2}):
        step = step_of(**options, cuda_graphs=True, capture=capture)
        take(step, range(1, 4))
        before = state(step)
        ran = []

        def function(crops, step=step, ran=ran):
            ran.append(crops)
            step._whole(replace(batch(3), crops=crops), None)

        def stopped(function):
            function()
            raise RuntimeError("stopped")

        with pytest.raises(RuntimeError, match="stopped"):
            Recorder(step._written, CPU, stopped).run("step", function, batch(2).crops)
        assert len(ran) > 1
        assert same(state(step), before)
        with Undone(step._written(), CPU):
            step._whole(batch(3), None)
            assert not same(state(step), before)
        assert same(state(step), before)


# ---- without recording: nothing waits, and few operators are outside the compiled graphs


@pytest.fixture(scope="module")
def fused_optimizers_without_data():
    """Adds the fake versions of these operators that PyTorch lacks (2.14: for a tensor rate); they return nothing."""
    with torch.library._scoped_library("aten", "FRAGMENT") as library:
        for name in ("_fused_sgd_", "_fused_adamw_"):
            for overload in ("", ".tensor_lr"):
                if not torch._C._dispatch_has_kernel_for_dispatch_key(f"aten::{name}{overload}", "Meta"):
                    library.impl(f"{name}{overload}", lambda *args, **kwargs: None, "Meta")
        yield


@pytest.mark.parametrize("recorded", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_no_step_reads_from_the_device(case, recorded, fused_optimizers_without_data):
    step = step_of(**CASES[case])
    if recorded:
        for student in step.students:
            student.keep_numbers_on_device()
    with FakeTensorMode(allow_non_fake_inputs=True):
        take(step, range(1, 3), sides=(16,))


def test_the_check_detects_a_read_from_the_device():
    class Reading(GroundTruth):
        def forward(self, batch):
            return super().forward(batch) if bool(batch.labels.sum() >= 0) else None

    for step in (step_of(kind="adamp"), step_of(labels=Reading(3))):
        with FakeTensorMode(allow_non_fake_inputs=True), pytest.raises(DataDependentOutputException):
            take(step, [1], sides=(16,))


class Outside(TorchDispatchMode):
    """Counts the operators that run outside the compiled graphs and the compiler's own wrappers."""

    def __init__(self):
        super().__init__()
        self.found: Counter[str] = Counter()

    @classmethod
    def ignore_compile_internals(cls):
        return True

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        # Markers for profilers are not counted.
        if function.namespace != "profiler" and not any("_aot_autograd" in file for file in _files_of_callers()):
            self.found[str(function)] += 1
        return function(*args, **(kwargs or {}))


def _files_of_callers():
    frame = sys._getframe(2)
    while frame:
        yield frame.f_code.co_filename
        frame = frame.f_back


@pytest.fixture
def graphs_of_aot(monkeypatch):
    """Traces forward and backward graphs as for Inductor, but runs them uncompiled: building kernels takes minutes."""
    backend = aot_autograd(fw_compiler=lambda graph, _: make_boxed_func(graph), keep_inference_input_mutations=True)
    compile = torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda function, **_: compile(function, backend=backend, fullgraph=True, dynamic=False)
    )
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("options", "most"),
    [
        ({"ema": 0.0}, 5),
        ({}, 5),
        ({"kind": "adamw"}, 5),
        ({"autocast": torch.bfloat16, "kind": "adamw"}, 5),
        ({"students": 2}, 5),
        ({"students": 2, "kind": "adamw", "ema": 0.0}, 5),
    ],
)
def test_few_operators_run_outside_the_compiled_graphs(options, most, graphs_of_aot):
    step = step_of(**options, compiled=True, strict=True)
    take(step, [1, 2], sides=(16,))
    own = batch(3)
    step(own, 0, 2, 3)
    with Outside() as outside:
        step(own, 0, 2, 3)
    assert 0 < sum(outside.found.values()) <= most, outside.found


@pytest.mark.slow
def test_three_runs_of_twelve_resolutions_each_stay_compiled(monkeypatch, capsys):
    compile, graphs = torch.compile, []

    def counting(graph, inputs):
        graphs.append(graph)
        return graph

    monkeypatch.setattr(
        torch, "compile", lambda function, **_: compile(function, backend=counting, fullgraph=True, dynamic=False)
    )
    sides = range(16, 16 + 8 * 12, 8)
    limit = torch._dynamo.config.recompile_limit
    try:
        for run in range(3):
            forget_compiled_steps(len(sides))
            step = step_of(compiled=True, strict=True, kind=("sgd", "adamw", "sgd")[run], students=1 + run)
            for _ in range(2):
                take(step, range(1, 13), sides=sides)
            assert len(graphs) == 12 * (run + 1)
    finally:
        torch._dynamo.config.recompile_limit = limit
        torch._dynamo.reset()
    assert not capsys.readouterr().out
