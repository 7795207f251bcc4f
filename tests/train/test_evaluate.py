"""Scores: among some of a network's classes, on ImageNet's several sets, and by ReaL labels."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import models
from data.originals import Originals
from data.sources import open_source
from kernels.normalise import Normalise
from models.classes import class_columns
from models.imagenet import class_ids
from tests.pictures import photograph
from train import TrainError
from train.evaluate import evaluate
from train.score import score

SHARED = Path(__file__).parents[3] / "shared/data"
IMAGENET = models.normalisation("resnet18")
CPU = torch.device("cpu")
IDS = class_ids()
NAME = "mobilenet0.25"


def bare(path: Path, outputs: int = 1000) -> nn.Module:
    """Writes a bare file of weights, with changed running statistics; returns its network."""
    torch.manual_seed(outputs)
    network = models.build(NAME, outputs)
    network(torch.randn(8, 3, 64, 64) * 2)
    torch.save(network.state_dict(), path, _use_new_zipfile_serialization=False)
    return network.eval()


def scores_of(checkpoint: str, data: Path, **options: Any) -> dict[str, Any]:
    """The results that the command writes."""
    evaluate(checkpoint, str(data), out="scores.json", device="cpu", **options)
    return json.loads(Path("scores.json").read_text())


@torch.inference_mode()
def logits_of(network: nn.Module, files: list[str], resolution: int = 64) -> torch.Tensor:
    """A network's logits for the central crops of image files, one by one."""
    said = []
    for file in files:
        with Image.open(file) as image:
            image = image.convert("RGB")
        side = round(min(image.size) * 0.875)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        crop = image.crop((left, top, left + side, top + side)).resize((resolution,) * 2, Image.Resampling.BILINEAR)
        pixels = torch.from_numpy(np.array(crop)).permute(2, 0, 1)[None]
        said.append(network(Normalise(IMAGENET)(pixels))[0])
    return torch.stack(said)


def test_a_network_of_all_classes_chooses_among_those_of_the_data(wordnet_folder, tmp_path):
    network = bare(tmp_path / "w.pytar")
    source = open_source(str(wordnet_folder))
    columns = [IDS.index(folder.name) for folder in sorted((wordnet_folder / "val").iterdir())]
    likeliest = logits_of(network, source.val.items)[:, columns].argsort(dim=1, descending=True)
    right = (likeliest[:, 0] == torch.from_numpy(source.val.labels)).float()
    loader = Originals(source.val, source.class_names, resolution=64, batch_size=4)
    scores = score(network, loader, IMAGENET, device=CPU, autocast=None, columns=columns)
    assert torch.equal(scores.predicted, likeliest[:, 0])
    assert scores.top1 == pytest.approx(100 * right.mean().item())
    assert scores.top5 == 100  # of three
    logits = logits_of(network, source.val.items)[:, columns]
    loss = -logits.softmax(dim=1)[range(15), source.val.labels].log().mean()
    assert scores.loss == pytest.approx(loss.item(), rel=1e-5)
    for label, (images, top1) in enumerate(scores.per_class):
        assert images == 5
        assert top1 == pytest.approx(100 * right[source.val.labels == label].mean().item())


