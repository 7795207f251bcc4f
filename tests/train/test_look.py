"""The page of `make look`: its numbers against an independent count, its contents, limits, and refused inputs."""

import base64
import io
import json
import shutil
from functools import partial
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from PIL import Image

import models
from command import exit_on_user_error
from data.beton import Beton
from data.convert import convert_source
from data.loader import open_loader
from data.sets import open_set
from data.sources import open_source
from kernels.normalise import Normalise
from models.trained import load_trained
from tests.pictures import write_class_folders
from train import TrainError
from train.augment import kept, partners
from train.config import configure, parse
from train.job import check, resolve
from train.look import command, matrix, page, sections, thumbnails
from train.look.answers import Answers, Judge, calibration, chosen, confusion
from train.look.command import LookOptions, look
from train.look.crops import first_crops
from train.look.duplicates import find_duplicates
from train.look.thumbnails import Thumbnails
from train.report.analysis import Compute
from train.train import train

CPU = Compute(torch.device("cpu"), "ffcv", 1, 16)
HOSTILE = ("<script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "$a & $b \x1b[31m")
WORDS = {"resolution": 32, "batch": 16, "device": "cpu", "precision": "fp32", "threads": 1}


@pytest.fixture(scope="module")
def data(converted, tmp_path_factory):
    """The tiny set, with names of classes and files that a page has to escape."""
    folder = tmp_path_factory.mktemp("named") / "set"
    shutil.copytree(converted.folder, folder)
    described = json.loads((folder / "set.json").read_text())
    (folder / "set.json").write_text(json.dumps(described | {"class_names": HOSTILE}))
    for split in ("train", "val"):
        file = folder / f"{split}.names.json"
        file.write_text(json.dumps([f"<b>{name}" for name in json.loads(file.read_text())]))
    return open_set(folder)


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    """A refinery and its student, finished."""
    root = tmp_path_factory.mktemp("runs")
    words = ["--resolution", "32", "--batch", "16", "--device", "cpu", "--data", str(data.folder), "--runs", str(root)]
    words += ["--precision", "fp32", "--recipe", "quick", "--threads", "1", "--model"]
    (refinery,) = train(parse([*words, "resnet18", "--epochs", "2"]))
    (student,) = train(parse([*words, "mobilenet0.25", "--epochs", "2", "--refinery", str(refinery.folder)]))
    return refinery, student


@pytest.fixture
def written(tmp_path):
    """Writes a page with these options and reads it."""

    def written(checkpoint: str | Path | None = None, images: int = 1000, **given: object) -> "Page":
        out = tmp_path / "look.html"
        options = LookOptions(str(checkpoint) if checkpoint else None, images)
        assert look(configure(WORDS | {"out": str(out)} | given), options) == out
        assert [path.name for path in tmp_path.iterdir() if "look" in path.name] == ["look.html"]
        return Page(out.read_text())

    return written


class Page(HTMLParser):
    """The page as a browser parses it."""

    def __init__(self, text: str):
        super().__init__()
        self.text, self.tags, self.open = text, [], []
        self.headings: list[str] = []
        self.cells: list[str] = []
        self.words = ""
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img"):
            self.open.append(tag)
        if tag == "h2":
            self.headings.append("")
        if tag == "td":
            self.cells.append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" in self.open:
            return
        self.words += data
        if "h2" in self.open:
            self.headings[-1] += data
        if "td" in self.open:
            self.cells[-1] += data

    @property
    def pictures(self) -> list[str]:
        return [attributes["src"] for tag, attributes in self.tags if tag == "img"]


def check_alone_and_harmless(found: Page) -> None:
    tags = {tag for tag, _ in found.tags}
    assert not {"script", "link", "iframe", "object", "embed", "b"} & tags
    for _, attributes in found.tags:
        assert not any(name.startswith("on") for name in attributes)
        for name in ("src", "href"):
            address = attributes.get(name)
            assert address is None or address.startswith(("data:image/", "#"))
    assert "\x1b" not in found.text


def test_before_training_a_page_shows_classes_crops_and_duplicates(written, data):
    found = written(data=str(data.folder))
    assert found.headings == ["Classes and sizes", "Crops and their labels", "Duplicates"]
    check_alone_and_harmless(found)
    for name in HOSTILE[:2]:
        assert name in found.words
    assert found.cells[:4] == [HOSTILE[0], "16", "33\xa0%", "5"]
    assert "Labels of crops: ground truth" in found.words
    assert "Over the 16 crops" not in found.words
    assert "No two images are the same" in found.words


def test_with_refinery_and_student_it_shows_their_labels_and_results(written, data, trained):
    refinery, student = trained
    found = written(student.folder)
    assert found.headings == [
        *("Classes and sizes", "Crops and their labels", "Duplicates", "Suspects", "Learning curves"),
        *("Worst classes", "Confusion", "Worst mistakes", "Calibration"),
    ]
    check_alone_and_harmless(found)
    # The page of a run shows its labels without further options.
    assert f"refinery resnet18 ({refinery.folder}/last.pt)" in found.words
    assert "refinery, image" in found.words
    assert "checkpoint, crop" in found.words
    assert f"top-1 {student.result['top1']:.2f} %, top-5 {student.result['top5']:.2f} % of 15" in found.words
    assert len([picture for picture in found.pictures if picture.startswith("data:image/jpeg")]) <= thumbnails.MOST
    for source in found.pictures:
        image = Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2])))
        image.load()
        assert image.format == "PNG" or max(image.size) <= 192


