"""The tables of the Label Refinery and ReLabel papers, made again on any set of images and at any size.

python -m train.tables --data imagenette2-160 --tables 1,4
make tables DATA=imagenette2-160 TABLES=1,4

Every row is a run, or one per seed: what is finished is not repeated, and what was stopped goes on.
"""

import json
import shlex
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from command import exit_on_user_error
from train import TrainError
from train.config import Config, configure, option_words, parse_both
from train.evaluate import evaluate, find_images
from train.job import check
from train.label import LabelOptions, label
from train.maps import MapsOptions, make_maps
from train.runs import Run, key_of, table_text
from train.train import train

_TITLES = {
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
}
# The rows of networks that label for others, which belong to no table of their own.
_REFINERIES = "refineries"
# Options that rows set.
_OF_ROWS = (
    *("model", "seed", "labels.per", "labels.taxonomy", "labels.stored", "labels.cycle", "loss.kind", "jitter"),
    *("augment.cutmix", "augment.refinery_sees"),
)
# From the one that says most of the method on.
_USUAL_ORDER = "1,4,2,3,6,7,5"


@dataclass(frozen=True)
class TablesOptions:
    """Options of the tables.

    Args:
        tables: which, with commas between them (default: Label Refinery's 1,4,2,3,6,7 and, with taxonomy, 5); ReLabel's
            are relabel-networks and relabel-labels; stored, which is in no paper, compares labels from files with the
            refinery's own
        seeds: runs a row, of seeds 0, 1, ...; refineries are trained once
        student: the student of most rows
        students: those of Table 2 and of relabel-networks, and those that learn together from one folder of stored
            labels
        refineries: those of Table 6
        refinery_epochs: for refineries (default: as all others)
        taxonomy: WordNet's is-a relation, "parent child" lines, for Table 5
        map_resolution: of the label maps, as python -m train.maps takes it
        v2: ImageNetV2's class folders, on which the runs of relabel-labels are scored too
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
        """By its column's name: what train.evaluate is asked for, besides the checkpoint. data: the set of the runs."""
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
    """What the tables are made with. config: what holds for every run. refinery: the one of most rows."""

    config: Config
    options: TablesOptions
    refinery: str = "resnet18"

    def command(self, tables: Sequence[str]) -> str:
        """What to type for these tables, files by their names alone."""
        options = self.options
        own = {
            "data": self.config.data,
            "tables": ",".join(tables),
            "seeds": options.seeds,
            "student": options.student,
            "refinery": self.refinery,
            "refinery-epochs": options.refinery_epochs,
            "students": options.students if {"2", "stored", "relabel-networks"} & set(tables) else None,
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


@dataclass
class Row:
    """A row of a table: its runs, one per seed, and the options in which it differs from the others.

    on_sets: of each run its accuracy on further sets, in percent, where the table has some.
    In the options, the name of a row in brackets stands for the folder of its run of the same seed, or of its only one.
    """

    table: str
    name: str
    options: str
    runs: list[Run] = field(default_factory=list)
    on_sets: list[dict[str, float | None]] = field(default_factory=list)

    def of_seed(self, seed: int) -> Run:
        return self.runs[seed % len(self.runs)]


class Tables:
    """Makes rows, run by run, and calls `show(rows)` after each."""

    def __init__(self, setting: Setting, show: Callable[[list[Row]], None]):
        self.rows: list[Row] = []
        self._setting = setting
        self._show = show

    def make(self, table: str) -> None:
        """Adds the rows of one of _TITLES' tables."""
        getattr(self, f"_table_{table.replace('-', '_')}")()

    def _table_1(self) -> None:
        student = self._setting.options.student
        before: Row | None = None
        for generation in (1, 2, 3):
            before = self._row("1", f"generation {generation}", student, refinery=before)
        longer = {"epochs": 3 * self._setting.config.replace({"model": student}).epochs}
        self._row("1", "generation 1, as long as all three", student, longer, seeds=1)

    def _table_2(self) -> None:
        names, refinery = self._setting.options.students.split(), self._refinery()
        for name in names:
            self._row("2", f"{name}, ground truth", name, seeds=1)
        # The refinery labels each crop once for all that can train together.
        config = self._setting.config.learning_from(str(refinery.of_seed(0).folder))
        refined = train(config.replace({"model": " ".join(names), "seed": 0}))
        for name, run in zip(names, refined, strict=True):
            self._add(Row("2", f"{name}, refined", _words({"model": name, "refinery": f"[{refinery.name}]"})), run)

    def _table_3(self) -> None:
        student, refinery = self._setting.options.student, self._refinery()
        start = self._row("3", "refined", student, refinery=refinery)
        self._row("3", "trained on", student, refinery=refinery, pretrained=start)
        self._row("3", "trained on with jitter", student, {"jitter": 1}, refinery=refinery, pretrained=start)

    def _table_4(self) -> None:
        self._row("4", "no refinery", self._setting.options.student)
        self._refined("4", "soft static", {"labels.per": "image"})
        self._refined("4", "hard dynamic", {"loss.kind": "hard"})
        self._refined("4", "soft dynamic")

    def _table_5(self) -> None:
        student, taxonomy = self._setting.options.student, self._setting.options.taxonomy
        self._row("5", "no refinery", student)
        self._row("5", "taxonomy categories", student, {"labels.taxonomy": taxonomy})
        self._refined("5", "visually refined categories", {"labels.per": "category", "labels.bn": "running"})
        self._refined("5", "visually refined images", {"labels.per": "image", "labels.bn": "running"})

    def _table_6(self) -> None:
        self._row("6", "no refinery", self._setting.options.student)
        for name in self._setting.options.refineries.split():
            self._row("6", name, self._setting.options.student, refinery=self._refinery(name))

    def _table_7(self) -> None:
        self._row("7", "no refinery", self._setting.options.student)
        self._refined("7", "L2", {"loss.kind": "l2"})
        self._refined("7", "KL from output to label", {"loss.kind": "reversed"})
        self._refined("7", "KL from label to output")

    def _table_relabel_networks(self) -> None:
        maps = self._maps()
        for name in self._setting.options.students.split():
            self._row("relabel-networks", f"{name}, ground truth", name)
            self._row("relabel-networks", f"{name}, maps", name, maps)
            self._row("relabel-networks", f"{name}, maps, CutMix", name, maps | self._cutmix)

    def _table_relabel_labels(self) -> None:
        table, student = "relabel-labels", self._setting.options.student
        self._row(table, "ground truth", student)
        self._row(table, "label smoothing", student, {"labels.smoothing": 0.1})
        self._refined(table, "label cleaning", {"labels.per": "image", "loss.kind": "hard"})
        self._row(table, "maps", student, self._maps())
        self._row(table, "maps, CutMix", student, self._maps() | self._cutmix)
        self._refined(table, "refinery", {})
        self._refined(table, "refinery, CutMix", self._cutmix)

    @property
    def _cutmix(self) -> dict[str, Any]:
        """In what rows with CutMix differ: as in the paper in the optimizer too, where all else is the paper's."""
        if self._setting.config.recipe == "relabel":
            return {"recipe": "relabel-cutmix"}
        return {"augment.cutmix": 1, "augment.unmixed": 1 / 60}

    def _maps(self) -> dict[str, Any]:
        """The option that takes the label maps of the refinery, which are made where they are missing."""
        refinery = self._refinery().of_seed(0).folder
        options = MapsOptions(self._setting.options.map_resolution)
        config = self._setting.config.replace({"model": self._setting.options.student})
        key = key_of(config.given | {"map_resolution": options.map_resolution})
        out = refinery.with_name(f"{refinery.name}-maps-{key}")
        make_maps(config.replace({"refinery": str(refinery), "out": str(out)}), options)
        return {"labels.stored": str(out)}

    def _table_stored(self) -> None:
        student = self._setting.options.student
        self._row("stored", "no refinery", student)
        self._refined("stored", "refinery")
        epochs = self._setting.config.replace({"model": student}).epochs
        top10 = LabelOptions(k=10)
        for name, options in {"exact": LabelOptions("exact"), "top 10": top10, "top 5": LabelOptions(k=5)}.items():
            self._from_stored(name, self._store(options, epochs))
        names, store, few = self._setting.options.students.split(), self._store(top10, epochs), max(epochs // 4, 1)
        self._from_stored(f"top 10 of {few} epochs, again and again", store, {"labels.cycle": few})
        config = self._setting.config.on_ground_truth().replace({"labels.stored": str(store), "seed": 0})
        for name, run in zip(names, train(config.replace({"model": " ".join(names)})), strict=True):
            self._add(
                Row("stored", f"{name}, with the others", _words({"model": name, "labels.stored": str(store)})), run
            )

    def _store(self, options: LabelOptions, epochs: int) -> Path:
        """The folder of the refinery's labels of the crops of seed 0, which are made where they are missing."""
        refinery = self._refinery().of_seed(0).folder
        config = self._setting.config.replace({"model": self._setting.options.student, "epochs": epochs, "seed": 0})
        kind = options.format if options.k is None else f"top{options.k}"
        out = refinery.with_name(f"{refinery.name}-labels-{kind}-of-{epochs}-{key_of(config.given)}")
        label(config.replace({"refinery": str(refinery), "out": str(out)}), options)
        return out

    def _from_stored(self, name: str, store: Path, options: Mapping[str, Any] = {}) -> None:
        self._row("stored", name, self._setting.options.student, {"labels.stored": str(store), **options})

    def _refinery(self, name: str | None = None) -> Row:
        """The row of a network that labels for others; trained once, with seed 0, for the students of all seeds."""
        name = name or self._setting.refinery
        for row in self.rows:
            if (row.table, row.name) == (_REFINERIES, f"refinery {name}"):
                return row
        epochs = self._setting.options.refinery_epochs
        options = {"epochs": epochs} if epochs else {}
        row = Row(_REFINERIES, f"refinery {name}", _words({"model": name, **options}))
        (run,) = train(self._setting.config.as_refinery(name, options | {"seed": 0}))
        self._add(row, run)
        return row

    def _refined(self, table: str, name: str, options: Mapping[str, Any] = {}) -> None:
        self._row(table, name, self._setting.options.student, options, refinery=self._refinery())

    def _row(
        self,
        table: str,
        name: str,
        model: str,
        options: Mapping[str, Any] = {},
        *,
        refinery: Row | None = None,
        pretrained: Row | None = None,
        seeds: int | None = None,
    ) -> Row:
        """A row of one run per seed. refinery, pretrained: the rows whose runs label, whose weights it starts from."""
        described = {"model": model}
        described |= {"refinery": f"[{refinery.name}]"} if refinery else {}
        described |= {"pretrained": f"[{pretrained.name}]/last.pt"} if pretrained else {}
        row = Row(table, name, _words(described | dict(options)))
        for seed in range(seeds or self._setting.options.seeds):
            config = self._setting.config
            config = config.learning_from(str(refinery.of_seed(seed).folder)) if refinery else config.on_ground_truth()
            changes = {"model": model, "seed": seed, **options}
            changes |= {"pretrained": str(pretrained.of_seed(seed).weights)} if pretrained else {}
            self._add(row, *train(config.replace(changes)))
        return row

    def _add(self, row: Row, run: Run) -> None:
        if not row.runs:
            self.rows.append(row)
        row.runs.append(run)
        if row.table == "relabel-labels":
            row.on_sets.append(self._on_sets(run))
        self._show(self.rows)

    def _on_sets(self, run: Run) -> dict[str, float | None]:
        """A run's accuracy on the further sets, in percent; None where none of their labels is of its classes."""
        found = {}
        for name, asked in self._setting.options.sets(self._setting.config.data).items():
            path = run.folder / f"evaluation-{name}-{key_of(asked)}.json"
            if not path.is_file():
                config = self._setting.config
                evaluate(str(run.folder), out=str(path), device=config.device, threads=config.threads, **asked)
            scores = json.loads(path.read_text())
            found[name] = scores["top1"] if name == "V2" else scores[name.lower().replace("-", "_")]["percent"]
        return found


def _words(options: Mapping[str, Any]) -> str:
    return " ".join(_plain(option_words(options)))


def _plain(words: Sequence[str]) -> list[str]:
    """Files by their names alone: where they lie is another machine's matter. A row's name stays as it is."""
    return [Path(word).name if "/" in word and not word.startswith("[") else word for word in words]


def _result(run: Run) -> dict[str, Any]:
    assert run.result is not None
    return run.result


def markdown(rows: Sequence[Row], setting: Setting, tables: Sequence[str]) -> str:
    """All rows so far: mean over seeds, and the standard deviation where there are several."""
    common = shlex.join(_plain(option_words(setting.config.given)))
    text = (
        f"Made by `{setting.command(tables)}`.\n\n"
        f"Every run: `python -m train {common}` with the row's options and `--seed` 0, 1, ...; a row's name in "
        "brackets stands for the folder of its run of the same seed. Refineries are trained once, with seed 0 and the "
        "recipe's options for refineries, and label for the students of all seeds. Accuracies are of the last epoch, "
        "one central crop, in percent: the mean over the seeds, and ± their standard deviation. Train top-1: random "
        "crops over the last epoch. Students of Table 2 that trained together share a rate and minutes.\n"
    )
    for table, title in ({_REFINERIES: "Refineries"} | _TITLES).items():
        mine = [row for row in rows if row.table == table]
        if mine:
            text += f"\n## {title}\n\n"
            sets = list(mine[0].on_sets[0]) if mine[0].on_sets else []
            heads = ["row", "options", "top-1", "±", "top-5", *sets, "train top-1", "seeds", "images/s", "minutes"]
            text += f"| {' | '.join(heads)} |\n|---|---|" + "---:|" * (len(heads) - 2) + "\n"
            for row in mine:
                results = [_result(run) for run in row.runs]
                top1 = [result["top1"] for result in results]
                spread = f"{statistics.stdev(top1):.2f}" if len(top1) > 1 else ""
                text += (
                    f"| {row.name} | `{row.options}` | {statistics.mean(top1):.2f} | {spread} | "
                    f"{statistics.mean(result['top5'] for result in results):.2f} | "
                    + "".join(f"{_mean([scores[name] for scores in row.on_sets])} | " for name in sets)
                    + f"{statistics.mean(run.metrics[-1]['train_top1'] for run in row.runs):.2f} | {len(row.runs)} | "
                    f"{statistics.median(result['images_per_second_per_device'] for result in results):.0f} | "
                    f"{statistics.mean(result['seconds'] for result in results) / 60:.1f} |\n"
                )
    return text


def _mean(values: Sequence[float | None]) -> str:
    """Of percents; – where there are none."""
    known = [value for value in values if value is not None]
    return f"{statistics.mean(known):.2f}" if known else "–"


def main() -> None:
    about = (
        "Makes the tables of the Label Refinery and ReLabel papers again, run by run; what is finished is not "
        "repeated. --refinery (default: resnet18) names the network that labels for most rows, --out the file to write "
        "(default: runs/tables-1-4-....md). All other options of python -m train hold for every run."
    )

    config, own = parse_both(sys.argv[1:], TablesOptions, prog="python -m train.tables", about=about)
    given = dict(config.given)
    refinery, out = given.pop("refinery", None), given.pop("out", None)
    wanted = (own.tables or _USUAL_ORDER).split(",")
    if not (own.tables or own.taxonomy):
        print("table 5 is left out: it needs --taxonomy, a file of WordNet's is-a relation")
        wanted.remove("5")
    setting = Setting(configure(given), own, refinery or Setting.refinery)
    make_tables(wanted, setting, Path(out or f"runs/tables-{'-'.join(wanted)}.md"))


def make_tables(wanted: Sequence[str], setting: Setting, out: Path) -> list[Row]:
    """Makes the tables in this order; `out` holds all rows so far after every run. Raises as train.train.train."""
    unknown = [table for table in wanted if table not in _TITLES]
    if unknown:
        raise TrainError(f"tables={unknown[0]}: unknown; there are {', '.join(_TITLES)}")
    options = setting.options
    if options.seeds < 1:
        raise TrainError(f"seeds={options.seeds}: must be at least 1")
    if "5" in wanted and not options.taxonomy:
        raise TrainError("table 5 needs --taxonomy, a file of WordNet's is-a relation")
    for asked in options.sets(setting.config.data).values():
        if "relabel-labels" not in wanted:
            raise TrainError(
                "v2, real, multi_label: are columns of the table relabel-labels; name it or leave them out"
            )
        find_images(asked["data"], asked.get("split", "val"), asked.get("real"), asked.get("multi_label"))

    given = [option for option in _OF_ROWS if option in setting.config.given]
    if given:
        raise TrainError(f"{', '.join(given)}: is what rows of the tables differ in; leave it out")
    # By its name, so that rows with `pretrained` do not switch to the recipe fine-tune.
    setting = replace(setting, config=setting.config.replace({"recipe": setting.config.recipe}))
    networks = dict.fromkeys(
        [options.student, setting.refinery, *options.students.split(), *options.refineries.split()]
    )
    taxonomy = {"labels.taxonomy": options.taxonomy} if "5" in wanted else {}
    plain = setting.config.on_ground_truth()
    refined = setting.config.learning_from(setting.refinery).replace({"model": options.student})
    check([*(plain.replace({"model": network} | taxonomy) for network in networks), refined])

    def write(rows: list[Row]) -> None:
        try:
            out.parent.mkdir(parents=True, exist_ok=True)
            out.write_text(markdown(rows, setting, wanted))
        except OSError as error:
            raise TrainError(f"{out}: cannot be written ({error.strerror})") from None

    tables = Tables(setting, write)
    for table in wanted:
        tables.make(table)
    rows = [("table", "row", "top-1", "seeds")]
    for row in tables.rows:
        top1 = statistics.mean(_result(run)["top1"] for run in row.runs)
        rows.append((row.table, row.name, f"{top1:.2f}", str(len(row.runs))))
    print(table_text(rows))
    print(f"written: {out}", flush=True)
    return tables.rows


if __name__ == "__main__":
    exit_on_user_error(main)
