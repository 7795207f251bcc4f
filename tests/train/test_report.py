"""Reports: their numbers against an independent count, the page and its pictures, and refused inputs."""

import base64
import io
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from command import run_command
from data.beton import Beton, write_beton
from data.convert import Storage, encode
from data.loader import open_loader
from data.sets import open_set
from kernels.normalise import Normalise
from models.trained import load_trained
from tests.pictures import photograph, write_class_folders
from train import TrainError
from train.config import parse
from train.report import analysis, figures
from train.report.analysis import Accuracies, Accuracy, Compute, Subject
from train.report.command import report
from train.runs import read_run
from train.train import train

CPU = Compute(torch.device("cpu"), "ffcv", 1, 16)
# Characters that a page has to escape, and that matplotlib would interpret as a formula.
NAMES = ("a<b", "$5 & $6", 'the "third"')


@pytest.fixture(scope="module")
def data(converted, tmp_path_factory):
    """The tiny set, with difficult names of classes."""
    folder = tmp_path_factory.mktemp("named") / "set"
    shutil.copytree(converted.folder, folder)
    described = json.loads((folder / "set.json").read_text())
    (folder / "set.json").write_text(json.dumps(described | {"class_names": NAMES}))
    return open_set(folder)


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    """A finished refinery and its student; only reports may change their folders."""
    root = tmp_path_factory.mktemp("runs")
    words = ["--resolution", "32", "--batch", "16", "--device", "cpu", "--data", str(data.folder), "--runs", str(root)]
    words += ["--precision", "fp32", "--recipe", "quick", "--model"]
    first = [*words, "resnet18", "--epochs", "3"]
    (refinery,) = train(parse(first))
    second = [*words, "mobilenet0.25", "--epochs", "1", "--refinery", str(refinery.folder)]
    (student,) = train(parse(second))
    return refinery, student


@pytest.fixture(scope="module")
def reported(trained, data, tmp_path_factory):
    """A report of both runs."""
    out = tmp_path_factory.mktemp("report")
    report(" ".join(str(run.folder) for run in trained), out=str(out), images="7 20 40", device="cpu", threads=1)
    return out


@pytest.fixture
def copies(trained, tmp_path):
    """The runs, in folders that a test may change."""
    return [Path(shutil.copytree(run.folder, tmp_path / run.folder.name)) for run in trained]


def subject_of(run, data) -> Subject:
    return Subject(run, "it", load_trained(str(run.folder)), 32, data.crop, "fp32")


def said_in_config(folder: Path, key: str, value: object) -> None:
    """Changes an option in the run's configuration."""
    path = folder / "config.yaml"
    kept = [line for line in path.read_text().splitlines() if not line.startswith(f"{key}:")]
    path.write_text("\n".join([*kept, f"{key}: {value}"]))


def logits_of(run, crops: torch.Tensor, *, batch_statistics: bool = False) -> torch.Tensor:
    """The logits of a run's network for crops, uint8, in plain PyTorch."""
    known = load_trained(str(run.folder))
    with torch.no_grad():
        return known.network.train(batch_statistics)(Normalise(known.normalisation)(crops))


def training_loader(data, seed: int, **options):
    return open_loader(data.beton("train"), resolution=32, seed=seed, crop=data.crop, decoder="ffcv", **options)


