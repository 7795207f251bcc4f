"""The charts of a page, as PNG: classes and sizes, learning curves, calibration."""

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter, StrMethodFormatter
from numpy.typing import NDArray

from train.look.answers import Calibration

_DPI = 130
# More classes are drawn as a curve.
_MOST_BARS = 30
_TRAIN, _VAL = "tab:blue", "tab:orange"
_LETTERS = 28


def class_counts(names: Sequence[str], train: NDArray[np.int64], val: NDArray[np.int64]) -> bytes:
    """Images of each class, the largest first. train, val: int64 [C]."""
    order = np.argsort(-train, kind="stable")
    if len(names) <= _MOST_BARS:
        figure, (axes,) = _sheet(1, 7.5, 0.9 + 0.36 * len(names))
        places = np.arange(len(names))
        for values, colour, label, shift in ((train, _TRAIN, "train", -0.2), (val, _VAL, "validation", 0.2)):
            axes.barh(places + shift, values[order], 0.38, color=colour, label=label)
            for place, value in zip(places, values[order].tolist(), strict=True):
                axes.annotate(f" {value:,}", (value, place + shift), va="center", fontsize=8)
        axes.set_yticks(places, [_short(names[each]) for each in order])
        axes.set_ylim(len(names) - 0.4, -0.6)
        axes.set_xlabel("images")
        axes.margins(x=0.1)
    else:
        figure, (axes,) = _sheet(1, 7.5, 3)
        for values, colour, label in ((train, _TRAIN, "train"), (val, _VAL, "validation")):
            axes.plot(range(1, len(names) + 1), values[order], color=colour, label=label)
        axes.set_ylim(bottom=0)
        axes.set_xlim(1, len(names))
        axes.set_xlabel("class, by its training images")
        axes.set_ylabel("images")
        axes.yaxis.set_major_locator(MaxNLocator(integer=True))
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    _legend(axes)
    return _png(figure)


def sizes(images: NDArray[np.float64], crops: NDArray[np.float64], resolution: int) -> bytes:
    """Histograms of the sizes of images and training crops; a line marks the size at which networks see crops.

    images: the shorter sides, crops: the square roots of their areas, both float64 [n], in stored pixels.
    """
    figure, panels = _sheet(2, 7.5, 2.6)
    highest = max(float(images.max()), float(crops.max()), resolution) * 1.05
    for axes, values, label in zip(
        panels, (images, crops), ("shorter side of an image, px", "side of a training crop, px"), strict=True
    ):
        axes.hist(values, bins=np.linspace(0, highest, 40).tolist(), color=_TRAIN)
        axes.axvline(resolution, color="black", linestyle="--", linewidth=1)
        # Space for the name of the line.
        axes.set(xlim=(0, highest), ylim=(0, 1.15 * axes.get_ylim()[1]))
        axes.set_xlabel(label)
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    panels[0].set_ylabel("images")
    panels[1].annotate(
        f"{resolution} px",
        (resolution, 1),
        (4, -2),
        xycoords=("data", "axes fraction"),
        textcoords="offset points",
        va="top",
    )
    return _png(figure)


def learning_curves(metrics: Sequence[dict[str, Any]], *, same_loss: bool) -> bytes:
    """Losses and accuracies after each epoch. same_loss: training and validation measure the same loss."""
    validated = any("val_loss" in line for line in metrics)
    apart = validated and not same_loss
    figure, panels = _sheet(2 + apart, 7.5 if not apart else 9.5, 3)
    losses = [("loss", "training crops", _TRAIN)] + [("val_loss", "validation images", _VAL)] * validated
    for number, (key, label, colour) in enumerate(losses):
        axes = panels[number if apart else 0]
        _curve(axes, metrics, key, colour, label)
        axes.set_ylim(bottom=0)
        axes.set_ylabel("loss, nats" if not apart else ("distance to the labels" if not number else "loss, nats"))
    of_accuracy = panels[-1]
    for key, label, colour, style in (
        ("train_top1", "top-1, training crops", _TRAIN, "-"),
        ("top1", "top-1, validation", _VAL, "-"),
        ("top5", "top-5, validation", _VAL, ":"),
    ):
        _curve(of_accuracy, metrics, key, colour, label, style)
    of_accuracy.set_ylim(0, 100)
    of_accuracy.yaxis.set_major_formatter(PercentFormatter(decimals=0))
    for axes in panels:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlabel("epoch")
        axes.grid(axis="y", color="0.92")
        _legend(axes, columns=1)
    return _png(figure)


def calibration_curve(found: Calibration) -> bytes:
    """Accuracy over confidence, and below it the number of images by confidence."""
    figure = Figure(figsize=(5, 4.6), layout="constrained")
    axes, below = figure.subplots(2, 1, height_ratios=[3, 1], sharex=True)
    axes.plot([0, 1], [0, 1], color="0.6", linestyle="--", linewidth=1, label="as confident as accurate")
    whiskers = [found.accuracy - found.low, found.high - found.accuracy]
    axes.errorbar(
        found.confidence, found.accuracy, yerr=whiskers, marker="o", color=_TRAIN, elinewidth=0.8, label="network"
    )
    axes.set(xlim=(0, 1), ylim=(0, 1), ylabel="accuracy")
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    below.bar(found.confidence, found.counts, 0.05, color=_TRAIN)
    below.set(xlabel="confidence: probability of the most likely class", ylabel="images")
    below.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    below.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    for each in (axes, below):
        each.spines[["top", "right"]].set_visible(False)
    _legend(axes)
    return _png(figure)


def _curve(axes: Axes, metrics: Sequence[dict[str, Any]], key: str, colour: str, label: str, style: str = "-") -> None:
    known = [(line["epoch"], line[key]) for line in metrics if isinstance(line.get(key), int | float)]
    if known:
        marker = "o" if len(known) <= 20 else ""
        axes.plot(*zip(*known, strict=True), color=colour, linestyle=style, marker=marker, markersize=3, label=label)


def _sheet(columns: int, width: float, height: float) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(width, height), layout="constrained")
    panels = list(figure.subplots(1, columns, squeeze=False)[0])
    for axes in panels:
        axes.spines[["top", "right"]].set_visible(False)
    return figure, panels


def _legend(axes: Axes, columns: int = 2) -> None:
    # Above the axes, where there are no lines.
    axes.legend(frameon=False, loc="lower left", bbox_to_anchor=(0, 1), ncols=columns, borderaxespad=0, fontsize=9)


def _png(figure: Figure) -> bytes:
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=_DPI)
    return file.getvalue()


def _short(text: str) -> str:
    return text if len(text) <= _LETTERS else f"{text[: _LETTERS - 1]}…"
