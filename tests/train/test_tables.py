"""The paper's tables, end to end on a tiny set."""

import json
import math
import re
import shutil
import statistics
from dataclasses import replace

import pytest

from models import ModelError
from models.trained import digest_of
from train import TrainError
from train.config import parse
from train.runs.code import files_of
from train.runs.environment import environment
from train.tables.command import main, make_tables
from train.tables.rows import Tables
from train.tables.text import Row, Score, Setting, TablesOptions, as_json, markdown


@pytest.fixture
def setting(run, converted, tmp_path):
    (tmp_path / "is_a.txt").write_text("thing class0\nthing class1\nclass1 class2\n")
    words = ["--resolution", "32", "--batch", "16", "--epochs", "1", "--device", "cpu", "--recipe", "quick"]
    return Setting(
        config=parse(["--data", str(converted.folder), *words]),
        options=TablesOptions(
            seeds=2,
            student="mobilenet0.25",
            students="mobilenet0.25 mobilenet0.5",
            refineries="resnet18",
            refinery_epochs=2,
            taxonomy=str(tmp_path / "is_a.txt"),
        ),
        refinery="resnet18",
    )


def with_options(setting: Setting, **options) -> Setting:
    return replace(setting, options=replace(setting.options, **options))


@pytest.mark.slow
def test_every_table(setting, tmp_path):
    rows = make_tables(["1", "4", "2", "3", "6", "7", "5"], setting, tmp_path / "out" / "tables.md")
    text = (tmp_path / "out" / "tables.md").read_text()
    written = (tmp_path / "out" / "tables.json").read_text()
    assert str(tmp_path) not in written
    described = json.loads(written)
    assert described["environment"]["command"]
    assert [(row["table"], row["name"]) for row in described["rows"]] == [(row.table, row.name) for row in rows]
    assert described["files"] == files_of("train.tables")
    assert re.findall(r"^## Table (\d)", text, re.MULTILINE) == list("1234567")
    assert str(tmp_path) not in text
    assert text.startswith(
        "Made by `python -m train.tables --data set --tables 1,4,2,3,6,7,5 --seeds 2 --student mobilenet"
    )
    by_name = {(row.table, row.name): row for row in rows}
    assert len(by_name) == len(rows) == 26
    first, second = (by_name["1", f"generation {number}"].runs for number in (1, 2))
    assert [run.identity["seed"] for run in first] == [0, 1]
    assert second[0].identity["refinery"]["weights"] != second[1].identity["refinery"]["weights"]
    assert [run.identity["epochs"] for run in by_name["1", "generation 1, as long as all three"].runs] == [3]
    # Two networks with two seeds, each refined and from ground truth.
    assert [len(row.runs) for row in rows if row.table == "2"] == [2, 2, 2, 2]
    jittered = by_name["3", "trained on with jitter"].runs[0].identity
    assert (jittered["jitter"], jittered["pretrained"] is None) == (1.0, False)
    (refinery,) = by_name["refineries", "refinery resnet18"].runs
    assert refinery.identity["epochs"] == 2
    soft = by_name["4", "soft dynamic"].runs
    assert all(run.identity["epochs"] == 1 for run in soft)
    assert [run.folder for run in by_name["7", "KL from label to output"].runs] == [run.folder for run in soft]
    top1 = [run.result["top1"] for run in soft]
    assert f"| soft dynamic | `--model mobilenet0.25 --refinery [refinery resnet18]` | {sum(top1) / 2:.2f} |" in text
    assert "| generation 3 | `--model mobilenet0.25 --refinery [generation 2]` |" in text
    assert "--pretrained [refined]/last.pt --jitter 1` |" in text


