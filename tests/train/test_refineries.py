"""Refineries of runs: published ones, of other classes and of other sizes; and weights to start from."""

import pytest
import torch

import models
from data.convert import convert_source
from data.sources import open_source
from models.imagenet import class_ids
from models.trained import Trained, load_trained
from train import TrainError
from train.config import parse
from train.job import check, resolve
from train.labels.refinery import RefineryLabels
from train.loop import Trainer
from train.train import train

NAME = "mobilenet0.25"
IDS = class_ids()


@pytest.fixture(scope="module")
def wordnet_set(wordnet_folder, tmp_path_factory):
    return convert_source(open_source(str(wordnet_folder)), tmp_path_factory.mktemp("sets") / "wordnet", processes=1)


def trainer_of(words) -> Trainer:
    data, (labels,) = check([parse(words)])
    return Trainer([resolve(parse(words), data, labels)])


WORDS = [
    "--model",
    NAME,
    "--resolution",
    "32",
    "--batch",
    "16",
    "--epochs",
    "1",
    "--device",
    "cpu",
    "--precision",
    "fp32",
]


def test_a_published_refinery_labels_a_set_of_some_of_its_classes(
    wordnet_set, bf16_units, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    torch.save(models.build(NAME, 1000).state_dict(), tmp_path / "w.pytar")
    words = [*WORDS, "--data", str(wordnet_set.folder), "--refinery", f"{NAME}:w.pytar", "--precision", "auto"]
    (run,) = train(parse(words))
    assert "refinery: of its 1000 classes, the data's 3 are used" in capsys.readouterr().out
    assert run.identity["refinery"]["network"] == NAME
    assert load_trained(str(run.folder)).class_names == wordnet_set.class_names
    trainer = trainer_of(words)
    batch = next(iter(trainer.loader.epoch(0)))
    columns = [IDS.index(name) for name in wordnet_set.class_names]
    assert trainer.labels.columns.tolist() == columns
    autocast = trainer.job.autocast
    assert autocast is (torch.bfloat16 if bf16_units else None)
    with torch.autocast("cpu", dtype=autocast, enabled=autocast is not None):
        assert trainer.labels(batch).logits.shape == (16, 3)


def test_a_refinery_that_lacks_classes_of_the_data_is_refused_with_both_counts(wordnet_set, converted, tmp_path):
    torch.save(models.build(NAME, 1000).state_dict(), tmp_path / "w.pytar")
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
        train(parse(words))


@pytest.mark.parametrize(
    ("name", "words", "seen"),
    [
        ("timm:vit_tiny_patch16_224", [], 224),  # accepts no other size
        ("timm:resnet10t", [], None),
        ("timm:resnet10t", ["--labels.resolution", "64"], 64),
    ],
)
def test_a_refinery_sees_the_students_resolution_if_it_accepts_it(name, words, seen, converted, tmp_path, capsys):
    network = models.build(name, 3)
    refinery = Trained(network, name, None, converted.class_names, models.normalisation(name), 224, 0.875)
    config = parse([*WORDS, "--data", str(converted.folder), "--refinery", "x:y", "--runs", str(tmp_path), *words])
    labels = RefineryLabels(refinery, "x:y", config.labels)
    trainer = Trainer([resolve(config, converted, labels)])
    assert trainer.labels.resolution == seen
    assert ("trained at 224 px, it sees the crops of 32 px" in capsys.readouterr().out) == (seen is None)
    batch = next(iter(trainer.loader.epoch(0)))
    assert trainer.labels(batch).logits.shape == (16, 3)


def test_a_size_that_the_refinery_does_not_accept_is_refused(converted, tmp_path):
    name = "timm:vit_tiny_patch16_224"
    refinery = Trained(models.build(name, 3), name, None, converted.class_names, models.normalisation(name), 224)
    words = ["--data", str(converted.folder), "--refinery", "x:y", "--runs", str(tmp_path), "--labels.resolution", "96"]
    config = parse([*WORDS, *words])
    with pytest.raises(
        TrainError, match=r"REFINERY=x:y: cannot take crops of 96 px \(Input height \(96\) doesn't match"
    ):
        Trainer([resolve(config, converted, RefineryLabels(refinery, "x:y", config.labels))])


@pytest.mark.parametrize("hub", ["timm", "torchvision"])
def test_only_a_hubs_networks_start_from_its_weights(hub, converted):
    words = [*WORDS, "--data", str(converted.folder), "--pretrained", hub]
    with pytest.raises(
        TrainError, match=f"pretrained={hub}: has weights for {hub}:NAME only, and not for MODEL={NAME}"
    ):
        train(parse(words))


def test_an_images_label_is_of_the_grown_crop_however_short_the_run(converted, tmp_path):
    """A run of two epochs ends before its crops have reached the full resolution."""
    words = ["--data", str(converted.folder), "--refinery", f"{NAME}:{tmp_path / 'w.pt'}", "--runs", str(tmp_path)]
    words += ["--resolution", "64", "--resolution_from", "0.5", "--epochs", "2", "--labels.per", "image"]
    torch.save(models.build(NAME, 3).state_dict(), tmp_path / "w.pt")
    trainer = trainer_of([*WORDS, *words])
    assert trainer.job.resolutions == [32, 48]
    assert [pairing.resolution for pairing in trainer.labels.pairings] == [64]


@pytest.mark.parametrize("options", [[], ["--labels.per", "image"], ["--labels.resolution", "48"]])
def test_averaged_statistics_are_the_same_in_every_start_of_a_run(options, run, converted):
    """They depend on the run's data only, not on a batch or a state: the second trainer labels like the first."""
    refinery = run("--epochs", "1")
    words = [*WORDS, "--data", str(converted.folder), "--refinery", str(refinery.folder), "--labels.bn", "averaged"]
    first, second = trainer_of([*words, *options]), trainer_of([*words, *options])
    batch = next(iter(first.loader.epoch(0)))
    logits = first.labels(batch).logits
    assert torch.equal(logits, second.labels(batch).logits)
    batches = trainer_of([*words[:-1], "batch", *options]).labels(batch).logits
    running = trainer_of([*words[:-1], "running", *options]).labels(batch).logits
    for other in (batches, running):
        assert not torch.allclose(logits, other, atol=1e-3)
