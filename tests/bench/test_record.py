"""The table and the files of a record."""

import json

from PIL import Image

from bench.environment import environment
from bench.record import BATCH_TIME, MEMORY, Column, Record, optional, rate_columns, table, write


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


def test_the_table_reads_well_as_text():
    text = table(RECORD, environment("cpu"))
    assert text.startswith("What it is.\n\n")
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


def test_rows_of_what_takes_no_time(tmp_path):
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
    assert paths[1].read_text() == f"# networks\n\n{table(RECORD, found)}"
    assert Image.open(paths[2]).width > 500


def test_a_part_that_did_not_run_is_written_too(tmp_path):
    nothing = Record("loop", {}, [], [RECORD.rows[2]], RECORD.identity, RECORD.figures)
    for path in write(nothing, environment("cpu"), tmp_path):
        assert path.stat().st_size > 0