def test_published_weights_of_more_classes_label_crops_and_images(written, wordnet_folder, tmp_path, monkeypatch):
    """From timm's cache, as after a download."""
    torch.manual_seed(0)
    repository = tmp_path / "hub" / "models--timm--resnet10t.c3_in1k"
    (repository / "snapshots" / "1").mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("1")
    weights = timm.create_model("resnet10t", num_classes=1000).state_dict()
    safetensors.torch.save_file(weights, repository / "snapshots" / "1" / "model.safetensors")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    found = written(data=str(wordnet_folder), refinery="timm:resnet10t:pretrained")
    assert "the refinery timm:resnet10t (timm:resnet10t:pretrained)" in found.words
    assert "refinery, image" in found.words
    assert found.headings[-1] == "Suspects"
    # WordNet ids in words, beside their folders.
    assert {"tiger shark", "n01491361"} <= set(found.cells)


def test_a_networks_name_selects_its_finished_run(written, data, trained):
    refinery, _ = trained
    found = written(data=str(data.folder), refinery="resnet18", runs=str(refinery.folder.parents[1]))
    assert f"refinery resnet18 ({refinery.folder}/last.pt)" in found.words


def test_a_lost_refinery_is_reported(written, trained, tmp_path, capsys):
    _, student = trained
    copy = Path(shutil.copytree(student.folder, tmp_path / "copy"))
    config = copy / "config.yaml"
    config.write_text(config.read_text().replace(str(trained[0].folder), str(tmp_path / "gone")))
    found = written(copy)
    assert f"{tmp_path / 'gone'}: the origin of the run's labels no longer exists" in capsys.readouterr().out
    assert "Labels of crops: ground truth" in found.words


def test_the_crops_are_those_of_the_first_step(data, trained):
    """Of a student: its own crops, with its refinery's labels, as the step computes them."""
    refinery, student = trained
    config = configure(WORDS | {"data": str(data.folder), "refinery": str(refinery.folder)})
    fetched, (labels,) = check([config])
    job = resolve(config, fetched, labels)
    assert job.crop_seed == student.crop_seed
    first = first_crops(job, Beton(data.beton("train")), HOSTILE, 9, None)
    loader = open_loader(
        data.beton("train"), resolution=32, batch_size=16, seed=student.crop_seed, crop=data.crop, decoder="ffcv"
    )
    batch = next(loader.epoch(0))
    known = load_trained(str(refinery.folder))
    with torch.no_grad():
        chances = known.network.train()(Normalise(known.normalisation)(batch.crops)).softmax(1)
    rows = {int(index): row for row, index in enumerate(batch.indices)}
    assert [crop.label for crop in first.crops[:3]] == list(dict.fromkeys(batch.labels.tolist()))
    for crop in first.crops:
        row = rows[crop.index]
        assert crop.boxes[0] == tuple(batch.boxes[row].tolist())
        assert (crop.pixels == batch.crops[row].permute(1, 2, 0).numpy()).all()
        assert dict(crop.said) == pytest.approx(dict(zip(HOSTILE, chances[row].tolist(), strict=True)), abs=1e-4)
        assert len(crop.boxes) == 4
    right = chances.argmax(1) == batch.labels
    assert first.agree == int(right.sum())
    assert first.given == pytest.approx(float(chances[range(16), batch.labels].mean()), abs=1e-4)


