"""What a run writes about itself: who it is, where and with what it ran, its metrics, checkpoints and result."""

import fcntl
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from train import TrainError
from train.config import Config, config_text
from train.runs import Run, checkpoint, json_lines


class Record:
    """The folder of a run, for one process at a time while it is entered as a context.

    identity.json: all that decides the weights the run ends with. config.yaml: the configuration, filled in.
    starts.jsonl: a line for each start, with what decides the last bits of the weights (device, decoder, ...).
    metrics.jsonl, tensorboard/: a line, and points, for each epoch. last.pt, best.pt: checkpoints of the last step that
    was saved and of the epoch with the highest top-1. result.json: the run's result.

    Raises TrainError where the folder cannot be written, and on entering where another process trains in it.
    """

    def __init__(self, folder: Path, config: Config, identity: dict[str, Any]):
        self._folder, self._config = folder, config
        self._run = Run(folder, identity, result=None)
        self._open = ExitStack()

    def __enter__(self) -> "Record":
        self._open.enter_context(locked(self._folder))
        return self

    def __exit__(self, *exception: object) -> None:
        self._open.close()

    def begin(self, start: dict[str, Any], epochs: int, steps: int) -> list[str]:
        """Writes identity and configuration, and logs a start after so many epochs and steps of the next one.

        Metrics of later epochs are dropped, because these will be repeated. start: device, decoder and so on of this
        start. Returns in what it differs from the start before, as phrases.
        """
        try:
            (self._folder / "identity.json").write_text(json.dumps(self._run.identity, indent=1) + "\n")
            (self._folder / "config.yaml").write_text(config_text(self._config))
            starts = self._folder / "starts.jsonl"
            before = json_lines(starts)
            # Written whole, so that a line that was cut short does not spoil the next one.
            _write_lines(self._run.metrics_file, self._run.metrics[:epochs])
            _write_lines(starts, [*before, {"epoch": epochs, "step": steps} | start])
        except OSError as error:
            raise TrainError(f"{self._folder}: the run cannot be written there ({error.strerror})") from None
        # Epochs are numbered from 1.
        self._board = SummaryWriter(str(self._folder / "tensorboard"), purge_step=epochs + 1)
        self._open.callback(self._board.close)
        last = before[-1] if before else start
        return [
            f"{name} was {last.get(name)} and is {value}" for name, value in start.items() if value != last.get(name)
        ]

    def write(self, metrics: dict[str, Any], *, name: str | None) -> None:
        """Keeps an epoch's metrics and prints them. name: the network's, where several train at once."""
        tqdm.write(
            (f"{name}, " if name else "")
            + f"epoch {metrics['epoch']}/{self._config.epochs}: loss {metrics['loss']:.3f}, "
            f"train top-1 {metrics['train_top1']:.1f} %; validation top-1 {metrics['top1']:.2f} %, "
            f"top-5 {metrics['top5']:.2f} %; {metrics['images_per_second_per_device']:.0f} images/s, "
            f"{100 * metrics['waiting']:.0f} % waiting for data"
        )
        try:
            with open(self._run.metrics_file, "a") as file:
                file.write(json.dumps(metrics) + "\n")
        except OSError as error:
            raise TrainError(f"{self._run.metrics_file}: cannot be written ({error.strerror})") from None
        for key, value in metrics.items():
            self._board.add_scalar(key, value, metrics["epoch"])

    def save(self, state: dict[str, Any], *, best: bool = False) -> None:
        """Writes last.pt, and best.pt if this is the best so far.

        best.pt first: last.pt stores the highest top-1, so a stop between the two in the other order would leave an
        older best.pt for good. In this order the epoch is repeated, and both are written again.
        """
        for name in ("best.pt", "last.pt") if best else ("last.pt",):
            checkpoint.save(self._folder / name, state)

    def saved(self) -> dict[str, Any] | None:
        """The last checkpoint, or None where there is none yet."""
        path = self._run.weights
        return checkpoint.load(path) if path.is_file() else None

    def result(self, *, best: float, seconds: float) -> dict[str, Any]:
        """The run's result: accuracies of its last epoch, the rate of its median one."""
        lines = self._run.metrics
        rates = sorted(line["images_per_second_per_device"] for line in lines)
        return {
            "top1": lines[-1]["top1"],
            "top5": lines[-1]["top5"],
            "best_top1": best,
            "epochs": self._config.epochs,
            "images_per_second_per_device": rates[len(rates) // 2],
            "seconds": seconds,
        }

    def finish(self, result: dict[str, Any]) -> Run:
        """Writes the result, with which the run is finished."""
        path = self._folder / "result.json"
        try:
            path.write_text(json.dumps(result, indent=1) + "\n")
        except OSError as error:
            raise TrainError(f"{path}: cannot be written ({error.strerror})") from None
        return replace(self._run, result=result)


class Silent(Record):
    """The record of a process that is not the first of its group: it writes and keeps nothing."""

    def __enter__(self) -> "Record":
        return self

    def begin(self, start: dict[str, Any], epochs: int, steps: int) -> list[str]:
        return []

    def write(self, metrics: dict[str, Any], *, name: str | None) -> None:
        """Nothing."""

    def save(self, state: dict[str, Any], *, best: bool = False) -> None:
        """Nothing."""

    def saved(self) -> dict[str, Any] | None:
        return None

    def result(self, *, best: float, seconds: float) -> dict[str, Any]:
        return {}

    def finish(self, result: dict[str, Any]) -> Run:
        return replace(self._run, result=result)


def _write_lines(path: Path, values: Sequence[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(value) + "\n" for value in values))


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """A run's folder, made if it is not there, for one process at a time.

    Raises TrainError where another process trains in it, or where it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        opened = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise TrainError(f"{folder}: the run cannot be written there ({error.strerror})") from None
    try:
        try:
            # Given back by the system when the process ends, however it does.
            fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise TrainError(f"{folder}: another process is training this run; wait for it, or stop it") from None
        yield
    finally:
        os.close(opened)
