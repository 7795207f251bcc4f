"""What a run writes about itself while it trains: who it is, its metrics epoch by epoch, and what comes out."""

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from train import TrainError
from train.config import Config


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """A run's folder, made if it is not there, for one process at a time.

    Raises TrainError where another process trains in it, or where it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        place = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise TrainError(f"{folder}: the run cannot be written there ({error.strerror})") from None
    try:
        try:
            # Given back by the system when the process ends, however it does.
            fcntl.flock(place, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise TrainError(f"{folder}: another process is training this run; wait for it, or stop it") from None
        yield
    finally:
        os.close(place)


class Record:
    """What is in the folder of a run: identity.json, config.yaml, a line an epoch in metrics.jsonl, and tensorboard/.

    epochs: how many are done; what was written of later ones is dropped, because they will be done again.
    Raises TrainError where the folder cannot be written.
    """

    def __init__(self, folder: Path, config: Config, identity: dict[str, Any], *, epochs: int):
        self._config = config
        self._metrics = folder / "metrics.jsonl"
        try:
            (folder / "identity.json").write_text(json.dumps(identity, indent=1) + "\n")
            plain = json.loads(json.dumps(asdict(config)))
            (folder / "config.yaml").write_text(yaml.safe_dump(plain, sort_keys=False))
            lines = self._metrics.read_text().splitlines(keepends=True) if self._metrics.is_file() else []
            self._metrics.write_text("".join(lines[:epochs]))
        except OSError as error:
            raise TrainError(f"{folder}: the run cannot be written there ({error.strerror})") from None
        # Epochs are numbered from 1.
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=epochs + 1)

    def __enter__(self) -> "Record":
        return self

    def __exit__(self, *exception: object) -> None:
        self._board.close()

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
            with open(self._metrics, "a") as file:
                file.write(json.dumps(metrics) + "\n")
        except OSError as error:
            raise TrainError(f"{self._metrics}: cannot be written ({error.strerror})") from None
        for key, value in metrics.items():
            self._board.add_scalar(key, value, metrics["epoch"])

    def result(self, *, best: float, seconds: float) -> dict[str, Any]:
        """What the run came to: accuracies of its last epoch, the rate of its median one."""
        lines = [json.loads(line) for line in self._metrics.read_text().splitlines()]
        rates = sorted(line["images_per_second_per_device"] for line in lines)
        return {
            "top1": lines[-1]["top1"],
            "top5": lines[-1]["top5"],
            "best_top1": best,
            "epochs": self._config.epochs,
            "images_per_second_per_device": rates[len(rates) // 2],
            "seconds": seconds,
        }
