"""The record of a measurement: JSON, a table in Markdown, and a bar chart."""

import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench import BenchError
from train.runs.code import files_of
from train.runs.environment import machine_line

Row = dict[str, Any]


@dataclass(frozen=True)
class Column:
    """A column of a table: its header, and the text of a row's cell."""

    head: str
    cell: Callable[[Row], str]


def figure(value: float) -> str:
    """Formats a number with at least three significant digits."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def optional(head: str, key: str, say: Callable[[Any], str]) -> Column:
    """Returns a column for `key`, with "–" in rows where it is missing or None."""
    return Column(head, lambda row: "–" if row.get(key) is None else say(row[key]))


def rate_columns(unit: str) -> tuple[Column, Column]:
    return (
        optional(unit, "rate", lambda rate: figure(rate["median"])),
        optional("min–max", "rate", lambda rate: f"{figure(rate['min'])}–{figure(rate['max'])}"),
    )


# For rows in images/s that have `batch`, the images per batch.
BATCH_TIME = Column("ms a batch", lambda row: figure(1000 * row["batch"] / row["rate"]["median"]))
MEMORY = optional("memory MB", "peak_memory_bytes", lambda value: f"{value / 1e6:.0f}")
# Of a GPU during the turns: the share of time in which nothing ran on it, its clock, and its power.
GPU_COLUMNS = (
    optional("idle", "idle", lambda share: f"{100 * share:.1f} %"),
    optional("MHz", "clock_mhz", lambda value: f"{value:.0f}"),
    optional("W", "watts", lambda value: f"{value:.0f}"),
)
DEVICE_MEMORY = optional("GPU MB", "peak_device_memory_bytes", lambda value: f"{value / 1e6:.0f}")


def step_columns(device: str, *more: Column) -> tuple[Column, ...]:
    """Returns the columns for rows that are steps, or parts of steps."""
    shares = [
        optional(head, key, lambda share: f"{100 * share:.0f} %")
        for head, key in (("of products", "share_of_flops"), ("of copies", "share_of_bytes"))
    ]
    common = (*rate_columns("images/s"), BATCH_TIME, *shares, *more, MEMORY)
    return (*common, DEVICE_MEMORY, *GPU_COLUMNS) if device == "cuda" else common


def ran(rows: list[Row]) -> dict[str, Row]:
    """Returns the rows that ran, by name."""
    return {row["name"]: row for row in rows if "not_run" not in row}


@dataclass(frozen=True)
class Section:
    """A separate table in a record, for the rows of one group. notes: how to read it."""

    heading: str
    group: str
    identity: tuple[Column, ...]
    figures: tuple[Column, ...]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Record:
    """The result of one part of the bench.

    settings: the options it ran with. notes: sentences on how to read the table, and findings.
    rows: one per measurement, as returned by in_turns; `name` and `group` together are unique in the part. Rows without
    a time have neither `unit` nor `rate`.
    identity, figures: columns of the table for every row, and columns only for rows that ran.
    chart: draws the chart into a file, called as chart(record, found, path); default: `bars`.
    sections: several tables instead of one; `identity` and `figures` are then not used.
    """

    part: str
    settings: dict[str, Any]
    notes: list[str]
    rows: list[Row]
    identity: tuple[Column, ...]
    figures: tuple[Column, ...]
    chart: "Callable[[Record, dict[str, Any], Path], None] | None" = None
    sections: tuple[Section, ...] = ()


def write(record: Record, found: dict[str, Any], folder: Path) -> list[Path]:
    """Writes DATE-PART-DEVICE.json, .md and .png into the folder and returns their paths. found: environment().

    The JSON contains digests of the files that the part depends on, from which `make records` detects changes.
    No .png is written if nothing was measured. Raises BenchError if the folder cannot be written.
    """
    with writing(folder):
        return _write(record, found, folder)


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Makes the folder; a context that turns OSErrors, also from the body, into a BenchError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        raise BenchError(f"{folder}: cannot be written ({error.strerror}); name another folder with OUT") from None


def _write(record: Record, found: dict[str, Any], folder: Path) -> list[Path]:
    stem = place(folder, record.part, found)
    paths = [stem.with_name(f"{stem.name}.{suffix}") for suffix in ("json", "md", "png")]
    described = {
        "part": record.part,
        "environment": found,
        "files": files_of(f"{__package__}.{record.part.replace('-', '_')}") or files_of(__package__),
        "settings": record.settings,
        "notes": record.notes,
        "rows": record.rows,
    }
    paths[0].write_text(json.dumps(described, indent=1) + "\n")
    paths[1].write_text(f"# {record.part}\n\n{table(record, found)}")
    measured = ran(record.rows) if record.chart else any("rate" in row for row in record.rows)
    if not measured:
        # A chart of an earlier start on this day would not match the table.
        paths.pop().unlink(missing_ok=True)
        return paths
    (record.chart or bars)(record, found, paths[2])
    return paths


def place(folder: Path, part: str, found: dict[str, Any]) -> Path:
    """Returns the path of a part's files without suffix."""
    device = re.sub(r"[^a-z0-9.]+", "-", re.sub(r"\((r|tm)\)", "", found["device"].lower())).strip("-")
    return folder / f"{found['date'][:10]}-{part}-{device}-{found['cpu']['cores']}-cores"