def test_a_table_and_the_json_beside_it_hold_what_its_runs_were_made_with(setting, run, tmp_path):
    made = run("--seed", "0", "--epochs", "1"), run("--seed", "1", "--epochs", "1", "--decoder", "torchvision")
    row = Row("4", "no refinery", "--model mobilenet0.25", list(made), [{"ReaL": Score(36.31, 112)}] * 2)
    text, described = markdown([row], setting, ["4"]), as_json([row])
    assert [machine["decoder"] for machine in described["machines"]] == ["ffcv", "torchvision"]
    for machine in described["machines"]:
        assert machine["versions"] == environment("cpu")["versions"]
        assert f"Decoder {machine['decoder']}, devices: 1, threads of each: {machine['threads']}, eager; " in text
        assert machine["compiler"] in (None, environment("cpu")["compiler"])
    assert described["files"] == files_of("train.tables")
    assert [one["result"] for one in described["rows"][0]["runs"]] == [one.result for one in made]
    images, top1 = made[0].metrics[-1]["val_images"], [one.result["top1"] for one in made]
    assert images == 15
    mean = sum(top1) / 2
    error = 100 * math.sqrt(mean / 100 * (1 - mean / 100) / 15)
    assert f"| {mean:.2f} | {statistics.stdev(top1):.2f} | {error:.2f} |" in text
    assert "| 36.31 (s.e. 4.54) |" in text
    # A run by other code, and one of an earlier version.
    for number, words in enumerate(({"code": "0" * 16}, None)):
        starts = made[number].folder / "starts.jsonl"
        start = json.loads(starts.read_text())
        start["environment"] = start["environment"] | words if words else {}
        starts.write_text(json.dumps(start) + "\n")
        assert as_json([row])["files"] is None
    assert "a run of an earlier version, which did not record its machine" in markdown([row], setting, ["4"])


def test_out_must_not_be_a_json_file(setting, tmp_path):
    with pytest.raises(TrainError, match=r"^OUT=.*tables\.json: is a table in Markdown"):
        make_tables(["4"], setting, tmp_path / "tables.json")


@pytest.mark.slow
def test_the_table_of_stored_labels(setting, tmp_path):
    setting = replace(setting, config=setting.config.replace({"epochs": 2}))
    rows = make_tables(["stored"], setting, tmp_path / "tables.md")
    assert [row.name for row in rows] == [
        *("no refinery", "refinery resnet18", "refinery", "exact", "top 10", "top 5"),
        *("top 10 of 1 epochs, again and again", "mobilenet0.25, with the others", "mobilenet0.5, with the others"),
    ]
    by_name = {row.name: row.runs for row in rows}
    # With seed 0, whose crops were labelled, exact labels equal the refinery's own.
    losses = {name: [[line["loss"] for line in run.metrics] for run in runs] for name, runs in by_name.items()}
    assert losses["exact"][0] == losses["refinery"][0]
    assert losses["exact"][1] != losses["refinery"][1]
    assert by_name["top 10 of 1 epochs, again and again"][0].identity["labels"]["epochs"] == 1
    text = (tmp_path / "tables.md").read_text()
    assert str(tmp_path) not in text
    assert text.count("| exact | `--model mobilenet0.25 --labels.stored resnet18-") == 1


@pytest.mark.slow
def test_the_table_of_statistics(setting, tmp_path):
    rows = make_tables(["statistics"], with_options(setting, seeds=1), tmp_path / "tables.md")
    of = {row.name: row.runs[0].identity["labels"].get("bn") for row in rows}
    del of["refinery resnet18"]
    assert of == {"no refinery": None, "batch": "batch", "averaged": "averaged", "running": "running"}


@pytest.mark.slow
def test_the_table_of_length(setting, tmp_path, capsys):
    """The most important rows come first, further seeds last; a stopped command continues."""
    out = tmp_path / "tables.md"
    rows = make_tables(["length"], with_options(setting, seeds=1), out)
    first = [row.name for row in rows]
    assert first == [
        *("refinery resnet18", "mobilenet0.25, refined", "mobilenet0.5, refined"),
        *("mobilenet0.25, ground truth", "mobilenet0.5, ground truth"),
        *("mobilenet0.25, ground truth, 4 times as long", "mobilenet0.25, generation 2", "mobilenet0.25, generation 3"),
        *("mobilenet0.25, soft static", "mobilenet0.25, hard dynamic"),
        *("mobilenet0.25, maps", "mobilenet0.25, maps, CutMix", "mobilenet0.25, stored labels, top 10"),
    ]
    by_name = {row.name: row for row in rows}
    of = {name: row.runs[0].identity for name, row in by_name.items()}
    assert of["mobilenet0.25, ground truth, 4 times as long"]["epochs"] == 4
    # Generations have different first weights and crops.
    assert of["mobilenet0.25, generation 3"]["generation"] == 2
    # Both were trained together, on the crops of one seed.
    assert of["mobilenet0.25, refined"]["refinery"] == of["mobilenet0.5, refined"]["refinery"] != None  # noqa: E711
    assert of["mobilenet0.25, soft static"]["labels"]["per"] == "image"
    assert of["mobilenet0.25, hard dynamic"]["loss"]["kind"] == "hard"
    capsys.readouterr()
    again = make_tables(["length"], setting, out)
    assert [row.name for row in again] == first
    assert [len(row.runs) for row in again] == [1, 2, 2, 2, 2, *[1] * 8]
    # Four runs of seed 1; nothing of seed 0 is trained again.
    assert capsys.readouterr().out.count("\nfinished: top-1") == 4
    assert "| mobilenet0.5, refined | `--model mobilenet0.5 --refinery [refinery resnet18]` |" in out.read_text()