@pytest.mark.parametrize("refined", [False, True])
def test_mixed_crops_have_the_labels_of_both(data, trained, refined):
    """The labels that the step uses: the weighted labels of two images, or the refinery's of the mixture."""
    refinery, _ = trained
    given = {"data": str(data.folder), "augment.mixup": 1.0} | ({"refinery": str(refinery.folder)} if refined else {})
    config = configure(WORDS | given)
    fetched, (labels,) = check([config])
    job = resolve(config, fetched, labels)
    first = first_crops(job, Beton(data.beton("train")), HOSTILE, 16, None)
    batch = next(job.open_crops().epoch(0))
    draws = job.augment.draw(16, 32, epoch=0, step=0)
    share, other = kept(draws), partners(draws)
    mixed = share[:, None, None, None] * batch.crops + (1 - share)[:, None, None, None] * batch.crops[other]
    own = torch.nn.functional.one_hot(batch.labels, 3).float()
    expected = share[:, None] * own + (1 - share)[:, None] * own[other]
    if refined:
        known = load_trained(str(refinery.folder))
        with torch.no_grad():
            expected = known.network.train()(Normalise(known.normalisation)(mixed)).softmax(1)
    assert (own - expected).abs().max() > 0.1
    rows = {int(index): row for row, index in enumerate(batch.indices)}
    for crop in first.crops:
        row = rows[crop.index]
        assert np.abs(crop.pixels - mixed[row].permute(1, 2, 0).numpy()).max() < 1
        assert dict(crop.said) == pytest.approx(dict(zip(HOSTILE, expected[row].tolist(), strict=True)), abs=1e-3)


def test_answers_are_the_networks_output_for_central_crops(data, trained):
    known = load_trained(str(trained[0].folder))
    judge = Judge("it", known, range(3), 32, data.crop, "fp32")
    beton = Beton(data.beton("val"))
    found = judge.answers(beton, np.arange(15), CPU, name="test")
    (batch,) = open_loader(beton.path, resolution=32, batch_size=15, train=False, crop=data.crop).epoch(0)
    with torch.no_grad():
        chances = known.network.eval()(Normalise(known.normalisation)(batch.crops)).softmax(1)
    assert found.predicted.tolist() == chances.argmax(1).tolist()
    assert found.confidence.tolist() == pytest.approx(chances.max(1).values.tolist(), abs=1e-4)
    assert found.of_label.tolist() == pytest.approx(chances[range(15), batch.labels].tolist(), abs=1e-4)
    assert found.within5.all()
    doubts = found.most_doubted(15)
    assert set(doubts.tolist()) == set(np.flatnonzero(~found.right).tolist())
    assert (np.diff(found.of_label[doubts]) >= 0).all()


def test_some_of_many_images_are_chosen_once_each(data):
    some = chosen(Beton(data.beton("train")), 10, seed=3)
    assert len(set(some.tolist())) == 10
    assert (np.diff(some) > 0).all()
    assert chosen(Beton(data.beton("train")), 1000, seed=3).tolist() == list(range(48))


def answers_of(labels, predicted, classes: int, confidence: float = 0.9) -> Answers:
    labels, predicted = np.asarray(labels), np.asarray(predicted)
    sure = np.full(len(labels), confidence, np.float32)
    own = np.where(labels == predicted, sure, np.float32(0.001))
    return Answers("it", np.arange(len(labels)), labels, predicted, sure, own, labels == predicted, classes)


