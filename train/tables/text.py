"""The contents of the tables: their options and rows, and how they are written."""

import math
import shlex
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from train.config import Config, option_words
from train.runs import Run
from train.tables.record import files_behind, machines_of, made_with

TITLES = {
    "1": "Table 1, self-refinement: each generation learns from the one before",
    "2": "Table 2, students of one refinery",
    "3": "Table 3, adversarial jitter, from the refined student on",
    "4": "Table 4, what a label is of and whether it is soft",
    "5": "Table 5, labels by category and by image, the refinery's statistics frozen",
    "6": "Table 6, refineries",
    "7": "Table 7, losses",
    "relabel-networks": "ReLabel, networks from ground truth and from label maps, with CutMix",
    "relabel-labels": "ReLabel, kinds of labels, with and without CutMix",
    "stored": "Stored labels, of one refinery for students of all seeds",
    "statistics": "The refinery's batch normalisation: by the batch, by a few batches' average, by its own training",
    "length": "Main results of both papers, for long runs, the most important first",
}
# The rows of refineries, which do not belong to a table.
REFINERIES = "refineries"


@dataclass(frozen=True)
class TablesOptions:
    """Options of the tables.

    Args:
        tables: which, with commas between them (default: Label Refinery's 1,4,2,3,6,7 and, with taxonomy, 5); ReLabel's
            are relabel-networks and relabel-labels; not from a paper are stored, labels from files beside the
            refinery's own, and statistics, cheaper batch normalisations of the refinery; length has the main results of
            both papers, for long runs on a GPU
        seeds: runs per row, of seeds 0, 1, ...; refineries are trained once
        student: the student of most rows
        students: those of Table 2, of relabel-networks and of length, and those that train together on one folder of
            stored labels
        refineries: those of Table 6
        refinery_epochs: for refineries (default: as for all others)
        taxonomy: WordNet's is-a relation, "parent child" lines, for Table 5
        map_resolution: of the label maps, as in python -m train.maps
        v2: ImageNetV2's class folders, on which the runs of relabel-labels are also scored
        real: real.json, for their ReaL accuracy
        multi_label: human_accuracy_v3.0.0.json, for their multi-label accuracy
    """

    tables: str | None = None
    seeds: int = 3
    student: str = "mobilenet0.25"
    students: str = "mobilenet0.25 mobilenet0.5 mobilenet resnet18 darknet19"
    refineries: str = "mobilenet0.5 darknet19 resnet18"
    refinery_epochs: int | None = None
    taxonomy: str | None = None
    map_resolution: int | None = None
    v2: str | None = None
    real: str | None = None
    multi_label: str | None = None

    def sets(self, data: str) -> dict[str, dict[str, Any]]:
        """The arguments of train.evaluate besides the checkpoint, by column name. data: the set of the runs."""
        sets: dict[str, dict[str, Any]] = {}
        if self.v2:
            sets["V2"] = {"data": self.v2, "split": "all"}
        if self.real:
            sets["ReaL"] = {"data": data, "real": self.real}
        if self.multi_label:
            sets["multi-label"] = {"data": data, "multi_label": self.multi_label}
        return sets


@dataclass(frozen=True)
class Setting:
    """How the tables are made. config: the options of every run. refinery: the one of most rows."""

    config: Config
    options: TablesOptions
    refinery: str = "resnet18"

    def command(self, tables: Sequence[str]) -> str:
        """The command for these tables, with file names without their folders."""
        options = self.options
        own = {
            "data": self.config.data,
            "tables": ",".join(tables),
            "seeds": options.seeds,
            "student": options.student,
            "refinery": self.refinery,
            "refinery-epochs": options.refinery_epochs,
            "students": options.students if {"2", "stored", "relabel-networks", "length"} & set(tables) else None,
            "refineries": options.refineries if "6" in tables else None,
            "taxonomy": options.taxonomy if "5" in tables else None,
            "map-resolution": options.map_resolution,
            "v2": options.v2,
            "real": options.real,
            "multi-label": options.multi_label,
        }
        given = {name: value for name, value in own.items() if value}
        common = {name: value for name, value in self.config.given.items() if name != "data"}
        return f"python -m train.tables {shlex.join(_plain(option_words(given | common)))}"


@dataclass(frozen=True)
class Score:
    """A run's accuracy on a further set: percent, None if none of its labels is of the run's classes; images."""

    percent: float | None
    images: int


@dataclass
class Row:
    """A row of a table: its runs, one per seed, and the options in which it differs from the others.

    on_sets: each run's accuracy on further sets, if the table has any. In the options, a row's name in brackets means
    the folder of its run of the same seed, or of its only one.
    """

    table: str
    name: str
    options: str
    runs: list[Run] = field(default_factory=list)
    on_sets: list[dict[str, Score]] = field(default_factory=list)

    def of_seed(self, seed: int) -> Run:
        return self.runs[seed % len(self.runs)]


