"""The files of a run: its identity, configuration and starts, metrics, checkpoints and result."""

import fcntl
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from PIL.Image import Image
from tqdm import tqdm

from data.durable import make_folder, reason, write_text
from train import TrainError
from train.config import Config, config_text
from train.runs import Run, checkpoint, json_lines, no_metrics, read_metrics
from train.runs.board import Board
from train.runs.code import training_code
from train.runs.environment import environment


class Record:
    """The folder of a run; as a context, it is locked for one process at a time.

    identity.json: everything that determines the final weights. config.yaml: the configuration, filled in.
    starts.jsonl: a line for each start, with what affects the last bits of the weights (device, decoder, ...) and, as
    `environment`, the machine, versions, commit, compiler and command; `code` is a digest of the training code.
    metrics.jsonl, tensorboard/: a line, and points, for each epoch. last.pt, last.before.pt, best.pt: checkpoints of
    the last step that was saved, of the save before, and of the epoch with the highest top-1; each holds identity and
    metrics too. result.json: the run's result. .lock: locked by the process that trains in it.

    Raises TrainError if the folder cannot be written, and on entering if another process trains in it.
    """

    def __init__(self, folder: Path, config: Config, identity: dict[str, Any]):
        self._folder, self._config = folder, config
        self._run = Run(folder, identity, result=None)
        self._open = ExitStack()
        # Lines of metrics.jsonl, and how many of them have been written.
        self._metrics: list[dict[str, Any]] = []
        self._written = 0

    def __enter__(self) -> "Record":
        self._open.enter_context(locked(self._folder))
        return self

    def __exit__(self, *exception: object) -> None:
        self._open.close()

    @property
    def has_checkpoint(self) -> bool:
        """Whether there is a checkpoint to continue from."""
        return self._run.weights.is_file()

    def saved(self) -> dict[str, Any] | None:
        """The last checkpoint, or None if there is none yet; if it is damaged, prints which one is used instead.

        Raises TrainError if all are damaged.
        """
        found = checkpoint.latest(self._folder)
        if not found:
            return None
        path, state = found
        if path != self._run.weights:
            print(f"warning: {self._run.weights}: is damaged or missing; continuing from {path}", flush=True)
            # So that it is neither read by others nor kept as the previous checkpoint.
            checkpoint.save(self._run.weights, state)
        # Checkpoints of earlier versions hold no metrics.
        if "metrics" in state:
            self._metrics = state["metrics"]
        else:
            self._metrics, damage = read_metrics(self._run.metrics_file)
            if damage:
                raise damage
        return state

    def begin(self, start: dict[str, Any], epochs: int, steps: int) -> list[str]:
        """Writes identity and configuration, and logs a start after some epochs and some steps of the next one.

        Metrics of later epochs are dropped, because these will be repeated. start: device, decoder and so on of this
        start. Returns its differences from the previous start, as phrases.
        """
        self._metrics = [line for line in self._metrics if line["epoch"] <= epochs]
        starts = self._folder / "starts.jsonl"
        before = json_lines(starts)
        self._write("identity.json", json.dumps(self._run.identity, indent=1) + "\n")
        self._write("config.yaml", config_text(self._config))
        made = environment("cpu" if start["device"] == "CPU" else "cuda") | {"code": training_code()}
        self._write("starts.jsonl", _lines([*before, {"epoch": epochs, "step": steps} | start | {"environment": made}]))
        self._write_metrics()
        # Epochs are numbered from 1.
        self._board = Board(self._folder / "tensorboard", epoch=epochs + 1)
        last = before[-1] if before else start
        return [
            f"{name} was {last.get(name)} and is {value}" for name, value in start.items() if value != last.get(name)
        ]

    def show(self, picture: Image) -> None:
        """Adds a picture of labelled crops to the plots."""
        self._board.add_crops(picture)

    def add(self, metrics: dict[str, Any], *, name: str | None) -> None:
        """Prints an epoch's metrics, which `save` then keeps. name: the network's, if several train together."""
        tqdm.write(
            (f"{name}, " if name else "")
            + f"epoch {metrics['epoch']}/{self._config.epochs}: loss {metrics['loss']:.3f}, "
            f"train top-1 {metrics['train_top1']:.1f} %; validation top-1 {metrics['top1']:.2f} %, "
            f"top-5 {metrics['top5']:.2f} %, loss {_shown(metrics['val_loss'])}; "
            f"{metrics['images_per_second_per_device']:.0f} images/s, {100 * metrics['waiting']:.0f} % waiting for data"
        )
        self._metrics.append(metrics)

    def save(self, state: dict[str, Any], *, best: bool = False) -> None:
        """Writes last.pt, and best.pt if this is the best so far; then metrics that are new.

        best.pt first: last.pt stores the highest top-1, so with the other order a stop between the two would leave an
        older best.pt forever. In this order the epoch is repeated, and both are written again.
        """
        state = state | {"identity": self._run.identity, "metrics": self._metrics}
        if best:
            checkpoint.save(self._folder / checkpoint.BEST, state)
        checkpoint.save(self._run.weights, state, keep=self._folder / checkpoint.BEFORE)
        new = self._metrics[self._written :]
        if new:
            self._write_metrics()
            for metrics in new:
                self._board.add(metrics)

    def result(self, *, best: float, seconds: float) -> dict[str, Any]:
        """The run's result: accuracies of its last epoch, the median rate of its epochs."""
        lines = self._metrics
        if not lines or lines[-1]["epoch"] != self._config.epochs:
            raise no_metrics(self._run.metrics_file, self._config.epochs)
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
        self._write("result.json", json.dumps(result, indent=1) + "\n")
        return replace(self._run, result=result)

    def _write_metrics(self) -> None:
        self._write(self._run.metrics_file.name, _lines(self._metrics))
        self._written = len(self._metrics)

    def _write(self, name: str, text: str) -> None:
        path = self._folder / name
        try:
            write_text(path, text)
        except OSError as error:
            kept = "; the last checkpoint is kept" if self.has_checkpoint else ""
            raise TrainError(f"{path}: cannot be written ({reason(error, path)}){kept}") from None


