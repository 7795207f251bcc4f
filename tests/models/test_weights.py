"""Files of weights: every format is read back exactly, and a file that does not fit is an error of one line."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import models
from models import ModelError
from models.weights import CHECKPOINT_FORMAT, Weights, load_into, load_weights

NAME = "mobilenet0.25"
NETWORK = {
    "name": NAME,
    "num_classes": 3,
    "class_names": ["ant", "bee", "cat"],
    "resolution": 64,
    "mean": [0.5, 0.5, 0.5],
    "std": [0.25, 0.25, 0.25],
}


def trained(name: str = NAME, num_classes: int = 3) -> nn.Module:
    """Returns a network whose buffers also differ from their initial values."""
    torch.manual_seed(num_classes)
    network = models.build(name, num_classes)
    network(torch.randn(4, 3, 64, 64))
    return network


State = dict[str, Tensor]


@pytest.fixture(scope="module")
def state() -> State:
    return trained().state_dict()


def assert_same(one: State, two: State) -> None:
    assert one.keys() == two.keys()
    for key in one:
        assert one[key].dtype == two[key].dtype, key
        assert torch.equal(one[key], two[key]), key


def prefixed(prefix: str, state: State) -> State:
    return {prefix + key: value for key, value in state.items()}


def legacy(content: Any, path: Path) -> None:
    """Saves in the format before PyTorch 1.6, as in the papers' files."""
    torch.save(content, path, _use_new_zipfile_serialization=False)


FORMATS: dict[str, tuple[str, Callable[[State, Path], Any]]] = {
    "bare": ("w.pt", torch.save),
    "published": ("alexnet.pytar", legacy),
    "under state_dict": ("w.pth", lambda s, p: torch.save({"epoch": 3, "state_dict": s, "arch": "x"}, p)),
    "under model": ("w.pth", lambda s, p: torch.save({"model": s, "optimizer": {"state": {}}}, p)),
    "with arguments": ("w.pth", lambda s, p: torch.save({"model": s, "args": argparse.Namespace(lr=0.1)}, p)),
    "data parallel": ("w.pytar", lambda s, p: legacy(prefixed("module.", s), p)),
    "compiled": ("w.pt", lambda s, p: torch.save(prefixed("_orig_mod.", s), p)),
    "compiled, then parallel": ("w.pt", lambda s, p: torch.save(prefixed("module._orig_mod.", s), p)),
    "parallel, then compiled": ("w.pt", lambda s, p: torch.save(prefixed("_orig_mod.module.", s), p)),
    "safetensors": ("w.safetensors", safetensors.torch.save_file),
}


@pytest.mark.parametrize("kind", FORMATS)
def test_every_format_is_read_back_with_the_same_bits(kind: str, state: State, tmp_path: Path) -> None:
    file, save = FORMATS[kind]
    save(state, tmp_path / file)
    weights = load_weights(tmp_path / file)
    assert weights.path == tmp_path / file
    assert weights.network is None
    assert_same(weights.state, state)

    network = models.build(NAME, 3)
    assert load_into(network, weights, name=NAME, strict_head=True) == []
    assert_same(network.state_dict(), state)


def test_our_checkpoint_names_its_network(state: State, tmp_path: Path) -> None:
    path = tmp_path / "last.pt"
    torch.save({"format": CHECKPOINT_FORMAT, "model": state, "network": NETWORK, "step": 7}, path)
    weights = load_weights(str(path))
    assert weights.network == NETWORK
    assert_same(weights.state, state)


def test_a_compiled_part_and_a_part_called_module_keep_their_names(tmp_path: Path) -> None:
    path = tmp_path / "w.pt"
    torch.save({"body._orig_mod.weight": torch.ones(1), "module.weight": torch.zeros(1)}, path)
    assert list(load_weights(path).state) == ["body.weight", "module.weight"]


def fails(load: Callable[[], object], *parts: str) -> None:
    """Asserts that `load` raises a ModelError of one line with these parts."""
    with pytest.raises(ModelError) as error:
        load()
    text = str(error.value)
    assert "\n" not in text
    for part in parts:
        assert part in text


