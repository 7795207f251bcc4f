"""Charts for parts where bars of rates would mislead: loaders by storage, and the parts of a step by time."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from bench.record import Record, bars, figure, title

_COLOURS = {"ours": "tab:blue", "peer": "tab:orange", "part": "0.6"}
_MARKERS = "os^Dv<>P*X"


def by_time(record: Record, found: dict[str, Any], path: Path) -> None:
    """Draws bars of milliseconds per batch into the file `path`, from rows in images/s that have a `batch`.

    The times of a step's parts add up; as rates, the parts that take almost no time would have the longest bars.
    """
    rows = []
    for row in record.rows:
        if "rate" in row:
            slowest, median, fastest = (1000 * row["batch"] / row["rate"][key] for key in ("min", "median", "max"))
            row = row | {"unit": "ms a batch", "rate": {"median": median, "min": fastest, "max": slowest}}
        rows.append(row)
    bars(replace(record, rows=rows), found, path)


def by_storage(record: Record, found: dict[str, Any], path: Path) -> None:
    """Draws a point for each row into the file `path`, on a logarithmic scale: the median, with whiskers for the range.

    Each row has `kind`, which sets the colour (ours, peer, or part: one stage of our loader alone), `reads`, the
    heading above it, and `group`, which sets the marker.
    """
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    rows = [row for row in record.rows if "rate" in row]
    groups = list(dict.fromkeys(row["group"] for row in rows))
    places: dict[tuple[str, str], int] = {}
    labels = []
    for reads in dict.fromkeys(row["reads"] for row in rows):
        labels.append((reads, "bold"))
        for name in dict.fromkeys(row["name"] for row in rows if row["reads"] == reads):
            places[reads, name] = len(labels)
            labels.append((name, "normal"))
    spacing = 0.7 / max(len(groups), 1)
    sheet = Figure(figsize=(9, 1.4 + len(labels) * max(0.24, 0.16 * len(groups))), layout="constrained")
    axes = sheet.subplots()
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:.0f}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    for row in rows:
        rate, number = row["rate"], groups.index(row["group"])
        y = places[row["reads"], row["name"]] + (number - (len(groups) - 1) / 2) * spacing
        colour = _COLOURS[row["kind"]]
        axes.plot([rate["min"], rate["max"]], [y, y], color=colour, linewidth=1.5)
        axes.plot(rate["median"], y, _MARKERS[number % len(_MARKERS)], color=colour, markersize=5)
        text = figure(rate["median"])
        axes.annotate(text, (rate["max"], y), (6, 0), textcoords="offset points", va="center", fontsize=8)
    axes.set_yticks(range(len(labels)), [label for label, _ in labels])
    for tick, (_, weight) in zip(axes.get_yticklabels(), labels, strict=True):
        tick.set_fontweight(weight)
    axes.set_ylim(max(len(labels), 1) - 0.4, -0.6)
    axes.grid(axis="y", color="0.92")
    axes.set_axisbelow(True)
    axes.margins(x=0.12)
    axes.set_xlabel("images/s, logarithmic (median; whiskers: lowest and highest turn)")
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title(title(record, found), fontsize=10)
    kinds = [kind for kind in _COLOURS if any(row["kind"] == kind for row in rows)]
    handles = [Line2D([], [], color=_COLOURS[kind], linewidth=3, label=kind) for kind in kinds]
    if len(groups) > 1:
        marks = zip(groups, _MARKERS * len(groups), strict=False)
        handles += [Line2D([], [], color="0.3", marker=mark, linestyle="", label=group) for group, mark in marks]
    if handles:
        sheet.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False, fontsize=8)
    sheet.savefig(path, dpi=120)