@pytest.mark.slow
def test_relabels_tables(setting, wordnet_folder, tmp_path, monkeypatch):
    """On classes of ImageNet, whose val images have ReaL labels: of the first three, one is right and one has none."""
    val = sorted((wordnet_folder / "val").rglob("*.*"))
    # WordNet's id of class 3 of ImageNet, in sorted order, is that of the first folder.
    names = {f"ILSVRC2012_val_{number:08d}": path for number, path in enumerate(val, 1)}
    data = tmp_path / "data"
    for part in ("train", "val"):
        shutil.copytree(wordnet_folder / part, data / part)
    for name, path in names.items():
        (data / "val" / path.parent.name / path.name).rename(data / "val" / path.parent.name / f"{name}{path.suffix}")
    classes = {"n01491361": 3, "n02104029": 222, "n15075141": 999}
    real = [[classes[path.parent.name]] for path in val] + [[] for _ in range(50_000 - len(val))]
    (tmp_path / "real.json").write_text(json.dumps(real))
    words = {"real": str(tmp_path / "real.json"), "v2": str(data / "val"), "map_resolution": 96, "seeds": 1}
    setting = with_options(setting, **words)
    setting = replace(setting, config=setting.config.replace({"data": str(data)}))
    rows = make_tables(["relabel-labels", "relabel-networks"], setting, tmp_path / "tables.md")
    assert [row.name for row in rows if row.table == "relabel-labels"] == [
        *("ground truth", "label smoothing", "label cleaning", "maps", "maps, CutMix", "refinery", "refinery, CutMix"),
    ]
    networks = [row.name for row in rows if row.table == "relabel-networks"]
    assert networks == [
        f"{name}, {labels}"
        for name in ("mobilenet0.25", "mobilenet0.5")
        for labels in ("ground truth", "maps", "maps, CutMix")
    ]
    by_name = {row.name: row for row in rows}
    cleaning = by_name["label cleaning"].runs[0].identity
    assert (cleaning["labels"]["per"], cleaning["loss"]["kind"]) == ("image", "hard")
    assert by_name["label smoothing"].runs[0].identity["labels"]["smoothing"] == 0.1
    assert by_name["maps"].runs[0].identity["labels"]["kind"] == "maps"
    assert by_name["maps"].runs[0].folder == by_name["mobilenet0.25, maps"].runs[0].folder
    for name in ("maps, CutMix", "refinery, CutMix"):
        assert by_name[name].runs[0].identity["augment"]["cutmix"] == 1
    # Each image has its own class as its ReaL label, and V2 is the same images here.
    for row in rows:
        if row.table == "relabel-labels":
            (sets,) = row.on_sets
            assert sets["V2"] == sets["ReaL"]
    text = (tmp_path / "tables.md").read_text()
    assert "| row | options | top-1 | ± | s.e. | top-5 | V2 | ReaL | train top-1 |" in text
    assert str(tmp_path) not in text
    # As in the paper, CutMix has its own recipe.
    paper = replace(setting, config=setting.config.replace({"recipe": "relabel"}))
    assert Tables(paper, lambda rows: None)._cutmix == {"recipe": "relabel-cutmix"}


@pytest.mark.slow
def test_finished_runs_are_not_repeated(setting, tmp_path, capsys):
    setting = with_options(setting, seeds=1)
    make_tables(["4"], setting, tmp_path / "tables.md")
    # Once more, nothing is trained.
    capsys.readouterr()
    make_tables(["4"], setting, tmp_path / "again.md")
    assert "\nfinished: top-1" not in capsys.readouterr().out
    assert (tmp_path / "again.md").read_text() == (tmp_path / "tables.md").read_text()


