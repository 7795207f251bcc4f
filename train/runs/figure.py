"""Accuracy against milliseconds per crop, of finished runs: a student at a fraction of its refinery's cost."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, StrMethodFormatter

from command import UserError
from data.durable import reason, replacing
from models.trained import digest_of, load_trained
from train import TrainError
from train.export.check import in_pytorch, milliseconds
from train.export.onnx_file import Probabilities
from train.runs import Run

SUFFIXES = (".svg", ".png", ".pdf")


def check_figure(path: Path) -> None:
    """Raises TrainError for a file that a figure cannot be written to."""
    if path.suffix not in SUFFIXES:
        raise TrainError(f"FIGURE={path}: end its name in {', '.join(SUFFIXES)}")
    if not path.parent.is_dir():
        raise TrainError(f"FIGURE={path}: there is no folder {path.parent}; make it first")


def draw(runs: Sequence[Run], path: Path) -> None:
    """Writes the figure, a panel for each set; a line connects a student with its refinery if that is also a run.

    runs: finished ones. Networks are timed here, in float32 on the CPU, one crop at a time; runs whose checkpoints
    cannot be read are skipped and listed. Raises TrainError if none is left, or the file cannot be written.
    """
    places = _places(runs)
    if not places:
        raise TrainError(f"FIGURE={path}: no finished run has a checkpoint that can be read")
    sets = sorted({run.identity["data"]["name"] for run, _ in places.values()})
    with matplotlib.rc_context({"text.parse_math": False}):
        sheet = Figure(figsize=(7, 4 * len(sets)), layout="constrained")
        for axes, name in zip(np.atleast_1d(sheet.subplots(len(sets), squeeze=True)), sets, strict=True):
            for run, latency in places.values():
                if run.identity["data"]["name"] != name:
                    continue
                top1, refinery = _top1(run), run.identity["refinery"]
                colour = "C1" if refinery else "C0"
                axes.plot([latency], [top1], "o", color=colour)
                axes.annotate(run.identity["model"], (latency, top1), xytext=(5, 5), textcoords="offset points")
                teacher = places.get(refinery.get("weights")) if refinery else None
                if teacher:
                    axes.plot([latency, teacher[1]], [top1, _top1(teacher[0])], "-", color="0.8", zorder=0)
            axes.set(xscale="log", ylabel="top-1 %", title=name)
            # Plain numbers: names with a $ must be shown literally, so powers of ten are not available.
            axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
            axes.xaxis.set_minor_locator(LogLocator(subs=(2, 5)))
            axes.xaxis.set_minor_formatter(StrMethodFormatter("{x:g}"))
            axes.set_xlabel(f"ms per crop, one at a time, on this machine's CPU with {torch.get_num_threads()} threads")
            axes.grid(alpha=0.3, which="both")
            axes.margins(0.25)
        sheet.legend(
            handles=[axes.plot([], [], "o", color=f"C{n}", label=of)[0] for n, of in enumerate(_LEGEND)],
            loc="outside lower center",
            ncols=2,
        )
        try:
            with replacing(path) as file:
                sheet.savefig(file, format=path.suffix[1:], dpi=120)
        except OSError as error:
            raise TrainError(f"FIGURE={path}: cannot be written ({reason(error, path)})") from None


_LEGEND = ("own labels of the images", "labels of a refinery")


def _places(runs: Sequence[Run]) -> dict[str, tuple[Run, float]]:
    """Each readable run and its milliseconds per crop, by the digest of its weights."""
    known: dict[tuple[str, int], float] = {}
    places = {}
    for run in runs:
        key = run.identity["model"], run.identity["resolution"]
        try:
            if key not in known:
                trained = load_trained(str(run.folder))
                module = Probabilities(trained.network, trained.normalisation).eval()
                crop = np.zeros((1, 3, key[1], key[1]), np.uint8)
                known[key] = milliseconds(in_pytorch(module, torch.device("cpu")), crop)
            places[digest_of(run.weights)] = run, known[key]
        except (UserError, OSError) as error:
            print(f"warning: {error}; left out of the figure", flush=True)
    return places


def _top1(run: Run) -> float:
    assert run.result
    return float(run.result["top1"])
