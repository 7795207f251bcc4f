"""Which runs make the rows of each table, and what these need first."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

from train.distributed import group
from train.evaluate import evaluate
from train.label import LabelOptions, label
from train.labels.refinery import RefineryOptions
from train.maps import MapsOptions, make_maps
from train.runs import Run, key_of
from train.tables.text import REFINERIES, Row, Score, Setting, words_of
from train.train import train


class Tables:
    """Makes rows, run by run, and calls `show(rows)` after each."""

    def __init__(self, setting: Setting, show: Callable[[list[Row]], None]):
        self.rows: list[Row] = []
        self._setting = setting
        self._show = show

    def make(self, table: str) -> None:
        """Adds the rows of one of TITLES' tables."""
        getattr(self, f"_table_{table.replace('-', '_')}")()

    def _table_1(self) -> None:
        student = self._setting.options.student
        before: Row | None = None
        for generation in (1, 2, 3):
            before = self._row("1", f"generation {generation}", student, refinery=before)
        longer = {"epochs": 3 * self._setting.config.replace({"model": student}).epochs}
        self._row("1", "generation 1, as long as all three", student, longer, seeds=1)

    def _table_2(self) -> None:
        students = self._students("2", self._setting.options.students.split())
        for seed in range(self._setting.options.seeds):
            students(seed)

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

    def _table_length(self) -> None:
        """The refinery's students, together; then runs that explain their gain; then the other seeds of the first."""
        table, student = "length", self._setting.options.student
        students = self._students(table, list(dict.fromkeys([student, *self._setting.options.students.split()])))
        refinery = self._refinery()
        epochs = self._setting.config.replace({"model": student}).epochs
        students(0)
        self._row(table, f"{student}, ground truth, 4 times as long", student, {"epochs": 4 * epochs}, seeds=1)
        before = next(row for row in self.rows if (row.table, row.name) == (table, f"{student}, ground truth"))
        for generation in (2, 3):
            before = self._row(table, f"{student}, generation {generation}", student, refinery=before, seeds=1)
        for name, options in {"soft static": {"labels.per": "image"}, "hard dynamic": {"loss.kind": "hard"}}.items():
            self._row(table, f"{student}, {name}", student, options, refinery=refinery, seeds=1)
        maps = self._maps()
        self._row(table, f"{student}, maps", student, maps, seeds=1)
        self._row(table, f"{student}, maps, CutMix", student, maps | self._cutmix, seeds=1)
        stored = {"labels.stored": str(self._store(LabelOptions(k=10), epochs))}
        self._row(table, f"{student}, stored labels, top 10", student, stored, seeds=1)
        for seed in range(1, self._setting.options.seeds):
            students(seed)

    def _students(self, table: str, names: Sequence[str]) -> Callable[[int], None]:
        """Adds rows for each network, refined and from ground truth, one run per call with a seed."""
        refinery = self._refinery()
        learning = self._setting.config.learning_from(str(refinery.of_seed(0).folder))
        refined = [Row(table, f"{name}, refined", _refined_by(name, refinery)) for name in names]
        truth = [Row(table, f"{name}, ground truth", words_of({"model": name})) for name in names]

        def students(seed: int) -> None:
            # The refinery labels each crop once for all students, which train together.
            together = train(learning.replace({"model": " ".join(names), "seed": seed}))
            for row, run in zip(refined, together, strict=True):
                self._add(row, run)
            for row, name in zip(truth, names, strict=True):
                config = self._setting.config.on_ground_truth()
                self._add(row, *train(config.replace({"model": name, "seed": seed})))

        return students

    @property
    def _cutmix(self) -> dict[str, Any]:
        """The options of rows with CutMix: also the paper's optimizer, if all else is as in the paper."""
        if self._setting.config.recipe == "relabel":
            return {"recipe": "relabel-cutmix"}
        return {"augment.cutmix": 1, "augment.unmixed": 0.0167}

    def _maps(self) -> dict[str, Any]:
        """The option for the label maps of the refinery, which are made if they are missing."""
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
                Row("stored", f"{name}, with the others", words_of({"model": name, "labels.stored": str(store)})), run
            )

    def _table_statistics(self) -> None:
        self._row("statistics", "no refinery", self._setting.options.student)
        for bn in get_args(RefineryOptions.__annotations__["bn"]):
            self._refined("statistics", bn, {"labels.bn": bn})

    def _store(self, options: LabelOptions, epochs: int) -> Path:
        """The folder of the refinery's labels of the crops of seed 0, which are made if they are missing."""
        refinery = self._refinery().of_seed(0).folder
        config = self._setting.config.replace({"model": self._setting.options.student, "epochs": epochs, "seed": 0})
        kind = options.format if options.k is None else f"top{options.k}"
        out = refinery.with_name(f"{refinery.name}-labels-{kind}-of-{epochs}-{key_of(config.given)}")
        label(config.replace({"refinery": str(refinery), "out": str(out)}), options)
        return out

    def _from_stored(self, name: str, store: Path, options: Mapping[str, Any] = {}) -> None:
        self._row("stored", name, self._setting.options.student, {"labels.stored": str(store), **options})

    def _refinery(self, name: str | None = None) -> Row:
        """The row of a refinery; trained once, with seed 0, for the students of all seeds."""
        name = name or self._setting.refinery
        for row in self.rows:
            if (row.table, row.name) == (REFINERIES, f"refinery {name}"):
                return row
        epochs = self._setting.options.refinery_epochs
        options = {"epochs": epochs} if epochs else {}
        row = Row(REFINERIES, f"refinery {name}", words_of({"model": name, **options}))
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
        """A row of one run per seed. refinery, pretrained: the rows of its refinery and of its first weights."""
        described = {"model": model}
        described |= {"refinery": f"[{refinery.name}]"} if refinery else {}
        described |= {"pretrained": f"[{pretrained.name}]/last.pt"} if pretrained else {}
        row = Row(table, name, words_of(described | dict(options)))
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

    def _scores(self, path: Path, run: Run, asked: Mapping[str, Any]) -> dict[str, Any]:
        if not path.is_file():
            config = self._setting.config
            evaluate(str(run.folder), out=str(path), device=config.device, threads=config.threads, **asked)
        return json.loads(path.read_text())

    def _on_sets(self, run: Run) -> dict[str, Score]:
        """A run's accuracy on the further sets."""
        found = {}
        for name, asked in self._setting.options.sets(self._setting.config.data).items():
            path = run.folder / f"evaluation-{name}-{key_of(asked)}.json"
            scores = group().in_turn(lambda: self._scores(path, run, asked))  # noqa: B023
            if name == "V2":
                found[name] = Score(scores["top1"], scores["images"])
            else:
                own = scores[name.lower().replace("-", "_")]
                found[name] = Score(own["percent"], own["images"])
        return found


def _refined_by(name: str, refinery: Row) -> str:
    """The options of a network that learns from the run of a row."""
    return words_of({"model": name, "refinery": f"[{refinery.name}]"})
