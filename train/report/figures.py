"""Draws the figures of a report as PNG files; their numbers come from analysis.py.

All are six inches wide, so that their text is readable on a phone.
"""

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from numpy.typing import NDArray

from train.report.analysis import Bins, Labels

_WIDTH = 6.0  # inches
_DPI = 160
_MARKERS = "osD^vPX*"
_COLUMNS = 3
# Classes in a label map: light, so that black numbers are readable on them, and different from the colours of boxes.
# All further classes have the last one.
_CLASS_COLOURS = ("#8da0cb", "#fc8d62", "#66c2a5", "#e78ac3", "#ffd92f", "#c0c0c0")
_OTHERS = -1
# The crops that accuracies were counted on, in figures whose colours do not denote runs.
_KIND_COLOURS = ("#9ecae1", "#4292c6", "#08306b")
_SMALLEST_POINTS = 5.0


def by_run(names: Sequence[str], values: Mapping[str, Sequence[float]], path: Path) -> None:
    """Accuracies in percent, run by run, as bars from 0 (Figure 1 of the paper, whose runs are one chain).

    values: a number for each run, by the crops that were counted.
    """
    figure, axes = _chart(0.9 + len(names) * (0.24 * len(values) + 0.25))
    height = 0.8 / len(values)
    for number, (label, of_runs) in enumerate(values.items()):
        places = [place + (number - (len(values) - 1) / 2) * height for place in range(len(names))]
        axes.barh(places, of_runs, height, color=_KIND_COLOURS[number % len(_KIND_COLOURS)], label=label)
        for place, value in zip(places, of_runs, strict=True):
            axes.annotate(f" {value:.1f}", (value, place), va="center", fontsize=9)
    axes.set_yticks(range(len(names)), [_folded(name, 16) for name in names])
    # Space for a number after a bar of 100 %.
    axes.set(xlim=(0, 108), ylim=(len(names) - 0.5, -0.5), xticks=range(0, 101, 20))
    axes.set_xlabel("top-1, %")
    _legend(axes, columns=len(values))
    figure.savefig(path, dpi=_DPI)


def by_training_accuracy(names: Sequence[str], bins: Sequence[Bins], path: Path) -> None:
    """Validation over training accuracy of classes, or of bins of them, one colour per run (Figure 4 of the paper)."""
    figure, axes = _chart(5.4)
    single = all((each.sizes == 1).all() for each in bins)
    for number, (name, each) in enumerate(zip(names, bins, strict=True)):
        axes.errorbar(
            each.train,
            each.val,
            yerr=None if single else [each.val - each.low, each.high - each.val],
            color=_colour(number),
            marker=_MARKERS[number % len(_MARKERS)],
            # No line through single classes, since it would only zigzag.
            linestyle="" if single else "-",
            elinewidth=0.8,
            label=_folded(name, 40),
        )
    axes.plot([0, 100], [0, 100], color="0.6", linestyle="--", linewidth=1, zorder=0)
    axes.set(xlim=(-2, 102), ylim=(-2, 102))
    axes.set_aspect("equal")
    axes.set_xlabel(f"accuracy on training crops{'' if single else ', mean of the bin'}, %")
    axes.set_ylabel("accuracy on validation crops, %")
    _legend(axes)
    figure.savefig(path, dpi=_DPI)


def distributions(names: Sequence[str], values: Sequence[NDArray[np.float64]], label: str, path: Path) -> None:
    """How accuracy is distributed over classes, one row per run: every class a dot, with box and mean.

    values: in percent, for each run float64 [classes], without NaN (Figures 5 and 6 of the paper).
    """
    figure, axes = _chart(1.0 + 0.75 * len(names))
    places = range(len(names))
    axes.boxplot(
        list(values),
        positions=places,
        orientation="horizontal",
        widths=0.6,
        whis=(0, 100),
        showcaps=False,
        showmeans=True,
        meanprops={"marker": "D", "markerfacecolor": "white", "markeredgecolor": "black", "zorder": 4},
        medianprops={"color": "black"},
        boxprops={"color": "0.4"},
        whiskerprops={"color": "0.4"},
    )
    rng = np.random.default_rng(0)
    for place, each in zip(places, values, strict=True):
        heights = place + rng.uniform(-0.2, 0.2, len(each))
        size = float(np.clip(600 / len(each), 4, 25))
        axes.scatter(each, heights, s=size, color=_colour(place), alpha=0.6, linewidths=0, zorder=3)
    axes.set_yticks(places, [_folded(name, 16) for name in names])
    axes.set(xlim=(-2, 102), ylim=(len(names) - 0.5, -0.5))
    axes.set_xlabel(label)
    figure.savefig(path, dpi=_DPI)


