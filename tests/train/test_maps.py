"""Label maps: made once, and pooled over each crop's box in training."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

import models
from data.loader import open_loader
from kernels.normalise import Normalise
from kernels.pool_labels import reference
from models import ModelError
from models.cells import CellLogits
from models.trained import load_trained
from tests.train.conftest import TINY
from train import TrainError
from train.config import parse
from train.job import check, resolve
from train.label import label
from train.labels import origin_of
from train.labels.maps import Maps
from train.labels.rows import CellRows
from train.labels.store import open_store
from train.maps import Mapper, MapsOptions, make_maps

POOLED = ["--labels.pooled", "probabilities"]


@pytest.fixture
def make(converted, refinery, tmp_path, monkeypatch):
    """Makes the maps of the tiny set in a folder of this name, of 96 px: 3 x 3 cells."""
    monkeypatch.chdir(tmp_path)

    def make(name, *words, side=96):
        given = [*TINY, "--data", str(converted.folder), "--refinery", str(refinery), "--out", str(tmp_path / name)]
        return make_maps(parse([*given, *words]), MapsOptions(side))

    make.data = str(converted.folder)
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
    """Recomputed from the images, with RoIAlign on the dense map."""
    store = make("maps")
    made = store.description
    assert (made.cells, made.k, made.resolution, made.shift) == (3, 3, 96, False)  # no class is left out
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


def test_probabilities_can_be_pooled_in_place_of_logits(run, make, capsys):
    store = make("maps")
    published, other = (run("--labels.stored", "maps", "--epochs", "1", *words) for words in ([], POOLED))
    assert "81 bytes per image, probabilities pooled\n" in capsys.readouterr().out
    assert "pooled" not in published.identity["labels"]
    assert other.identity["labels"]["pooled"] == "probabilities"
    batch = next(open_loader(Path(make.data) / "train.beton", resolution=32, batch_size=6).epoch(0))
    rows = torch.from_numpy(store.rows(0)[batch.indices.numpy()])
    logits, ids = CellRows(3, 5, 3).unpack(rows)
    shares = torch.cat([batch.boxes[:, :2], batch.boxes[:, :2] + batch.boxes[:, 2:]], dim=1) / batch.sizes.repeat(1, 2)
    said = Maps(store, "probabilities")(replace(batch, labels_on_disk=rows)).probabilities
    torch.testing.assert_close(said, reference(logits, ids, shares, 3, kind="probabilities"), rtol=1e-4, atol=1e-5)


def resolve_online(converted, refinery, *words):
    config = parse([*TINY, "--data", str(converted.folder), "--refinery", str(refinery), *words])
    data, (labels,) = check([config])
    return resolve(config, data, labels)


def test_a_run_trains_on_maps(run, make, refinery, capsys):
    store = make("maps")
    out = capsys.readouterr().out
    assert "maps    maps of 3x3 cells, top 3, of " in out
    assert "head    the mean of layer4, then fc\n" in out
    several = run("--labels.stored", str(store.folder), "--copies", "2", "--model", "mobilenet0.25 mobilenet0.5")
    out = capsys.readouterr().out
    assert f"labels  maps of 3x3 cells, top 3, in {store.folder}: resnet18 at 96 px, 81 bytes per image" in out
    for found in several:
        assert found.result["epochs"] == 2
        assert origin_of(found.identity) == "resnet18, maps"
        assert found.identity["generation"] == 1
        assert found.identity["refinery"]["weights"] == load_trained(str(refinery)).digest
    # The second time, nothing is made.
    before = (store.folder / "train.maps").stat().st_mtime_ns
    make("maps")
    assert (store.folder / "train.maps").stat().st_mtime_ns == before


def test_by_default_a_map_has_the_scale_of_validation_crops(make, converted, refinery, capsys):
    store = make("maps", side=None)
    assert "maps    of one cell give all crops of an image the same label" in capsys.readouterr().out
    trained = load_trained(str(refinery))
    assert store.description.resolution == round(32 / trained.center_ratio)
    job = resolve_online(converted, refinery, "--labels.bn", "running")
    published = replace(job.labels, trained=replace(trained, file=None))
    assert Mapper(replace(job, labels=published), MapsOptions()).description.resolution == 480


@pytest.mark.parametrize("offset", [0, -8, -100])
def test_dropped_logits_are_0_on_average(make, converted, refinery, monkeypatch, offset):
    """So that a label is close to that of all logits for any offset, as after training with binary cross-entropy."""
    monkeypatch.setattr("train.maps._KEPT", 2)
    state = torch.load(refinery / "last.pt")
    state["model"]["fc.bias"] += offset
    # Makes cells differ by more than the tolerance below.
    state["model"]["fc.weight"] *= 20
    torch.save(state, "last.pt")
    store = make("maps", "--refinery", "last.pt")
    assert store.description.shift
    trained = load_trained("last.pt")
    network, normalise = CellLogits(trained.network, "resnet18", 96), Normalise(trained.normalisation)
    mapper = Mapper(resolve_online(converted, refinery), MapsOptions(96))
    batch = next(mapper._loader.epoch(0))
    cells = network(normalise(batch.paired[mapper._whole])).movedim(1, -1)
    whole = torch.tensor([[0.0, 0.0, 1.0, 1.0]]).expand(len(cells), 4)
    ids = torch.arange(3).expand(cells.shape)
    source = Maps(store)
    rows = source.fetch(batch.indices.numpy(), batch.copies.numpy(), 0)
    boxes = torch.cat([torch.zeros_like(batch.sizes), batch.sizes], dim=1)
    said = source(replace(batch, boxes=boxes, labels_on_disk=rows)).distribution(3)
    # One class is left out: its logit, moved with the others, is exactly 0.
    wanted = reference(cells, ids, whole, 3)
    assert wanted.std(dim=0).min() > 0.05
    torch.testing.assert_close(said, wanted, rtol=0, atol=0.002)


def test_maps_work_in_a_compiled_graph_and_in_batches_of_one(make, converted):
    source = Maps(make("maps"))
    rows = torch.from_numpy(source._store.rows(0)[:5].copy())
    for classes in (10, 300, 70000):
        format = CellRows(classes, 5, 3)
        packed = format.pack(torch.randn(4, classes, 3, 3))
        together = format.unpack(packed)
        for one in range(4):
            for part, all_of_it in zip(format.unpack(packed[one : one + 1]), together, strict=True):
                assert torch.equal(part, all_of_it[one : one + 1])
    loader = open_loader(converted.beton("train"), resolution=32, batch_size=5)
    batch = replace(next(loader.epoch(0)), labels_on_disk=rows)
    compiled = torch.compile(source, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(batch).probabilities, source(batch).probabilities)


def test_logits_out_of_the_range_of_float16_are_refused(make, refinery):
    state = torch.load(refinery / "last.pt")
    state["model"]["fc.weight"] *= 1e6
    torch.save(state, "last.pt")
    with pytest.raises(TrainError, match="its logits for some images are not finite in float16"):
        make("maps", "--refinery", "last.pt")
    assert open_store("maps").epochs == 0


def test_a_batch_of_one_and_folders_of_other_labels(make, refinery):
    assert make("maps", "--batch", "1").epochs == 1
    label(parse([*TINY, "--data", make.data, "--refinery", str(refinery), "--out", "labels"]))
    with pytest.raises(TrainError, match="OUT=.*labels: holds top 3 labels of crops and no maps"):
        make("labels")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--loss.temperature", "2"], "loss.temperature=2: labels from maps are probabilities at temperature 1"),
        (["--labels.cycle", "2"], "labels.cycle=2: maps label the crops of any epoch"),
        (["--labels.bn", "running"], "labels.bn has no effect with labels.stored"),
        (["--refinery", "resnet50"], "REFINERY=resnet50: LABELS=.* were made by another one, resnet18 and not"),
    ],
)
def test_options_without_effect_on_maps_are_refused(run, make, words, says):
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
def test_inputs_that_cannot_be_mapped_are_refused(make, words, side, says):
    with pytest.raises(TrainError, match=says):
        make("maps", *words, side=side)


def test_more_classes_than_can_be_pooled_are_refused(make, monkeypatch):
    monkeypatch.setattr("train.labels.maps.MOST_CLASSES", 2)
    with pytest.raises(TrainError, match="set: has 3 classes; maps are pooled of 2 at most"):
        make("maps")
    assert not Path("maps").exists()


def test_a_refinery_without_cells_is_refused(make):
    torch.save(models.build("alexnet", 3).state_dict(), "alexnet.pt")
    with pytest.raises(ModelError, match="alexnet: its head is not the mean of a feature map and a linear layer"):
        make("maps", "--refinery", "alexnet:alexnet.pt")
    assert not Path("maps").exists()
