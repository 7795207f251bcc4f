"""What the user may name as a trained network, and which classes it then has."""

from pathlib import Path

import pytest
import torch

import models
from data.convert import convert_source
from data.sources import open_source
from models import ModelError
from models.imagenet import class_ids
from train import TrainError
from train.config import parse
from train.job import open_trainer, train
from train.trained import Trained, load_trained, parse_spec

NAME = "mobilenet0.25"
IDS = class_ids()


def bare(path: Path, outputs: int, name: str = NAME) -> dict[str, torch.Tensor]:
    """Writes a file of weights as the papers' are: a bare state dict in the old format."""
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
def test_what_a_word_names(spec, name, place):
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
        None,  # of images to be told apart
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
    with pytest.raises(TrainError, match=r"seven.pytar: holds bare weights without the names of classes"):
        load_trained(f"{NAME}:{tmp_path / 'seven.pytar'}")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["alexnet", "resnet50"])
def test_the_papers_files_of_a_thousand_classes(name, tmp_path):
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
    torch.hub.set_dir(str(tmp_path))  # as if they had been fetched before
    try:
        (tmp_path / "checkpoints").mkdir()
        torch.save(network.state_dict(), tmp_path / "checkpoints" / "mobilenet_v3_small-047dcff4.pth")
        trained = load_trained(f"{name}:pretrained", class_names=["ant", "bee"])
    finally:
        torch.hub.set_dir(before)
    assert trained.class_names == IDS
    assert (trained.resolution, trained.center_ratio) == (224, 224 / 256)
    assert trained.normalisation == models.normalisation("resnet50")
    assert (trained.file, trained.place) == (None, f"{name}:pretrained")
    assert torch.equal(trained.network.state_dict()["classifier.3.bias"], network.state_dict()["classifier.3.bias"])


def test_published_weights_that_tell_no_classes_of_imagenet_apart_are_refused():
    with pytest.raises(TrainError, match="are no classifier of ImageNet's classes; fine-tune it"):
        load_trained("timm:vit_base_patch16_clip_224.openai:pretrained")
    with pytest.raises(ModelError, match="resnet50: has no weights to fetch; .* take torchvision:NAME or timm:NAME"):
        load_trained("resnet50:pretrained")


def test_weights_are_told_apart_by_their_digest(tmp_path):
    def published(seed: int) -> Trained:
        torch.manual_seed(seed)
        network = models.build(NAME, 3)
        return Trained(network, NAME, None, ("a", "b", "c"), models.normalisation(NAME))

    assert published(0).digest() == published(0).digest()
    assert published(0).digest() != published(1).digest()
    moved = published(0)
    moved.network.half()
    assert moved.digest() != published(0).digest()
    bare(tmp_path / "w.pytar", 3)
    first, second = (load_trained(f"{NAME}:{tmp_path / 'w.pytar'}", class_names="abc").digest() for _ in range(2))
    assert first == second


@pytest.fixture(scope="module")
def wordnet_set(wordnet_folder, tmp_path_factory):
    return convert_source(open_source(str(wordnet_folder)), tmp_path_factory.mktemp("sets") / "wordnet", processes=1)


WORDS = ["--model", NAME, "--resolution", "32", "--batch", "16", "--epochs", "1", "--device", "cpu"]


def test_a_published_refinery_labels_a_set_of_some_of_its_classes(wordnet_set, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    bare(tmp_path / "w.pytar", 1000)
    words = [*WORDS, "--data", str(wordnet_set.folder), "--refinery", f"{NAME}:w.pytar"]
    (run,) = train(parse(words), words)
    assert "refinery: of its 1000 classes, the data's 3 are used" in capsys.readouterr().out
    assert run.identity["refinery"]["network"] == NAME
    assert load_trained(str(run.folder)).class_names == wordnet_set.class_names
    trainer = open_trainer([parse(words)], wordnet_set, load_trained(words[-1], class_names=IDS), torch.device("cpu"))
    batch = next(iter(trainer.loader.epoch(0)))
    columns = [IDS.index(name) for name in wordnet_set.class_names]
    assert trainer.labels.columns.tolist() == columns
    assert trainer.labels(batch).logits.shape == (16, 3)


def test_a_refinery_that_lacks_classes_of_the_data_is_refused_with_both_counts(wordnet_set, converted, tmp_path):
    bare(tmp_path / "w.pytar", 1000)
    torch.save(
        {
            "format": "label-refinery-checkpoint",
            "model": models.build(NAME, 1000).state_dict(),
            "network": {
                **{"name": NAME, "num_classes": 1000, "class_names": list(IDS), "resolution": 32, "center_ratio": 1.0},
                **dict(zip(("mean", "std"), map(list, models.normalisation(NAME)), strict=True)),
            },
        },
        tmp_path / "last.pt",
    )
    words = [*WORDS, "--data", str(converted.folder), "--refinery", str(tmp_path)]
    with pytest.raises(
        TrainError, match=r"labels 1000 classes, and DATA=.* has 3, of which it lacks class0, class1, class2; train it"
    ):
        train(parse(words), words)


@pytest.mark.parametrize(
    ("name", "words", "seen"),
    [
        ("timm:vit_tiny_patch16_224", [], 224),  # takes nothing else
        ("timm:resnet10t", [], None),
        ("timm:resnet10t", ["--labels.resolution", "64"], 64),
    ],
)
def test_a_refinery_sees_what_the_student_sees_if_it_takes_that(name, words, seen, converted, tmp_path, capsys):
    network = models.build(name, 3)
    refinery = Trained(network, name, None, converted.class_names, models.normalisation(name), 224, 0.875)
    config = parse([*WORDS, "--data", str(converted.folder), "--refinery", "x:y", "--runs", str(tmp_path), *words])
    trainer = open_trainer([config], converted, refinery, torch.device("cpu"))
    assert trainer.labels.resolution == seen
    assert ("trained at 224 px, it sees the crops of 32 px" in capsys.readouterr().out) == (seen is None)
    batch = next(iter(trainer.loader.epoch(0)))
    assert trainer.labels(batch).logits.shape == (16, 3)


def test_a_size_that_the_refinery_does_not_take_is_refused(converted, tmp_path):
    name = "timm:vit_tiny_patch16_224"
    refinery = Trained(models.build(name, 3), name, None, converted.class_names, models.normalisation(name), 224)
    words = ["--data", str(converted.folder), "--refinery", "x:y", "--runs", str(tmp_path), "--labels.resolution", "96"]
    with pytest.raises(
        TrainError, match=r"REFINERY=x:y: cannot take crops of 96 px \(Input height \(96\) doesn't match"
    ):
        open_trainer([parse([*WORDS, *words])], converted, refinery, torch.device("cpu"))


@pytest.mark.parametrize("hub", ["timm", "torchvision"])
def test_only_a_hubs_networks_start_from_its_weights(hub, converted):
    words = [*WORDS, "--data", str(converted.folder), "--pretrained", hub]
    with pytest.raises(
        TrainError, match=f"pretrained={hub}: has weights for {hub}:NAME only, and not for MODEL={NAME}"
    ):
        train(parse(words), words)
