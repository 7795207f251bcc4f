"""Stored labels in training: the same crops, labels and weights as with the refinery."""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from data.convert import convert_source
from data.sources import open_source
from models.trained import load_trained
from tests.pictures import write_class_folders
from tests.train.conftest import TINY
from train import TrainError
from train.chain import chain
from train.config import configure, parse
from train.interrupt import Interrupted, Stop
from train.job import check, resolve
from train.label import Labeller, LabelOptions, label
from train.labels import find, origin_of
from train.labels.refinery import Refinery
from train.labels.store import Store, open_store
from train.loop import Trainer
from train.report.command import report
from train.runs import read_run
from train.runs.__main__ import table
from train.step import Step

EXACT = LabelOptions("exact")
# 48 images in batches of 20: two steps per epoch, and 8 images that training drops.
BATCH = ("--batch", "20")


@pytest.fixture
def make(converted, refinery, tmp_path, monkeypatch):
    """Labels crops of the tiny set into a folder of this name."""
    monkeypatch.chdir(tmp_path)

    def make(name: str, options: LabelOptions = EXACT, *words: str) -> Store:
        given = [*TINY, "--data", str(converted.folder), "--refinery", str(refinery), "--out", str(tmp_path / name)]
        return label(parse([*given, *BATCH, *words]), options)

    return make


def weights_of(run) -> dict[str, torch.Tensor]:
    return torch.load(run.weights)["model"]


def assert_same_weights(one, other) -> None:
    theirs = weights_of(other)
    for name, value in weights_of(one).items():
        assert torch.equal(value, theirs[name]), name


@pytest.mark.parametrize(
    ("precision", "options"),
    [("fp32", []), ("bf16", []), ("fp32", ["--copies", "2", "--labels.bn", "running"])],
    ids=["fp32", "bf16", "copies, running statistics"],
)
def test_exact_labels_train_the_same_weights_as_the_refinery(run, make, refinery, monkeypatch, precision, options):
    monkeypatch.setattr("train.device._has_bf16", lambda device: True)
    words = [*BATCH, "--precision", precision]
    of_run = [word for word in options if word not in ("--labels.bn", "running")]
    store = make("labels", EXACT, "--precision", precision, *options)
    online = run(*words, "--refinery", str(refinery), *options)
    stored = run(*words, "--labels.stored", str(store.folder), *of_run)
    assert stored.folder != online.folder
    assert_same_weights(stored, online)
    assert [line["loss"] for line in stored.metrics] == [line["loss"] for line in online.metrics]
    assert stored.identity["refinery"] == online.identity["refinery"]
    assert stored.crop_seed == online.crop_seed
    # Several students together get the same weights as each alone.
    several = run(*words, "--labels.stored", str(store.folder), *of_run, "--model", "mobilenet0.25 mobilenet0.5")
    assert_same_weights(several[0], online)


def test_a_run_trains_on_packed_labels(run, make, capsys):
    store = make("labels", LabelOptions(k=2))
    assert store.description.bytes_per_crop == 2
    capsys.readouterr()
    found = run(*BATCH, "--labels.stored", str(store.folder), "--loss.kind", "hard")
    out = capsys.readouterr().out
    assert (
        f"labels  stored in {store.folder}: resnet18, with batch statistics, top 2, 2 bytes per crop, 2 epochs" in out
    )
    assert "\nlabels: " not in out  # nothing differs
    assert found.result["epochs"] == 2


def test_every_crop_has_its_row(make, converted, refinery):
    """Also those that training drops. With running statistics, a label depends only on its crop."""
    store = make("labels", EXACT, "--copies", "2", "--labels.bn", "running", "--labels.resolution", "24")
    trained = load_trained(str(refinery))
    alone = Refinery(trained.network, trained.normalisation, bn="running", resolution=24)
    job = job_of(converted, refinery, "--copies", "2", "--labels.bn", "running")
    loader = Labeller(job, EXACT).loader
    seen = []
    for epoch in range(2):
        rows = torch.from_numpy(store.rows(epoch).copy()).view(torch.float32)
        assert rows.shape == (96, 3)
        for batch in loader.epoch(epoch):
            with torch.no_grad():
                wanted = alone(batch).logits
            places = batch.indices * 2 + batch.copies
            torch.testing.assert_close(rows[places], wanted, rtol=1e-4, atol=1e-4)
            seen += places.tolist()
        assert rows.unique(dim=0).shape[0] > 80
    assert sorted(seen) == sorted([*range(96)] * 2)