class Page(HTMLParser):
    """The page as a browser parses it: all tags with their attributes, and the text of cells and captions."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, list[str]] = {"td": [], "figcaption": []}
        self.open: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img"):
            self.open.append(tag)
        if tag in self.texts:
            self.texts[tag].append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        for tag in self.texts:
            if tag in self.open:
                self.texts[tag][-1] += data


def test_accuracy_of_each_class_equals_a_plain_count(reported, trained, data):
    """Counted image by image, in another order and other batches."""
    splits = {
        "train": training_loader(data, 1000, batch_size=7, drop_last=False),
        "val_crops": open_loader(
            data.beton("val"), resolution=32, seed=1000, crop=data.crop, decoder="ffcv", batch_size=7, drop_last=False
        ),
        "val": open_loader(data.beton("val"), resolution=32, batch_size=4, train=False, crop=data.crop),
    }
    assert data.crop.center_ratio == 1.0
    for run in trained:
        (kept,) = run.folder.glob("accuracies-*.json")
        written = json.loads(kept.read_text())
        for split, loader in splits.items():
            tally: dict[int, list[bool]] = {label: [] for label in range(3)}
            for batch in loader.epoch(0):
                for said, label in zip(
                    logits_of(run, batch.crops).argmax(1).tolist(), batch.labels.tolist(), strict=True
                ):
                    tally[label].append(said == label)
            assert [len(hits) for hits in tally.values()] == ([16] * 3 if split == "train" else [5] * 3)
            assert written[split]["per_class"] == [
                [len(hits), pytest.approx(100 * sum(hits) / len(hits))] for hits in tally.values()
            ]
            every = [hit for hits in tally.values() for hit in hits]
            assert written[split]["top1"] == pytest.approx(100 * sum(every) / len(every))
        assert written["val"]["top1"] == pytest.approx(run.result["top1"])
        assert tuple(written["class_names"]) == NAMES


def test_a_run_in_bfloat16_is_counted_in_bfloat16(run, bf16_units, tmp_path):
    """Emulated on a processor without units for it; the cache's key includes the precision."""
    finished = run("--precision", "auto", "--epochs", "1")
    report(str(finished.folder), out=str(tmp_path / "out"), images="7", device="cpu", threads=1)
    (kept,) = finished.folder.glob("accuracies-*.json")
    written = json.loads(kept.read_text())
    assert written["of"]["precision"] == ("bf16" if bf16_units else "fp32")
    assert written["val"]["top1"] == pytest.approx(finished.result["top1"])


def test_the_page_holds_all_figures_and_needs_nothing_else(reported, data):
    text = (reported / "report.html").read_text()
    page = Page(text)
    images = [attributes for tag, attributes in page.tags if tag == "img"]
    assert len(images) == len(page.texts["figcaption"]) == 8
    assert sorted(path.name for path in reported.iterdir()) == [
        *(f"figure-{number}.png" for number in range(1, 9)),
        "report.html",
    ]
    for number, (image, caption) in enumerate(zip(images, page.texts["figcaption"], strict=True), 1):
        kind, _, encoded = image["src"].partition(",")
        assert kind == "data:image/png;base64"
        assert base64.b64decode(encoded) == (reported / f"figure-{number}.png").read_bytes()
        picture = Image.open(io.BytesIO(base64.b64decode(encoded)))
        assert picture.width == 960
        assert np.asarray(picture.convert("L")).std() > 10  # not blank
        assert len(image["alt"]) > 30
        assert caption.startswith(f"Figure {number}. ")
        assert data.name in caption
        assert "last epoch (last.pt)" in caption or "the refinery of run 2" in caption
    assert not {"script", "link", "iframe"} & {tag for tag, _ in page.tags}
    outside = ("src", "href", "srcset", "data", "poster")
    references = [value for _, attributes in page.tags for name, value in attributes.items() if name in outside]
    assert all(value.startswith("data:image/png;base64,") for value in references)
    assert "The runs were trained on other images" not in text
    assert 'name="viewport"' in text
    assert not page.open


def test_the_page_describes_what_was_counted(reported, trained):
    page = Page((reported / "report.html").read_text())
    first, second = page.texts["td"][:9], page.texts["td"][9:]
    assert first[:3] == ["1", "resnet18", "ground truth"]
    assert second[:3] == ["2", "mobilenet0.25", "resnet18"]
    for row, run in zip((first, second), trained, strict=True):
        (kept,) = run.folder.glob("accuracies-*.json")
        written = json.loads(kept.read_text())
        train1, crops, val = written["train"]["top1"], written["val_crops"]["top1"], written["val"]
        assert row[3:] == [
            *(f"{value:.2f}" for value in (val["top1"], val["top5"], train1, crops, train1 - crops)),
            run.folder.name,
        ]
    captions = page.texts["figcaption"]
    assert "one random crop of each of 48 training images (seed 1000, epoch 0)" in captions[0]
    assert "the central crop of each of 15 validation images" in captions[0]
    assert "statistics of the batch, 16 training crops" in captions[1]
    assert "training image 7, which the set labels a<b" in captions[1]
    assert "training image 20, which the set labels $5 & $6" in captions[2]
    assert "one random crop of each of 15 validation images" in captions[0]
    assert "a point is one of the 3 classes; on the dashed line" in captions[3]
    assert "a dot is a class (of 16 images)" in captions[4]
    assert "a dot is a class (of 5 images)" in captions[5]
    assert "3 training images, a random crop of each" in captions[6]


