"""The accepted names of a trained network, and the classes that it then has."""

from pathlib import Path

import pytest
import torch

import models
from models import ModelError
from models.imagenet import class_ids
from models.trained import Trained, load_trained, parse_spec

NAME = "mobilenet0.25"
IDS = class_ids()


def bare(path: Path, outputs: int, name: str = NAME) -> dict[str, torch.Tensor]:
    """Writes a file of weights as published with the papers: a bare state dict in the old format. Returns the state."""
    torch.manual_seed(outputs)
    state = models.build(name, outputs).state_dict()
    torch.save(state, path, _use_new_zipfile_serialization=False)
    return state


@pytest.mark.parametrize(
    ("spec", "name", "place"),
    [
        ("resnet50", "resnet50", None),
        ("resnet50:a/resnet50.pytar", "resnet50", "a/resnet50.pytar"),
        ("mobilenet0.25:w.pt", "mobilenet0.25", "w.pt"),
        ("timm:resnet18.a1_in1k", "timm:resnet18.a1_in1k", None),
        ("timm:resnet18.a1_in1k:w.safetensors", "timm:resnet18.a1_in1k", "w.safetensors"),
        ("timm:resnet18:pretrained", "timm:resnet18", "pretrained"),
        ("torchvision:resnet18", "torchvision:resnet18", None),
        ("torchvision:resnet18.IMAGENET1K_V1:pretrained", "torchvision:resnet18.IMAGENET1K_V1", "pretrained"),
        ("runs/scenes/resnet50-0123abcd", None, "runs/scenes/resnet50-0123abcd"),
        ("c:/weights.pt", None, "c:/weights.pt"),
    ],
)
def test_parse_spec(spec, name, place):
    assert parse_spec(spec) == (name, place)


def test_a_bare_file_has_the_classes_of_the_data(tmp_path):
    state = bare(tmp_path / "w.pytar", 3)
    trained = load_trained(f"{NAME}:{tmp_path / 'w.pytar'}", class_names=["ant", "bee", "cat"])
    assert trained.class_names == ("ant", "bee", "cat")
    for key, value in trained.network.state_dict().items():
        assert torch.equal(value, state[key]), key


@pytest.mark.parametrize(
    "class_names",
    [
        None,  # images with unknown classes
        IDS[20:30],
        IDS,
        sorted(map(str, range(1000))),  # ImageNetV2
    ],
)
def test_a_bare_file_of_imagenet_has_its_classes_in_their_order(class_names, tmp_path):
    bare(tmp_path / "w.pytar", 1000)
    assert load_trained(f"{NAME}:{tmp_path / 'w.pytar'}", class_names=class_names).class_names == IDS


def test_a_bare_file_for_other_classes_is_refused_with_both_counts(tmp_path):
    bare(tmp_path / "thousand.pytar", 1000)
    bare(tmp_path / "seven.pytar", 7)
    for file, outputs, class_names in [
        ("thousand", 1000, ["ant", "bee", "cat"]),
        ("seven", 7, ["ant", "bee", "cat"]),
        ("seven", 7, IDS[:10]),
    ]:
        with pytest.raises(ModelError, match=f"holds {NAME} for {outputs} classes, not {len(class_names)}; pass"):
            load_trained(f"{NAME}:{tmp_path / file}.pytar", class_names=class_names)
    with pytest.raises(ModelError, match=r"seven.pytar: holds bare weights without the names of classes"):
        load_trained(f"{NAME}:{tmp_path / 'seven.pytar'}")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["alexnet", "resnet50"])
def test_the_papers_files_with_a_thousand_classes(name, tmp_path):
    state = bare(tmp_path / f"{name}.pytar", 1000, name)
    trained = load_trained(f"{name}:{tmp_path / name}.pytar", class_names=IDS[:10])
    assert trained.class_names == IDS
    for key, value in trained.network.state_dict().items():
        assert torch.equal(value, state[key]), key


def test_published_weights_come_with_their_classes_size_and_normalisation(tmp_path):
    torch.manual_seed(0)
    name = "torchvision:mobilenet_v3_small"
    network = models.build(name, 1000)
    before = torch.hub.get_dir()
    torch.hub.set_dir(str(tmp_path))  # as if the weights were cached
    try:
        (tmp_path / "checkpoints").mkdir()
        torch.save(network.state_dict(), tmp_path / "checkpoints" / "mobilenet_v3_small-047dcff4.pth")
        trained = load_trained(f"{name}:pretrained", class_names=["ant", "bee"])
    finally:
        torch.hub.set_dir(before)
    assert trained.class_names == IDS
    assert (trained.resolution, trained.center_ratio) == (224, 224 / 256)
    assert trained.normalisation == models.normalisation("resnet50")
    assert (trained.file, trained.origin) == (None, f"{name}:pretrained")
    assert torch.equal(trained.network.state_dict()["classifier.3.bias"], network.state_dict()["classifier.3.bias"])


def test_published_weights_without_an_imagenet_classifier_are_refused():
    with pytest.raises(ModelError, match="are not a classifier of ImageNet's classes; fine-tune it"):
        load_trained("timm:vit_base_patch16_clip_224.openai:pretrained")
    with pytest.raises(ModelError, match="resnet50: has no weights to fetch; .* take torchvision:NAME or timm:NAME"):
        load_trained("resnet50:pretrained")


def test_digests_identify_weights(tmp_path):
    def published(seed: int) -> Trained:
        torch.manual_seed(seed)
        network = models.build(NAME, 3)
        return Trained(network, NAME, None, ("a", "b", "c"), models.normalisation(NAME))

    assert published(0).digest == published(0).digest
    assert published(0).digest != published(1).digest
    moved = published(0)
    moved.network.half()
    assert moved.digest != published(0).digest
    bare(tmp_path / "w.pytar", 3)
    first, second = (load_trained(f"{NAME}:{tmp_path / 'w.pytar'}", class_names="abc").digest for _ in range(2))
    assert first == second
