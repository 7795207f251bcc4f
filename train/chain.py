"""Generations of networks, each learning from the one before (Label Refinery, section 3 and Table 1).

python -m train.chain --models "alexnet alexnet alexnet" --data images/
make chain MODELS="alexnet alexnet alexnet" DATA=images/
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from command import exit_on_user_error, with_flags
from train import TrainError
from train.ahead import Part, look_ahead, next_generation, parts_of, with_costs
from train.announce import announce_plan
from train.config import PLAN_FLAGS, Config, parse_both
from train.distributed import group, joined
from train.job import check
from train.labels import origin_of
from train.labels.refinery import RefineryLabels
from train.launch import on_devices
from train.report import figures
from train.runs import Run, key_of, table_text
from train.train import train_jobs, with_refinery


@dataclass(frozen=True)
class ChainOptions:
    """Options of a chain.

    Args:
        models: the networks, one generation each, with spaces between them
        dry_run: end after the plan: what is to be trained, for how long, and what is written (images are converted
            for it, and a few steps timed)
    """

    models: str = ""
    dry_run: bool = False


def main() -> None:
    about = (
        "Trains networks one after another (--models), each on the labels of the previous one. Finished runs are not "
        "repeated, and stopped runs continue. Ends with the table of generations, which is written below --runs as "
        "text, JSON and a picture. All options apply to every generation, except --refinery and --pretrained, which "
        "are only for the first."
    )

    def parse(words: list[str]) -> tuple[Config, ChainOptions]:
        return parse_both(words, ChainOptions, prog="python -m train.chain", about=about, out="")

    def work(asked: tuple[Config, ChainOptions]) -> None:
        config, own = asked
        with joined(config.device):
            chain(config, own.models.split(), dry_run=own.dry_run)

    on_devices(f"{__package__}.chain", with_flags(sys.argv[1:], PLAN_FLAGS), parse, work)


def chain(config: Config, models: Sequence[str], *, dry_run: bool = False) -> list[Run]:
    """Trains the generations and writes their table. dry_run: ends after the plan, without any runs.

    config: the options of all of them; its refinery labels for the first one, which otherwise learns from the ground
    truth. Raises as train.train.train does, and TrainError if there are no networks.
    """
    if not models:
        raise TrainError("MODELS is empty; name the networks, with spaces between them")
    if config.out:
        raise TrainError(f"out={config.out}: is the folder of one run; the runs of a chain lie below --runs")
    # Options of a refinery's labels apply from the second generation on, if the first has no refinery.
    refined = config.refinery or config.labels.stored
    first = (config if refined else config.reset(RefineryLabels.options)).replace({"model": models[0]})
    # Later generations are checked as students of a network's name: the runs that will teach them do not exist yet.
    check([first, *(_later(config, before, model) for before, model in pairwise(models))])
    generations = _planned([first, *(_later(config, before, model) for before, model in pairwise(models))], dry_run)
    announce_plan([part for parts in generations for part in parts], dry_run=dry_run)
    if dry_run:
        return []
    runs: list[Run] = []
    for generation, (model, parts) in enumerate(zip(models, generations, strict=True), 1):
        print(f"generation {generation} of {len(models)}: {model}", flush=True)
        ahead = look_ahead([_later(config, str(runs[-1].folder), model) if runs else first])
        after = sum(part.seconds for others in generations[generation:] for part in others)
        runs += train_jobs(with_refinery(ahead, parts, after), parts, after)
        print(flush=True)
    if group().first:
        _write([_row(generation, run) for generation, run in enumerate(runs, 1)], runs, Path(config.runs))
    return runs


def _planned(configs: Sequence[Config], dry_run: bool) -> list[list[Part]]:
    """The parts to be trained for each generation; none for a finished one."""
    ahead = look_ahead(configs[:1])
    planned = [parts_of(ahead)]
    for config in configs[1:]:
        ahead = next_generation(ahead.jobs[0], config)
        planned.append(parts_of(ahead))
    measured = iter(with_costs([part for parts in planned for part in parts], always=dry_run))
    return [[next(measured) for _ in parts] for parts in planned]


def _later(config: Config, refinery: str, model: str) -> Config:
    return config.learning_from(refinery).replace({"model": model, "pretrained": None})


def _row(generation: int, run: Run) -> dict[str, Any]:
    assert run.result is not None
    last = run.metrics[-1]
    return {
        "generation": generation,
        "model": run.identity["model"],
        "labels": origin_of(run.identity),
        "top1": run.result["top1"],
        "top5": run.result["top5"],
        # On random training crops, with the image's class, over the last epoch.
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
        names = [f"{row['generation']} {row['model']}" for row in rows]
        values = {
            "training crops, last epoch": [row["train_top1"] for row in rows],
            "validation images": [row["top1"] for row in rows],
        }
        figures.by_run(names, values, folder / "chain.png")
    except OSError as error:
        raise TrainError(f"{folder}: the table of generations cannot be written ({error.strerror})") from None
    print(
        f"{text}\ntrain top-1: on the random training crops of the last epoch, while the network still learned; top-1, "
        "top-5: on central\ncrops of validation images, which are easier. gap: train top-1 less top-1, of these two "
        f"kinds of crops.\n{folder}: chain.txt, chain.json, chain.png",
        flush=True,
    )


if __name__ == "__main__":
    exit_on_user_error(main)