def test_cached_accuracies_are_not_computed_again(reported, trained, data, tmp_path, capsys):
    subject = subject_of(trained[1], data)
    before = {path: path.read_bytes() for path in trained[1].folder.glob("accuracies-*")}
    (kept,) = before
    first = analysis.accuracies(subject, data, seed=1000, compute=CPU)
    assert f"from {kept}" in capsys.readouterr().out
    other = replace(subject, run=replace(subject.run, folder=tmp_path))
    (tmp_path / kept.name).write_bytes(before[kept][:300])  # as a full disk leaves it
    assert (
        analysis.accuracies(other, data, seed=1000, compute=CPU)
        == first
        == analysis.accuracies(other, data, seed=1000, compute=CPU)
    )
    assert capsys.readouterr().out.count(" from ") == 1
    analysis.accuracies(other, data, seed=1001, compute=CPU)
    assert len(list(tmp_path.glob("accuracies-*"))) == 2
    assert {path: path.read_bytes() for path in trained[1].folder.glob("accuracies-*")} == before


@pytest.mark.parametrize(
    ("classes", "sizes"), [(1, {1}), (2, {1}), (5, {1}), (20, {1}), (21, {3}), (45, {3}), (61, {3, 4}), (1000, {50})]
)
def test_bins_of_classes(classes, sizes):
    rng = np.random.default_rng(classes)
    train, val = rng.uniform(0, 100, classes).tolist(), rng.uniform(0, 100, classes).tolist()
    unknown = [(3, 10.0), (0, None)]
    found = analysis.binned(
        Accuracies(
            Accuracy(0, 0, [(4, accuracy) for accuracy in train] + unknown),
            Accuracy(0, 0, [(4, accuracy) for accuracy in val] + unknown[::-1]),
            Accuracy(0, 0, [(4, 50.0)] * (classes + 2)),
        )
    )
    pairs = sorted(zip(train, val, strict=True))
    assert set(found.sizes.tolist()) == sizes
    assert len(found.sizes) <= 20
    for size, mean_train, mean_val, low, high in zip(
        found.sizes, found.train, found.val, found.low, found.high, strict=True
    ):
        members, pairs = pairs[:size], pairs[size:]
        assert mean_train == pytest.approx(sum(t for t, _ in members) / size)
        assert mean_val == pytest.approx(sum(v for _, v in members) / size)
        assert (low, high) == (min(v for _, v in members), max(v for _, v in members))
    assert not pairs


@pytest.mark.parametrize("bn", ["batch", "running"])
def test_labels_of_a_refinery_are_those_it_gives_in_training(trained, data, bn):
    """All 48 crops of a copy in one batch, whose statistics do not depend on their order."""
    refinery, student = trained
    subject = subject_of(replace(student, identity=student.identity | {"batch": 48}), data)
    labelling = analysis.Labelling(load_trained(str(refinery.folder)), "it", subject, bn=bn, resolution=None)
    crops, labels = analysis.refinery_labels(
        labelling, Beton(data.beton("train")), [40, 3], seed=5, copies=2, names=NAMES, compute=CPU
    )
    batches = list(training_loader(data, 5, batch_size=48, copies=2, order="sequential").epoch(0))
    for copy, batch in enumerate(batches):
        chances = logits_of(refinery, batch.crops, batch_statistics=bn == "batch").softmax(1)
        for place, index in enumerate((40, 3)):
            assert crops.boxes[place, copy].tolist() == batch.boxes[index].tolist()
            assert crops.flips[place, copy] == batch.flips[index]
            assert [name for name, _ in labels[place][copy]] == [
                NAMES[i] for i in chances[index].argsort(descending=True)
            ]
            assert [chance for _, chance in labels[place][copy]] == pytest.approx(
                chances[index].sort(descending=True).values.tolist(), abs=1e-4
            )


def test_predictions_are_of_the_crops_that_are_counted(trained, data):
    subject, beton = subject_of(trained[0], data), Beton(data.beton("train"))
    crops = analysis.training_crops(beton, [9, 30], subject.rule, seed=1000)
    said = analysis.predictions(subject, beton, crops, names=NAMES, compute=CPU)
    (batch,) = training_loader(data, 1000, batch_size=48, order="sequential").epoch(0)
    chances = logits_of(trained[0], batch.crops).softmax(1)
    for labels, index in zip(said, (9, 30), strict=True):
        assert dict(labels) == pytest.approx(dict(zip(NAMES, chances[index].tolist(), strict=True)), abs=1e-4)