def test_the_last_batch_is_filled_up_with_the_first_images(make, converted, refinery):
    store = make("labels", EXACT, "--copies", "2")
    trained = load_trained(str(refinery))
    network = Refinery(trained.network, trained.normalisation)
    batches = list(Labeller(job_of(converted, refinery, "--copies", "2"), EXACT).loader.epoch(1))
    rows = torch.from_numpy(store.rows(1).copy()).view(torch.float32)
    for copy in range(2):
        first, last = batches[copy], batches[-2 + copy]
        assert (len(last.labels), set(last.copies.tolist())) == (8, {copy})
        with torch.no_grad():
            wanted = network(replace(last, crops=torch.cat([last.crops, first.crops[:12]]))).logits[:8]
        torch.testing.assert_close(rows[last.indices * 2 + copy], wanted, rtol=1e-5, atol=1e-5)


def job_of(converted, refinery, *words: str):
    config = parse([*TINY, *BATCH, "--data", str(converted.folder), "--refinery", str(refinery), *words])
    data, (labels,) = check([config])
    return resolve(config, data, labels)


def test_the_seed_affects_only_the_first_weights(run, make):
    store = make("labels", EXACT, "--seed", "7")
    one, other = (run(*BATCH, "--labels.stored", str(store.folder), "--seed", seed) for seed in ("0", "1"))
    assert one.crop_seed == other.crop_seed == store.description.seed
    assert one.folder != other.folder
    assert any(not torch.equal(value, weights_of(other)[name]) for name, value in weights_of(one).items())


def test_the_plan_of_the_labels_is_the_default(run, make, converted):
    store = make("labels", EXACT, "--crop.scale", "[0.3,0.6]", "--crop.flip", "false", "--resolution", "40")
    config = configure(
        {
            "data": str(converted.folder),
            "labels.stored": str(store.folder),
            "model": "resnet18",
            "epochs": 2,
            "batch": 20,
        }
    )
    data, (labels,) = check([config])
    job = resolve(config, data, labels)
    assert (job.crop.scale, job.crop.flip, job.crop.center_ratio) == ((0.3, 0.6), False, data.crop.center_ratio)
    assert job.resolution == 40
    assert resolve(config.replace({"resolution": 32}), data, labels).resolution == 32


def test_fewer_copies_than_stored(run, make, refinery):
    store = make("labels", EXACT, "--copies", "2", "--labels.bn", "running")
    stored = run(*BATCH, "--labels.stored", str(store.folder))
    online = run(*BATCH, "--refinery", str(refinery), "--labels.bn", "running")
    assert_same_weights(stored, online)
    with pytest.raises(TrainError, match=r"copies=3: LABELS=.* holds labels of 2 of an image's crops"):
        run(*BATCH, "--labels.stored", str(store.folder), "--copies", "3")


def test_differences_from_how_the_labels_were_made_are_printed(run, make, capsys):
    store = make("labels", EXACT, "--resolution", "64")
    capsys.readouterr()
    words = ["--batch", "16", "--order", "quasi-random", "--resolution", "64", "--resolution_from", "0.5"]
    run(*words, "--labels.stored", str(store.folder))
    out = capsys.readouterr().out
    assert (
        "labels: made with the statistics of batches of 20 in random order; this run takes batches of 16 in "
        "quasi-random order" in out
    )
    assert "labels: made of crops of 64 px; those of 32, 48 px have the same boxes but other pixels" in out
    assert "made in" not in out
    for words in (["--batch", "16"], [*BATCH, "--order", "quasi-random"]):
        capsys.readouterr()
        run(*words, "--resolution", "64", "--labels.stored", str(store.folder))
        assert "labels: made with the statistics of batches of 20 in random order" in capsys.readouterr().out


def test_another_precision_is_printed(run, make, monkeypatch, capsys):
    monkeypatch.setattr("train.device._has_bf16", lambda device: True)
    store = make("labels", LabelOptions(k=3), "--labels.bn", "running")
    capsys.readouterr()
    run("--batch", "16", "--precision", "bf16", "--labels.stored", str(store.folder))
    out = capsys.readouterr().out
    assert "labels: made in fp32; this run computes in bf16\n" in out
    assert "batches of" not in out  # running statistics do not depend on it


