"""The table and the files of a record."""

import json
import re

import pytest
from matplotlib.figure import Figure
from PIL import Image

from bench.chart import by_storage, by_time
from bench.record import BATCH_TIME, MEMORY, Column, Record, bars, optional, rate_columns, table, write
from train.runs.code import files_of
from train.runs.environment import environment


def ran(name: str, group: str, median: float, **more) -> dict:
    rate = {"median": median, "min": median * 0.9, "max": median * 1.1}
    return {
        "name": name,
        "group": group,
        "unit": "images/s",
        "rate": rate,
        "batch": 10,
        "peak_memory_bytes": 2e6,
    } | more


RECORD = Record(
    part="networks",
    settings={"batch": 10},
    notes=["What it is."],
    rows=[
        ran("step", "a → b", 1000.4, share=0.5),
        ran("optimizer", "a → b", 4.56),
        {"name": "step", "group": "a → c", "unit": "images/s", "not_run": "c: too small"},
    ],
    identity=(Column("pair", lambda row: row["group"]), Column("what", lambda row: row["name"])),
    figures=(*rate_columns("images/s"), BATCH_TIME, optional("share", "share", lambda x: f"{100 * x:.0f} %"), MEMORY),
)


def test_the_table_is_readable_as_text():
    text = table(RECORD, environment("cpu"))
    assert re.match(r"Made by `[^`]*(pytest|make test|\.ci/run)[^`]*`\.\n\nWhat it is\.\n\n", text)
    assert "torch 2" in text
    assert text[text.index("| pair") :] == (
        "| pair  | what      | images/s |  min–max | ms a batch | share | memory MB |\n"
        "|-------|-----------|---------:|---------:|-----------:|------:|----------:|\n"
        "| a → b | step      |     1000 | 900–1100 |         10 |  50 % |         2 |\n"
        "| a → b | optimizer |     4.56 | 4.1–5.02 |       2193 |     – |         2 |\n"
        "| a → c | step      |  not run |          |            |       |           |\n"
        "\n"
        "- a → c, step: not run: c: too small\n"
    )


def test_rows_without_a_time(tmp_path):
    rows = [ran("step", "a", 1000.4), {"name": "step", "group": "b", "share": 0.25}]
    figures = (*rate_columns("images/s"), optional("share", "share", lambda x: f"{100 * x:.0f} %"))
    record = Record("networks", {}, [], rows, RECORD.identity, figures)
    assert "| b    | step |        – |        – |  25 % |\n" in table(record, environment("cpu"))
    for path in write(record, environment("cpu"), tmp_path):
        assert path.stat().st_size > 0


def test_a_part_is_written_as_json_table_and_chart(tmp_path):
    found = environment("cpu")
    paths = write(RECORD, found, tmp_path / "results")
    assert [path.suffix for path in paths] == [".json", ".md", ".png"]
    assert all(path.name.startswith(f"{found['date'][:10]}-networks-") for path in paths)
    described = json.loads(paths[0].read_text())
    assert described["rows"] == RECORD.rows
    assert described["environment"] == found
    assert described["files"] == files_of("bench.networks")
    assert paths[1].read_text() == f"# networks\n\n{table(RECORD, found)}"
    assert Image.open(paths[2]).width > 500


def test_a_part_that_did_not_run_is_written_without_a_chart(tmp_path):
    write(Record("loop", {}, [], RECORD.rows, RECORD.identity, RECORD.figures), environment("cpu"), tmp_path)
    for chart in (None, by_storage):
        nothing = Record("loop", {}, [], [RECORD.rows[2]], RECORD.identity, RECORD.figures, chart)
        paths = write(nothing, environment("cpu"), tmp_path)
        assert [path.suffix for path in paths] == [".json", ".md"]
        assert sorted(tmp_path.iterdir()) == sorted(paths)


def test_bars_are_aligned_with_their_names(monkeypatch, tmp_path):
    """For names in one group and names in two groups."""
    rows = [ran("step", "a", 1000.0), ran("step", "b", 500.0), ran("optimizer", "b", 80.0), RECORD.rows[2]]
    sheets: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda self, path, **_: sheets.append(self))
    for chart in (bars, by_time):
        chart(Record("networks", {}, [], rows, (), ()), environment("cpu"), tmp_path / "networks.png")
    (rates,), (times,) = sheets[0].axes, sheets[1].axes
    for axes in (rates, times):
        assert [label.get_text() for label in axes.get_yticklabels()] == ["step", "optimizer"]
        places = [bar.get_y() + bar.get_height() / 2 for bar in axes.patches]
        assert places == pytest.approx([-0.2, 0.2, 1])
    assert [bar.get_width() for bar in rates.patches] == pytest.approx([1000, 500, 80])
    # Milliseconds per batch of 10 images.
    assert [bar.get_width() for bar in times.patches] == pytest.approx([10, 20, 125])
    assert {text.get_text() for text in times.texts} == {"10", "20", "125"}
    assert times.get_xlabel().startswith("ms a batch")
    (segment, *_) = times.collections[0].get_segments()
    assert sorted(segment[:, 0]) == pytest.approx([10 / 1.1, 10 / 0.9])
