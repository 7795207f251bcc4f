"""The tables of the Label Refinery paper, made anew on any set of images and at any size.

python -m train.tables --data imagenette2-160 --tables 1,4
make tables DATA=imagenette2-160 TABLES=1,4

Every row is a run, or one a seed: what is finished is not repeated, and what was stopped goes on.
"""

import argparse
import shlex
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from train import TrainError
from train.config import parse
from train.job import ON_GROUND_TRUTH, check, end_in_one_line, train
from train.runs import Run, table_text

_TITLES = {
    "1": "Table 1, self-refinement: each generation learns from the one before",
    "2": "Table 2, students of one refinery",
    "3": "Table 3, adversarial jitter, from the refined student on",
    "4": "Table 4, what a label is of and whether it is soft",
    "5": "Table 5, labels by category and by image, the refinery's statistics frozen",
    "6": "Table 6, refineries",
    "7": "Table 7, losses",
}
# The rows of networks that label for others, which belong to no table of their own.
_REFINERIES = "refineries"
# From the one that says most of the method on.
_USUAL_ORDER = "1,4,2,3,6,7,5"


@dataclass
class Setting:
    """What the tables are made with.

    data: as for train. words: options of train that hold for every run. seeds: how many, from 0. student, refinery: the
    networks of most rows. students: those of Table 2. refineries: those of Table 6. refinery_epochs: epochs of
    refineries, where they train longer than students. taxonomy: WordNet's is-a relation, for Table 5.
    """

    data: str
    words: list[str]
    seeds: int
    student: str
    refinery: str
    students: list[str]
    refineries: list[str]
    refinery_epochs: int | None = None
    taxonomy: str | None = None

    def command(self, tables: Sequence[str]) -> str:
        """What to type for these tables, files by their names alone."""
        options = {
            "data": self.data,
            "tables": ",".join(tables),
            "seeds": self.seeds,
            "student": self.student,
            "refinery": self.refinery,
            "refinery-epochs": self.refinery_epochs,
            "students": " ".join(self.students) if "2" in tables else None,
            "refineries": " ".join(self.refineries) if "6" in tables else None,
            "taxonomy": self.taxonomy if "5" in tables else None,
        }
        given = [word for name, value in options.items() if value for word in (f"--{name}", str(value))]
        return f"python -m train.tables {shlex.join(_plain([*given, *self.words]))}"


