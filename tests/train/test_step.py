"""The step: its computation, its sums, and its compilation into one graph, once."""

import copy
import functools
from dataclasses import replace

import pytest
import torch

import models
from data.loader import open_loader
from kernels.normalise import Normalise
from train import TrainError
from train.config import OptimizerConfig
from train.failures import is_out_of_memory
from train.labels.ground_truth import GroundTruth
from train.labels.refinery import Refinery
from train.step import Step, correct, forget_compiled_steps
from train.student import CROPS, LOSS, TOP1, TOP5, Student

IMAGENET = models.normalisation("resnet18")
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def loader(converted):
    return open_loader(converted.beton("train"), resolution=32, batch_size=16, decoder="ffcv")


def student_of(name="mobilenet0.25", *, seed=0, lr=0.05, normalisation=IMAGENET):
    torch.manual_seed(seed)
    return Student(name, models.build(name, 3), OptimizerConfig(lr=lr), normalisation=normalisation, device=CPU)


def step_of(labels, *, students=None, compiled=False, autocast=None, **options):
    students = students or [student_of()]
    return Step(students, labels, device=CPU, autocast=autocast, compiled=compiled, **options)


def refinery():
    torch.manual_seed(9)
    return Refinery(models.build("resnet18", 3), IMAGENET)


def test_a_step_equals_the_plain_computation(loader):
    """A step in plain PyTorch gives the same weights (later steps would amplify differences of rounding)."""
    labels = refinery()
    step = step_of(labels)
    student = copy.deepcopy(step.students[0].network).train()
    optimizer = torch.optim.SGD(student.parameters(), lr=0.05, momentum=0.9)
    teacher = copy.deepcopy(labels.network)
    normalise = Normalise(IMAGENET)
    batch = next(iter(loader.epoch(0)))
    step(batch)
    with torch.no_grad():
        target = teacher(normalise(batch.crops)).softmax(dim=1)
    torch.nn.functional.cross_entropy(student(normalise(batch.crops)), target).backward()
    optimizer.step()
    for ours, theirs in zip(step.students[0].network.state_dict().values(), student.state_dict().values(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_sums(loader):
    step = step_of(GroundTruth(3))
    losses = []
    for batch in loader.epoch(0):
        student = copy.deepcopy(step.students[0].network).train()
        losses.append(torch.nn.functional.cross_entropy(student(Normalise(IMAGENET)(batch.crops)), batch.labels).item())
        step(batch)
    assert step.students[0].sums[CROPS] == 48
    assert step.students[0].sums[LOSS].item() == pytest.approx(16 * sum(losses), rel=1e-4)
    assert 0 <= step.students[0].sums[TOP1] <= step.students[0].sums[TOP5]
    assert step.students[0].sums[TOP5] == 48  # of three classes, the true one is always among the first five


def test_correct():
    """Of eight classes, the true one at each rank: first, among the first five, and beyond."""
    logits = torch.arange(8.0).flip(0).repeat(8, 1)
    found = [[int(n) for n in correct(logits[i : i + 1], torch.tensor([i]))] for i in range(8)]
    assert found == [[1, 1], *[[0, 1]] * 4, *[[0, 0]] * 3]
    assert [int(n) for n in correct(logits, torch.arange(8))] == [1, 5]


def test_a_loss_that_is_not_finite_shows_in_the_sums(loader):
    step = step_of(GroundTruth(3))
    with torch.no_grad():
        next(step.students[0].network.parameters()).fill_(float("inf"))
    step(next(iter(loader.epoch(0))))
    assert not torch.isfinite(step.students[0].sums[LOSS])


def test_two_students_learn_the_same_as_each_alone(loader):
    """They share only the labels; each sees crops with its own normalisation."""
    halves = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))

    def students():
        return [student_of("mobilenet0.25"), student_of("resnet18", seed=1, lr=0.02, normalisation=halves)]

    alone, together = students(), students()
    both = step_of(refinery(), students=together)
    steps = [step_of(refinery(), students=[student]) for student in alone]
    for batch in loader.epoch(0):
        for step in (both, *steps):
            step(batch)
    for one, other in zip(alone, together, strict=True):
        assert torch.equal(one.sums, other.sums)
        for ours, theirs in zip(one.network.state_dict().values(), other.network.state_dict().values(), strict=True):
            assert torch.equal(ours, theirs)


