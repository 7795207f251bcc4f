"""The chart of loaders."""

import pytest
from matplotlib.figure import Figure

from bench.chart import by_storage
from bench.record import Record
from train.runs.environment import environment


def row(name: str, kind: str, reads: str, median: float, threads: int) -> dict:
    rate = {"median": median, "min": median * 0.9, "max": median * 1.1}
    return {"name": name, "kind": kind, "reads": reads, "group": f"{threads} threads", "unit": "images/s", "rate": rate}


@pytest.fixture
def drawn(monkeypatch, tmp_path):
    """A function that draws rows with by_storage and returns the figure."""

    def draw(rows: list[dict]) -> Figure:
        sheets: list[Figure] = []
        monkeypatch.setattr(Figure, "savefig", lambda self, path, **_: sheets.append(self))
        by_storage(Record("loaders", {}, [], rows, (), ()), environment("cpu"), tmp_path / "loaders.png")
        return sheets[0]

    return draw


def test_rows_are_grouped_by_storage_and_coloured_by_kind(drawn):
    rows = [
        row("pillow", "peer", "files", 300, 1),
        row("ours", "ours", "blocks", 6000, 1),
        row("copy alone", "part", "blocks", 58_704, 1),
        row("pillow", "peer", "files", 550, 2),
        {
            "name": "spdl",
            "kind": "peer",
            "reads": "files",
            "group": "1 threads",
            "unit": "images/s",
            "not_run": "missing",
        },
    ]
    sheet = drawn(rows)
    (axes,) = sheet.axes
    assert [label.get_text() for label in axes.get_yticklabels()] == [
        "files",
        "pillow",
        "blocks",
        "ours",
        "copy alone",
    ]
    assert axes.get_xscale() == "log"
    assert {text.get_text() for text in axes.texts} == {"300", "550", "6000", "58704"}
    points = {line.get_xdata()[0]: line for line in axes.lines if len(line.get_xdata()) == 1}
    colours = {median: point.get_color() for median, point in points.items()}
    assert colours[300] == colours[550]
    assert len(set(colours.values())) == 3
    assert points[300].get_marker() != points[550].get_marker()
    (legend,) = sheet.legends
    assert [text.get_text() for text in legend.get_texts()] == ["ours", "peer", "part", "1 threads", "2 threads"]


def test_a_figure_without_rows_is_empty(drawn):
    assert drawn([]).axes[0].lines[:] == []