def test_confusion_and_accuracy_of_classes():
    found = answers_of([0, 0, 0, 0, 1, 1, 3], [0, 1, 1, 3, 1, 1, 0], 4)
    assert confusion(found).tolist() == [[0.25, 0.5, 0, 0.25], [0, 1, 0, 0], [0, 0, 0, 0], [1, 0, 0, 0]]
    assert found.confused() == [(0, 1, 2), (0, 3, 1), (3, 0, 1)]
    images, accuracy = found.of_classes()
    assert images.tolist() == [4, 2, 0, 1]
    assert accuracy[[0, 1, 3]].tolist() == [25, 100, 0]
    assert np.isnan(accuracy[2])
    assert sections.suspicious(found) == 0
    assert sections.suspicious(answers_of([0, 1], [1, 1], 2, confidence=0.95)) == 1


def test_calibration_of_a_calibrated_network():
    rng = np.random.default_rng(0)
    confidence = rng.uniform(0.2, 1, 60_000).astype(np.float32)
    right = rng.uniform(size=60_000) < confidence
    labels = np.zeros(60_000, np.int64)
    found = calibration(
        Answers("it", np.arange(60_000), labels, np.where(right, 0, 1), confidence, confidence, right, 2)
    )
    assert found.error < 0.01
    assert found.counts.sum() == 60_000
    assert (found.low <= found.accuracy).all()
    assert (found.accuracy <= found.high).all()
    assert (np.abs(found.accuracy - found.confidence) < 0.03).all()
    over = calibration(
        Answers(
            "it",
            np.arange(4),
            np.zeros(4, int),
            np.array([0, 1, 1, 1]),
            np.full(4, 1.0, np.float32),
            *[right[:4]] * 2,
            2,
        )
    )
    assert (over.error, over.counts.tolist(), over.accuracy.tolist()) == (0.75, [4], [0.25])


def test_confused_classes_are_adjacent():
    """Groups of classes that are confused with each other become adjacent from a random order."""
    rng = np.random.default_rng(1)
    group = np.repeat(np.arange(20), 25)[rng.permutation(500)]
    shares = np.where(group[:, None] == group[None], 0.02, 0) + np.eye(500) * 0.5
    order = matrix.by_similarity(shares.astype(np.float32))
    assert sorted(order.tolist()) == list(range(500))
    assert np.count_nonzero(np.diff(group[order])) == 19
    for classes in (1, 2, 3):
        assert sorted(matrix.by_similarity(np.eye(classes, dtype=np.float32)).tolist()) == list(range(classes))


