"""Exported folders: they work without this project and agree with the network, or are refused."""

import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import timm
import torch
from onnx import numpy_helper
from PIL import Image
from safetensors.torch import load_file
from torch import nn

import models
from command import run_command
from models.standalone import standalone
from models.weights import CHECKPOINT_FORMAT
from tests.paths import ROOT
from tests.pictures import photograph
from train import TrainError
from train.export import command
from train.export.check import Difference, Marks, check_equal, check_loss
from train.export.command import export
from train.export.folder import placed
from train.runs.__main__ import table

NAME, SIDE = "mobilenet0.25", 32
MEAN, STD = (torch.tensor(part).view(1, 3, 1, 1) for part in models.normalisation(NAME))
CHEAP: dict[str, Any] = {"device": "cpu", "decoder": "torchvision", "threads": 1}


def lively(name: str, classes: int = 3) -> nn.Module:
    """A network whose output differs from crop to crop, as that of trained ones does."""
    torch.manual_seed(1)
    network = models.build(name, classes)
    with torch.no_grad():
        for _ in range(20):
            network(crops(8) / 255 * 4 - 2)
        *_, head = (module for module in network.modules() if isinstance(module, nn.Linear))
        said = network.eval()(_normalised(crops(32)))
        head.weight *= 3 / said.std(dim=0).mean()
    return network.eval()


def crops(count: int) -> torch.Tensor:
    """Pictures uint8 [count, 3, SIDE, SIDE]."""
    pictures = [np.asarray(photograph(seed, SIDE, SIDE)) for seed in range(count)]
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2)


def _normalised(images: torch.Tensor) -> torch.Tensor:
    return (images / 255 - MEAN) / STD


@torch.inference_mode()
def expected(network: nn.Module, images: torch.Tensor) -> np.ndarray:
    return network(_normalised(images)).softmax(dim=1).numpy()


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> tuple[str, nn.Module]:
    """A checkpoint as NAME:FILE, and its network."""
    path = tmp_path_factory.mktemp("weights") / "w.pytar"
    network = lively(NAME)
    torch.save(network.state_dict(), path)
    return f"{NAME}:{path}", network


@pytest.fixture(scope="module")
def exported(weights, converted, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("exported") / "network"
    export(weights[0], "onnx", data=str(converted.folder), out=str(folder), resolution=SIDE, **CHEAP)
    return folder


@pytest.fixture
def again(weights, converted, exported, tmp_path, monkeypatch):
    """Exports again, with an existing file in place of the exporter's, to which `change` is applied first."""

    def again(change=lambda model: None, **options: Any) -> Path:
        def write(path: Path, *_: Any, **__: Any) -> None:
            model = onnx.load(exported / "model.onnx")
            change(model)
            onnx.save(model, path)

        monkeypatch.setattr(command, "write_onnx", write)
        options = {"data": str(converted.folder), "out": str(tmp_path / "out"), "resolution": SIDE} | CHEAP | options
        export(weights[0], "onnx", **options)
        return Path(options["out"])

    return again


def session_of(path: Path) -> onnxruntime.InferenceSession:
    return onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])


