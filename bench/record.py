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
    """A column of a table: its head, and what it says of a row."""

    head: str
    cell: Callable[[Row], str]


def figure(value: float) -> str:
    """A number with three digits at least."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def optional(head: str, key: str, say: Callable[[Any], str]) -> Column:
    """A column of what only some rows know, or know as None."""
    return Column(head, lambda row: "–" if row.get(key) is None else say(row[key]))


def rate_columns(unit: str) -> tuple[Column, Column]:
    return (
        optional(unit, "rate", lambda rate: figure(rate["median"])),
        optional("min–max", "rate", lambda rate: f"{figure(rate['min'])}–{figure(rate['max'])}"),
    )


# Of rows whose unit is images/s; batch: images a batch.
BATCH_TIME = Column("ms a batch", lambda row: figure(1000 * row["batch"] / row["rate"]["median"]))
MEMORY = optional("memory MB", "peak_memory_bytes", lambda value: f"{value / 1e6:.0f}")
# Of a GPU while it worked: the share of the time in which nothing ran on it, its clock, and what it drew.
GPU_COLUMNS = (
    optional("idle", "idle", lambda share: f"{100 * share:.1f} %"),
    optional("MHz", "clock_mhz", lambda value: f"{value:.0f}"),
    optional("W", "watts", lambda value: f"{value:.0f}"),
)
DEVICE_MEMORY = optional("GPU MB", "peak_device_memory_bytes", lambda value: f"{value / 1e6:.0f}")


def step_columns(device: str, *more: Column) -> tuple[Column, ...]:
    """The columns of rows that are steps, or parts of steps."""
    shares = [
        optional(head, key, lambda share: f"{100 * share:.0f} %")
        for head, key in (("of products", "share_of_flops"), ("of copies", "share_of_bytes"))
    ]
    common = (*rate_columns("images/s"), BATCH_TIME, *shares, *more, MEMORY)
    return (*common, DEVICE_MEMORY, *GPU_COLUMNS) if device == "cuda" else common


def ran(rows: list[Row]) -> dict[str, Row]:
    """The rows that ran, by name."""
    return {row["name"]: row for row in rows if "not_run" not in row}


@dataclass(frozen=True)
class Section:
    """A table of its own in a record: of the rows of one group. notes: how to read it."""

    heading: str
    group: str
    identity: tuple[Column, ...]
    figures: tuple[Column, ...]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Record:
    """The result of one part of the bench.

    settings: what was asked for. notes: sentences that say how to read the table, and what follows from it.
    rows: one a measurement, as in_turns gives them; `name` and `group` are its own in the part. Those of what takes no
    time have neither `unit` nor `rate`.
    identity, figures: columns of the table: what is known of every row, and what only of those that ran.
    chart: draws the figure into a file; called as chart(record, found, path). Default: `bars`.
    sections: several tables in place of the one, whose columns are then not used.
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
    """Writes DATE-PART-DEVICE.json, .md and .png into the folder and returns their paths; `found`: environment().

    The JSON holds the digests of the files that the part depends on, by which `make records` notices a change.

    There is no .png of a part of which nothing was measured. Raises BenchError where they cannot be written.
    """
    with writing(folder):
        return _write(record, found, folder)


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Makes the folder. Raises BenchError where that, or what is written in this context, fails."""
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
        # One of an earlier start on this day would not fit the table.
        paths.pop().unlink(missing_ok=True)
        return paths
    (record.chart or bars)(record, found, paths[2])
    return paths


def place(folder: Path, part: str, found: dict[str, Any]) -> Path:
    """Where the files of a part lie, without their suffix."""
    device = re.sub(r"[^a-z0-9.]+", "-", re.sub(r"\((r|tm)\)", "", found["device"].lower())).strip("-")
    return folder / f"{found['date'][:10]}-{part}-{device}-{found['cpu']['cores']}-cores"


def table(record: Record, found: dict[str, Any]) -> str:
    """The record in Markdown: the notes, the machine, and a table that reads well as plain text too."""
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
    """A Markdown table whose first `left` columns are aligned to the left, the others to the right."""
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
    """What stands above a figure."""
    return f"{record.part}: {found['device']}, {found['cpu']['cores']} cores, {found['date'][:10]}"


def bars(record: Record, found: dict[str, Any], path: Path) -> None:
    """Horizontal bars, a colour for each group: the median, with whiskers from the lowest to the highest.

    A name has as many bars as there are groups with a row of it.
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
        # Below the panels, where there is no bar.
        handles = [Patch(color=f"C{number % 10}", label=group) for number, group in enumerate(groups)]
        sheet.legend(handles=handles, loc="outside lower center", ncols=min(len(handles), 3), frameon=False)
    sheet.savefig(path, dpi=120)
