"""The loop of a run: epochs of steps, a validation after each, checkpoints, metrics, and an orderly stop."""

import json
import math
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from data.convert import ConvertedSet
from data.loader import open_loader
from data.progress import images_bar
from data.sources import CropRule
from kernels.normalise import Normalisation
from train import TrainError, checkpoint
from train.config import Config, OptimizerConfig, command_to_continue
from train.evaluate import Scores, score, validation_loader
from train.labels import LabelSource
from train.step import CROPS, LOSS, TOP1, TOP5, Step

# How often the sums are read from the device (which waits for it), and saved within a long epoch.
_SECONDS_BETWEEN_LOOKS = 2.0
_SECONDS_BETWEEN_SAVES = 600.0


class Interrupted(Exception):
    """The user stopped the run; its checkpoint is written. The message says how to continue."""


@dataclass
class Job:
    """All that a run needs, checked and resolved.

    config: what was asked for, with resolution, crop and precision filled in. rule: the crops, resolution included.
    network: the student as it starts. identity: all that decides the weights the run ends with.
    """

    config: Config
    folder: Path
    data: ConvertedSet
    rule: CropRule
    network: nn.Module
    normalisation: Normalisation
    labels: LabelSource
    identity: dict[str, Any]
    device: torch.device
    autocast: torch.dtype | None
    compiled: bool


@dataclass
class Progress:
    """Where a run stands: epochs done, steps done in the present one, seconds spent, the best validation so far.

    train_seconds and waited_seconds (for data) are of the present epoch, seconds of the whole run with its validation.
    """

    epoch: int = 0
    step: int = 0
    train_seconds: float = 0.0
    waited_seconds: float = 0.0
    seconds: float = 0.0
    best_top1: float = 0.0