def test_each_student_has_its_own_normalisation(loader):
    halves = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    seen = []
    step = step_of(GroundTruth(3), students=[student_of(), student_of(normalisation=halves)])
    for student in step.students:
        student.network.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    batch = next(iter(loader.epoch(0)))
    step(batch)
    for crops, normalisation in zip(seen, (IMAGENET, halves), strict=True):
        assert torch.equal(crops, Normalise(normalisation)(batch.crops))


@pytest.mark.parametrize("kind", ["soft", "hard", "reversed", "l2"])
def test_every_loss_can_be_learned(loader, kind):
    step = step_of(refinery(), students=[student_of(lr=0.005)], loss=kind, temperature=2.0)
    batch = next(iter(loader.epoch(0)))
    losses = []
    for _ in range(8):
        step.students[0].sums.zero_()
        step(batch)
        losses.append(step.students[0].sums[LOSS].item())
    assert losses[-1] < losses[0]


class Tiny(torch.nn.Module):
    """A network so small that compiling it takes seconds."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv1 = torch.nn.Conv2d(3, channels, 3, stride=2, padding=1)
        self.bn1 = torch.nn.BatchNorm2d(channels)
        self.conv2 = torch.nn.Conv2d(channels, 2 * channels, 3, stride=2, padding=1)
        self.bn2 = torch.nn.BatchNorm2d(2 * channels)
        self.head = torch.nn.Linear(2 * channels, 3)

    def forward(self, x):
        x = self.bn1(self.conv1(x)).relu()
        return self.head(self.bn2(self.conv2(x)).relu().mean((2, 3)))


def tiny_step(optimizer="sgd", **options):
    torch.manual_seed(4)
    labels = Refinery(Tiny(16), IMAGENET, dtype=options.get("autocast") or torch.float32)
    autocast = options.get("autocast")
    moved_by = OptimizerConfig(kind=optimizer, lr=0.05)
    student = Student("tiny", Tiny(8), moved_by, normalisation=IMAGENET, device=CPU, autocast=autocast)
    return step_of(labels, students=[student], **options)


@pytest.fixture
def new_memory_is_nan():
    """Uninitialised memory holds NaN instead of arbitrary values."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("kind", ["sgd", "adamw", "adamp"])
def test_fp16_scales_the_loss_and_skips_what_overflows(loader, new_memory_is_nan, kind):
    """A skipped step has no effect: the next one equals the first step of a student that skipped none."""
    skipping, plain = (tiny_step(autocast=torch.float16, optimizer=kind) for _ in range(2))
    scaler = skipping.students[0].scaler
    scaler.update(2.0**30)  # gradients overflow
    plain.students[0].scaler.update(2.0**10)
    weights, never_skipped = (step.students[0].network.head.weight for step in (skipping, plain))
    before = weights.detach().clone()
    batch = next(iter(loader.epoch(0)))
    skipping(batch)
    assert scaler.get_scale() == 2.0**29
    assert torch.equal(weights, before)
    scaler.update(2.0**10)
    skipping(batch)
    plain(batch)
    assert scaler.get_scale() == 2.0**10
    assert not torch.equal(weights, before)
    assert torch.equal(weights, never_skipped)


def test_compiled_bfloat16_agrees_with_eager_float32_over_50_steps(loader):
    """The loss of every ten steps within 5 %, and the networks' final output within 5 % of its range."""
    steps = [tiny_step(), tiny_step(autocast=torch.bfloat16, compiled=True, strict=True)]
    losses: list[list[float]] = [[], []]
    batches = [batch for epoch in range(17) for batch in loader.epoch(epoch)][:50]
    for number, batch in enumerate(batches, 1):
        for step, found in zip(steps, losses, strict=True):
            step(batch)
            if number % 10 == 0:
                found.append(step.students[0].sums[LOSS].item())
                step.students[0].sums.zero_()
    assert losses[0][-1] < 0.5 * losses[0][0]  # they have learned something
    assert losses[1] == pytest.approx(losses[0], rel=0.05)
    crops = Normalise(IMAGENET)(batches[0].crops)
    said = [step.students[0].network.eval()(crops) for step in steps]
    assert (said[1] - said[0]).abs().max() < 0.05 * (said[0].max() - said[0].min())


