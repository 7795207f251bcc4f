"""The bench of single depthwise convolutions."""

from dataclasses import replace

import pytest
import torch

from bench import depthwise
from bench.depthwise import Convolving, Shape, shapes_of
from bench.limit import COPIES
from bench.settings import Settings, resolve

_SHAPE = Shape(6, 9, 2)


@pytest.fixture
def settings() -> Settings:
    unset = ("contenders", "crops", "epochs", "gpus", "pairs", "steps", "threads")
    fixed = {"quick": True, "device": "cpu", "precision": "fp32", "data": None, "refinery": None, "compile": "never"}
    return resolve(**dict.fromkeys(unset), **fixed, resolution=32, batch=3)


def test_the_shapes_of_mobilenet_are_the_papers():
    """Table 1 of Howard et al. 2017."""
    first = [(32, 112, 1), (64, 112, 2), (128, 56, 1), (128, 56, 2), (256, 28, 1), (256, 28, 2)]
    assert shapes_of("mobilenet", 224) == [*first, (512, 14, 1), (512, 14, 2), (1024, 7, 1)]
    assert shapes_of("resnet18", 224) == []


def test_bytes_are_those_of_each_tensor_once():
    # 6 x 9 x 9 in, 6 x 5 x 5 out.
    assert _SHAPE.elements(backward=False) == 486 + 150
    # And the output's gradient, the input again and its gradient.
    assert _SHAPE.elements(backward=True) == 486 + 150 + 150 + 486 + 486
    assert Shape(8, 10, 1).elements(backward=True) == 5 * 800


@pytest.mark.parametrize("backward", [False, True])
def test_both_ways_compute_the_same(settings, backward):
    found = []
    for own in (False, True):
        torch.manual_seed(0)
        runner = Convolving(settings, _SHAPE, own=own, backward=backward)
        assert runner.run().amount == 3
        found.append(runner.once())
    assert len(found[0]) == (3 if backward else 1)
    assert found[0][0].shape == (3, 6, 5, 5)
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


def test_our_kernel_takes_turns_on_a_gpu_only(settings):
    def names(settings: Settings) -> list[str]:
        return [contender.row["name"] for contender in depthwise._contenders(settings, _SHAPE)]

    library = [COPIES, "PyTorch, forward", "PyTorch, forward and backward"]
    assert names(settings) == library
    on_gpu = replace(settings, device="cuda", precision="bf16")
    assert names(on_gpu) == [*library, "own kernel, forward", "own kernel, forward and backward"]
    copies, forward, *_ = (contender.row["bytes"] for contender in depthwise._contenders(on_gpu, _SHAPE))
    assert (copies, forward) == (2 * 1758, 2 * 636)


@pytest.mark.slow
def test_a_row_for_each_shape_and_way(settings, monkeypatch):
    monkeypatch.setattr(depthwise, "shapes_of", lambda name, resolution: [_SHAPE, Shape(16, 8, 1)])
    record = depthwise.measure(settings)
    assert [(row["group"], row["name"].split(",")[0]) for row in record.rows] == [
        (group, name)
        for group in ("6 x 9 x 9, stride 2", "16 x 8 x 8, stride 1")
        for name in (COPIES, *["PyTorch"] * 2)
    ]
    for copies, *rest in (record.rows[:3], record.rows[3:]):
        assert "share_of_bytes" not in copies
        for row in rest:
            done = row["rate"]["median"] * row["bytes"] / (copies["rate"]["median"] * copies["bytes"])
            assert row["share_of_bytes"] == pytest.approx(done)


@pytest.mark.gpu
@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("backward", [False, True])
def test_passes_are_recorded_on_a_gpu(settings, own, backward):
    runner = Convolving(replace(settings, device="cuda", precision="bf16"), _SHAPE, own=own, backward=backward)
    assert runner.run().amount == 150
    torch.cuda.synchronize()