def test_options_apply_to_refineries(setting, run, tmp_path):
    """Also initial weights, which are not used for a refinery that a run trains first."""
    start = run("--model", "resnet18", "--epochs", "1")
    config = setting.config.replace({"pretrained": str(start.weights), "recipe": "quick"})
    tables = Tables(replace(with_options(setting, seeds=1, refinery_epochs=1), config=config), lambda rows: None)
    (refinery,) = tables._refinery().runs
    assert refinery.identity["pretrained"] == digest_of(start.weights)
    assert (refinery.identity["seed"], refinery.identity["refinery"]) == (0, None)


@pytest.mark.slow
def test_students_of_other_batches_train_apart(setting, tmp_path, capsys):
    """The paper's recipe has another batch size for MobileNets."""
    (tmp_path / "mine.yaml").write_text("{batch: 16, epochs: 1, networks: {mobilenet: {batch: 8}}}")
    words = ["--resolution", "32", "--device", "cpu", "--recipe", str(tmp_path / "mine.yaml")]
    setting = with_options(setting, students="mobilenet0.25 resnet18")
    setting = replace(setting, config=parse(["--data", setting.config.data, *words]))
    rows = make_tables(["2"], setting, tmp_path / "tables.md")
    assert [run.identity["batch"] for row in rows if "refined" in row.name for run in row.runs] == [8, 8, 16, 16]
    assert "batch: mobilenet0.25 takes 8 and resnet18 16 from recipe" in capsys.readouterr().out
    assert str(tmp_path) not in (tmp_path / "tables.md").read_text()


def test_only_table_5_needs_a_taxonomy(setting, tmp_path, monkeypatch, capsys):
    made = []
    monkeypatch.setattr(
        "train.tables.command.make_tables", lambda wanted, setting, out: made.append((wanted, str(out)))
    )
    monkeypatch.setattr("sys.argv", ["tables", "--data", setting.config.data])
    main()
    assert made == [(list("142367"), "runs/tables-1-4-2-3-6-7.md")]
    assert "table 5 is left out: it needs --taxonomy" in capsys.readouterr().out


def test_bad_tables_are_refused_before_anything_is_trained(setting, tmp_path, monkeypatch):
    monkeypatch.setattr("train.tables.rows.train", None)
    with pytest.raises(ModelError, match="mobilnet"):
        make_tables(["1"], with_options(setting, students="mobilenet0.25 mobilnet"), tmp_path / "tables.md")
    with pytest.raises(ModelError, match="alexnet: resolution=32 is too small"):
        make_tables(["1"], with_options(setting, refineries="alexnet"), tmp_path / "tables.md")
    for option, says in (
        ({"labels.resolution": -1}, "labels.resolution=-1: must be at least 1"),
        ({"labels.per": "category", "jitter": 1}, "labels.per, jitter: is what rows of the tables differ in"),
        ({"labels.taxonomy": "nofile"}, "labels.taxonomy: is what rows of the tables differ in"),
    ):
        with pytest.raises(TrainError, match=says):
            make_tables(["1"], replace(setting, config=setting.config.replace(option)), tmp_path / "tables.md")
    (tmp_path / "is_a.txt").write_text("thing other\n")
    with pytest.raises(TrainError, match="lacks 3 of the 3 classes"):
        make_tables(["1", "5"], setting, tmp_path / "tables.md")
    setting = with_options(setting, taxonomy=None)
    with pytest.raises(TrainError, match="tables=9: unknown"):
        make_tables(["1", "9"], setting, tmp_path / "tables.md")
    with pytest.raises(TrainError, match="table 5 needs --taxonomy"):
        make_tables(["1", "5"], setting, tmp_path / "tables.md")
    with pytest.raises(TrainError, match="v2, real, multi_label: are columns of the table relabel-labels"):
        make_tables(["1"], with_options(setting, real="real.json"), tmp_path / "tables.md")
    with pytest.raises(TrainError, match="real.json"):
        make_tables(["relabel-labels"], with_options(setting, real="real.json"), tmp_path / "tables.md")
    with pytest.raises(TrainError, match="seeds=0"):
        make_tables(["1"], with_options(setting, seeds=0), tmp_path / "tables.md")