def words_of(options: Mapping[str, Any]) -> str:
    return " ".join(_plain(option_words(options)))


def _plain(words: Sequence[str]) -> list[str]:
    """File names without their folders, which differ between machines. A row's name is not changed."""
    return [Path(word).name if "/" in word and not word.startswith("[") else word for word in words]


def result_of(run: Run) -> dict[str, Any]:
    assert run.result is not None
    return run.result


def markdown(rows: Sequence[Row], setting: Setting, tables: Sequence[str]) -> str:
    """All rows so far: mean over seeds, and the standard deviation if there are several."""
    common = shlex.join(_plain(option_words(setting.config.given)))
    text = (
        f"Made by `{setting.command(tables)}`.\n\n"
        f"Every run: `python -m train {common}` with the row's options and `--seed` 0, 1, ...; a row's name in "
        "brackets stands for the folder of its run of the same seed. Refineries are trained once, with seed 0 and the "
        "recipe's options for refineries, and label for the students of all seeds. Accuracies are of the last epoch, "
        "one central crop, in percent: the mean over the seeds, and ± their standard deviation. s.e.: the standard "
        "error of a single run's top-1, since the images are a sample: the root of p (1 - p) / images. Train top-1: "
        "random crops over the last epoch. Students of Table 2 that trained together share a rate and minutes.\n"
    )
    text += "".join(f"\n{line}\n" for line in made_with([run for row in rows for run in row.runs]))
    for table, title in ({REFINERIES: "Refineries"} | TITLES).items():
        mine = [row for row in rows if row.table == table]
        if mine:
            text += f"\n## {title}\n\n"
            sets = list(mine[0].on_sets[0]) if mine[0].on_sets else []
            heads = [
                "row",
                "options",
                "top-1",
                "±",
                "s.e.",
                "top-5",
                *sets,
                "train top-1",
                "seeds",
                "images/s",
                "minutes",
            ]
            text += f"| {' | '.join(heads)} |\n|---|---|" + "---:|" * (len(heads) - 2) + "\n"
            for row in mine:
                results = [result_of(run) for run in row.runs]
                top1 = [result["top1"] for result in results]
                spread = f"{statistics.stdev(top1):.2f}" if len(top1) > 1 else ""
                text += (
                    f"| {row.name} | `{row.options}` | {statistics.mean(top1):.2f} | {spread} | {_error(row.runs)} | "
                    f"{statistics.mean(result['top5'] for result in results):.2f} | "
                    + "".join(f"{_score([scores[name] for scores in row.on_sets])} | " for name in sets)
                    + f"{statistics.mean(run.metrics[-1]['train_top1'] for run in row.runs):.2f} | {len(row.runs)} | "
                    f"{statistics.median(result['images_per_second_per_device'] for result in results):.0f} | "
                    f"{statistics.mean(result['seconds'] for result in results) / 60:.1f} |\n"
                )
    return text


def as_json(rows: Sequence[Row]) -> dict[str, Any]:
    """All rows so far with every run's result, and how the runs were made."""
    runs = [run for row in rows for run in row.runs]
    return {
        "machines": machines_of(runs),
        "files": files_behind(runs),
        "rows": [
            {
                "table": row.table,
                "name": row.name,
                "options": row.options,
                "runs": [
                    {"run": run.folder.name, "seed": run.identity["seed"], "last_epoch": run.metrics[-1]}
                    | {"result": result_of(run)}
                    for run in row.runs
                ],
                "on_sets": [{name: asdict(score) for name, score in scores.items()} for scores in row.on_sets],
            }
            for row in rows
        ],
    }


def standard_error(percent: float, images: int) -> float:
    """The standard error, in points, of a percentage that was counted on this many images."""
    return math.sqrt(percent * (100 - percent) / images)


def _error(runs: Sequence[Run]) -> str:
    """Of a single run's top-1; – for runs of earlier versions, which do not record the number of validation images."""
    images = runs[0].metrics[-1].get("val_images")
    return f"{standard_error(statistics.mean(result_of(run)['top1'] for run in runs), images):.2f}" if images else "–"


def _score(scores: Sequence[Score]) -> str:
    """The mean, with the standard error of a single run; – if no image was scored."""
    known = [score.percent for score in scores if score.percent is not None]
    if not known:
        return "–"
    return f"{statistics.mean(known):.2f} (s.e. {standard_error(statistics.mean(known), scores[0].images):.2f})"
