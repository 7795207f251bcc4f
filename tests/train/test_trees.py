"""Label maps in the published layout: read as they were written, or refused by name."""

import contextlib
import errno
import io
import json
import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from command import exit_on_user_error
from data import DataError
from tests.train.test_store import DESCRIPTION
from train import TrainError
from train.interrupt import Interrupted
from train.labels import origin_of
from train.labels.maps import Maps
from train.labels.rows import CellRows
from train.labels.store import create_store, open_store
from train.maps import main
from train.trees import export_maps, import_maps, map_file, read_map

FIRST = "class0/000.pt"


def random_map(seed: int, *, classes: int = 3, kept: int = 2, side: int = 3) -> torch.Tensor:
    """[2, K, S, S], as a file holds it."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(kept, side, side, generator=generator).sort(dim=0, descending=True).values
    ids = torch.rand(classes, side, side, generator=generator).argsort(dim=0)[:kept]
    return torch.stack([logits, ids.float()])


@pytest.fixture
def tree(converted, tmp_path, monkeypatch) -> Path:
    """A map for each image of the tiny set, in `tree` of the working folder."""
    monkeypatch.chdir(tmp_path)
    for number, name in enumerate(converted.image_names("train")):
        path = Path("tree", name).with_suffix(".pt")
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(random_map(number), path)
    return Path("tree")


@pytest.fixture
def read(converted, tree):
    """Imports `tree` into `maps`, or with other options."""

    def read(**options):
        return import_maps(**{"tree": str(tree), "data": str(converted.folder), "out": "maps"} | options)

    return read


@given(data=st.data())
def test_a_written_map_is_read_back(tmp_path_factory, data):
    classes = data.draw(st.sampled_from([1, 2, 5, 256, 257, 1000, 65536]))
    kept, side = data.draw(st.integers(1, min(classes, 6))), data.draw(st.integers(1, 4))
    logits = data.draw(st.lists(st.floats(width=16, allow_nan=False, allow_infinity=False), min_size=4, max_size=4))
    ids = torch.stack(
        [torch.randperm(classes, generator=torch.Generator().manual_seed(cell))[:kept] for cell in range(side * side)]
    ).view(side, side, kept)
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    values = torch.from_numpy(rng.choice(logits, (side, side, kept)))
    path = tmp_path_factory.getbasetemp() / "map.pt"
    path.write_bytes(map_file(values.half(), ids))
    found = read_map(path, classes)
    assert found.shape == (2, kept, side, side)
    rows = CellRows(classes, kept, side)
    again = rows.unpack(rows.pack_kept(*found.movedim(1, -1)[:, None]))
    assert torch.equal(again[0][0], values.half())
    assert torch.equal(again[1][0], ids)


def test_the_published_reader_finds_each_cell_in_its_place(tmp_path):
    """It scatters the logits into a map of float32, [C, S, S]."""
    logits, ids = torch.zeros(3, 3, 2), torch.tensor([0, 1]).expand(3, 3, 2).clone()
    logits[0, 2] = torch.tensor([7.0, 5.0])  # in the first row and the last column
    ids[0, 2] = torch.tensor([4, 2])
    (tmp_path / "map.pt").write_bytes(map_file(logits, ids))
    found = torch.load(tmp_path / "map.pt", weights_only=True)
    dense = torch.zeros(5, 3, 3).scatter_(0, found[1].long(), found[0])
    assert dense[:, 0, 2].tolist() == [0, 0, 5, 0, 7]
    assert dense.sum() == 12
    # Nothing but the map is in the file.
    assert os.path.getsize(tmp_path / "map.pt") < found.nbytes + 2000


def test_imported_maps_are_those_of_the_tree(converted, tree, read, capsys):
    names = converted.image_names("train")
    (tree / "class0" / "more.pt").write_bytes(b"the map of an image that could not be read")
    store = read(refinery="efficientnet-l2")
    out = capsys.readouterr().out
    assert "maps    maps of 3x3 cells, top 2, of " in out
    assert " by efficientnet-l2, from tree\n" in out
    assert "maps    1 of no training image are left out (first class0/more.pt)\n" in out
    assert "logits  as they are; classes that a cell leaves out count as 0\n" in out
    assert out.endswith("finished; to train from them:\n  make train LABELS=maps ...\n")
    assert sorted(os.listdir("maps")) == ["labels.json", "train.maps"]
    logits, ids = CellRows(3, 2, 3).unpack(torch.from_numpy(store.rows(0).copy()))
    for number, name in enumerate(names):
        written = torch.load((tree / name).with_suffix(".pt")).permute(0, 2, 3, 1)
        assert torch.equal(logits[number], written[0].half())
        assert torch.equal(ids[number], written[1].long())
    made = store.description
    assert (made.cells, made.k, made.shift, made.resolution, made.precision) == (3, 2, None, None, None)
    assert made.data == {"name": converted.name, "fingerprint": converted.fingerprint, "images": 48, "classes": 3}


def test_a_crops_label_is_from_its_place_in_the_map(tree, read):
    corner = torch.zeros(2, 2, 3, 3)
    corner[1] = torch.tensor([2, 0])[:, None, None]
    corner[0, 0, 0, 2] = 20  # class 2 in the first row and the last column
    torch.save(corner, tree / FIRST)
    store = read()
    # In 90 rows and 60 columns: that corner, and the corner that it would be if columns came first.
    boxes = torch.tensor([[0, 40, 30, 20], [60, 0, 30, 20]])
    rows = torch.from_numpy(store.rows(0)[[0, 0]])
    batch = SimpleNamespace(boxes=boxes, sizes=torch.tensor([[90, 60], [90, 60]]), labels_on_disk=rows)
    said = Maps(store).forward(batch).distribution(3)
    torch.testing.assert_close(said, torch.tensor([[0.0, 0, 1], [1 / 3, 1 / 3, 1 / 3]]), atol=1e-6, rtol=0)


def test_maps_are_in_the_order_of_the_stored_images(converted, read):
    shutil.copytree(converted.folder, "copy")
    names = Path("copy/train.names.json")
    names.write_text(json.dumps(json.loads(names.read_text())[::-1]))
    assert np.array_equal(read(data="copy").rows(0)[::-1], read(out="others").rows(0))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_maps_of_any_floating_type_are_the_same_maps(tree, read, dtype):
    wanted = random_map(0).bfloat16()
    for path in tree.rglob("*.pt"):
        torch.save(wanted.to(dtype), path)
    logits, ids = CellRows(3, 2, 3).unpack(torch.from_numpy(read().rows(0)[:1].copy()))
    assert torch.equal(logits[0], wanted[0].permute(1, 2, 0).half())
    assert torch.equal(ids[0], wanted[1].permute(1, 2, 0).long())


def test_exported_maps_are_imported_as_they_were(converted, tree, read, capsys):
    store = read()
    capsys.readouterr()
    Path("empty").mkdir()
    export_maps("maps", str(converted.folder), "empty")
    out = capsys.readouterr().out
    assert "maps    maps of 3x3 cells, top 2, of " in out
    assert "logits" not in out
    files = {str(path.relative_to("empty")) for path in Path("empty").rglob("*") if path.is_file()}
    assert files == {str(path.relative_to(tree)) for path in tree.rglob("*.pt")}
    again = read(tree="empty", out="again")
    assert np.array_equal(again.rows(0), store.rows(0))
    assert again.description == store.description
    assert sorted(os.listdir()) == ["again", "empty", "maps", "tree"]


def test_what_a_run_learns_depends_on_the_maps(run, tree, read):
    one = read()
    torch.save(random_map(99), tree / FIRST)
    other = read(out="other")
    assert one.network["weights"] != other.network["weights"]
    assert one.description.key != other.description.key
    found = run("--labels.stored", "maps", "--epochs", "1")
    assert origin_of(found.identity) == "relabel, maps"
    assert found.identity["refinery"] == one.network
    assert found.identity["generation"] == 1


def test_shifted_maps_are_exported_with_a_notice(converted, tree, read, capsys):
    shifted = create_store(Path("shifted"), replace(read().description, shift=True))
    with shifted.writing(0) as rows:
        rows[:] = open_store("maps").rows(0)
    export_maps("shifted", str(converted.folder), "out")
    says = "logits  shifted, so that those left out are 0 on average; for readers that count them as 0\n"
    assert says in capsys.readouterr().out


def saved(value: object) -> bytes:
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


def changed(index: object, value: float, dtype: torch.dtype = torch.float32) -> bytes:
    found = random_map(0).to(dtype)
    found[index] = value
    return saved(found)


@pytest.mark.parametrize(
    ("contents", "says"),
    [
        (b"no file of torch", "is damaged, or no file of torch.save; unpack or make it again"),
        (saved(random_map(0))[:-200], "is damaged, or no file of torch.save"),
        (saved(Path("x")), "is damaged, or no file of torch.save"),  # which would run code
        (saved([1.0]), "holds list; a map is a tensor of floating-point numbers"),
        (
            saved(random_map(0).long()),
            r"holds a tensor of torch.int64 \(torch.strided\); a map is a tensor of floating-point numbers",
        ),
        (saved(random_map(0).to_sparse()), r"holds a tensor of torch.float32 \(torch.sparse_coo\); a map is"),
        (saved(random_map(0)[0]), r"has shape \[2, 3, 3\]; a map is \[2, K, S, S\]"),
        (saved(random_map(0).permute(0, 2, 3, 1)), r"has shape \[2, 3, 3, 2\]; a map is"),
        (saved(random_map(0).repeat(2, 1, 1, 1)), r"has shape \[4, 2, 3, 3\]; a map is"),
        (saved(random_map(0)[:, :0]), r"has shape \[2, 0, 3, 3\]; a map is"),
        (changed((0, 1, 2, 2), torch.nan), "some of its logits are not finite"),
        (changed((0, 1, 2, 2), -torch.inf), "some of its logits are not finite"),
        (changed((0, 1, 2, 2), -1e5), "its logits go up to 100000; float16, in which maps are kept, ends at 65504"),
        (changed((1, 0, 0, 0), 0.5), "some of its class ids are not whole numbers"),
        (changed((1, 0, 0, 0), torch.nan), "some of its class ids are not whole numbers"),
        (changed((1, 0, 0, 0), torch.inf), "its class ids are 0 to inf"),
        (changed((1, 0, 0, 0), 3), "its class ids are 0 to 3, and those of the data 0 to 2"),
        (changed((1, 0, 0, 0), -1), "its class ids are -1 to 2, and those of the data 0 to 2"),
        (changed((1, slice(None), 0, 0), 1), "some cell has a class twice"),
    ],
)
@pytest.mark.filterwarnings("ignore:Validating sparse tensor invariants")
def test_files_that_are_not_maps_are_refused(tmp_path, contents, says):
    path = tmp_path / "map.pt"
    path.write_bytes(contents)
    with pytest.raises(TrainError, match=rf"^{path}: {says}") as refused:
        read_map(path, 3)
    assert "\n" not in str(refused.value)


def test_a_type_that_rounds_class_ids_is_refused(tmp_path):
    path = tmp_path / "map.pt"
    torch.save(random_map(0).half(), path)
    assert read_map(path, 2049).shape == (2, 2, 3, 3)
    with pytest.raises(TrainError, match="its type does not tell class ids above 2048 apart; make the maps in float32"):
        read_map(path, 2050)


@pytest.mark.parametrize(
    ("harm", "says"),
    [
        (lambda last: last.write_bytes(b"!"), "class2/015.pt: is damaged"),
        (
            lambda last: torch.save(random_map(0, side=2), last),
            r"class2/015.pt: has shape \[2, 2, 2, 2\] and class0/000.pt \[2, 2, 3, 3\]; all must be alike",
        ),
    ],
)
def test_a_bad_last_map_leaves_no_maps_and_the_command_can_be_repeated(tree, read, harm, says):
    last = tree / "class2" / "015.pt"
    whole = last.read_bytes()
    harm(last)
    with pytest.raises(TrainError, match=says):
        read()
    assert os.listdir("maps") == ["labels.json"]
    with pytest.raises(TrainError, match="LABELS=maps: its maps are not finished"):
        export_maps("maps", "anything", "out")
    last.write_bytes(whole)
    assert read().epochs == 1


def test_a_stop_leaves_no_maps_and_no_tree(converted, read, monkeypatch):
    original, calls = torch.load, []

    def stops(*arguments, **options):
        calls.append(arguments)
        if len(calls) == 5:
            os.kill(os.getpid(), signal.SIGINT)
        return original(*arguments, **options)

    monkeypatch.setattr(torch, "load", stops)
    with pytest.raises(Interrupted, match="maps are imported in one go, so type again"):
        read()
    assert open_store("maps").epochs == 0
    store = read()
    assert store.epochs == 1
    original_file, calls = map_file, []

    def stops_too(logits, ids):
        calls.append(ids)
        if len(calls) == 5:
            os.kill(os.getpid(), signal.SIGINT)
        return original_file(logits, ids)

    monkeypatch.setattr("train.trees.map_file", stops_too)
    with pytest.raises(Interrupted, match="a tree is exported in one go, so type again"):
        export_maps("maps", str(converted.folder), "out")
    assert len(calls) == 5
    assert sorted(os.listdir()) == ["maps", "tree"]


def test_only_lost_maps_are_imported_again(tree, read):
    wanted = read().description
    with pytest.raises(TrainError, match="OUT=maps: holds finished maps already; give another folder"):
        read()
    Path("maps/train.maps").unlink()
    assert read().description == wanted
    Path("maps/train.maps").unlink()
    torch.save(random_map(99), tree / FIRST)
    with pytest.raises(TrainError, match="OUT=maps: is of other maps than those of tree; give another folder"):
        read()
    assert open_store("maps").epochs == 0


def test_maps_that_another_process_imports_are_skipped(read, capsys):
    store = read()
    Path("maps/train.maps").unlink()
    with store.writing(0):
        assert read().epochs == 0
        assert "maps: another process is importing them" in capsys.readouterr().out


def lose(tree: Path, *files: str) -> None:
    for file in files:
        (tree / file).unlink()


@pytest.mark.parametrize(
    ("harm", "says"),
    [
        (shutil.rmtree, "tree=tree: no such folder; an archive of maps has to be unpacked first"),
        (
            lambda tree: [path.unlink() for path in tree.rglob("*.pt")],
            r"tree=tree: no maps \(.pt\) in it or below; give the folder of class folders",
        ),
        (
            lambda tree: lose(tree, "class1/003.pt", "class2/001.pt"),
            r"tree=tree: 2 of the 48 training images of .* have no map in it \(first class1/003.pt\); give the folder",
        ),
        (
            lambda tree: (tree / "class1").rename(tree / "classX"),
            r"16 of the 48 .* \(first class1/000.pt\), and 16 of its maps are of no image \(first classX/000.pt\)",
        ),
    ],
)
def test_trees_that_do_not_match_the_images(tree, read, harm, says):
    harm(tree)
    with pytest.raises(TrainError, match=says) as refused:
        read()
    assert "\n" not in str(refused.value)
    assert not Path("maps").exists()


def test_folders_that_cannot_hold_the_maps(read):
    create_store(Path("labels"), DESCRIPTION)
    with pytest.raises(TrainError, match="OUT=labels: holds top 10 labels of crops and no maps; give another folder"):
        read(out="labels")
    with pytest.raises(TrainError, match="OUT=tree: holds other files"):
        read(out="tree")
    with pytest.raises(TrainError, match="refinery=my network: give a name of letters"):
        read(refinery="my network")
    with pytest.raises(TrainError, match="refinery=: give a name of letters"):
        read(refinery="")
    made = read().description
    create_store(Path("others"), replace(made, cells=4, bytes_per_crop=CellRows(made.data["classes"], made.k, 4).width))
    with pytest.raises(TrainError, match=r"OUT=others: holds other labels \(.*cells is 4 there and 3 here\)"):
        read(out="others")


def test_more_classes_than_can_be_pooled_are_refused(read, monkeypatch):
    monkeypatch.setattr("train.labels.maps.MOST_CLASSES", 2)
    with pytest.raises(TrainError, match="set: has 3 classes; maps are pooled of 2 at most"):
        read()
    monkeypatch.setattr("train.labels.maps.MOST_CLASSES", 3)
    assert read().epochs == 1


def test_too_little_disk_space_is_refused(converted, read, monkeypatch):
    read()
    monkeypatch.setattr("shutil.disk_usage", lambda folder: SimpleNamespace(free=2000))
    with pytest.raises(TrainError, match=r"the maps take 2.59 kB, and 2 kB are free; take another disk$"):
        read(out="more")
    with pytest.raises(TrainError, match=r"OUT=out: the tree takes .* kB, and 2 kB are free"):
        export_maps("maps", str(converted.folder), "out")
    assert not Path("out").exists()


def test_sets_whose_images_have_no_names_or_share_them(converted, read, tmp_path):
    read()
    copy = tmp_path / "copy"
    shutil.copytree(converted.folder, copy)
    names = copy / "train.names.json"
    names.write_text(names.read_text().replace("class1/001.jpg", "class1/000.png"))
    says = "copy: class1/000.jpg and class1/000.png would have one map, class1/000.pt; rename one and convert again"
    with pytest.raises(TrainError, match=says):
        read(data=str(copy), out="new")
    with pytest.raises(TrainError, match=says):
        export_maps("maps", str(copy), "new")
    names.unlink()
    for refused in (lambda: read(data=str(copy), out="new"), lambda: export_maps("maps", str(copy), "new")):
        with pytest.raises(DataError, match="copy: holds no file names of its images"):
            refused()
    with pytest.raises(DataError, match="DATA=scenes: maps are found by the names of image files"):
        read(data="scenes", out="new")
    assert not Path("new").exists()


def test_inputs_that_cannot_be_exported_are_refused(converted, read, tmp_path):
    read()
    data = str(converted.folder)
    for out in ("tree", "maps/labels.json"):
        with pytest.raises(TrainError, match=f"^OUT={out}: exists already; give a new folder or an empty one"):
            export_maps("maps", data, out)
    with pytest.raises(TrainError, match="cannot be written .Not a directory.; nothing was left half-done"):
        export_maps("maps", data, "maps/labels.json/tree")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "is_mount", lambda path: True)
        with pytest.raises(TrainError, match="^OUT=out: is where a disk is mounted; give a new folder on it"):
            export_maps("maps", data, "out")
    create_store(Path("labels"), DESCRIPTION)
    with pytest.raises(TrainError, match="LABELS=labels: holds top 10 labels of crops and no maps"):
        export_maps("labels", data, "out")
    made = open_store("maps").description
    theirs = create_store(Path("theirs"), replace(made, data=made.data | {"fingerprint": "ab" * 32}))
    with theirs.writing(0):
        pass
    with pytest.raises(TrainError, match="LABELS=theirs: are of other data, with fingerprint abab"):
        export_maps("theirs", data, "out")
    assert not Path("out").exists()


def test_a_disk_that_fills_up_leaves_no_tree(converted, read, monkeypatch):
    read()
    original = Path.write_bytes

    def full(path, contents):
        if path.name == "003.pt":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return original(path, contents)

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(TrainError, match="OUT=out: cannot be written .No space left on device.; nothing was left"):
        export_maps("maps", str(converted.folder), "out")
    assert sorted(os.listdir()) == ["maps", "tree"]


def test_the_command_imports_and_exports(converted, tree, monkeypatch, capsys):
    def types(*words: str) -> str:
        monkeypatch.setattr("sys.argv", ["maps.py", *words])
        with contextlib.suppress(SystemExit):
            exit_on_user_error(main)
        said = capsys.readouterr()
        return said.out + said.err

    data = ["--data", str(converted.folder)]
    assert "finished; to train" in types("import", "--tree", "tree", *data, "--out", "maps", "--refinery", "netA")
    assert open_store("maps").network["network"] == "netA"
    assert "\nfinished\n" in types("export", "--labels", "maps", *data, "--out", "out")
    assert types("export", "--labels", "maps", *data, "--out", "out").startswith("error: OUT=")
    assert "error: unrecognized arguments: import" in types("--refinery", "resnet18", "import")
    assert "python -m train.maps import --help" in types("--help")
    assert "published" in types("import", "--help")
    assert "published" in types("export", "--help")