def test_a_run_longer_than_the_stored_epochs(run, make, converted):
    store = make("labels")
    words = [*BATCH, "--labels.stored", str(store.folder), "--epochs", "3"]
    with pytest.raises(TrainError, match=r"epochs=3: LABELS=.* holds 2 epochs; label more .* --labels.cycle 2"):
        run(*words)
    with pytest.raises(TrainError, match=r"labels.cycle=3: LABELS=.* holds 2 epochs"):
        run(*words, "--labels.cycle", "3")
    with pytest.raises(TrainError, match="labels.pooled=probabilities: is for maps, and LABELS=.* labels of crops"):
        run(*words, "--epochs", "1", "--labels.pooled", "probabilities")
    again = run(*words, "--labels.cycle", "2")
    assert again.result["epochs"] == 3
    assert again.identity["labels"]["epochs"] == 2
    config = parse([*TINY, *words, "--labels.cycle", "2", "--data", str(converted.folder)])
    data, (labels,) = check([config])
    job = resolve(config, data, labels)
    assert [job.plan_epoch(epoch) for epoch in range(3)] == [0, 1, 0]
    # Additional labels change neither this run nor one without a cycle.
    make("labels", EXACT, "--epochs", "3")
    data, (later,) = check([config])
    assert resolve(config, data, later).identity == job.identity
    # The third epoch's labels belong to its crops.
    trainer = Trainer([job])
    (first, *_), (third, *_) = (list(trainer.loader_at(32).epoch(job.plan_epoch(epoch))) for epoch in (0, 2))
    assert torch.equal(first.boxes, third.boxes)
    assert torch.equal(first.labels_on_disk, third.labels_on_disk)


def test_only_additional_epochs_are_labelled(make):
    store = make("labels")
    before = {path.name: path.stat().st_mtime_ns for path in store.folder.glob("*.labels")}
    key = store.description.key
    store = make("labels", EXACT, "--epochs", "3")
    assert store.epochs == 3
    assert store.description.key == key
    assert {name: (store.folder / name).stat().st_mtime_ns for name in before} == before
    with pytest.raises(TrainError, match=r"OUT=.*labels: holds exact labels and not top 3; give another folder"):
        make("labels", LabelOptions())
    with pytest.raises(TrainError, match=r"OUT=.*labels: holds other labels \(batch is 20 there and 16 here\)"):
        make("labels", EXACT, "--batch", "16")


def test_a_stop_keeps_finished_epochs(make, monkeypatch, tmp_path):
    original = Labeller._labelled
    batches = []

    def stops(self, batch):
        batches.append(batch)
        if len(batches) == 5:  # in the second epoch
            os.kill(os.getpid(), 2)
        return original(self, batch)

    monkeypatch.setattr(Labeller, "_labelled", stops)
    with pytest.raises(Interrupted, match="stopped in epoch 2; the epochs before it are kept"):
        make("labels")
    assert open_store(tmp_path / "labels").epochs == 1
    assert sorted(os.listdir(tmp_path / "labels")) == ["epoch-0000.labels", "labels.json"]
    assert make("labels").epochs == 2
    assert len(batches) == 5 + 3


def test_an_epoch_that_another_process_writes_is_skipped(make, capsys):
    store = make("labels")
    shutil.copytree(store.folder, store.folder.with_name("whole"))
    for path in store.folder.glob("*.labels"):
        path.unlink()
    with store.writing(0) as rows:
        assert make("labels").epochs == 0
        assert "another process is writing epoch 1\nfinished: 1 epochs of 48 labels" in capsys.readouterr().out
        rows[:] = open_store(store.folder.with_name("whole")).rows(0)
    assert store.epochs == 2
    assert np.array_equal(store.rows(1), open_store(store.folder.with_name("whole")).rows(1))


def test_damage_ends_training_with_the_files_name(run, make):
    store = make("labels")
    path = store.folder / "epoch-0001.labels"
    rows = bytearray(path.read_bytes())
    rows[100] ^= 1
    path.write_bytes(rows)
    with pytest.raises(TrainError, match=r"epoch-0001.labels: is damaged"):
        run(*BATCH, "--labels.stored", str(store.folder))
    path.unlink()
    make("labels")
    assert run(*BATCH, "--labels.stored", str(store.folder)).result["epochs"] == 2


