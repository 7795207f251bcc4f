"""The paper's tables, end to end on a tiny set."""

import re

import pytest

from train import TrainError
from train.tables import Setting, make_tables


@pytest.fixture
def setting(run, converted, tmp_path):
    (tmp_path / "is_a.txt").write_text("thing class0\nthing class1\nclass1 class2\n")
    return Setting(
        data=str(converted.folder),
        words=["--resolution", "32", "--batch", "16", "--epochs", "1", "--device", "cpu", "--recipe", "quick"],
        seeds=2,
        student="mobilenet0.25",
        refinery="resnet18",
        students=["mobilenet0.25", "mobilenet0.5"],
        refineries=["resnet18"],
        refinery_epochs=2,
        taxonomy=str(tmp_path / "is_a.txt"),
    )


@pytest.mark.slow
def test_every_table(setting, tmp_path):
    rows = make_tables(["1", "4", "2", "3", "6", "7", "5"], setting, tmp_path / "out" / "tables.md")
    text = (tmp_path / "out" / "tables.md").read_text()
    assert re.findall(r"^## Table (\d)", text, re.MULTILINE) == list("1234567")
    assert str(tmp_path) not in text
    by_name = {(row.table, row.name): row for row in rows}
    assert len(by_name) == len(rows) == 26
    first, second = (by_name["1", f"generation {number}"].runs for number in (1, 2))
    assert [run.identity["seed"] for run in first] == [0, 1]
    assert second[0].identity["refinery"]["weights"] != second[1].identity["refinery"]["weights"]
    assert by_name["1", "generation 1, as long as all three"].runs[0].identity["epochs"] == 3
    jittered = by_name["3", "trained on with jitter"].runs[0].identity
    assert (jittered["jitter"], jittered["pretrained"] is None) == (1.0, False)
    (refinery,) = by_name["2", "resnet18, the refinery"].runs
    assert refinery.identity["epochs"] == 2
    soft = by_name["4", "soft dynamic"].runs
    assert all(run.identity["epochs"] == 1 for run in soft)
    assert [run.folder for run in by_name["7", "KL from label to output"].runs] == [run.folder for run in soft]
    top1 = [run.result["top1"] for run in soft]
    assert f"| soft dynamic | `--model mobilenet0.25 --refinery resnet18` | {sum(top1) / 2:.2f} |" in text


@pytest.mark.slow
def test_what_is_there_is_not_made_again(setting, tmp_path, capsys):
    setting.seeds = 1
    make_tables(["4"], setting, tmp_path / "tables.md")
    # Once more, nothing is trained.
    capsys.readouterr()
    make_tables(["4"], setting, tmp_path / "again.md")
    assert "\nfinished: top-1" not in capsys.readouterr().out
    assert (tmp_path / "again.md").read_text() == (tmp_path / "tables.md").read_text()


def test_bad_tables_are_refused_before_anything_is_trained(setting, tmp_path):
    setting.taxonomy = None
    with pytest.raises(TrainError, match="tables=9: unknown"):
        make_tables(["1", "9"], setting, tmp_path / "tables.md")
    with pytest.raises(TrainError, match="table 5 needs --taxonomy"):
        make_tables(["1", "5"], setting, tmp_path / "tables.md")
    setting.seeds = 0
    with pytest.raises(TrainError, match="seeds=0"):
        make_tables(["1"], setting, tmp_path / "tables.md")
