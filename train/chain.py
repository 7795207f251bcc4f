"""Generations of networks, each learning from the one before (Label Refinery, section 3 and Table 1).

python -m train.chain --models "alexnet alexnet alexnet" --data images/
make chain MODELS="alexnet alexnet alexnet" DATA=images/
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from train import TrainError
from train.config import parse
from train.job import ON_GROUND_TRUTH, check, end_in_one_line, train
from train.runs import Run, key_of, table_text


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m train.chain",
        description="Trains one network after the other, each on the labels of the one before. What is finished is "
        "not repeated, and what was stopped goes on. Ends with the table of generations, which is written below "
        "--runs as text, JSON and a picture.",
        epilog="All other options are those of python -m train (--help lists them) and hold for every generation; "
        "--refinery and --pretrained are for the first alone.",
        allow_abbrev=False,
    )
    parser.add_argument("--models", required=True, metavar='"A B C"', help="the networks, with spaces between them")
    parser.add_argument("--refinery", help="who labels for the first network (default: the images' own labels)")
    words, arguments = parser.parse_known_args()
    end_in_one_line(lambda: chain(words.models.split(), arguments, refinery=words.refinery))


def chain(models: Sequence[str], arguments: Sequence[str], *, refinery: str | None = None) -> list[Run]:
    """Trains the generations and writes their table.

    arguments: words for `train.config.parse`. refinery: who labels for the first network; None: the ground truth.
    Raises as train.job.train, and TrainError for no networks at all.
    """
    if not models:
        raise TrainError("MODELS is empty; name the networks, with spaces between them")
    first = ["--refinery", refinery] if refinery else ON_GROUND_TRUTH
    # Later generations are looked at as students of a network's name: the runs that will teach them are not there yet.
    learning = [first, *([*_LATER, "--refinery", before] for before in models[:-1])]
    configs = [parse([*arguments, *words, "--model", model]) for words, model in zip(learning, models, strict=True)]
    if configs[0].out:
        raise TrainError(f"out={configs[0].out}: is the folder of one run; the runs of a chain lie below --runs")
    check(configs)
    runs: list[Run] = []
    for generation, model in enumerate(models, 1):
        print(f"generation {generation} of {len(models)}: {model}", flush=True)
        learns = [*_LATER, "--refinery", str(runs[-1].folder)] if runs else first
        words = [*arguments, *learns, "--model", model]
        runs += train(parse(words), words)
        print(flush=True)
    _write([_row(generation, run) for generation, run in enumerate(runs, 1)], runs, Path(configs[0].runs))
    return runs


# What holds for the first generation alone.
_LATER = ("--pretrained=null", "--labels.smoothing=0", "--labels.taxonomy=null")


def _row(generation: int, run: Run) -> dict[str, Any]:
    assert run.result is not None
    last = run.metrics[-1]
    refinery = run.identity["refinery"]
    return {
        "generation": generation,
        "model": run.identity["model"],
        "labels": refinery["network"] if refinery else "ground truth",
        "top1": run.result["top1"],
        "top5": run.result["top5"],
        # Of random training crops, by the image's class, over the last epoch.
        "train_top1": last["train_top1"],
        "gap": last["train_top1"] - run.result["top1"],
        "run": str(run.folder),
    }


def _write(rows: list[dict[str, Any]], runs: Sequence[Run], root: Path) -> None:
    text = table_text(
        [
            ("generation", "model", "labels", "top-1", "top-5", "train top-1", "gap", "run"),
            *(
                (
                    str(row["generation"]),
                    row["model"],
                    row["labels"],
                    *(f"{row[key]:.2f}" for key in ("top1", "top5", "train_top1", "gap")),
                    row["run"],
                )
                for row in rows
            ),
        ]
    )
    key = key_of([run.folder.name for run in runs])
    folder = root / runs[-1].identity["data"]["name"] / f"chain-{key}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "chain.txt").write_text(text)
        (folder / "chain.json").write_text(json.dumps(rows, indent=1) + "\n")
        _draw(rows, folder / "chain.png")
    except OSError as error:
        raise TrainError(f"{folder}: the table of generations cannot be written ({error.strerror})") from None
    print(f"{text}\n{folder}: chain.txt, chain.json, chain.png", flush=True)


def _draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Train and validation accuracy by generation (Figure 1 of the paper)."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(1.5 + 1.2 * len(rows), 3.6), layout="constrained")
    axes = figure.subplots()
    names = [f"{row['generation']}\n{row['model']}" for row in rows]
    for key, label in (("train_top1", "training crops"), ("top1", "validation")):
        axes.plot(names, [row[key] for row in rows], marker="o", label=label)
    axes.set_xlabel("generation")
    axes.set_ylabel("top-1, %")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