@dataclass
class Row:
    """A row of a table: its runs, one a seed, and the options that tell it from the others.

    In the options, the name of a row in brackets stands for the folder of its run of the same seed, or of its only one.
    """

    table: str
    name: str
    options: str
    runs: list[Run] = field(default_factory=list)

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
        getattr(self, f"_table{table}")()

    def _table1(self) -> None:
        student = self._setting.student
        before: Row | None = None
        for generation in (1, 2, 3):
            before = self._row("1", f"generation {generation}", student, refinery=before)
        longer = 3 * parse(["--data", self._setting.data, *self._setting.words, "--model", student]).epochs
        self._row("1", "generation 1, as long as all three", student, "--epochs", str(longer), seeds=1)

    def _table2(self) -> None:
        names, refinery = self._setting.students, self._refinery()
        for name in names:
            self._row("2", f"{name}, ground truth", name, seeds=1)
        # The refinery labels each crop once for all that can train together.
        refined = self._train(" ".join(names), ["--refinery", str(refinery.of_seed(0).folder), "--seed", "0"])
        for name, run in zip(names, refined, strict=True):
            self._add(Row("2", f"{name}, refined", _options(name, "--refinery", f"[{refinery.name}]")), run)

    def _table3(self) -> None:
        student, refinery = self._setting.student, self._refinery()
        start = self._row("3", "refined", student, refinery=refinery)
        for name, jitter in (("trained on", ()), ("trained on with jitter", ("--jitter", "1"))):
            self._row("3", name, student, *jitter, refinery=refinery, pretrained=start)

    def _table4(self) -> None:
        self._row("4", "no refinery", self._setting.student)
        self._refined("4", "soft static", "--labels.per", "image")
        self._refined("4", "hard dynamic", "--loss.kind", "hard")
        self._refined("4", "soft dynamic")

    def _table5(self) -> None:
        assert self._setting.taxonomy  # make_tables has seen to it
        self._row("5", "no refinery", self._setting.student)
        self._row("5", "taxonomy categories", self._setting.student, "--labels.taxonomy", self._setting.taxonomy)
        frozen = ("--labels.bn", "running")
        self._refined("5", "visually refined categories", *frozen, "--labels.per", "category")
        self._refined("5", "visually refined images", *frozen, "--labels.per", "image")

    def _table6(self) -> None:
        self._row("6", "no refinery", self._setting.student)
        for name in self._setting.refineries:
            self._row("6", name, self._setting.student, refinery=self._refinery(name))

    def _table7(self) -> None:
        self._row("7", "no refinery", self._setting.student)
        self._refined("7", "L2", "--loss.kind", "l2")
        self._refined("7", "KL from output to label", "--loss.kind", "reversed")
        self._refined("7", "KL from label to output")

    def _refinery(self, name: str | None = None) -> Row:
        name = name or self._setting.refinery
        for row in self.rows:
            if (row.table, row.name) == (_REFINERIES, f"refinery {name}"):
                return row
        epochs = self._setting.refinery_epochs
        words = ("--epochs", str(epochs)) if epochs else ()
        return self._row(_REFINERIES, f"refinery {name}", name, *words, seeds=1)

    def _refined(self, table: str, name: str, *options: str) -> None:
        self._row(table, name, self._setting.student, *options, refinery=self._refinery())

    def _row(
        self,
        table: str,
        name: str,
        model: str,
        *options: str,
        refinery: Row | None = None,
        pretrained: Row | None = None,
        seeds: int | None = None,
    ) -> Row:
        """A row of a run a seed. refinery, pretrained: the rows whose runs label, and whose weights it starts from."""
        described = ["--refinery", f"[{refinery.name}]"] if refinery else []
        described += ["--pretrained", f"[{pretrained.name}]/last.pt"] if pretrained else []
        row = Row(table, name, _options(model, *described, *options))
        for seed in range(seeds or self._setting.seeds):
            words = ["--seed", str(seed), *options]
            words += ["--refinery", str(refinery.of_seed(seed).folder)] if refinery else []
            words += ["--pretrained", str(pretrained.of_seed(seed).weights)] if pretrained else []
            self._add(row, *self._train(model, words))
        return row

    def _add(self, row: Row, run: Run) -> None:
        if not row.runs:
            self.rows.append(row)
        row.runs.append(run)
        self._show(self.rows)

    def _train(self, model: str, words: Sequence[str]) -> list[Run]:
        arguments = ["--data", self._setting.data, *self._setting.words, "--model", model, *words]
        return train(parse(arguments), arguments)


def _options(model: str, *words: str) -> str:
    return " ".join(["--model", model, *_plain(words)])


def _plain(words: Sequence[str]) -> list[str]:
    """Files by their names alone: where they lie is another machine's matter. A row's name stays as it is."""
    return [Path(word).name if "/" in word and not word.startswith("[") else word for word in words]


def _result(run: Run) -> dict[str, Any]:
    assert run.result is not None
    return run.result