def alone(folder: Path, photo: Image.Image) -> list[str]:
    """The output of a model card's code for a photo, in a process without this project."""
    photo.save(folder / "photo.jpg", quality=95)
    (lines,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    check = "import importlib.util\nassert not importlib.util.find_spec('kernels')\n"
    # Packages may be installed there.
    places = [place for place in os.environ.get("PYTHONPATH", "").split(os.pathsep) if place and place != str(ROOT)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(places)}
    done = subprocess.run(
        [sys.executable, "-c", check + lines], cwd=folder, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def said_of_photo(network: nn.Module, folder: Path, ratio: float = 1.0) -> tuple[str, float]:
    with Image.open(folder / "photo.jpg") as image:
        side = round(ratio * min(image.size))
        left, top = (image.width - side) // 2, (image.height - side) // 2
        crop = image.crop((left, top, left + side, top + side)).resize((SIDE, SIDE), Image.Resampling.BILINEAR)
    said = expected(network, torch.from_numpy(np.array(crop)).permute(2, 0, 1)[None])[0]
    return f"class{said.argmax()}", float(said.max())


@pytest.mark.parametrize("count", [1, 3, 7])
def test_onnx_agrees_with_pytorch_for_any_number_of_crops(weights, exported, count):
    images = crops(count)
    (said,) = session_of(exported / "model.onnx").run(["probabilities"], {"images": images.numpy()})
    assert said.dtype == np.float32
    np.testing.assert_allclose(said, expected(weights[1], images), atol=1e-4)
    if count > 1:
        assert np.ptp(said, axis=0).max() > 0.05  # crops matter


def test_onnx_metadata_describe_inputs_and_classes(exported, converted):
    session = session_of(exported / "model.onnx")
    (takes,), (gives,) = session.get_inputs(), session.get_outputs()
    assert (takes.name, takes.type, takes.shape[1:]) == ("images", "tensor(uint8)", [3, SIDE, SIDE])
    assert (gives.name, gives.type, gives.shape[1:]) == ("probabilities", "tensor(float)", [3])
    assert isinstance(takes.shape[0], str)
    metadata = session.get_modelmeta().custom_metadata_map
    assert tuple(json.loads(metadata["class_names"])) == converted.class_names
    assert json.loads(metadata["resolution"]) == SIDE
    # It contains neither paths nor code of the machine that wrote it.
    content = (exported / "model.onnx").read_bytes()
    assert b".py" not in content
    assert b"forward" not in content


def test_the_code_of_an_onnx_card_runs_as_printed(weights, exported, converted, tmp_path):
    folder = shutil.copytree(exported, tmp_path / "elsewhere")
    name, probability = alone(folder, photograph(5, 90, 70))
    assert (name, float(probability)) == (
        said_of_photo(weights[1], folder, converted.crop.center_ratio)[0],
        pytest.approx(said_of_photo(weights[1], folder, converted.crop.center_ratio)[1], abs=1e-4),
    )


def _other_mean(model: onnx.ModelProto) -> None:
    (shift,) = (each for each in model.graph.initializer if list(each.dims) == [1, 3, 1, 1] and _values(each).min() < 0)
    shift.CopyFrom(numpy_helper.from_array(_values(shift) + np.float32(0.5), shift.name))


def _classes_in_another_order(model: onnx.ModelProto) -> None:
    head = next(each for each in model.graph.initializer if each.dims[:1] == [3] and len(each.dims) == 2)
    head.CopyFrom(numpy_helper.from_array(_values(head)[[1, 2, 0]].copy(), head.name))


def _values(tensor: onnx.TensorProto) -> np.ndarray:
    return numpy_helper.to_array(tensor)


@pytest.mark.parametrize("change", [_other_mean, _classes_in_another_order])
def test_a_file_with_different_output_is_refused(again, change, tmp_path):
    with pytest.raises(TrainError, match="^model.onnx differs from the network in PyTorch"):
        again(change)
    assert list(tmp_path.iterdir()) == []


def test_the_same_file_unchanged_is_kept_and_replaces_an_earlier_export(again, tmp_path):
    out = again()
    (out / "README.md").write_text("older")
    assert again() == out
    assert (out / "README.md").read_text() != "older"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_int8_that_loses_too_much_is_refused_unless_accepted(again, exported, monkeypatch, tmp_path, capsys):
    marks = iter([0, 12, 0, 12])  # of 15 images, what the network and the quantised file get wrong

    def marks_of(answers, *_: Any, **__: Any):
        found = [Marks(np.arange(15) >= wrong, np.ones(15, bool)) for wrong in [next(marks)]] * len(answers)
        return found, Difference()

    def quantise(source: Path, target: Path, crops: Any, **_: Any) -> None:
        assert next(crops).shape[1:] == (3, SIDE, SIDE)
        shutil.copy(source, target)

    monkeypatch.setattr(command, "marks_of", marks_of)
    monkeypatch.setattr(command, "quantise", quantise)
    with pytest.raises(TrainError, match=r"^INT8=1: top-1 100.00 % before, 20.00 % after: 80.00 points less"):
        again(int8=True)
    assert list(tmp_path.iterdir()) == []
    out = again(int8=True, accept_loss=True)
    assert {path.name for path in out.iterdir()} == {"config.json", "README.md", "model.onnx", "model-int8.onnx"}
    printed = capsys.readouterr().out
    assert "ms before" in printed
    assert "model-int8.onnx" in printed.splitlines()[-4]


def test_allowed_loss_of_int8():
    right = np.ones(1000, bool)
    for wrong, refused in [(10, False), (11, True)]:
        after = Marks(np.arange(1000) >= wrong, right)
        if refused:
            with pytest.raises(TrainError):
                check_loss(Marks(right, right), after, accepted=False)
        check_loss(Marks(right, right), after, accepted=refused)
    # For few images, two standard errors are more than a point; images with equal answers add nothing to them.
    few = np.ones(50, bool)
    check_loss(Marks(few, few), Marks(np.arange(50) >= 3, few), accepted=False)
    with pytest.raises(TrainError):
        check_loss(Marks(few, few), Marks(np.arange(50) >= 5, few), accepted=False)


def test_tolerance_between_two_outputs():
    marks = Marks(np.ones(1, bool), np.ones(1, bool))

    def differs(theirs: list[float], ours: list[float], **binary: bool) -> bool:
        difference = Difference()
        difference.add(np.array([theirs], np.float32), np.array([ours], np.float32))
        try:
            check_equal(difference, marks, marks, binary=binary.get("binary", False))
        except TrainError:
            return True
        return False

    assert not differs([0.5, 0.3, 0.2], [0.5005, 0.2995, 0.2])
    assert differs([0.5, 0.3, 0.2], [0.502, 0.298, 0.2])
    assert not differs([0.4004, 0.3996, 0.2], [0.3996, 0.4004, 0.2])  # a tie
    assert differs([0.4006, 0.3994, 0.2], [0.39999, 0.40001, 0.2])  # none
    assert differs([0.5, 0.5], [math.nan, 0.5])
    assert not differs([0.9, 0.1], [0.2, 0.8], binary=True)
    assert differs([0.9, 0.1], [math.nan, 0.8], binary=True)
    wrong = Marks(np.zeros(1, bool), np.ones(1, bool))
    with pytest.raises(TrainError, match="0.5 points"):
        check_equal(Difference(), marks, wrong, binary=True)


def test_a_run_is_exported_beside_its_checkpoint_on_its_own_data(refinery, converted):
    export(str(refinery), "safetensors", **CHEAP)
    folder = refinery / "export-safetensors"
    config = json.loads((folder / "config.json").read_text())
    identity = json.loads((refinery / "identity.json").read_text())
    result = json.loads((refinery / "result.json").read_text())
    assert config["accuracy"] == {
        "top1": pytest.approx(result["top1"]),
        "top5": pytest.approx(result["top5"]),
        "images": 15,
        "data": converted.name,
    }
    assert config["class_names"] == list(converted.class_names)
    assert (config["resolution"], config["network"]) == (SIDE, "resnet18")
    assert config["trained"]["epochs"] == 2
    assert config["trained_on"]["fingerprint"] == identity["data"]["fingerprint"]
    assert config["labelled_by"] == {**identity["labels"], "refinery": None}
    weights = torch.load(refinery / "last.pt", weights_only=True)["model"]
    assert all(torch.equal(value, weights[name]) for name, value in load_file(folder / "model.safetensors").items())
    shutil.rmtree(folder)


def test_the_code_of_a_safetensors_card_runs_as_printed(weights, converted, tmp_path):
    folder = tmp_path / "out"
    export(weights[0], "safetensors", data=str(converted.folder), out=str(folder), resolution=SIDE, **CHEAP)
    name, probability = alone(folder, photograph(6, 70, 80))
    theirs, best = said_of_photo(weights[1], folder, converted.crop.center_ratio)
    assert (name, float(probability)) == (theirs, pytest.approx(best, abs=1e-4))


def test_timm_loads_its_networks_from_the_folder(converted, tmp_path):
    network = lively("timm:resnet10t")
    torch.save(network.state_dict(), tmp_path / "w.pytar")
    checkpoint = f"timm:resnet10t:{tmp_path / 'w.pytar'}"
    folder = tmp_path / "out"
    export(checkpoint, "safetensors", data=str(converted.folder), out=str(folder), resolution=SIDE, **CHEAP)
    loaded = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    with torch.inference_mode():
        assert torch.equal(loaded(_normalised(crops(2))), network(_normalised(crops(2))))
    assert loaded.pretrained_cfg["input_size"][-1] == SIDE
    assert loaded.pretrained_cfg["crop_pct"] == converted.crop.center_ratio
    assert list(loaded.pretrained_cfg["label_names"]) == list(converted.class_names)


@pytest.mark.parametrize("name", models.names())
def test_every_network_is_built_without_this_project(name):
    code = standalone(name, 4)
    space: dict[str, Any] = {}
    if code.source:
        assert not re.search(r"^(from|import) (models|kernels|train|data)", code.source, re.MULTILINE)
        exec(compile(code.source, "network.py", "exec"), space)
    else:
        exec(code.imports, space)
    with torch.device("meta"):
        theirs, ours = eval(code.expression, space), models.build(name, 4)
    assert {key: value.shape for key, value in theirs.state_dict().items()} == {
        key: value.shape for key, value in ours.state_dict().items()
    }


def test_the_binary_network_without_this_project_gives_the_same_output():
    code = standalone("resnet50-xnor", 3)
    space: dict[str, Any] = {}
    exec(code.source, space)
    ours, theirs = models.build("resnet50-xnor", 3).eval(), eval(code.expression, space).eval()
    theirs.load_state_dict(ours.state_dict())
    with torch.inference_mode():
        assert torch.equal(ours(_normalised(crops(2))), theirs(_normalised(crops(2))))


def test_bad_input_is_refused_at_once(weights, converted, wordnet_folder, refinery, tmp_path, monkeypatch):
    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("slow work began")

    monkeypatch.setattr(command, "write_onnx", never)
    monkeypatch.setattr(command, "marks_of", never)
    monkeypatch.chdir(tmp_path)
    for folder in ("foreign", "own config"):
        (tmp_path / folder).mkdir()
    (tmp_path / "foreign" / "thesis.txt").write_text("years of work")
    (tmp_path / "own config" / "config.json").write_text("{}")
    (tmp_path / "file").write_text("")
    data = str(converted.folder)
    # A network that knows two of the data's three classes of ImageNet.
    described = {
        **{"name": NAME, "class_names": ["n01491361", "n02104029", "n00004475"], "resolution": SIDE},
        **{"center_ratio": 1.0, "mean": MEAN.flatten().tolist(), "std": STD.flatten().tolist()},
    }
    state = {"format": CHECKPOINT_FORMAT, "model": weights[1].state_dict(), "network": described}
    torch.save(state, "two.pytar")
    shutil.copytree(refinery, "moved")
    configuration = Path("moved/config.yaml").read_text()
    Path("moved/config.yaml").write_text(configuration.replace(f"data: {data}", "data: gone"))
    for checkpoint, format, options, says in [
        ("runs/none", "onnx", {}, "^runs/none: no such run folder or file"),
        ("resnet18", "onnx", {}, "^CHECKPOINT=resnet18: names a network without weights"),
        (weights[0], "safetensors", {"int8": True}, "^INT8=1 is for FORMAT=onnx, not safetensors"),
        (weights[0], "onnx", {"accept_loss": True}, "^accept_loss is for INT8=1"),
        (weights[0], "onnx", {"batch": 0}, "^BATCH=0: must be at least 1"),
        (str(refinery), "onnx", {"data": str(wordnet_folder)}, "was trained on 3 classes, and .* lacks n01491361"),
        ("moved", "onnx", {}, "^moved/last.pt: was trained on gone; give it, or other images, as DATA"),
        ("two.pytar", "onnx", {"data": str(wordnet_folder)}, "has 1 classes that .* does not know"),
        (weights[0], "onnx", {"data": data, "out": "file"}, "^OUT=file: is a file"),
        (weights[0], "onnx", {"data": data, "out": "file/below"}, "^OUT=file/below: cannot be written"),
        (weights[0], "onnx", {"data": data, "out": "foreign"}, "^OUT=foreign: holds thesis.txt"),
        (weights[0], "onnx", {"data": data, "out": "own config"}, "^OUT=own config: is not an earlier export"),
        (f"{weights[0]}", "onnx", {"data": None}, "holds bare weights without the names of classes"),
    ]:
        with pytest.raises(ValueError, match=says) as caught:
            export(checkpoint, format, **options)
        assert "\n" not in str(caught.value)
    assert (tmp_path / "foreign" / "thesis.txt").read_text() == "years of work"


def test_the_figure_of_accuracy_and_milliseconds(refinery, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    table(str(refinery.parent), figure="a.svg")
    drawn = Path("a.svg").read_text()
    assert drawn.startswith("<?xml")
    assert "resnet18" in re.findall(r"<!-- (.*?) -->", drawn)
    for figure, says in [("a.txt", "^FIGURE=a.txt: end its name in .svg"), ("no/a.svg", "there is no folder no")]:
        with pytest.raises(TrainError, match=says):
            table(str(refinery.parent), figure=figure)
    assert not Path("a.txt").exists()


def test_a_missing_package_is_named(weights, converted, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(TrainError, match="^FORMAT=onnx needs the package onnxruntime .*pip install"):
        export(weights[0], "onnx", data=str(converted.folder))


def test_an_unknown_format_ends_in_one_line(capsys):
    with pytest.raises(SystemExit) as ended:
        run_command(export, prog="python -m train.export", words=["--checkpoint", "x", "--format", "tflite"])
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "format" in line
    assert "tflite" in line
    assert "onnx" in line


@pytest.mark.slow
@pytest.mark.parametrize("name", [NAME, "resnet18"])
def test_int8_is_static_and_per_channel_and_computes_nearly_the_same(name, converted, tmp_path):
    network = lively(name)
    torch.save(network.state_dict(), tmp_path / "w.pytar")
    out = tmp_path / "out"
    options = CHEAP | {"data": str(converted.folder), "out": str(out), "resolution": SIDE}
    export(f"{name}:{tmp_path / 'w.pytar'}", "onnx", int8=True, accept_loss=True, **options)
    model = onnx.load(out / "model-int8.onnx")
    nodes = {node.output[0]: node for node in model.graph.node}
    initial = {each.name: _values(each) for each in model.graph.initializer}
    convolutions = [node for node in model.graph.node if node.op_type == "Conv"]
    for node in convolutions:
        weight = nodes[node.input[1]]
        assert weight.op_type == "DequantizeLinear"
        assert initial[weight.input[0]].dtype == np.int8
        assert initial[weight.input[1]].size == len(initial[weight.input[0]])  # a scale for each channel
        assert nodes[node.input[0]].op_type == "DequantizeLinear"
    assert model.graph.node[-1].op_type == "Softmax"
    sizes = [(out / f"model{kind}.onnx").stat().st_size for kind in ("", "-int8")]
    assert sizes[1] < sizes[0] / 2
    images = crops(20)
    (said,) = session_of(out / "model.onnx").run(None, {"images": images.numpy()})
    np.testing.assert_allclose(said, expected(network, images), atol=1e-4)
    (said,) = session_of(out / "model-int8.onnx").run(None, {"images": images.numpy()})
    assert np.abs(said - expected(network, images)).mean() < 0.1
    assert "class_names" in session_of(out / "model-int8.onnx").get_modelmeta().custom_metadata_map


@pytest.mark.slow
def test_the_binary_network_as_onnx(converted, tmp_path):
    network = models.build("resnet50-xnor", 3)
    torch.save(network.state_dict(), tmp_path / "w.pytar")
    options = CHEAP | {"data": str(converted.folder), "out": str(tmp_path / "out"), "resolution": SIDE}
    export(f"resnet50-xnor:{tmp_path / 'w.pytar'}", "onnx", **options)
    (said,) = session_of(tmp_path / "out/model.onnx").run(None, {"images": crops(3).numpy()})
    assert said.shape == (3, 3)


def test_only_leftovers_of_killed_exports_are_removed(tmp_path):
    others = [".other.partial-abc", ".out.partial-b.partial-abc"]
    for name in (*others, ".out.partial-abc_12"):
        (tmp_path / name).mkdir()
    with placed(tmp_path / "out") as folder:
        (folder / "model.onnx").touch()
    assert sorted(os.listdir(tmp_path)) == sorted([*others, "out"])
