"""Figures of label maps: labels as in training, drawing, and refused inputs."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

from command import run_command
from data.plan import random_boxes
from tests.pictures import photograph
from tests.train.conftest import TINY
from train.config import parse
from train.job import check, resolve
from train.labels.rows import CellRows
from train.labels.store import Description, Store, create_store
from train.report import figures
from train.report.analysis import cut_out, picture
from train.report.maps import show


def described(converted, **others) -> Description:
    """Of maps of 3 x 3 cells that keep 2 of 3 classes."""
    made = Description(
        data={"name": "images", "fingerprint": converted.fingerprint, "images": 48, "classes": 3},
        refinery={"network": "resnet18", "weights": "0" * 64, "generation": 2, "bn": "running", "resolution": 96},
        plan=None,
        resolution=96,
        precision="fp32",
        batch=16,
        order="sequential",
        format="map",
        k=2,
        dtype="float16",
        bytes_per_crop=CellRows(3, 2, 3).width,
        cells=3,
        shift=True,
    )
    return replace(made, **others)


@pytest.fixture
def cells() -> torch.Tensor:
    """Logits of each image's cells; one in each cell is 0, and not stored."""
    logits = torch.randn(48, 3, 3, 3, generator=torch.Generator().manual_seed(0)).abs() + 0.5
    logits = logits.half().float()
    return logits.scatter(1, logits.argmin(dim=1, keepdim=True), 0.0)


@pytest.fixture
def store(converted, cells, tmp_path) -> Store:
    made = create_store(tmp_path / "maps", described(converted))
    with made.writing(0) as rows:
        rows[:] = CellRows(3, 2, 3).pack(cells).numpy()
    return made


def test_labels_are_those_that_a_run_learns(converted, store, cells, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(figures, "map_of_image", lambda *given: drawn.append(given))
    show(str(store.folder), str(converted.folder), images="40 3", seed=7, out=str(tmp_path / "out"))
    config = parse([*TINY, "--data", str(converted.folder), "--labels.stored", str(store.folder), "--seed", "7"])
    data, (labels,) = check([config])
    job = resolve(config, data, labels)
    source = job.labels.open(job)
    loader = job.open_crops(source)
    assert [given[6] for given in drawn] == ["training image 40: class2", "training image 3: class0"]
    for index, (image, names, shown, boxes, crops, said, _, path) in zip((40, 3), drawn, strict=True):
        assert (image == picture(loader._beton, index)).all()
        assert names == converted.class_names
        assert shown == pytest.approx(cells[index].softmax(0).movedim(0, -1).numpy(), abs=1e-6)
        assert path == tmp_path / "out" / f"map-{index}.png"
        for epoch in range(5):
            batch = next(batch for batch in loader.epoch(epoch) if index in batch.indices)
            place = batch.indices.tolist().index(index)
            assert boxes[epoch].tolist() == batch.boxes[place].tolist()
            assert (crops[epoch] == cut_out(image, boxes[epoch], bool(batch.flips[place]))).all()
            chances = source(batch).distribution(3)[place]
            assert dict(said[epoch]) == pytest.approx(dict(zip(names, chances.tolist(), strict=True)), abs=1e-6)
            assert [name for name, _ in said[epoch]] == [names[i] for i in chances.argsort(descending=True)]
    assert len(drawn[0][4]) == 5


def test_figures_are_written_beside_the_maps(converted, store, tmp_path, capsys):
    show(str(store.folder), str(converted.folder))
    written = sorted((tmp_path / "maps-shown").iterdir())
    assert len(written) == 3  # an image of each class
    assert sorted(capsys.readouterr().out.split()) == [str(path) for path in written]
    for path in written:
        figure = Image.open(path)
        assert figure.width == 960
        assert np.asarray(figure.convert("L")).std() > 10  # not blank


def test_a_cell_has_the_colour_of_its_class_and_the_opacity_of_its_probability():
    cells = np.array([[[0.7, 0.2, 0.1], [0.1, 0.9, 0.0]], [[0.3, 0.4, 0.3], [0.0, 1.0, 0.0]]], np.float32)
    axes = Figure().subplots()
    assert figures._map(axes, cells, np.zeros((40, 100, 3), np.uint8)) == {1: "#8da0cb", 0: "#fc8d62"}
    (drawn,) = axes.images
    assert drawn.get_extent() == [-0.5, 99.5, 39.5, -0.5]
    shades = np.asarray(drawn.get_array())
    assert shades[:, :, 3] == pytest.approx(np.array([[0.7, 0.9], [0.4, 1.0]]))
    first, second = (np.array([int(code[at : at + 2], 16) / 255 for at in (0, 2, 4)]) for code in ("8da0cb", "fc8d62"))
    assert shades[:, :, :3] == pytest.approx(np.array([[second, first], [first, first]]))
    assert {text.get_text(): text.get_position() for text in axes.texts} == {
        "70": (24.5, 9.5),
        "90": (74.5, 9.5),
        "40": (24.5, 29.5),
        "100": (74.5, 29.5),
    }


def test_rare_classes_share_a_colour_and_small_cells_have_no_numbers():
    cells = np.eye(9, dtype=np.float32)[np.array([[0, 8, 8], [8, 3, 1], [5, 2, 4]])]
    axes = Figure().subplots()
    colours = figures._map(axes, cells, np.zeros((50, 50, 3), np.uint8))
    assert list(colours) == [8, 0, 1, 2, 3, -1]
    assert list(colours.values()) == list(figures._CLASS_COLOURS)
    # Class 5, which shares the colour of the others.
    assert np.asarray(axes.images[0].get_array())[2, 0, :3] == pytest.approx(0xC0 / 255)
    assert len(axes.texts) == 9
    for height, width, numbers in [(50, 50, 225), (50, 10, 0), (5, 50, 0)]:
        axes = Figure().subplots()
        figures._map(axes, np.full((15, 15, 2), 0.5, np.float32), np.zeros((height, width, 3), np.uint8))
        assert len(axes.texts) == numbers


def test_boxes_and_names_of_a_figure(tmp_path, monkeypatch):
    kept = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *given, **options: kept.append(figure))
    image, boxes = np.zeros((40, 60, 3), np.uint8), np.array([[2, 30, 20, 10], [0, 0, 40, 60]], np.int32)
    cells = np.eye(9, dtype=np.float32)[np.arange(9).reshape(3, 3)]
    labels = [[("a", 0.9), ("b", 0.06)], [("c", 0.5)]]
    crops = [cut_out(image, box, False) for box in boxes]
    figures.map_of_image(image, list("abcdefghi"), cells, boxes, crops, labels, "image 5", tmp_path / "map.png")
    whole, _, below, first, second = kept[0].axes
    assert [patch.get_bbox().bounds for patch in whole.patches] == [(29.5, 1.5, 10, 20), (-0.5, -0.5, 60, 40)]
    assert [text.get_text() for text in below.get_legend().get_texts()] == [*"abcde", "others"]
    assert (first.get_xlabel(), second.get_xlabel()) == ("a 90 %\nb 6 %", "c 50 %")
    assert first.images[0].get_array().shape == (20, 10, 3)