def test_too_little_memory_names_a_batch_that_fits(run, make, monkeypatch):
    """A smaller batch has correspondingly fewer labels."""
    store = make("labels", LabelOptions(k=2), "--epochs", "1")
    original = Step.__call__

    def call(self, batch, *where):
        if len(batch.labels) > 6:
            torch.empty(2**52)
        assert len(batch.labels_on_disk) == len(batch.labels) == len(batch.indices)
        original(self, batch, *where)

    monkeypatch.setattr(Step, "__call__", call)
    with pytest.raises(TrainError, match="batch=20: a step at 32 px does not fit in .*; --batch 5 fits"):
        run(*BATCH, "--labels.stored", str(store.folder), "--epochs", "1")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--jitter", "1", "--pretrained", "w.pt"], "jitter moves crops, and stored labels are of crops as planned"),
        (["--labels.bn", "running"], "labels.bn has no effect with labels.stored"),
        (["--labels.smoothing", "0.1"], "labels.smoothing has no effect with labels.stored"),
        (["--labels.taxonomy", "is_a.txt"], "labels.taxonomy has no effect with labels.stored"),
        (["--loss.temperature", "2"], "loss.temperature=2: packed labels hold probabilities at temperature 1"),
        (["--crop.scale", "[0.5,1]"], r"crop.scale=\[0.5, 1.0\]: LABELS=.* are of crops with \[0.25, 1.0\]"),
        (["--crop.ratio", "[1,1]"], r"crop.ratio=\[1.0, 1.0\]: LABELS=.* are of crops with \[0.75, 1.33"),
        (["--labels.cycle", "0"], "labels.cycle=0: must be at least 1"),
        (["--crop.flip", "false"], "crop.flip=False: LABELS=.* are of crops with True"),
        (
            ["--refinery", "resnet50"],
            "REFINERY=resnet50: LABELS=.* were made by another one, resnet18 and not",
        ),
        (["--labels.stored", "nowhere"], "labels.json: cannot be read .*; is nowhere a folder of stored labels"),
    ],
)
def test_options_without_effect_on_stored_labels_are_refused(run, make, words, says):
    store = make("labels", LabelOptions(k=2), "--epochs", "1")
    with pytest.raises(TrainError, match=says):
        run(*BATCH, "--epochs", "1", "--labels.stored", str(store.folder), *words)


def test_exact_labels_take_a_temperature_and_their_own_refinery_by_name_or_folder(run, make, refinery):
    store = make("labels", EXACT, "--epochs", "1")
    words = [*BATCH, "--epochs", "1", "--loss.temperature", "2"]
    online = run(*words, "--refinery", str(refinery))
    for named in ("resnet18", str(refinery)):
        stored = run(*words, "--labels.stored", str(store.folder), "--refinery", named)
        assert_same_weights(stored, online)


def test_another_refinery_beside_the_labels_is_refused_with_both_digests(run, make, refinery, converted):
    store = make("labels", LabelOptions(), "--epochs", "1")
    other = run("--model", "resnet18", "--epochs", "1")
    ours, theirs = (load_trained(str(folder)).digest[:16] for folder in (other.folder, refinery))
    with pytest.raises(TrainError, match=f"were made by another one, {theirs} and not {ours}; leave one of them out"):
        run("--labels.stored", str(store.folder), "--refinery", str(other.folder), "--epochs", "1")


def test_labels_of_other_images_are_refused_with_both_fingerprints(run, make, tmp_path):
    store = make("labels", LabelOptions(), "--epochs", "1")
    for part in ("train", "val"):
        write_class_folders(tmp_path / "others" / part, 3, 20, seed=50)
    others = convert_source(open_source(str(tmp_path / "others")), tmp_path / "set", processes=1)
    theirs = store.description.data["fingerprint"][:16]
    says = f"are of other data, with fingerprint {theirs} and not {others.fingerprint[:16]} as "
    with pytest.raises(TrainError, match=says):
        run("--data", str(others.folder), "--labels.stored", str(store.folder), "--epochs", "1")


@pytest.mark.parametrize(
    ("options", "words", "says"),
    [
        (LabelOptions(), ["--refinery", "null"], "REFINERY is missing"),
        (LabelOptions(), ["--out", "null"], "OUT is missing"),
        (
            LabelOptions(),
            ["--out", "/dev/null/labels", "--refinery", "resnet50"],
            "OUT=/dev/null/labels: labels cannot",
        ),
        (LabelOptions(k=0), [], "k=0: must be at least 1"),
        (LabelOptions("exact", k=3), [], "k=3: is for packed labels"),
        (LabelOptions(), ["--labels.per", "image"], "labels.per=image: only labels of crops are stored"),
        (LabelOptions(), ["--labels.stored", "x"], "labels.stored are for training"),
        (LabelOptions(), ["--batch", "64"], "batch=64: .* has 48 images; take a smaller batch"),
    ],
)
def test_inputs_that_cannot_be_labelled_are_refused(make, tmp_path, options, words, says):
    with pytest.raises(TrainError, match=says):
        make("labels", options, *words)
    assert not (tmp_path / "labels").exists()


