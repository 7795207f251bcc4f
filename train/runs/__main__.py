"""A table of all runs.

python -m train.runs
make runs
"""

from pathlib import Path

from command import run_command
from train import TrainError
from train.runs import all_runs, progress_of, table_text

_HEADS = ("data", "model", "refinery", "px", "epochs", "seed", "top-1", "top-5", "images/s", "minutes", "state", "run")


def table(folder: str = "runs") -> None:
    """Prints a table of all runs in a folder and below.

    Args:
        folder: where runs lie
    """
    root = Path(folder)
    if not root.is_dir():
        raise TrainError(f"{folder}: no such folder; no run has been made here yet")
    rows: list[tuple[str, ...]] = [_HEADS]
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


if __name__ == "__main__":
    run_command(table, prog="python -m train.runs")
