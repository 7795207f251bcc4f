"""Label maps: made once, and pooled over each crop's box in training."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

import models
from kernels.normalise import Normalise
from kernels.pool_labels import reference
from models import ModelError
from models.cells import CellLogits
from models.trained import load_trained
from tests.train.conftest import TINY
from train import TrainError
from train.config import parse
from train.job import check, resolve
from train.labels import origin_of
from train.labels.maps import Maps
from train.labels.rows import CellRows
from train.labels.store import open_store
from train.maps import Mapper, MapsOptions, make_maps
from train.train import train


@pytest.fixture(scope="module")
def refinery(converted, tmp_path_factory):
    root = tmp_path_factory.mktemp("refinery")
    words = ["--data", str(converted.folder), "--model", "resnet18", "--runs", str(root), "--recipe", "quick"]
    (run,) = train(parse([*TINY, *words]))
    return run.folder


@pytest.fixture
def make(converted, refinery, tmp_path, monkeypatch):
    """Makes the maps of the tiny set in a folder of this name, of 96 px: 3 x 3 cells."""
    monkeypatch.chdir(tmp_path)

    def make(name, *words, side=96):
        given = [*TINY, "--data", str(converted.folder), "--refinery", str(refinery), "--out", str(tmp_path / name)]
        return make_maps(parse([*given, *words]), MapsOptions(side))

    return make


@pytest.mark.parametrize(("classes", "width"), [(3, 81), (10, 135), (256, 135), (257, 180), (70000, 270)])
def test_rows_keep_the_likeliest_classes_of_each_cell(classes, width):
    rows = CellRows(classes, 5, 3)
    cells = torch.randn(2, classes, 3, 3)
    packed = rows.pack(cells)
    assert packed.shape == (2, rows.width)
    assert rows.width == width
    logits, ids = rows.unpack(packed)
    wanted = cells.movedim(1, -1).topk(rows.k, dim=3)
    assert torch.equal(ids, wanted.indices)
    assert torch.equal(logits, wanted.values.half())


def test_published_maps_take_four_and_a_half_kilobytes():
    assert CellRows(1000, 5, 15).width == 4500


def test_a_crops_label_is_the_map_pooled_over_its_box(make, converted, refinery):
    """Computed again from the pictures, with RoIAlign on the dense map."""
    store = make("maps")
    made = store.description
    assert (made.cells, made.k, made.resolution, made.shift) == (3, 3, 96, False)
    config = parse([*TINY, "--data", str(converted.folder), "--labels.stored", str(store.folder)])
    data, (labels,) = check([config])
    job = resolve(config, data, labels)
    assert (job.seed, job.crop_seed, job.crop, job.plan_epoch(7)) == (job.crop_seed, job.seed, data.crop, 7)
    source = job.labels.open(job)
    assert isinstance(source, Maps)
    trained = load_trained(str(refinery))
    network, normalise = CellLogits(trained.network, "resnet18", 96), Normalise(trained.normalisation)
    mapper = Mapper(resolve_online(converted, refinery), MapsOptions(96))
    pictures = {}
    for batch in mapper._loader.epoch(0):
        for index, picture in zip(batch.indices.tolist(), batch.paired[mapper._whole], strict=True):
            pictures[index] = picture
    assert sorted(pictures) == list(range(48))
    batch = next(job.open_crops(source).epoch(1))
    said = source(batch).distribution(3)
    cells = network(normalise(torch.stack([pictures[index] for index in batch.indices.tolist()])))
    top = cells.movedim(1, -1).half().topk(3, dim=3)
    top_left, size = batch.boxes[:, :2], batch.sizes
    shares = torch.cat([top_left / size, (top_left + batch.boxes[:, 2:]) / size], dim=1)
    torch.testing.assert_close(said, reference(top.values, top.indices, shares, 3), rtol=1e-3, atol=1e-3)
    # Crops of one image differ, and so do their labels.
    assert said.unique(dim=0).shape[0] == len(said)


def resolve_online(converted, refinery):
    config = parse([*TINY, "--data", str(converted.folder), "--refinery", str(refinery)])
    data, (labels,) = check([config])
    return resolve(config, data, labels)


def test_maps_train(run, make, refinery, capsys):
    store = make("maps")
    out = capsys.readouterr().out
    assert "maps    maps of 3x3 cells, top 3, of " in out
    assert "head    the mean of layer4, then fc\n" in out
    several = run("--labels.stored", str(store.folder), "--copies", "2", "--model", "mobilenet0.25 mobilenet0.5")
    out = capsys.readouterr().out
    assert f"labels  maps of 3x3 cells, top 3, in {store.folder}: resnet18 at 96 px, 81 bytes an image" in out
    for found in several:
        assert found.result["epochs"] == 2
        assert origin_of(found.identity) == "resnet18, maps"
        assert found.identity["generation"] == 1
        assert found.identity["refinery"]["weights"] == load_trained(str(refinery)).digest
    # Once more, nothing is made.
    before = (store.folder / "train.maps").stat().st_mtime_ns
    make("maps")
    assert (store.folder / "train.maps").stat().st_mtime_ns == before


def test_by_default_a_map_has_the_scale_of_validation_crops(make, converted, refinery, capsys):
    store = make("maps", side=None)
    assert "maps    of one cell give all crops of an image the same label" in capsys.readouterr().out
    trained = load_trained(str(refinery))
    assert store.description.resolution == round(32 / trained.center_ratio)
    job = resolve_online(converted, refinery)
    published = replace(job.labels, trained=replace(trained, file=None))
    assert Mapper(replace(job, labels=published), MapsOptions()).description.resolution == 480


def test_logits_far_below_0_are_shifted(make, converted, refinery, monkeypatch):
    """As of a network that was trained with binary cross-entropy; two of three classes are kept."""
    monkeypatch.setattr("train.maps._KEPT", 2)
    plain = open_store(make("plain").folder)
    state = torch.load(refinery / "last.pt")
    state["model"]["fc.bias"] -= 100
    torch.save(state, "last.pt")
    shifted = make("shifted", "--refinery", "last.pt")
    assert (plain.description.shift, shifted.description.shift) == (False, True)
    rows = CellRows(3, 2, 3)
    (logits, ids), (theirs, their_ids) = (
        rows.unpack(torch.from_numpy(store.rows(0).copy())) for store in (shifted, plain)
    )
    assert torch.equal(ids, their_ids)
    # The third class is 0 now; that the others kept their distance from each other shows that only cells were moved.
    torch.testing.assert_close(logits.diff(dim=3), theirs.diff(dim=3), rtol=1e-2, atol=1e-2)
    assert (logits >= 0).all()


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--loss.temperature", "2"], "loss.temperature=2: labels from maps are probabilities at temperature 1"),
        (["--labels.cycle", "2"], "labels.cycle=2: maps label the crops of any epoch"),
        (["--labels.bn", "running"], "labels.bn has no meaning with labels.stored"),
        (["--refinery", "resnet50"], "REFINERY=resnet50: LABELS=.* were made by another one, resnet18 and not"),
    ],
)
def test_what_has_no_meaning_with_maps(run, make, words, says):
    store = make("maps")
    with pytest.raises(TrainError, match=says):
        run("--labels.stored", str(store.folder), *words)


def test_damaged_maps_are_named(run, make):
    store = make("maps")
    path = store.folder / "train.maps"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    with pytest.raises(TrainError, match="train.maps: has 3887 bytes and should have 3888"):
        run("--labels.stored", str(store.folder))
    path.write_bytes(b"!" + whole[1:])
    with pytest.raises(TrainError, match="train.maps: is damaged"):
        run("--labels.stored", str(store.folder))
    path.unlink()
    with pytest.raises(TrainError, match="its maps are not finished"):
        run("--labels.stored", str(store.folder))


@pytest.mark.parametrize(
    ("words", "side", "says"),
    [
        (["--refinery", "null"], 96, "REFINERY is missing"),
        (["--out", "null"], 96, "OUT is missing"),
        (["--labels.bn", "running"], 96, "labels.bn: has no meaning for maps"),
        ([], 0, "map_resolution=0: must be at least 1"),
    ],
)
def test_what_cannot_be_mapped(make, words, side, says):
    with pytest.raises(TrainError, match=says):
        make("maps", *words, side=side)


def test_a_refinery_without_cells_is_refused(make):
    torch.save(models.build("alexnet", 3).state_dict(), "alexnet.pt")
    with pytest.raises(ModelError, match="alexnet: its head is not the mean of a feature map and a linear layer"):
        make("maps", "--refinery", "alexnet:alexnet.pt")
    assert not Path("maps").exists()