def test_the_command_prints_which_classes_are_scored(wordnet_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    bare(tmp_path / "w.pytar")
    scores = scores_of(f"{NAME}:w.pytar", wordnet_folder, resolution=64)
    assert "of the 1000 classes of mobilenet0.25, the 3 of the data are used" in capsys.readouterr().out
    assert (scores["images"], scores["resolution"], scores["top5"]) == (15, 64, 100)
    assert list(scores["per_class"]) == sorted(folder.name for folder in (wordnet_folder / "val").iterdir())


def test_a_network_of_some_classes_is_scored_on_the_images_of_these(tmp_path):
    """Also if the data's other classes are between them, and another class of the network is not in the data."""
    names = IDS[100:106]
    for number, name in enumerate(names):
        (tmp_path / "set" / name).mkdir(parents=True)
        for image in range(3):
            photograph(10 * number + image, 70, 70).save(tmp_path / "set" / name / f"{image}.png")
    theirs = (names[4], IDS[7], names[1])
    network = bare(tmp_path / "w.pytar", 3)
    source = open_source(str(tmp_path / "set"), whole=True)
    loader = Originals(source.val, source.class_names, resolution=64, batch_size=5)
    scores = score(network, loader, IMAGENET, device=CPU, autocast=None, columns=class_columns(theirs, names))
    assert scores.images == 6
    assert [images for images, _ in scores.per_class] == [0, 3, 0, 0, 3, 0]
    # Among the two common classes, for all images; only images of these two are scored.
    logits = logits_of(network, source.val.items)
    chosen = torch.where(logits[:, 0] > logits[:, 2], 4, 1)
    assert torch.equal(scores.predicted, chosen)
    labels = torch.from_numpy(source.val.labels)
    scored = (labels == 1) | (labels == 4)
    assert scores.top1 == pytest.approx(100 * (chosen == labels)[scored].float().mean().item())
    right = torch.where(labels == 4, 0, 1)  # among the network's two classes that count, the first and the last
    losses = -logits[:, [0, 2]].softmax(dim=1)[range(18), right].log()
    assert scores.loss == pytest.approx(losses[scored].mean().item(), rel=1e-5)


class Colours(nn.Module):
    """Knows the class that a plain picture's colour stands for, and its neighbours."""

    def forward(self, crops: torch.Tensor) -> torch.Tensor:
        mean, std = (torch.tensor(part).view(1, 3, 1, 1) for part in IMAGENET)
        red, green, _ = (255 * (crops * std + mean)).mean(dim=(2, 3)).unbind(dim=1)
        number = (red / 6).round() * 40 + (green / 6).round()
        return -(number[:, None] - torch.arange(1000)).abs()


def test_imagenetv2_is_in_the_order_of_numbers(tmp_path):
    for number in range(1000):
        (tmp_path / str(number)).mkdir()
        Image.new("RGB", (8, 8), (number // 40 * 6, number % 40 * 6, 0)).save(tmp_path / str(number) / "a.png")
    source = open_source(str(tmp_path), whole=True)
    loader = Originals(source.val, source.class_names, resolution=8, batch_size=500)
    scores = score(
        Colours(), loader, IMAGENET, device=CPU, autocast=None, columns=class_columns(IDS, source.class_names)
    )
    assert (scores.top1, scores.top5, scores.images) == (100, 100, 1000)
    assert score(Colours(), loader, IMAGENET, device=CPU, autocast=None).top1 < 5  # in the order of text


@pytest.fixture(scope="module")
def validation_images(tmp_path_factory):
    """Imagenette's images of ImageNet's validation set, in their class folders."""
    if not SHARED.is_dir():
        pytest.skip("needs Imagenette and ReaL labels in shared/data")
    root = tmp_path_factory.mktemp("imagenette")
    for file in sorted((SHARED / "imagenette2-160/val").glob("*/ILSVRC2012_val_*")):
        (root / file.parent.name).mkdir(exist_ok=True)
        (root / file.parent.name / file.name).symlink_to(file)
    return root


@pytest.mark.slow
@pytest.mark.parametrize("outputs", [10, 1000])
def test_imagenettes_validation_images_by_real_labels(validation_images, outputs, tmp_path, monkeypatch, capsys):
    network = bare(tmp_path / "w.pytar", outputs)
    monkeypatch.chdir(tmp_path)
    ours = scores_of(
        f"{NAME}:w.pytar",
        validation_images,
        resolution=64,
        split="all",
        real=str(SHARED / "labels/real.json"),
    )
    classes = [wordnet_id for _, wordnet_id, _ in json.loads((SHARED / "labels/imagenet_classes.json").read_text())]
    real = json.loads((SHARED / "labels/real.json").read_text())
    files = sorted(map(str, validation_images.glob("*/*")))
    ten = sorted({Path(file).parent.name for file in files})
    logits = logits_of(network, files)
    columns = [classes.index(name) for name in ten] if outputs == 1000 else range(10)
    right, first = [], []
    for file, row in zip(files, logits[:, columns], strict=True):
        guess = ten[row.argmax()]
        labels = [classes[label] for label in real[int(re.search(r"_(\d{8})\.", file)[1]) - 1]]
        first.append(guess == Path(file).parent.name)
        if set(labels) & set(ten):
            right.append(guess in labels)
    assert ours["images"] == len(files) == 134
    # 6 have no labels at all, 16 show other classes of ImageNet only.
    assert (ours["real"]["images"], ours["real"]["left_out"]) == (len(right), 22) == (112, 22)
    assert ours["real"]["percent"] == pytest.approx(100 * sum(right) / len(right))
    assert ours["top1"] == pytest.approx(100 * sum(first) / 134)
    assert "% on 112 images; 22 more have no label among the 10 classes" in capsys.readouterr().out


def test_a_set_of_unreadable_images_has_no_scores(tmp_path):
    for name in ("ant", "bee"):
        (tmp_path / "set" / name).mkdir(parents=True)
        (tmp_path / "set" / name / "1.jpg").write_bytes(b"no image")
    source = open_source(str(tmp_path / "set"), whole=True)
    loader = Originals(source.val, source.class_names, resolution=64, batch_size=1)
    with pytest.raises(TrainError, match="there is no image to score"):
        score(models.build(NAME, 2), loader, IMAGENET, device=CPU, autocast=None)


def test_multi_label_accuracy_is_reported(wordnet_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    bare(tmp_path / "w.pytar")
    names = sorted(folder.name for folder in (wordnet_folder / "val").iterdir())
    # Any answer is right for 000.jpg and wrong for 001.jpg; the other images are not judged.
    judged = {"000.JPEG": {"correct": names[:2], "unclear": names[2:]}, "001.JPEG": {"correct": [IDS[0]]}}
    Path("annotations.json").write_text(json.dumps({"initial_annots": judged, "problematic_images": {}}))
    scores = scores_of(f"{NAME}:w.pytar", wordnet_folder, resolution=64, multi_label="annotations.json")
    assert scores["multi_label"] == {"percent": 100, "images": 3, "left_out": 3}


def test_unscorable_inputs_are_refused(wordnet_folder, image_folder, converted, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    bare(tmp_path / "w.pytar")
    bare(tmp_path / "three.pytar", 3)
    Path("real.json").write_text("[[0]]")
    for file, data, says in [
        ("w", wordnet_folder, "none of its files is named as one that has ReaL labels"),
        ("three", image_folder, "is of other classes than ImageNet's"),
        ("w", converted.folder, "is a converted set, and this is scored on the files as they are; give the folder"),
    ]:
        with pytest.raises(TrainError, match=f"^DATA={data}: {says}"):
            scores_of(f"{NAME}:{file}.pytar", data, real="real.json")