@pytest.mark.parametrize("classes", [1, 2, 12, 40, 41, 500, 1500])
def test_every_cell_of_a_matrix_is_visible(classes):
    """A single cell is visible for any number of classes."""
    shares = np.zeros((classes, classes), np.float32)
    empty, together = matrix.picture(shares, ["name"] * classes)
    shares[classes // 3, classes // 2] = 1
    png, again = matrix.picture(shares, ["name"] * classes)
    assert together == again == (2 if classes > 1000 else 1)
    before, after = (np.asarray(Image.open(io.BytesIO(each)).convert("L"), int) for each in (empty, png))
    assert before.shape == after.shape
    assert (before - after).max() > 100
    assert len(png) < 2_000_000


def test_duplicates_are_found_within_and_across_splits(tmp_path):
    write_class_folders(tmp_path / "images" / "train", 3, 4)
    write_class_folders(tmp_path / "images" / "val", 3, 2, seed=100)
    train_, val = tmp_path / "images" / "train", tmp_path / "images" / "val"
    shutil.copy(train_ / "class0" / "001.jpg", train_ / "class2" / "copy.jpg")
    shutil.copy(train_ / "class1" / "003.jpg", val / "class1" / "copy.jpg")
    shutil.copy(train_ / "class1" / "000.jpg", train_ / "class1" / "copy.jpg")
    data = convert_source(open_source(str(tmp_path / "images")), tmp_path / "set", processes=1)
    betons = [Beton(data.beton(split)) for split in ("train", "val")]
    found = find_duplicates(*betons)
    names = {"train": data.image_names("train"), "val": data.image_names("val")}
    files = [[f"{split}/{names[split][index]}" for split, index in each.members] for each in found]
    assert files == [
        ["train/class0/001.jpg", "train/class2/copy.jpg"],
        ["train/class1/003.jpg", "val/class1/copy.jpg"],
        ["train/class1/000.jpg", "train/class1/copy.jpg"],
    ]
    assert [(each.contradictory, each.across) for each in found] == [(True, False), (False, True), (False, False)]
    out = tmp_path / "page.html"
    look(configure(WORDS | {"data": str(data.folder), "batch": 4, "out": str(out)}))
    found_page = Page(out.read_text())
    words = found_page.words
    assert "3 images are there more than once, byte for byte: 1 with different labels, 1 both in train" in words
    for file in ("train/class0/001.jpg", "train/class2/copy.jpg", "val/class1/copy.jpg"):
        assert f"<div class=file>{file}</div>" in found_page.text
    # Files of other writers have no checksums.
    for beton in betons:
        beton.checksums = None
    assert find_duplicates(*betons) == found


def test_thumbnails_are_limited_in_number_and_size():
    noise = np.random.default_rng(0).integers(0, 256, (400, 300, 3), dtype=np.uint8)
    made = Thumbnails()
    for _ in range(thumbnails.MOST):
        address = made.address(noise, boxes=((0, 0, 400, 300), (399, 299, 1, 1)))
    assert len(base64.b64decode(address.partition(",")[2])) <= 16_000
    with pytest.raises(RuntimeError):
        made.address(noise)
    assert Image.open(io.BytesIO(base64.b64decode(address.partition(",")[2]))).size == (144, 192)
    assert Image.open(io.BytesIO(base64.b64decode(Thumbnails().address(noise[:1, :1]).partition(",")[2]))).size == (
        1,
        1,
    )


def test_500_classes_with_long_names_stay_within_the_limits(tmp_path):
    """Noise, which JPEG and PNG cannot compress, and a network that confuses everything with everything."""
    rng = np.random.default_rng(0)
    for split, images in (("train", 1), ("val", 1)):
        for label in range(500):
            folder = tmp_path / "images" / split / f"{label:03}{'<&' * 60}"
            folder.mkdir(parents=True)
            for number in range(images):
                Image.fromarray(rng.integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(folder / f"{number}.png")
    data = convert_source(open_source(str(tmp_path / "images")), tmp_path / "set", processes=1)
    torch.manual_seed(0)
    torch.save(models.build("mobilenet0.25", 500).state_dict(), tmp_path / "bare.pt")
    out = tmp_path / "page.html"
    options = LookOptions(f"mobilenet0.25:{tmp_path / 'bare.pt'}")
    look(configure(WORDS | {"data": str(data.folder), "batch": 64, "out": str(out)}), options)
    found = Page(out.read_text())
    check_alone_and_harmless(found)
    assert out.stat().st_size < page.MOST_BYTES
    assert 100 < len([each for each in found.pictures if "jpeg" in each[:30]]) <= thumbnails.MOST
    assert "Classes by their numbers in the picture" in found.words
    assert "…" in found.words


def test_a_page_with_all_parts_holds_no_more_than_the_limit_of_thumbnails():
    from train.look import results

    most = 2 * sections.CROPS + sections._GROUPS + sections.SUSPECTS + sections._SUSPECTS_OF_VAL
    assert most + results.MISTAKES + results._WORST_SHOWN * results._OF_A_CLASS <= thumbnails.MOST


def test_learning_curves_show_the_validation_loss_where_there_is_one(trained, tmp_path, written):
    _, student = trained
    copy = Path(shutil.copytree(student.folder, tmp_path / "copy"))
    metrics = copy / "metrics.jsonl"
    recorded = [json.loads(line) for line in metrics.read_text().splitlines()]
    for line in recorded:
        line.pop("val_loss", None)
    for more, said in (({}, False), ({"val_loss": 1.5}, True)):
        metrics.write_text("".join(json.dumps(line | more) + "\n" for line in recorded))
        words = written(copy).words
        assert ("The run recorded no validation loss" in words) != said
        assert ("so they stand apart" in words) == said


@pytest.mark.slow
def test_scenes_show_the_truth_about_crops(tmp_path, monkeypatch):
    from data import scenes

    assert scenes.CLASS_NAMES
    monkeypatch.chdir(tmp_path)
    job_of = partial(configure, WORDS)
    config = job_of().replace({"data": "scenes"})
    data, (labels,) = check([config])
    job = resolve(config, data, labels)
    beton = Beton(data.beton("train"))
    first = first_crops(job, beton, data.class_names, 12, None)
    boxes = np.array([crop.boxes[0] for crop in first.crops])
    truth = scenes.crop_truth("train", np.array([crop.index for crop in first.crops]), boxes)
    names = [data.class_names[label] if label >= 0 else "nothing (ground)" for label in truth]
    assert [crop.truth for crop in first.crops] == names


@pytest.fixture
def refusal(monkeypatch, capsys):
    """The one line with which the command refuses its words."""

    def refusal(*words: object) -> str:
        monkeypatch.setattr("sys.argv", ["look", *map(str, words)])
        with pytest.raises(SystemExit) as ended:
            exit_on_user_error(command.main)
        assert ended.value.code == 2
        errors = capsys.readouterr().err
        assert len(errors.splitlines()) == 1, errors
        return errors

    return refusal


def test_bad_inputs_end_in_one_line_before_anything_slow(data, trained, refusal, tmp_path, monkeypatch):
    _, student = trained
    monkeypatch.chdir(tmp_path)

    def never(*_: object, **__: object) -> None:
        raise AssertionError("something slow has begun")

    for name in ("find_duplicates", "first_crops"):
        monkeypatch.setattr(command, name, never)
    (tmp_path / "file").touch()
    (tmp_path / "folder.html").mkdir()
    bare = shutil.copytree(student.folder, tmp_path / "bare")
    (bare / "config.yaml").unlink()
    five = write_class_folders(tmp_path / "five", 5, 3)
    known = ["--data", data.folder]
    for words, says in [
        (["--data", "absent"], "DATA=absent: no such folder"),
        ([*known, "--refinery", "resnet50"], f"REFINERY=resnet50: has no finished run on {data.name} at"),
        ([*known, "--refinery", "absent"], "absent: no such run folder"),
        ([*known, "--checkpoint", "resnet50"], "CHECKPOINT=resnet50: names a network without weights"),
        ([*known, "--checkpoint", "absent"], "absent: no such run folder"),
        (["--data", five, "--checkpoint", student.folder], "lacks class0, class1"),
        (["--checkpoint", bare], "config.yaml: missing or damaged; say with DATA"),
        ([*known, "--out", "page.txt"], "OUT=page.txt: name a file that ends in .html"),
        ([*known, "--out", "folder.html"], "OUT=folder.html: name a file that ends in .html"),
        ([*known, "--out", "file/page.html"], "cannot be made"),
        ([*known, "--images", "0"], "images=0: must be at least 1"),
        ([*known, "--batch", "0"], "batch=0: must be at least 1"),
        ([*known, "--resolution", "0"], "resolution=0: must be at least 1"),
        ([*known, "--gpus", "2"], "--gpus"),
    ]:
        assert says in refusal(*words), words
    assert not list(tmp_path.rglob("look.html"))


def test_a_page_that_cannot_be_written_leaves_the_previous_one(data, tmp_path, monkeypatch):
    out = tmp_path / "look.html"
    out.write_text("the one before")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(TrainError, match="the disk of .* is full"):
        look(configure(WORDS | {"data": str(data.folder), "out": str(out)}))
    assert out.read_text() == "the one before"
    assert [path.name for path in tmp_path.iterdir()] == ["look.html"]
