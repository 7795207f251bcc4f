"""What a run keeps on disk: its folder's name, who it is, what came out, and how runs are found again."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from command import printable
from data.plan import seed_of_generation
from train import TrainError


@dataclass(frozen=True)
class Run:
    """A run folder. identity: all that decides the weights it ends with; result: of a finished run, else None."""

    folder: Path
    identity: dict[str, Any]
    result: dict[str, Any] | None

    @property
    def weights(self) -> Path:
        return self.folder / "last.pt"

    @property
    def crop_seed(self) -> int:
        """The seed that its training crops were drawn with (data.plan)."""
        # Of stored labels, the crops are those that were labelled.
        if "crop_seed" in self.identity["labels"]:
            return int(self.identity["labels"]["crop_seed"])
        # A run of an earlier version drew them with the user's seed itself.
        seed, generation = self.identity["seed"], self.identity.get("generation")
        return seed if generation is None else seed_of_generation(seed, generation)

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """What was measured after each epoch so far."""
        return json_lines(self.metrics_file)

    @property
    def metrics_file(self) -> Path:
        return self.folder / "metrics.jsonl"


def json_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a file of JSON, one value per line; none where there is no such file.

    A last line that a full disk or a kill has cut short is left out. Raises TrainError for other damage.
    """
    lines = path.read_text().splitlines() if path.is_file() else []
    values = []
    for number, line in enumerate(lines, 1):
        try:
            values.append(json.loads(line))
        except ValueError:
            if number < len(lines):
                raise TrainError(f"{path}:{number}: is damaged; remove the run's folder to start again") from None
    return values


def key_of(identity: Any) -> str:
    """Eight hex digits that name an identity, or anything else that JSON can hold."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:8]


def folder_name(identity: dict[str, Any]) -> str:
    """MODEL[-from-REFINERY]-KEY."""
    refinery = identity["refinery"]
    name = identity["model"] + (f"-from-{refinery['network']}" if refinery else "")
    return f"{name.replace(':', '-').replace('/', '-')}-{key_of(identity)}"


def read_run(folder: Path) -> Run | None:
    """The run in a folder, or None where there is none. Raises TrainError where its files are damaged."""
    path = folder / "identity.json"
    result = folder / "result.json"
    try:
        if not path.is_file():
            return None
        identity = _as_written_now(json.loads(path.read_text()))
        return Run(folder, identity, json.loads(result.read_text()) if result.is_file() else None)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise TrainError(f"{folder}: a damaged run ({error}); remove the folder to start again") from None


def _as_written_now(identity: dict[str, Any]) -> dict[str, Any]:
    """The identity of a run of an earlier version, which named no kind of labels, in the form of this one.

    It has no generation, and so never equals the identity of a new run, whose crops are others.
    """
    labels = {"per": "crop", "taxonomy": None} | identity["labels"]
    if "kind" not in labels:
        kind = "taxonomy" if labels["taxonomy"] else "refinery" if identity["refinery"] else "ground_truth"
        identity["labels"] = labels | {"kind": "category" if labels["per"] == "category" else kind}
        identity["crop"] = {name: value for name, value in identity["crop"].items() if name != "resolution"}
    return identity


def all_runs(root: Path) -> Iterator[Run]:
    """Every run below root, in the order of their paths."""
    for path in sorted(root.rglob("identity.json")):
        run = read_run(path.parent)
        if run:
            yield run


def finished_refinery(root: Path, wanted: dict[str, Any]) -> Run | None:
    """A finished run that can be the refinery whose own training would have the identity `wanted`, or None.

    The very run if it is there, else the most accurate one of the same network on the same data, crops and
    resolution, trained on the same kind of labels in any way (another seed, recipe or length, pre-trained or not).
    """
    same = ("data", "model", "resolution", "crop", "refinery")
    candidates = [
        run
        for run in all_runs(root)
        if run.result
        and all(run.identity[key] == wanted[key] for key in same)
        and run.identity["labels"]["kind"] == wanted["labels"]["kind"]
    ]
    for run in candidates:
        if run.identity == wanted:
            return run
    return max(candidates, key=lambda run: run.result["top1"] if run.result else 0.0, default=None)


def progress_of(run: Run) -> str:
    if run.result:
        return "finished"
    return f"epoch {len(run.metrics)} of {run.identity['epochs']}"


def table_text(rows: Sequence[Sequence[str]]) -> str:
    """Rows of cells as lines with aligned columns; names in them cannot act on a terminal."""
    rows = [[printable(cell) for cell in row] for row in rows]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join(lines) + "\n"
