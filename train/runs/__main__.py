"""A table of all runs.

python -m train.runs
make runs
"""

from pathlib import Path
from typing import Any

from command import run_command
from train import TrainError
from train.runs import all_runs, table_text
from train.runs.state import config_of, differences, is_failed_start, last_written, state_of

_HEADS = (
    *("data", "model", "refinery", "px", "epochs", "seed", "recipe", "top-1", "top-5", "images/s", "minutes"),
    *("written", "differs in", "state", "run"),
)
_DIFFERS = _HEADS.index("differs in")


def table(folder: str = "runs", figure: str | None = None) -> None:
    """Prints a table of all runs in a folder and below, except those that ended before their first checkpoint.

    "written" is the time of the result, or else of the last checkpoint. "differs in" lists the options in which a run
    differs from others with its data, network, refinery and recipe, except those that have their own columns.

    Args:
        folder: the folder of all runs
        figure: a file (.svg, .png, .pdf) for a plot of accuracy against milliseconds per crop of all finished runs,
            whose networks are timed on this machine's CPU
    """
    if figure:
        # Imported here: the table does not need PyTorch.
        from train.runs.figure import check_figure, draw

        check_figure(Path(figure))
    root = Path(folder)
    if not root.is_dir():
        raise TrainError(f"{folder}: no such folder; no run has been made here yet")
    found = list(all_runs(root))
    runs = [run for run in found if not is_failed_start(run)]
    failed = len(found) - len(runs)
    left_out = f"{failed} failed start{'s' * (failed > 1)} left out (make clean-runs lists them)" if failed else ""
    if not runs:
        raise TrainError(f"{folder}: no runs in it yet" + (f"; {left_out}" if left_out else ""))
    recipes = [_recipe(config_of(run)) for run in runs]
    rows: list[tuple[str, ...]] = [_HEADS]
    for run, recipe, differs in zip(runs, recipes, differences(runs, recipes), strict=True):
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
                recipe,
                f"{result['top1']:.2f}" if result else "",
                f"{result['top5']:.2f}" if result else "",
                f"{result['images_per_second_per_device']:.0f}" if result else "",
                f"{result['seconds'] / 60:.1f}" if result else "",
                last_written(run),
                differs,
                state_of(run),
                str(run.folder),
            )
        )
    if not any(row[_DIFFERS] for row in rows[1:]):
        rows = [row[:_DIFFERS] + row[_DIFFERS + 1 :] for row in rows]
    print(table_text(rows), end="", flush=True)
    if left_out:
        print(left_out, flush=True)
    if figure:
        draw([run for run in runs if run.result], Path(figure))
        print(f"written to {figure}")


def _recipe(config: dict[str, Any]) -> str:
    """A recipe as it was named, a file without its folder."""
    return Path(str(config.get("recipe") or "-")).name


if __name__ == "__main__":
    run_command(table, prog="python -m train.runs")
