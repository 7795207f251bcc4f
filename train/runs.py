"""Run folders: their names, what is in them, and a table across them.

python -m train.runs
make runs
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.command import run_command
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
    def metrics(self) -> list[dict[str, Any]]:
        """What was measured after each epoch so far."""
        path = self.folder / "metrics.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


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
        return Run(folder, json.loads(path.read_text()), json.loads(result.read_text()) if result.is_file() else None)
    except (OSError, json.JSONDecodeError) as error:
        raise TrainError(f"{folder}: a damaged run ({error}); remove the folder to start again") from None


def all_runs(root: Path) -> Iterator[Run]:
    """Every run below root, in the order of their paths."""
    for path in sorted(root.rglob("identity.json")):
        run = read_run(path.parent)
        if run:
            yield run


def finished_refinery(root: Path, wanted: dict[str, Any]) -> Run | None:
    """A finished run that can be the refinery whose own training would have the identity `wanted`, or None.

    The very run if it is there, else the most accurate one of the same network on the same data, crops and
    resolution, trained on ground truth in any way (another seed, recipe or length, pre-trained or not).
    """
    same = ("data", "model", "resolution", "crop", "refinery")
    candidates = [
        run
        for run in all_runs(root)
        if run.result
        and all(run.identity[key] == wanted[key] for key in same)
        and not run.identity["labels"]["taxonomy"]
    ]
    for run in candidates:
        if run.identity == wanted:
            return run
    return max(candidates, key=lambda run: run.result["top1"] if run.result else 0.0, default=None)


def progress_of(run: Run) -> str:
    if run.result:
        return "finished"
    return f"epoch {len(run.metrics)} of {run.identity['epochs']}"


def table(folder: str = "runs") -> None:
    """Prints a table of all runs in a folder and below.

    Args:
        folder: where runs lie
    """
    root = Path(folder)
    if not root.is_dir():
        raise TrainError(f"{folder}: no such folder; no run has been made here yet")
    rows = [
        (
            "data",
            "model",
            "refinery",
            "px",
            "epochs",
            "seed",
            "top-1",
            "top-5",
            "images/s",
            "minutes",
            "state",
            "run",
        )
    ]
    for run in all_runs(root):
        identity, result = run.identity, run.result or {}
        refinery = identity["refinery"]
        rows.append(
            (
                identity["data"]["name"],
                identity["model"],
                refinery["network"] if refinery else "-",
                str(identity["resolution"]),
                str(identity["epochs"]),
                str(identity["seed"]),
                f"{result['top1']:.2f}" if result else "",
                f"{result['top5']:.2f}" if result else "",
                f"{result['images_per_second_per_device']:.0f}" if result else "",
                f"{result['seconds'] / 60:.1f}" if result else "",
                progress_of(run),
                str(run.folder),
            )
        )
    if len(rows) == 1:
        raise TrainError(f"{folder}: no runs in it yet")
    print(table_text(rows), end="")


def table_text(rows: Sequence[Sequence[str]]) -> str:
    """Rows of cells as lines with aligned columns."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    run_command(table, prog="python -m train.runs", errors=(TrainError,))
