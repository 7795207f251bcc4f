"""A table of all runs.

python -m train.runs
make runs
"""

from pathlib import Path

from command import run_command
from train import TrainError
from train.runs import all_runs, progress_of, table_text

_HEADS = ("data", "model", "refinery", "px", "epochs", "seed", "top-1", "top-5", "images/s", "minutes", "state", "run")


def table(folder: str = "runs", figure: str | None = None) -> None:
    """Prints a table of all runs in a folder and below.

    Args:
        folder: where runs lie
        figure: a file (.svg, .png, .pdf) to draw accuracy against milliseconds a crop in, of all finished runs, whose
            networks are timed for it on this machine's CPU
    """
    if figure:
        # Loaded here: the table needs no PyTorch.
        from train.runs.figure import check_figure, draw

        check_figure(Path(figure))
    root = Path(folder)
    if not root.is_dir():
        raise TrainError(f"{folder}: no such folder; no run has been made here yet")
    rows: list[tuple[str, ...]] = [_HEADS]
    runs = list(all_runs(root))
    for run in runs:
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
    print(table_text(rows), end="", flush=True)
    if figure:
        draw([run for run in runs if run.result], Path(figure))
        print(f"written to {figure}")


if __name__ == "__main__":
    run_command(table, prog="python -m train.runs")