def markdown(rows: Sequence[Row], setting: Setting, tables: Sequence[str]) -> str:
    """All rows so far: mean over seeds, and the standard deviation where there are several."""
    words = shlex.join(["--data", Path(setting.data).name, *_plain(setting.words)])
    text = (
        f"Made by `{setting.command(tables)}`.\n\n"
        f"Every run: `python -m train {words}` with the row's options and `--seed` 0, 1, ...; a row's name in brackets "
        "stands for the folder of its run of the same seed. Accuracies are of the last epoch, one central crop, in "
        "percent: the mean over the seeds, and ± their standard deviation. Train top-1: random crops over the last "
        "epoch. Students of Table 2 that trained together share a rate and minutes.\n"
    )
    for table, title in ({_REFINERIES: "Refineries"} | _TITLES).items():
        mine = [row for row in rows if row.table == table]
        if mine:
            text += f"\n## {title}\n\n"
            text += "| row | options | top-1 | ± | top-5 | train top-1 | seeds | images/s | minutes |\n"
            text += "|---|---|" + "---:|" * 7 + "\n"
            for row in mine:
                results = [_result(run) for run in row.runs]
                top1 = [result["top1"] for result in results]
                spread = f"{statistics.stdev(top1):.2f}" if len(top1) > 1 else ""
                text += (
                    f"| {row.name} | `{row.options}` | {statistics.mean(top1):.2f} | {spread} | "
                    f"{statistics.mean(result['top5'] for result in results):.2f} | "
                    f"{statistics.mean(run.metrics[-1]['train_top1'] for run in row.runs):.2f} | {len(row.runs)} | "
                    f"{statistics.median(result['images_per_second_per_device'] for result in results):.0f} | "
                    f"{statistics.mean(result['seconds'] for result in results) / 60:.1f} |\n"
                )
    return text


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m train.tables",
        description="Makes tables of the Label Refinery paper anew. What is finished is not repeated.",
        epilog="All other options are those of python -m train (--help lists them) and hold for every run.",
        allow_abbrev=False,
    )
    parser.add_argument("--data", default="scenes", help="as for train (default: scenes)")
    parser.add_argument(
        "--tables", metavar="1,4,...", help="which, with commas between them (default: all; 5 only with --taxonomy)"
    )
    parser.add_argument("--seeds", type=int, default=3, help="runs a row (default: 3)")
    parser.add_argument("--student", default="mobilenet0.25", help="the student of most rows (default: mobilenet0.25)")
    parser.add_argument("--refinery", default="resnet18", help="its refinery (default: resnet18)")
    parser.add_argument(
        "--students", default="mobilenet0.25 mobilenet0.5 mobilenet resnet18 darknet19", help="those of Table 2"
    )
    parser.add_argument("--refineries", default="mobilenet0.5 darknet19 resnet18", help="those of Table 6")
    parser.add_argument("--refinery-epochs", type=int, metavar="N", help="for refineries (default: as all others)")
    parser.add_argument("--taxonomy", metavar="FILE", help='WordNet\'s is-a relation, "parent child" lines (Table 5)')
    parser.add_argument("--out", metavar="FILE", help="the file to write (default: runs/tables-1-4-....md)")
    options, words = parser.parse_known_args()
    wanted = (options.tables or _USUAL_ORDER).split(",")
    if not (options.tables or options.taxonomy):
        print("table 5 is left out: it needs --taxonomy, a file of WordNet's is-a relation")
        wanted.remove("5")
    out = options.out or f"runs/tables-{'-'.join(wanted)}.md"
    setting = Setting(
        data=options.data,
        words=words,
        seeds=options.seeds,
        student=options.student,
        refinery=options.refinery,
        students=options.students.split(),
        refineries=options.refineries.split(),
        refinery_epochs=options.refinery_epochs,
        taxonomy=options.taxonomy,
    )
    end_in_one_line(lambda: make_tables(wanted, setting, Path(out)))


def make_tables(wanted: Sequence[str], setting: Setting, out: Path) -> list[Row]:
    """Makes the tables in this order; `out` holds all rows so far after every run. Raises as train.job.train."""
    unknown = [table for table in wanted if table not in _TITLES]
    if unknown:
        raise TrainError(f"tables={unknown[0]}: unknown; there are {', '.join(_TITLES)}")
    if setting.seeds < 1:
        raise TrainError(f"seeds={setting.seeds}: must be at least 1")
    if "5" in wanted and not setting.taxonomy:
        raise TrainError("table 5 needs --taxonomy, a file of WordNet's is-a relation")

    # By name, because rows that start from trained weights would else have another recipe than those beside them.
    if not any(word.split("=")[0] == "--recipe" for word in setting.words):
        recipe = parse(["--data", setting.data, *setting.words]).recipe
        setting = replace(setting, words=["--recipe", str(recipe), *setting.words])
    networks = dict.fromkeys([setting.student, setting.refinery, *setting.students, *setting.refineries])
    words = ["--data", setting.data, *setting.words, *ON_GROUND_TRUTH]
    words += ["--labels.taxonomy", setting.taxonomy] if setting.taxonomy and "5" in wanted else []
    check([parse([*words, "--model", network]) for network in networks])

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
    main()