@pytest.mark.parametrize(("file", "reason"), [("none.pt", "No such file"), (".", "Is a directory")])
def test_files_that_cannot_be_opened(file: str, reason: str, tmp_path: Path) -> None:
    path = tmp_path / file
    fails(lambda: load_weights(path), f"{path}: cannot be opened ({reason}")


@pytest.mark.parametrize("file", ["w.pt", "w.pytar", "w.safetensors"])
@pytest.mark.parametrize("content", [b"", b"hello world\n", b"PK\x03\x04", b"<!DOCTYPE html><html></html>"])
def test_files_of_another_kind(file: str, content: bytes, tmp_path: Path) -> None:
    path = tmp_path / file
    path.write_bytes(content)
    fails(lambda: load_weights(path), f"{path}: is damaged, cut short or no file of weights")


@pytest.mark.parametrize("kind", ["bare", "published", "safetensors"])
@given(kept=st.floats(0, 1, exclude_max=True))
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_files_cut_short(kind: str, tmp_path: Path, kept: float) -> None:
    file, save = FORMATS[kind]
    save({"weight": torch.ones(64, 64), "bias": torch.zeros(64)}, tmp_path / file)
    whole = (tmp_path / file).read_bytes()
    (tmp_path / file).write_bytes(whole[: int(kept * len(whole))])
    fails(lambda: load_weights(tmp_path / file), f"{tmp_path / file}: ", "damaged")


class Ran(Exception):
    pass


class Trap:
    """An example of a malicious file: unpickling it calls a function."""

    def __reduce__(self) -> tuple[Callable[[], None], tuple[()]]:
        return spring, ()


def spring() -> None:
    raise Ran


def test_nothing_in_a_file_is_run(tmp_path: Path) -> None:
    path = tmp_path / "w.pt"
    for save in (torch.save, legacy):
        save({"weight": torch.ones(1), "extra": Trap()}, path)
        fails(lambda: load_weights(path), f"{path}: holds ", "spring", "save its tensors alone")
        with pytest.raises(Ran):
            torch.load(path, weights_only=False)


def test_a_whole_pickled_network_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "w.pt"
    torch.save(nn.Linear(2, 2), path)
    fails(lambda: load_weights(path), f"{path}: holds torch.nn.modules.linear.Linear", "save its tensors alone")


@pytest.mark.parametrize("content", [{}, {"state_dict": {}}, {"epoch": 3}, {1: torch.ones(1)}, [torch.ones(1)]])
def test_files_without_weights(content: Any, tmp_path: Path) -> None:
    path = tmp_path / "w.pt"
    torch.save(content, path)
    fails(lambda: load_weights(path), f"{path}: holds ", "pass a file with a state dict")


@pytest.mark.parametrize("network", [None, {}, {"name": 3}, "resnet18"])
def test_our_checkpoint_must_name_its_network(network: Any, state: State, tmp_path: Path) -> None:
    path = tmp_path / "last.pt"
    torch.save({"format": CHECKPOINT_FORMAT, "model": state, "network": network}, path)
    fails(lambda: load_weights(path), f"{path}: is a checkpoint that does not name its network")


def test_our_checkpoint_must_hold_weights(tmp_path: Path) -> None:
    path = tmp_path / "last.pt"
    torch.save({"format": CHECKPOINT_FORMAT, "network": NETWORK}, path)
    fails(lambda: load_weights(path), f"{path}: holds no weights")


def weights_of(state: State, network: dict[str, Any] | None = None) -> Weights:
    return Weights(Path("w.pt"), state, network)


def test_another_network_than_the_named_one_is_refused(state: State) -> None:
    network = models.build("mobilenet0.5", 3)
    fails(
        lambda: load_into(network, weights_of(state, NETWORK), name="mobilenet0.5", strict_head=True),
        "w.pt: holds weights of mobilenet0.25, not of mobilenet0.5",
    )


def test_the_tag_of_timms_weights_does_not_make_another_network() -> None:
    network = models.build("timm:resnet10t", 2)
    tagged = weights_of(network.state_dict(), {"name": "timm:resnet10t.c3_in1k"})
    assert load_into(network, tagged, name="timm:resnet10t", strict_head=True) == []
    # The dot of a built-in name does not begin a tag.
    quarter = weights_of(trained().state_dict(), {"name": "mobilenet0.25"})
    with pytest.raises(ModelError, match=r"not of mobilenet0\.5"):
        load_into(models.build("mobilenet0.5", 3), quarter, name="mobilenet0.5", strict_head=True)