class Trainer:
    """Trains a job's network in its folder, continuing from the checkpoint there.

    decoder: the name of the decoder at work. run() leaves result.json.
    """

    def __init__(self, job: Job):
        self.job = job
        config = job.config
        self.student = job.network.to(job.device).to(memory_format=torch.channels_last)
        self.lr = config.optimizer.lr * config.batch / config.optimizer.lr_batch
        self.optimizer = _optimizer(config.optimizer, self.student.parameters(), self.lr)
        labels = job.labels.to(job.device).to(memory_format=torch.channels_last)
        self.step = Step(
            self.student,
            labels,
            self.optimizer,
            job.normalisation,
            device=job.device,
            autocast=job.autocast,
            compiled=job.compiled,
        )
        loading: dict[str, Any] = {"decoder": config.decoder, "device": job.device, "threads": config.threads}
        self.loader = open_loader(
            job.data.beton("train"),
            resolution=job.rule.resolution,
            batch_size=config.batch,
            seed=config.seed,
            copies=config.copies,
            order=config.order,
            scale=job.rule.scale,
            ratio=job.rule.ratio,
            flip=job.rule.flip,
            fetch=labels.fetch,
            **loading,
        )
        self.validation = validation_loader(job.data, rule=job.rule, batch=config.batch, **loading)
        self.decoder = self.loader.decoder
        self.progress = Progress()

    def run(self) -> dict[str, Any]:
        """Trains to the last epoch and returns the result.

        Raises Interrupted after Ctrl-C or SIGTERM, and TrainError for a loss that is not finite or a full disk.
        """
        folder, config = self.job.folder, self.job.config
        if (folder / "last.pt").is_file():
            self._restore()
            if self.progress.epoch < config.epochs:
                print(
                    f"continuing in epoch {self.progress.epoch + 1} of {config.epochs}, "
                    f"after step {self.progress.step} of {self.loader.steps}",
                    flush=True,
                )
        self._open_folder()
        with (
            _stop_on_signal() as stop,
            SummaryWriter(str(folder / "tensorboard"), purge_step=self.progress.epoch) as board,
        ):
            while self.progress.epoch < config.epochs:
                sums = self._train_epoch(stop)
                started = time.perf_counter()
                scores = score(
                    self.student,
                    self.validation,
                    self.job.normalisation,
                    device=self.job.device,
                    autocast=self.job.autocast,
                )
                self._end_epoch(sums, scores, board, seconds=time.perf_counter() - started)
                if stop.requested and self.progress.epoch < config.epochs:
                    raise self._interrupted()
        return self._result()

    def _train_epoch(self, stop: "_Stop") -> list[float]:
        """The steps of the present epoch that are still to be done; returns the epoch's sums (see Step)."""
        config, progress, loader = self.job.config, self.progress, self.loader
        name = f"epoch {progress.epoch + 1}/{config.epochs}"
        done, total = progress.step * config.batch, loader.steps * config.batch
        with images_bar(total, name, done=done) as bar:
            batches = loader.epoch(progress.epoch, progress.step)
            mark = looked = saved = time.perf_counter()
            while (batch := next(batches, None)) is not None:
                progress.waited_seconds += time.perf_counter() - mark
                factor = config.schedule.factor(progress.epoch + progress.step / loader.steps, config.epochs)
                for group in self.optimizer.param_groups:
                    group["lr"] = self.lr * factor
                self.step(batch)
                progress.step += 1
                bar.update(len(batch.labels))
                now = time.perf_counter()
                progress.train_seconds += now - mark
                mark = now
                if stop.requested or now - saved > _SECONDS_BETWEEN_SAVES:
                    self._finite_sums()
                    self._save("last.pt")
                    saved = time.perf_counter()
                if stop.requested:
                    raise self._interrupted()
                if now - looked > _SECONDS_BETWEEN_LOOKS:
                    sums = self._finite_sums()
                    bar.set_postfix_str(
                        f"loss {sums[LOSS] / sums[CROPS]:.3f}, top-1 {100 * sums[TOP1] / sums[CROPS]:.1f} %",
                        refresh=False,
                    )
                    looked = time.perf_counter()
            # Reading the sums waits for the device, which belongs to the epoch's time.
            sums = self._finite_sums()
            progress.train_seconds += time.perf_counter() - mark
        return sums

    def _finite_sums(self) -> list[float]:
        sums = self.step.sums.tolist()
        if not math.isfinite(sums[LOSS]):
            rate = self.optimizer.param_groups[0]["lr"]
            raise TrainError(
                f"the loss is no longer finite in epoch {self.progress.epoch + 1}, by step {self.progress.step}, at "
                f"learning rate {rate:.4g}; try a smaller --optimizer.lr (the checkpoint before it is kept)"
            )
        return sums

    def _end_epoch(self, sums: list[float], scores: Scores, board: SummaryWriter, *, seconds: float) -> None:
        progress = self.progress
        crops = sums[CROPS]
        metrics = {
            "epoch": progress.epoch + 1,
            "loss": sums[LOSS] / crops,
            "train_top1": 100 * sums[TOP1] / crops,
            "train_top5": 100 * sums[TOP5] / crops,
            "top1": scores.top1,
            "top5": scores.top5,
            "images_per_second_per_device": crops / progress.train_seconds,
            "waiting": progress.waited_seconds / progress.train_seconds,
            "lr": self.optimizer.param_groups[0]["lr"],
        }
        tqdm.write(
            f"epoch {metrics['epoch']}/{self.job.config.epochs}: loss {metrics['loss']:.3f}, "
            f"train top-1 {metrics['train_top1']:.1f} %; validation top-1 {scores.top1:.2f} %, "
            f"top-5 {scores.top5:.2f} %; {metrics['images_per_second_per_device']:.0f} images/s, "
            f"{100 * metrics['waiting']:.0f} % waiting for data"
        )
        _append(self.job.folder / "metrics.jsonl", json.dumps(metrics))
        for name, value in metrics.items():
            board.add_scalar(name, value, progress.epoch + 1)
        best = scores.top1 >= progress.best_top1
        self.progress = progress = Progress(
            epoch=progress.epoch + 1,
            seconds=progress.seconds + progress.train_seconds + seconds,
            best_top1=max(progress.best_top1, scores.top1),
        )
        self.step.sums.zero_()
        self._save("last.pt")
        if best:
            self._save("best.pt")

    def _result(self) -> dict[str, Any]:
        lines = [json.loads(line) for line in (self.job.folder / "metrics.jsonl").read_text().splitlines()]
        rates = sorted(line["images_per_second_per_device"] for line in lines)
        return {
            "top1": lines[-1]["top1"],
            "top5": lines[-1]["top5"],
            "best_top1": self.progress.best_top1,
            "epochs": self.job.config.epochs,
            "images_per_second_per_device": rates[len(rates) // 2],
            "seconds": self.progress.seconds,
        }

    def _open_folder(self) -> None:
        """Writes what identifies the run, and drops the metrics of epochs that will be done again."""
        folder = self.job.folder
        try:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "identity.json").write_text(json.dumps(self.job.identity, indent=1) + "\n")
            plain = json.loads(json.dumps(asdict(self.job.config)))
            (folder / "config.yaml").write_text(yaml.safe_dump(plain, sort_keys=False))
            metrics = folder / "metrics.jsonl"
            lines = metrics.read_text().splitlines(keepends=True) if metrics.is_file() else []
            metrics.write_text("".join(lines[: self.progress.epoch]))
        except OSError as error:
            raise TrainError(f"{folder}: the run cannot be written there ({error.strerror})") from None

    def _save(self, name: str) -> None:
        job = self.job
        mean, std = job.normalisation
        checkpoint.save(
            job.folder / name,
            {
                "model": self.student.state_dict(),
                "network": {
                    "name": job.config.model,
                    "num_classes": len(job.data.class_names),
                    "class_names": list(job.data.class_names),
                    "resolution": job.rule.resolution,
                    "center_ratio": job.rule.center_ratio,
                    "mean": list(mean),
                    "std": list(std),
                },
                "optimizer": self.optimizer.state_dict(),
                "generators": checkpoint.generator_states(job.device),
                "sums": self.step.sums.cpu(),
                "progress": asdict(self.progress),
            },
        )

    def _restore(self) -> None:
        state = checkpoint.load(self.job.folder / "last.pt")
        self.student.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        checkpoint.restore_generators(state["generators"], self.job.device)
        self.step.sums.copy_(state["sums"])
        self.progress = Progress(**state["progress"])

    def _interrupted(self) -> Interrupted:
        return Interrupted(
            f"stopped in epoch {self.progress.epoch + 1} of {self.job.config.epochs}, after step {self.progress.step} "
            f"of {self.loader.steps}; to continue, type again:\n  {command_to_continue()}"
        )


@dataclass
class _Stop:
    requested: bool = False


@contextmanager
def _stop_on_signal() -> Iterator[_Stop]:
    """Turns Ctrl-C and SIGTERM into a request that the loop heeds after the present step; a second one ends at once."""
    stop = _Stop()

    def request(number: int, frame: Any) -> None:
        if stop.requested:
            raise KeyboardInterrupt
        stop.requested = True
        tqdm.write("stopping after this step ...")

    before = {number: signal.signal(number, request) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _optimizer(config: OptimizerConfig, weights: Iterator[nn.Parameter], lr: float) -> torch.optim.Optimizer:
    if config.kind == "adamw":
        return torch.optim.AdamW(weights, lr=lr, weight_decay=config.weight_decay, fused=True)
    return torch.optim.SGD(
        weights,
        lr=lr,
        momentum=config.momentum,
        nesterov=config.nesterov,
        weight_decay=config.weight_decay,
        fused=True,
    )


def _append(path: Path, line: str) -> None:
    try:
        with open(path, "a") as file:
            file.write(line + "\n")
    except OSError as error:
        raise TrainError(f"{path}: cannot be written ({error.strerror})") from None