def test_pictures_are_the_stored_images(data):
    beton = Beton(data.beton("train"))
    image = analysis.picture(beton, 5)
    assert image.shape == (*beton.sizes[5], 3)
    batch = next(iter(open_loader(beton.path, resolution=32, batch_size=6, train=False, crop=data.crop).epoch(0)))
    crop = Image.fromarray(analysis.cut_out(image, batch.boxes[5].numpy(), False))
    resized = np.asarray(crop.resize((32, 32), Image.Resampling.BILINEAR), dtype=int)
    assert np.abs(resized - batch.crops[5].permute(1, 2, 0).numpy()).mean() < 1
    box = np.array([2, 3, 10, 20])
    assert (analysis.cut_out(image, box, True) == image[2:12, 3:23][:, ::-1]).all()


def test_pictures_are_those_stored_as_blocks(tmp_path):
    original = photograph(2, 74, 113)
    write_beton(tmp_path / "blocks.beton", [encode(original, Storage("blocks"))], at_most=1, in_blocks=True)
    image = analysis.picture(Beton(tmp_path / "blocks.beton"), 0)
    assert image.shape == (74, 113, 3)
    assert np.abs(image.astype(int) - np.asarray(original)).mean() < 6


def test_images_are_chosen_by_the_seed_from_different_classes(data):
    beton = Beton(data.beton("train"))
    chosen = analysis.choose_images(beton, 4, seed=1)
    assert sorted(beton.labels[chosen]) == [0, 1, 2]
    assert chosen == analysis.choose_images(beton, 4, seed=1)
    assert len({tuple(analysis.choose_images(beton, 2, seed=seed)) for seed in range(8)}) > 4


def test_imagenet_is_shown_in_words():
    assert analysis.readable(NAMES) == NAMES
    assert analysis.readable(["n03888257", "n01440764"]) == ("parachute", "tench")
    assert analysis.readable(["n02012849", "n03126707", "n99999999"]) == (
        "crane n02012849",
        "crane n03126707",
        "n99999999",
    )


def test_a_report_is_written_beside_its_runs_and_finds_their_refinery(reported, copies, capsys):
    _, student = copies
    report(str(student), images="0", device="cpu", threads=1)
    (folder,) = student.parent.glob("report-*")
    captions = Page((folder / "report.html").read_text()).texts["figcaption"]
    assert "by resnet18, the refinery of run 1 mobilenet0.25" in captions[1]
    assert [caption.partition(".")[0] for caption in captions] == [f"Figure {n}" for n in (1, 2, 4, 5, 6, 7, 8)]
    assert f"{folder / 'report.html'}" in capsys.readouterr().out


def test_other_images_and_a_lost_refinery_are_reported(reported, copies, data, tmp_path):
    refinery, student = copies
    shutil.rmtree(refinery)
    said_in_config(student, "refinery", refinery)
    other = shutil.copytree(data.folder, tmp_path / "other")
    shutil.copy(data.beton("val"), other / "train.beton")
    said_in_config(student, "data", other)
    with pytest.raises(TrainError, match="its images are no longer those that"):
        report(str(student), device="cpu")
    report(str(student), data=str(other), out=str(tmp_path / "out"), images="0", device="cpu", threads=1)
    text = (tmp_path / "out" / "report.html").read_text()
    assert "The runs were trained on other images of these classes." in text
    assert "one random crop of each of 15 training images" in text
    assert "because the refinery of run 1 mobilenet0.25 was not found" in Page(text).texts["figcaption"][1]


@pytest.fixture
def refusal(tmp_path, monkeypatch, capsys) -> Callable[..., str]:
    """The one line with which the command refuses its words."""

    def refusal(*words: object) -> str:
        command = partial(run_command, report, prog="report")
        with pytest.raises(SystemExit) as ended:
            command(words=[str(word) for word in words])
        assert ended.value.code == 2
        out, errors = capsys.readouterr()
        assert not out
        assert len(errors.splitlines()) == 1, errors
        return errors

    return refusal


