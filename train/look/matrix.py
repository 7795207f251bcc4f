"""A confusion matrix as a picture: classes that are confused with each other are adjacent."""

import io

import numpy as np
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from numpy.typing import NDArray
from scipy.cluster.hierarchy import leaves_list, linkage
from scipy.spatial.distance import squareform

# Above this the table of confused pairs is clearer than a picture, and takes less memory.
MOST_CLASSES = 2000
NAMED = 40
_SIDE, _LARGEST_CELL = 1000, 56
# Ordering the leaves takes time proportional to the cube of their number.
_MOST_OPTIMAL = 1000
_DPI = 100
_LETTERS = 22


def by_similarity(shares: NDArray[np.float32]) -> NDArray[np.int64]:
    """The classes in an order in which those that are confused with each other are neighbours: int64 [C].

    shares: as of `confusion`. Hierarchical clustering (average linkage) by how often two classes are confused, in
    either direction.
    """
    classes = len(shares)
    if classes < 3:
        return np.arange(classes)
    both = (shares + shares.T).astype(np.float64)
    np.fill_diagonal(both, 0)
    # The square root: a pair that is rarely confused is still clearly nearer than one that never is.
    distances = 1 - np.sqrt(both / max(both.max(), 1e-12))
    np.fill_diagonal(distances, 0)
    tree = linkage(squareform(distances, checks=False), "average", optimal_ordering=classes <= _MOST_OPTIMAL)
    return leaves_list(tree).astype(np.int64)


def picture(shares: NDArray[np.float32], names: list[str]) -> tuple[bytes, int]:
    """A PNG of a matrix in the given order, and how many classes share one point of it (1 if all fit).

    shares: float32 [C, C], row: the class by the set, column: the class by the network. names: of the classes.
    If points have several classes, each shows the highest of their shares.
    """
    classes = len(shares)
    together = -(-classes // _SIDE)
    drawn = _pooled(shares, together)
    side = len(drawn) * max(1, min(_LARGEST_CELL, _SIDE // len(drawn)))
    named = classes <= NAMED
    short = [name if len(name) <= _LETTERS else f"{name[: _LETTERS - 1]}…" for name in names]
    longest = max(map(len, short)) if named else 5
    points = min(10.0, max(6.0, 0.5 * side / len(drawn)))
    around = 50 + round(longest * points * 0.85)
    width, height = side + around + 90, side + around + 10
    figure = Figure(figsize=(width / _DPI, height / _DPI), dpi=_DPI)
    axes = figure.add_axes((around / width, around / height, side / width, side / height))
    shown = axes.imshow(drawn, cmap="Blues", norm=PowerNorm(0.5 if named else 0.33, 0, 1), interpolation="nearest")
    if named:
        axes.set_xticks(range(classes), short, rotation=90, fontsize=points)
        axes.set_yticks(range(classes), short, fontsize=points)
    else:
        step = next(each for each in (10, 20, 50, 100, 200, 500) if classes / each <= 20)
        places = range(0, classes, step)
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_ticks([place / together for place in places], [str(place + 1) for place in places], fontsize=9)
    if classes <= 12:
        for row, column in np.ndindex(classes, classes):
            share = drawn[row, column]
            if share >= 0.005:
                colour = "white" if share > 0.35 else "black"
                axes.text(column, row, f"{100 * share:.0f}", color=colour, ha="center", va="center", fontsize=10)
    axes.set_xlabel("the network says")
    axes.set_ylabel("the set says")
    bar = figure.add_axes(((around + side + 15) / width, around / height, 12 / width, min(side, 240) / height))
    ticks = (0, 0.05, 0.25, 0.5, 1)
    figure.colorbar(shown, cax=bar, ticks=ticks, format=lambda share, _: f"{100 * share:.0f} %")
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=_DPI)
    return file.getvalue(), together


def _pooled(shares: NDArray[np.float32], together: int) -> NDArray[np.float32]:
    """The highest share of every `together` x `together` cells."""
    if together == 1:
        return shares
    cells = -(-len(shares) // together)
    padded = np.pad(shares, (0, cells * together - len(shares)))
    return padded.reshape(cells, together, cells, together).max(axis=(1, 3))