class Silent(Record):
    """The record of a process that is not the first of its group: it writes nothing."""

    def __enter__(self) -> "Record":
        return self

    def begin(self, start: dict[str, Any], epochs: int, steps: int) -> list[str]:
        return []

    def show(self, picture: Image) -> None:
        """Nothing."""

    def add(self, metrics: dict[str, Any], *, name: str | None) -> None:
        """Nothing."""

    def save(self, state: dict[str, Any], *, best: bool = False) -> None:
        """Nothing."""

    def saved(self) -> dict[str, Any] | None:
        return None

    def result(self, *, best: float, seconds: float) -> dict[str, Any]:
        return {}

    def finish(self, result: dict[str, Any]) -> Run:
        return replace(self._run, result=result)


def _shown(loss: float | None) -> str:
    return "not finite" if loss is None else f"{loss:.3f}"


def _lines(values: Sequence[dict[str, Any]]) -> str:
    return "".join(json.dumps(value) + "\n" for value in values)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """A run's folder, made if it does not exist, for one process at a time.

    Raises TrainError if another process trains in it, or if it cannot be made. Prints a notice if the file system does
    not support locks.
    """
    lock = folder / ".lock"
    try:
        make_folder(folder)
        # For writing, as network file systems require.
        opened = os.open(lock, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise TrainError(f"{folder}: the run cannot be written there ({reason(error, lock)})") from None
    try:
        try:
            # Released by the system however the process ends.
            fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            raise TrainError(f"{folder}: another process is training this run; wait for it, or stop it") from None
        except OSError as error:
            print(
                f"{folder}: cannot be locked there ({error.strerror}); see that no other process trains this run",
                flush=True,
            )
        yield
    finally:
        os.close(opened)
