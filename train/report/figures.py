"""Draws the figures of a report as PNG files; what they show is computed elsewhere (analysis.py).

All are six inches wide, so that their letters can be read on a telephone.
"""

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from numpy.typing import NDArray

from train.report.analysis import Bins, Labels

_WIDTH = 6.0  # inches
_DPI = 160
_MARKERS = "osD^vPX*"


def by_run(names: Sequence[str], train: Sequence[float], val: Sequence[float], path: Path) -> None:
    """Train and validation accuracy, in percent, run by run (Figure 1 of the paper)."""
    figure, axes = _chart(3.4)
    places = range(len(names))
    for values, label, marker in ((train, "training crops", "s"), (val, "validation images", "o")):
        axes.plot(places, values, marker=marker, label=label)
    for place in places:
        # The number of the upper point stands above it and that of the lower below: they never meet.
        for value, other, upward in ((train[place], val[place], True), (val[place], train[place], False)):
            above = value > other or (value == other and upward)
            axes.annotate(
                f"{value:.1f}",
                (place, value),
                (0, 6 if above else -6),
                textcoords="offset points",
                ha="center",
                va="bottom" if above else "top",
                fontsize=9,
            )
    axes.set_xticks(places, [_folded(name, 14) for name in names])
    axes.margins(x=0.12, y=0.2)
    axes.set_ylabel("top-1, %")
    _legend(axes)
    figure.savefig(path, dpi=_DPI)


def by_training_accuracy(names: Sequence[str], bins: Sequence[Bins], path: Path) -> None:
    """Validation over training accuracy of binned classes, one line a run (Figure 4 of the paper)."""
    figure, axes = _chart(4.2)
    for number, (name, each) in enumerate(zip(names, bins, strict=True)):
        axes.errorbar(
            each.train,
            each.val,
            yerr=each.spread,
            color=_colour(number),
            marker=_MARKERS[number % len(_MARKERS)],
            elinewidth=0.8,
            label=_folded(name, 40),
        )
    low = max(0.0, min(float(min(each.train.min(), (each.val - each.spread).min())) for each in bins))
    high = min(100.0, max(float(max(each.train.max(), (each.val + each.spread).max())) for each in bins))
    axes.plot([low, high], [low, high], color="0.6", linestyle="--", linewidth=1, zorder=0)
    axes.set_xlabel("accuracy on training crops, mean of the bin, %")
    axes.set_ylabel("validation accuracy, %")
    _legend(axes)
    figure.savefig(path, dpi=_DPI)


def distributions(names: Sequence[str], values: Sequence[NDArray[np.float64]], label: str, path: Path) -> None:
    """How accuracy is distributed over classes, one row a run: every class a dot, with box and mean.

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
    columns = 3
    rows = -(-len(crops) // columns)
    lines = max(len(each) for each in labels)
    figure = Figure(figsize=(_WIDTH, 3.0 + rows * (1.7 + 0.17 * lines)), layout="constrained")
    grid = figure.add_gridspec(1 + rows, columns, height_ratios=[2.7] + [1.6 + 0.17 * lines] * rows)
    whole = figure.add_subplot(grid[0, :])
    _show(whole, image)
    whole.set_title(title, fontsize=10)
    for number, (box, crop, label) in enumerate(zip(boxes.tolist(), crops, labels, strict=True)):
        top, left, height, width = box
        colour = _colour(number)
        whole.add_patch(Rectangle((left - 0.5, top - 0.5), width, height, fill=False, edgecolor=colour, linewidth=2))
        _number(whole, number, left - 0.5, top - 0.5)
        axes = figure.add_subplot(grid[1 + number // columns, number % columns])
        _show(axes, crop)
        _number(axes, number, -0.5, -0.5)
        for spine in axes.spines.values():
            spine.set(visible=True, color=colour, linewidth=2)
        says = "\n".join(f"{_short(name, 20)} {_percent(chance)}" for name, chance in label)
        axes.set_xlabel(says, fontsize=9)
    figure.savefig(path, dpi=_DPI)


@dataclass(frozen=True)
class Example:
    """A crop, uint8 [height, width, 3], what it is called, its image's class, and what each run says it shows."""

    crop: NDArray[np.uint8]
    title: str
    truth: str
    said: Sequence[Labels]


def predictions(names: Sequence[str], examples: Sequence[Example], path: Path) -> None:
    """Crops, each beside the likeliest classes by every run (Figures 7 and 8 of the paper); the true class is bold."""
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


def _legend(axes: Axes) -> None:
    # Above the axes, where no line passes.
    axes.legend(frameon=False, loc="lower left", bbox_to_anchor=(0, 1), ncols=2, borderaxespad=0)


def _show(axes: Axes, image: NDArray[np.uint8]) -> None:
    axes.imshow(image)
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_visible(False)


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