@pytest.mark.parametrize("strict_head", [True, False])
def test_misfits_are_named_and_counted_and_do_not_change_the_network(state: State, strict_head: bool) -> None:
    misfit = dict(state)
    for block in (1, 2, 3, 4):
        del misfit[f"features.{block}.1.0.weight"]
    misfit["extra"] = torch.ones(1)
    misfit["features.0.0.weight"] = torch.ones(8, 3, 5, 5)
    network = models.build(NAME, 3)
    before = {key: value.clone() for key, value in network.state_dict().items()}
    fails(
        lambda: load_into(network, weights_of(misfit), name=NAME, strict_head=strict_head),
        f"w.pt: does not fit {NAME}",
        "4 missing: features.1.1.0.weight, features.2.1.0.weight, features.3.1.0.weight, ...",
        "1 unexpected: extra",
        "1 mis-shaped: features.0.0.weight [8, 3, 5, 5] for [8, 3, 3, 3]",
    )
    assert_same(network.state_dict(), before)


def test_the_weights_of_another_family_are_a_misfit(state: State) -> None:
    network = models.build("resnet18", 3)
    fails(
        lambda: load_into(network, weights_of(state), name="resnet18", strict_head=False),
        "does not fit resnet18",
        "missing: conv1.weight",
        "unexpected: features.0.0.weight",
    )


@pytest.mark.parametrize(
    ("name", "head"),
    [
        (NAME, ["classifier.weight", "classifier.bias"]),
        ("timm:resnet10t", ["fc.weight", "fc.bias"]),
    ],
)
def test_a_head_for_other_classes(name: str, head: list[str]) -> None:
    given = trained(name, 5).state_dict()
    network = models.build(name, 3)
    before = {key: value.clone() for key, value in network.state_dict().items()}
    fails(
        lambda: load_into(network, weights_of(given), name=name, strict_head=True),
        f"w.pt: holds {name} for 5 classes, not 3",
    )
    assert_same(network.state_dict(), before)

    assert load_into(network, weights_of(given), name=name, strict_head=False) == head
    assert_same(network.state_dict(), given | {key: before[key] for key in head})


def test_a_head_for_the_same_number_of_classes_is_copied_in_fine_tuning(state: State) -> None:
    network = models.build(NAME, 3)
    assert load_into(network, weights_of(state), name=NAME, strict_head=False) == []
    assert_same(network.state_dict(), state)


def test_weights_without_a_head_are_for_fine_tuning_only(state: State) -> None:
    headless = {key: value for key, value in state.items() if not key.startswith("classifier")}
    network = models.build(NAME, 3)
    left_out = load_into(network, weights_of(headless), name=NAME, strict_head=False)
    assert left_out == ["classifier.weight", "classifier.bias"]
    fails(
        lambda: load_into(network, weights_of(headless), name=NAME, strict_head=True),
        "2 missing: classifier.weight, classifier.bias",
    )


def test_a_head_of_other_features_is_a_misfit_even_in_fine_tuning(state: State) -> None:
    given = state | {"classifier.weight": torch.ones(5, 100)}
    fails(
        lambda: load_into(models.build(NAME, 3), weights_of(given), name=NAME, strict_head=False),
        "mis-shaped: classifier.weight [5, 100] for [3, 256]",
    )


def test_files_older_than_the_batch_counter_fit(state: State) -> None:
    old = {key: value for key, value in state.items() if not key.endswith("num_batches_tracked")}
    assert len(old) < len(state)
    network = models.build(NAME, 3)
    assert load_into(network, weights_of(old), name=NAME, strict_head=True) == []
    assert torch.equal(network.state_dict()["features.0.1.running_mean"], old["features.0.1.running_mean"])


def test_half_precision_files_fill_a_float32_network(state: State) -> None:
    half = {key: value.half() if value.is_floating_point() else value for key, value in state.items()}
    network = models.build(NAME, 3)
    load_into(network, weights_of(half), name=NAME, strict_head=True)
    weight = network.state_dict()["classifier.weight"]
    assert weight.dtype == torch.float32
    assert torch.equal(weight, half["classifier.weight"].float())