@pytest.mark.parametrize(
    ("height", "width", "side", "classes"), [(1, 1, 1, 2), (300, 60, 15, 1000), (30, 400, 3, 10), (90, 120, 1, 1)]
)
def test_any_image_and_map_can_be_drawn(tmp_path, height, width, side, classes):
    """Also gray images. The figure has the usual width, and nothing is cut off."""
    image = np.asarray(photograph(0, max(height, 8), max(width, 8)).convert("L").convert("RGB"))[:height, :width]
    cells = np.random.default_rng(0).dirichlet(np.ones(classes), (side, side)).astype(np.float32)
    boxes = np.concatenate([random_boxes([0], [[height, width]], seed=0, epoch=each)[0] for each in range(5)])
    crops = [cut_out(image, box, False) for box in boxes]
    names = [f"a class with a name as long as this one {number}" for number in range(classes)]
    labels = [[(name, 1.0) for name in names[:3]]] * 5
    path = tmp_path / "map.png"
    figures.map_of_image(image, names, cells, boxes, crops, labels, f"training image 123456: {names[0]}", path)
    drawn = np.asarray(Image.open(path).convert("L"))
    assert drawn.shape[1] == 960
    assert (drawn[:, [0, -1]] == 255).all()


def test_bad_inputs_end_in_one_line(converted, store, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    create_store(tmp_path / "unfinished", described(converted))
    other = {"name": "images", "fingerprint": "1" * 64, "images": 48, "classes": 3}
    create_store(tmp_path / "others", described(converted, data=other))
    plan = {"seed": 1, "crop": {"scale": [0.1, 1], "ratio": [1, 1], "flip": True}, "copies": 1}
    of_crops = {"plan": plan, "order": "random", "format": "packed", "dtype": None, "bytes_per_crop": 2}
    create_store(tmp_path / "crops", described(converted, **of_crops, cells=None, shift=None))
    (tmp_path / "file").touch()
    data = str(converted.folder)
    for words, says in [
        (["--labels", "absent", "--data", data], "absent/labels.json: cannot be read"),
        (["--labels", "crops", "--data", data], "LABELS=crops: holds top 2 labels of crops and no maps"),
        (["--labels", "others", "--data", data], "LABELS=others: are of other data, with fingerprint 1111111111111111"),
        (["--labels", "unfinished", "--data", data], "unfinished/train.maps: cannot be read"),
        (["--labels", "maps", "--data", "absent"], "DATA=absent: no such folder"),
        (["--labels", "maps", "--data", data, "--images", "3 48"], "images=3 48: give numbers from 0 to 47"),
        (["--labels", "maps", "--data", data, "--images", "cat"], "images=cat: give numbers"),
        (["--labels", "maps", "--data", data, "--out", "file"], "file: cannot be written (File exists)"),
        (["--labels", "maps", "--data", data, "--seed", "x"], "seed"),
    ]:
        with pytest.raises(SystemExit) as ended:
            run_command(show, prog="maps", words=words)
        assert ended.value.code == 2
        out, errors = capsys.readouterr()
        assert says in errors, words
        assert len(errors.splitlines()) == 1, errors
        assert not out
    assert not (tmp_path / "maps-shown").exists()