def crops_of_image(
    image: NDArray[np.uint8],
    boxes: NDArray[np.int32],
    crops: Sequence[NDArray[np.uint8]],
    labels: Sequence[Labels],
    title: str,
    path: Path,
) -> None:
    """An image with boxes, and below it the crops with their labels (Figures 2 and 3 of the paper).

    image, crops: uint8 [height, width, 3]. boxes: int32 [crops, 4] (top, left, height, width) in pixels of the image.
    """
    rows = -(-len(crops) // _COLUMNS)
    lines = max(len(each) for each in labels)
    figure = Figure(figsize=(_WIDTH, 3.0 + rows * (1.7 + 0.17 * lines)), layout="constrained")
    grid = figure.add_gridspec(1 + rows, _COLUMNS, height_ratios=[2.7] + [1.6 + 0.17 * lines] * rows)
    whole = figure.add_subplot(grid[0, :])
    _show(whole, image)
    whole.set_title(title, fontsize=10)
    _boxes(whole, boxes)
    for number, (crop, label) in enumerate(zip(crops, labels, strict=True)):
        _labelled_crop(figure.add_subplot(grid[1 + number // _COLUMNS, number % _COLUMNS]), number, crop, label)
    figure.savefig(path, dpi=_DPI)


def map_of_image(
    image: NDArray[np.uint8],
    names: Sequence[str],
    cells: NDArray[np.float32],
    boxes: NDArray[np.int32],
    crops: Sequence[NDArray[np.uint8]],
    labels: Sequence[Labels],
    title: str,
    path: Path,
) -> None:
    """An image with boxes, beside it its label map, and below both the crops with their labels.

    image, boxes, crops: as for `crops_of_image`. names: of the classes. cells: float32 [S, S, classes], rows of the
    image first, each cell's probabilities of all classes.
    """
    rows = -(-len(crops) // _COLUMNS)
    lines = max(len(each) for each in labels)
    scale = _inches_a_pixel(image)
    heights = [scale * len(image) + 0.2, 0.7] + [1.6 + 0.17 * lines] * rows
    figure = Figure(figsize=(_WIDTH, sum(heights) + 0.1 * (2 + rows)), layout="constrained")
    grid = figure.add_gridspec(2 + rows, 2 * _COLUMNS, height_ratios=heights)
    whole, drawn = figure.add_subplot(grid[0, :_COLUMNS]), figure.add_subplot(grid[0, _COLUMNS:])
    _show(whole, image)
    whole.set_title(_folded(title, 36), fontsize=10)
    _boxes(whole, boxes)
    colours = _map(drawn, cells, image)
    below = figure.add_subplot(grid[1, :])
    below.set_axis_off()
    below.legend(
        handles=[
            Patch(color=colour, label="others" if each == _OTHERS else _short(names[each], 22))
            for each, colour in colours.items()
        ],
        title="map: the most likely class of each cell, paler if less likely (in %)",
        title_fontsize=9,
        loc="center",
        ncols=_COLUMNS,
        columnspacing=1.0,
        handlelength=1.5,
        frameon=False,
        fontsize=9,
    )
    for number, (crop, label) in enumerate(zip(crops, labels, strict=True)):
        row, column = divmod(number, _COLUMNS)
        axes = figure.add_subplot(grid[2 + row, 2 * column : 2 * column + 2])
        _labelled_crop(axes, number, crop, label)
    figure.savefig(path, dpi=_DPI)


def _map(axes: Axes, cells: NDArray[np.float32], image: NDArray[np.uint8]) -> dict[int, str]:
    """Draws each cell in the colour of its most likely class, paler if that is less likely, with its percentage.

    Returns the colours of the classes, the most frequent first; _OTHERS for all without their own.
    """
    (height, width), side = image.shape[:2], len(cells)
    likeliest, chances = cells.argmax(axis=2), cells.max(axis=2)
    found, counts = np.unique(likeliest, return_counts=True)
    ordered = found[np.argsort(-counts, kind="stable")].tolist()
    if len(ordered) > len(_CLASS_COLOURS):
        ordered = [*ordered[: len(_CLASS_COLOURS) - 1], _OTHERS]
    colours = dict(zip(ordered, _CLASS_COLOURS, strict=False))
    shades = np.array([to_rgba(colours.get(each, _CLASS_COLOURS[-1])) for each in likeliest.flatten().tolist()])
    shades[:, 3] = chances.flatten()
    axes.imshow(shades.reshape(side, side, 4), extent=(-0.5, width - 0.5, height - 0.5, -0.5))
    axes.set(xticks=[], yticks=[])
    axes.set_title(f"label map of {side}x{side} cells", fontsize=10)
    cell_height, cell_width = (_inches_a_pixel(image) * length / side for length in (height, width))
    # Space for three digits.
    points = min(9.0, 36 * cell_width, 60 * cell_height)
    if points >= _SMALLEST_POINTS:
        for row, column in np.ndindex(side, side):
            x, y = (column + 0.5) * width / side - 0.5, (row + 0.5) * height / side - 0.5
            axes.text(x, y, f"{100 * chances[row, column]:.0f}", fontsize=points, ha="center", va="center")
    return colours


def _inches_a_pixel(image: NDArray[np.uint8]) -> float:
    """The scale of an image that fills half the width of a figure, or has that height."""
    return (_WIDTH / 2 - 0.1) / max(image.shape[:2])


@dataclass(frozen=True)
class Example:
    """A crop, uint8 [height, width, 3], its name, its image's class, and each run's labels of it."""

    crop: NDArray[np.uint8]
    title: str
    truth: str
    said: Sequence[Labels]


def predictions(names: Sequence[str], examples: Sequence[Example], path: Path) -> None:
    """Crops, each beside every run's most likely classes (Figures 7 and 8 of the paper); the true class is bold."""
    bars = max(len(labels) for example in examples for labels in example.said)
    tall = max(1.6, 0.2 * (bars + 1.2) * len(names))
    figure = Figure(figsize=(_WIDTH, len(examples) * (tall + 0.35)), layout="constrained")
    grid = figure.add_gridspec(len(examples), 2, width_ratios=[1, 1.9])
    for row, example in enumerate(examples):
        seen = figure.add_subplot(grid[row, 0])
        _show(seen, example.crop)
        seen.set_title(_folded(example.title, 28), fontsize=9)
        axes = figure.add_subplot(grid[row, 1])
        for number, (name, labels) in enumerate(zip(names, example.said, strict=True)):
            first = number * (bars + 1.2)
            axes.text(0, first - 0.9, _short(name, 40), color=_colour(number), fontsize=9, va="center")
            ys = [first + place for place in range(len(labels))]
            axes.barh(ys, 1, 0.9, color="0.96")
            axes.barh(ys, [chance for _, chance in labels], 0.9, color=_colour(number), alpha=0.35)
            for y, (label, chance) in zip(ys, labels, strict=True):
                weight = "bold" if label == example.truth else "normal"
                text = f"{_short(label, 30)} {_percent(chance)}"
                axes.text(0.01, y, text, fontsize=9, va="center", weight=weight)
        axes.set(xlim=(0, 1), ylim=(len(names) * (bars + 1.2) - 1.6, -1.6))
        axes.set_axis_off()
    figure.savefig(path, dpi=_DPI)


def _chart(height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(_WIDTH, height), layout="constrained")
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _legend(axes: Axes, columns: int = 2) -> None:
    # Above the axes, where there are no lines.
    axes.legend(
        frameon=False,
        loc="lower left",
        bbox_to_anchor=(0, 1),
        ncols=columns,
        borderaxespad=0,
        fontsize=9,
        columnspacing=1,
        handlelength=1.5,
    )


def _show(axes: Axes, image: NDArray[np.uint8]) -> None:
    axes.imshow(image)
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_visible(False)


def _boxes(axes: Axes, boxes: NDArray[np.int32]) -> None:
    """Draws numbered boxes on an image."""
    for number, (top, left, height, width) in enumerate(boxes.tolist()):
        outline = Rectangle((left - 0.5, top - 0.5), width, height, fill=False, edgecolor=_colour(number), linewidth=2)
        axes.add_patch(outline)
        _number(axes, number, left - 0.5, top - 0.5)


def _labelled_crop(axes: Axes, number: int, crop: NDArray[np.uint8], label: Labels) -> None:
    """Draws what is in a numbered box, with its label below."""
    _show(axes, crop)
    _number(axes, number, -0.5, -0.5)
    for spine in axes.spines.values():
        spine.set(visible=True, color=_colour(number), linewidth=2)
    axes.set_xlabel("\n".join(f"{_short(name, 20)} {_percent(chance)}" for name, chance in label), fontsize=9)


def _number(axes: Axes, number: int, x: float, y: float) -> None:
    patch = {"facecolor": _colour(number), "edgecolor": "none", "pad": 1.5}
    axes.text(x, y, str(number + 1), color="white", fontsize=8, va="top", ha="left", bbox=patch)


def _colour(number: int) -> str:
    return f"C{number % 10}"


def _percent(chance: float) -> str:
    return f"{100 * chance:.0f} %"


def _short(text: str, width: int) -> str:
    return text if len(text) <= width else f"{text[: width - 1]}…"


def _folded(text: str, width: int) -> str:
    return "\n".join(textwrap.wrap(text, width, break_long_words=False))