def test_bad_inputs_end_in_one_line_before_anything_slow(copies, refusal, data, converted, tmp_path):
    _, student = copies
    unfinished = shutil.copytree(student, tmp_path / "unfinished")
    (unfinished / "result.json").unlink()
    elsewhere = shutil.copytree(student, tmp_path / "elsewhere")
    identity = json.loads((elsewhere / "identity.json").read_text())
    identity["data"] = {"name": "others", "fingerprint": "0" * 64}
    (elsewhere / "identity.json").write_text(json.dumps(identity))
    renamed = shutil.copytree(student, tmp_path / "renamed")
    state = torch.load(renamed / "last.pt")
    state["network"]["class_names"] = ["x", "y", "z"]
    torch.save(state, renamed / "last.pt")
    emptied = shutil.copytree(student, tmp_path / "emptied")
    (emptied / "last.pt").unlink()
    (tmp_path / "file").touch()
    crop_seed = read_run(student).crop_seed
    five = write_class_folders(tmp_path / "five", 5, 3)
    for words, says in [
        (["--runs", ""], "RUNS is empty"),
        (["--runs", "'a"], "RUNS='a: cannot be read"),
        (["--runs", tmp_path], f"{tmp_path}: not the folder of a run"),
        (["--runs", f"{student} absent"], "absent: not the folder of a run"),
        (["--runs", f"{student} {unfinished}"], f"{unfinished}: is not finished (epoch 1 of 1)"),
        (["--runs", f"{student} {student}/"], "is named twice"),
        (
            ["--runs", f"{student} {elsewhere}"],
            f"{elsewhere}: was trained on other images (others) than {student} ({data.name})",
        ),
        (["--runs", f"{student} {renamed}"], f"{renamed}: was trained on other classes than {student}"),
        (["--runs", emptied], "no last.pt in it"),
        (["--runs", student, "--seed", crop_seed], f"seed={crop_seed}: {student} was trained on its crops"),
        (["--runs", student, "--data", five], f"DATA={five}: has 5 classes, and {student} was trained on 3"),
        (["--runs", student, "--data", converted.folder], "has 3 other classes"),
        (["--runs", student, "--data", "absent"], "DATA=absent: no such folder"),
        (["--runs", student, "--images", "3 48"], "images=3 48: give numbers from 0 to 47"),
        (["--runs", student, "--images", "3 3"], "images=3 3: give numbers"),
        (["--runs", student, "--images", "cat"], "images=cat: give numbers"),
        (["--runs", student, "--validation-images", "15"], "validation_images=15: give numbers from 0 to 14"),
        (["--runs", student, "--out", tmp_path / "file"], "cannot be made (File exists); name another folder with OUT"),
        (["--runs", student, "--batch", "0"], "batch=0: must be at least 1"),
        (["--runs", student, "--device", "tpu"], "device=tpu"),
        (["--runs", student, "--decoder", "opencv"], "decoder=opencv"),
    ]:
        assert says in refusal(*words), words
    config = student / "config.yaml"
    config.write_text(config.read_text().replace(str(data.folder), str(tmp_path / "moved")))
    assert f"say with DATA where {student}'s images are now" in refusal("--runs", student)
    config.write_text("{")
    assert f"{config}: missing or damaged; say with DATA" in refusal("--runs", student)
    assert not list(tmp_path.glob("report-*"))


@pytest.fixture
def axes_of(monkeypatch, tmp_path):
    """Draws a figure of one pair of axes and returns these."""

    def axes_of(draw: Callable[..., None], *values: object):
        sheets: list = []
        monkeypatch.setattr(figures.Figure, "savefig", lambda self, path, **_: sheets.append(self))
        draw(*values, tmp_path / "figure.png")
        (axes,) = sheets[0].axes
        return axes

    return axes_of


def test_figure_1_starts_at_0_and_has_no_lines(axes_of):
    values = {"training crops": [97.0, 100.0], "validation images": [95.0, 96.0]}
    axes = axes_of(figures.by_run, ["1 a", "2 b"], values)
    assert axes.get_xlim()[0] == 0
    assert not axes.lines
    assert [bar.get_width() for bar in axes.patches] == [97, 100, 95, 96]
    assert {bar.get_x() for bar in axes.patches} == {0}


@pytest.mark.parametrize(("classes", "points"), [(5, 5), (40, 13)])
def test_figure_4_stays_within_0_and_100(axes_of, classes, points):
    rng = np.random.default_rng(0)
    train, val = (Accuracy(0, 0, [(4, each) for each in rng.choice([0.0, 50.0, 100.0], classes)]) for _ in range(2))
    bins = analysis.binned(Accuracies(train, val, val))
    axes = axes_of(figures.by_training_accuracy, ["1 a"], [bins])
    assert len(axes.lines[0].get_xdata()) == points
    # Only bins have bars, within 0 and 100 %.
    bars = np.concatenate([line for drawn in axes.collections for line in drawn.get_segments()] or [np.zeros((0, 2))])
    assert (len(bars) > 0) == (classes > 20)
    assert ((bars >= 0) & (bars <= 100)).all()
    assert axes.get_xlim() == axes.get_ylim()