def test_labels_that_are_not_finite_discard_their_epoch(make, tmp_path, monkeypatch):
    original, batches = Labeller.logits, []

    def logits(self, batch):
        batches.append(batch)
        said = original(self, batch)
        return said.index_fill(0, torch.tensor([0]), torch.nan) if len(batches) == 4 else said  # one of epoch 2

    monkeypatch.setattr(Labeller, "logits", logits)
    with pytest.raises(TrainError, match="some crops of epoch 2 are not finite"):
        make("labels", LabelOptions())
    assert open_store(tmp_path / "labels").epochs == 1


def test_a_refinery_that_is_not_finite_leaves_no_labels(make, converted, refinery, tmp_path, monkeypatch):
    state = torch.load(refinery / "last.pt")
    state["model"]["fc.weight"][0, 0] = torch.inf
    torch.save(state, tmp_path / "last.pt")
    with pytest.raises(TrainError, match="its logits for some crops of epoch 1 are not finite"):
        make("labels", EXACT, "--refinery", str(tmp_path / "last.pt"))
    assert open_store(tmp_path / "labels").epochs == 0


def test_a_refinery_named_by_its_network_is_trained_for_as_long_as_its_recipe_says(converted, tmp_path, monkeypatch):
    """--epochs counts epochs of labels."""
    monkeypatch.chdir(tmp_path)
    Path("short.yaml").write_text("epochs: 1\nbatch: 16\noptimizer: {kind: adamw, lr: 0.001}\n")
    words = [
        "--data",
        str(converted.folder),
        "--recipe",
        "short.yaml",
        "--refinery",
        "mobilenet0.25",
        "--device",
        "cpu",
    ]
    store = label(parse([*words, "--resolution", "32", "--epochs", "2", "--out", "labels"]))
    assert store.epochs == 2
    (identity,) = Path("runs").rglob("identity.json")
    assert json.loads(identity.read_text())["epochs"] == 1
    assert read_run(identity.parent).result


def test_a_stop_before_labelling_writes_no_rows(converted, refinery):
    labeller = Labeller(job_of(converted, refinery), EXACT)
    rows = np.zeros((48, 12), np.uint8)
    with pytest.raises(Interrupted):
        labeller.label_epoch(0, rows, Stop(requested=True), "labels")


def test_reports_and_tables_of_runs_from_stored_labels(run, make, refinery, capsys):
    store = make("labels", LabelOptions(), "--epochs", "1")
    found = run(*BATCH, "--labels.stored", str(store.folder), "--epochs", "1")
    assert origin_of(found.identity) == "resnet18, stored"
    for runs, says in (
        (f"{refinery} {found.folder}", "resnet18, the refinery of run 2 mobilenet0.25, with the weights it had"),
        (str(found.folder), "because the refinery of run 1 mobilenet0.25 was not found"),
    ):
        report(runs, out="report", device="cpu", batch=16)
        assert says in Path("report/report.html").read_text()
    table("runs")
    assert "mobilenet0.25  resnet18, stored" in capsys.readouterr().out


def test_a_chain_begins_with_stored_labels(run, make, converted):
    store = make("labels", LabelOptions(), "--epochs", "1")
    words = [*TINY, *BATCH, "--data", str(converted.folder), "--epochs", "1", "--loss.kind", "hard"]
    first, second = chain(parse([*words, "--labels.stored", str(store.folder)]), ["mobilenet0.25", "mobilenet0.25"])
    kinds = [(each.identity["labels"]["kind"], each.identity["loss"]["kind"]) for each in (first, second)]
    assert kinds == [("stored", "hard"), ("refinery", "hard")]
    assert [each.identity["generation"] for each in (first, second)] == [1, 2]


def test_labels_without_a_finished_epoch_are_refused(run, make, converted):
    store = make("labels", LabelOptions(), "--epochs", "1")
    (store.folder / "epoch-0000.labels").unlink()
    with pytest.raises(TrainError, match="no epoch is finished yet; label some with python -m train.label"):
        find(parse([*TINY, "--labels.stored", str(store.folder)]), converted.class_names)
