"""Fixtures: runs on a tiny set within this process, and a set with some of ImageNet's classes."""

from pathlib import Path

import pytest

from tests.pictures import write_class_folders
from train.config import parse
from train.train import train

# The precision is given, since tests compare numbers and processors have different units.
TINY = [
    *("--model", "mobilenet0.25", "--resolution", "32", "--batch", "16", "--epochs", "2"),
    *("--device", "cpu", "--precision", "fp32"),
]


@pytest.fixture(params=[True, False], ids=["bf16 units", "no bf16 units"])
def bf16_units(request, monkeypatch) -> bool:
    """Whether the processor seems to have bfloat16 units; without them PyTorch emulates it, but slower."""
    monkeypatch.setattr("train.device._has_bf16", lambda device: request.param)
    return request.param


@pytest.fixture
def run(converted, tmp_path, monkeypatch):
    """Trains with these options on the tiny set, in a temporary folder."""
    monkeypatch.chdir(tmp_path)

    def run(*words: str):
        runs = train(parse([*TINY, "--data", str(converted.folder), *words]))
        return runs[0] if len(runs) == 1 else runs

    return run


@pytest.fixture(scope="session")
def refinery(converted, tmp_path_factory) -> Path:
    """The run folder of a resnet18 on the tiny set, whose labels differ from crop to crop."""
    root = tmp_path_factory.mktemp("refinery")
    words = ["--data", str(converted.folder), "--model", "resnet18", "--runs", str(root), "--recipe", "quick"]
    (run,) = train(parse([*TINY, *words]))
    return run.folder


@pytest.fixture(scope="session")
def wordnet_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """train/ with 16 images of each of 3 classes of ImageNet, val/ with 5."""
    root = tmp_path_factory.mktemp("wordnet")
    for part, images, seed in (("train", 16, 0), ("val", 5, 1000)):
        write_class_folders(root / part, 3, images, seed=seed)
        for label, name in enumerate(("n01491361", "n02104029", "n15075141")):
            (root / part / f"class{label}").rename(root / part / name)
    return root
