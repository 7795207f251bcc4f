"""The tables of the Label Refinery and ReLabel papers, reproduced on any set of images and at any size.

python -m train.tables --data imagenette2-160 --tables 1,4
make tables DATA=imagenette2-160 TABLES=1,4

Every row is one run, or one per seed: finished runs are not repeated, and stopped ones continue.
"""

import json
import statistics
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from train import TrainError
from train.config import Config, configure, parse_both
from train.device import device_named
from train.distributed import group, joined
from train.job import check
from train.launch import on_devices
from train.runs import table_text
from train.runs.environment import environment
from train.score.images import find_images
from train.tables.rows import Tables
from train.tables.text import TITLES, Row, Setting, TablesOptions, as_json, markdown, result_of

# Options that rows set.
_OF_ROWS = (
    *("model", "seed", "labels.per", "labels.taxonomy", "labels.stored", "labels.cycle", "loss.kind", "jitter"),
    *("augment.cutmix", "augment.refinery_sees"),
)
# The most informative table about the method first.
_USUAL_ORDER = "1,4,2,3,6,7,5"


def main() -> None:
    about = (
        "Reproduces the tables of the Label Refinery and ReLabel papers, run by run; finished runs are not "
        "repeated. --refinery (default: resnet18) is the network that labels for most rows. "
        "All other options of python -m train apply to every run."
    )

    def parse(words: list[str]) -> tuple[Config, TablesOptions]:
        out = "the file of the tables, in .md; a .json is written beside it (default: runs/tables-1-4-....md)"
        return parse_both(words, TablesOptions, prog="python -m train.tables", about=about, out=out)

    def work(asked: tuple[Config, TablesOptions]) -> None:
        with joined(asked[0].device):
            _make_asked(*asked)

    on_devices(__package__, sys.argv[1:], parse, work)


def _make_asked(config: Config, own: TablesOptions) -> None:
    given = dict(config.given)
    refinery, out = given.pop("refinery", None), given.pop("out", None)
    wanted = (own.tables or _USUAL_ORDER).split(",")
    if not (own.tables or own.taxonomy):
        print("table 5 is left out: it needs --taxonomy, a file of WordNet's is-a relation")
        wanted.remove("5")
    setting = Setting(configure(given), own, refinery or Setting.refinery)
    make_tables(wanted, setting, Path(out or f"runs/tables-{'-'.join(wanted)}.md"))


def make_tables(wanted: Sequence[str], setting: Setting, out: Path) -> list[Row]:
    """Makes the tables in this order; after every run, `out` and the JSON beside it hold all rows so far.

    Raises as train.train.train does.
    """
    unknown = [table for table in wanted if table not in TITLES]
    if unknown:
        raise TrainError(f"tables={unknown[0]}: unknown; there are {', '.join(TITLES)}")
    if out.suffix == ".json":
        raise TrainError(f"OUT={out}: is a table in Markdown, beside which its .json is written; give a name in .md")
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

    found = environment(device_named(setting.config.device).type)

    def write(rows: list[Row]) -> None:
        if not group().first:
            return
        try:
            out.parent.mkdir(parents=True, exist_ok=True)
            out.write_text(markdown(rows, setting, wanted))
            described = {"part": "tables", "environment": found} | as_json(rows)
            out.with_suffix(".json").write_text(json.dumps(described, indent=1) + "\n")
        except OSError as error:
            raise TrainError(f"{out}: cannot be written ({error.strerror})") from None

    tables = Tables(setting, write)
    for table in wanted:
        tables.make(table)
    rows = [("table", "row", "top-1", "seeds")]
    for row in tables.rows:
        top1 = statistics.mean(result_of(run)["top1"] for run in row.runs)
        rows.append((row.table, row.name, f"{top1:.2f}", str(len(row.runs))))
    print(table_text(rows))
    print(f"written: {out}", flush=True)
    return tables.rows