@pytest.fixture
def no_compiler():
    """Simulates a missing C++ compiler, which fails only when the first graph is built."""
    from torch._inductor import config, cpp_builder

    def forget():
        torch._dynamo.reset()
        for function in vars(cpp_builder).values():
            if isinstance(function, functools._lru_cache_wrapper):
                function.cache_clear()

    forget()
    with config.patch({"cpp.cxx": ("/no/such/compiler",), "force_disable_caches": True}):
        yield
    forget()


def same_weights(one: Step, other: Step) -> bool:
    states = [step.students[0].network.state_dict().values() for step in (one, other)]
    return all(torch.equal(ours, theirs) for ours, theirs in zip(*states, strict=True))


def test_a_failed_compilation_prints_a_notice_and_changes_nothing(loader, no_compiler, capsys):
    step, eager = tiny_step(compiled=True), tiny_step()
    for batch in loader.epoch(0):
        step(batch)
        eager(batch)
    assert "runs uncompiled (InvalidCxxCompiler: No working C++ compiler found" in capsys.readouterr().out
    assert same_weights(step, eager)
    torch._dynamo.reset()
    with pytest.raises(TrainError, match="compile=always: the step cannot be compiled .*; try --compile never"):
        tiny_step(compiled=True, strict=True)(next(iter(loader.epoch(0))))


@pytest.fixture
def quick_compiler(monkeypatch):
    """Dynamo traces and counts the graphs, and PyTorch runs them uncompiled: building each takes seconds."""
    compile = torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda function, **_: compile(function, backend="eager", fullgraph=True, dynamic=False)
    )
    torch._dynamo.reset()
    with torch._dynamo.config.patch(recompile_limit=2):
        yield
    torch._dynamo.reset()


def test_a_failed_compilation_at_a_later_resolution(converted, loader, quick_compiler, capsys):
    """Here by exceeding the limit of graphs."""
    first = next(iter(loader.epoch(0)))
    batches = [replace(first, crops=first.crops[:, :, :side, :side]) for side in (32, 24, 16)]
    step, eager = tiny_step(compiled=True), tiny_step()
    for batch in (*batches, *batches):
        step(batch)
        eager(batch)
    assert capsys.readouterr().out.count("the step cannot be compiled and runs uncompiled (") == 1
    assert same_weights(step, eager)
    torch._dynamo.reset()
    strict = tiny_step(compiled=True, strict=True)
    strict(batches[0])
    strict(batches[1])
    with pytest.raises(TrainError, match="compile=always: the step cannot be compiled"):
        strict(batches[2])


def test_trainings_of_one_process_do_not_share_a_limit_of_graphs(loader, quick_compiler, capsys):
    """PyTorch limits the graphs of a function, which all trainings share; each gets as many as it needs."""
    crops = next(iter(loader.epoch(0)))
    sides = (32, 40, 48, 56)
    for _ in range(2):
        forget_compiled_steps(len(sides))
        step = tiny_step(compiled=True, strict=True)
        for side in sides:
            step(replace(crops, crops=torch.zeros(16, 3, side, side, dtype=torch.uint8)))
        assert step.students[0].sums[CROPS] == 16 * len(sides)
    assert not capsys.readouterr().out


def test_errors_of_too_little_memory_are_recognised(loader):
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**52)
    assert is_out_of_memory(caught.value)
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))


@pytest.mark.slow
def test_compiles_into_one_graph_once(loader):
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    eager, compiled = step_of(refinery()), step_of(refinery(), compiled=True)
    first = next(iter(loader.epoch(0)))
    eager(first)
    compiled(first)
    torch.testing.assert_close(compiled.students[0].sums, eager.students[0].sums, rtol=1e-4, atol=1e-3)
    for epoch in range(1, 3):
        for batch in loader.epoch(epoch):
            compiled(batch)
    assert counters["stats"]["unique_graphs"] == 1