def table(record: Record, found: dict[str, Any]) -> str:
    """Returns the record in Markdown: notes, the machine, and a table that is also readable as plain text."""
    text = "\n".join([f"Made by `{found['command']}`.", "", *record.notes, "", machine_line(found), ""]) + "\n"
    if not record.sections:
        return text + _rows(record.rows, record.identity, record.figures)
    for section in record.sections:
        rows = [row for row in record.rows if row["group"] == section.group]
        text += "\n".join([f"## {section.heading}", "", *section.notes, "", ""])
        text += _rows(rows, section.identity, section.figures) + "\n"
    return text.rstrip("\n") + "\n"


def _rows(shown: list[Row], identity: tuple[Column, ...], figures: tuple[Column, ...]) -> str:
    rows = []
    missing = []
    for row in shown:
        cells = [column.cell(row) for column in identity]
        if "not_run" in row:
            cells += ["not run", *[""] * (len(figures) - 1)]
            called = ", ".join(part for part in (row["group"], row["name"]) if part)
            missing.append(f"- {called}: not run: {row['not_run']}\n")
        else:
            cells += [column.cell(row) for column in figures]
        rows.append(cells)
    heads = [column.head for column in (*identity, *figures)]
    text = aligned(heads, rows, left=len(identity)) + "\n"
    return text + ("\n" + "".join(missing) if missing else "")


def aligned(heads: list[str], rows: list[list[str]], *, left: int) -> str:
    """Returns a Markdown table with the first `left` columns aligned to the left and the others to the right."""
    widths = [max(len(row[column]) for row in (heads, *rows)) for column in range(len(heads))]

    def line(cells: list[str]) -> str:
        padded = [
            cell.ljust(width) if column < left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ]
        return f"| {' | '.join(padded)} |"

    rule = "|".join("-" * (width + 1) + ("-" if column < left else ":") for column, width in enumerate(widths))
    return "\n".join([line(heads), f"|{rule}|", *map(line, rows)])


def title(record: Record, found: dict[str, Any]) -> str:
    """Returns the title of a chart."""
    return f"{record.part}: {found['device']}, {found['cpu']['cores']} cores, {found['date'][:10]}"


def bars(record: Record, found: dict[str, Any], path: Path) -> None:
    """Draws horizontal bars of medians into the file `path`, with whiskers for the range and a colour per group.

    Each name has one bar per group that contains it.
    """
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    rows = [row for row in record.rows if "rate" in row]
    units = list(dict.fromkeys(row["unit"] for row in rows)) or [""]
    names = [list(dict.fromkeys(row["name"] for row in rows if row["unit"] == unit)) for unit in units]
    groups = list(dict.fromkeys(row["group"] for row in rows))
    members = {
        (unit, name): [row for row in rows if (row["unit"], row["name"]) == (unit, name)]
        for unit, labels in zip(units, names, strict=True)
        for name in labels
    }
    most = [
        max((len(members[unit, name]) for name in labels), default=1) for unit, labels in zip(units, names, strict=True)
    ]
    heights = [0.8 + 0.32 * len(labels) * count for labels, count in zip(names, most, strict=True)]
    sheet = Figure(figsize=(9, 0.8 + sum(heights)), layout="constrained")
    panels = sheet.subplots(len(units), 1, height_ratios=heights, squeeze=False)[:, 0]
    for axes, unit, labels, count in zip(panels, units, names, most, strict=True):
        height = 0.8 / count
        for number, group in enumerate(groups):
            drawn = [row for row in rows if row["unit"] == unit and row["group"] == group]
            rates = [row["rate"] for row in drawn]
            medians = [rate["median"] for rate in rates]
            whiskers = [
                [rate["median"] - rate["min"] for rate in rates],
                [rate["max"] - rate["median"] for rate in rates],
            ]
            ys = []
            for row in drawn:
                beside = members[unit, row["name"]]
                ys.append(labels.index(row["name"]) + (beside.index(row) - (len(beside) - 1) / 2) * height)
            colour = f"C{number % 10}"
            axes.barh(ys, medians, height, xerr=whiskers, capsize=2.5, color=colour, label=group, ecolor="0.25")
            for y, rate in zip(ys, rates, strict=True):
                text = figure(rate["median"])
                axes.annotate(text, (rate["max"], y), (5, 0), textcoords="offset points", va="center")
        axes.set_yticks(range(len(labels)), labels)
        axes.invert_yaxis()
        axes.margins(x=0.12)
        axes.set_xlabel(f"{unit} (median; whiskers: lowest and highest turn)")
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_title(title(record, found), fontsize=10)
    if len(groups) > 1:
        # Below the panels, so that it covers no bar.
        handles = [Patch(color=f"C{number % 10}", label=group) for number, group in enumerate(groups)]
        sheet.legend(handles=handles, loc="outside lower center", ncols=min(len(handles), 3), frameon=False)
    sheet.savefig(path, dpi=120)
