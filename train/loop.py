"""The loop of a run, or of several at once: epochs of steps, a validation after each, checkpoints and metrics."""

import math
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from data.convert import ConvertedSet
from data.loader import CropBatch, Loader, open_loader
from data.progress import images_bar
from data.sources import CropRule
from kernels.normalise import Normalisation
from train import TrainError, checkpoint
from train.config import Config, OptimizerConfig, command_to_continue, growing_resolution
from train.device import autocast_type, prepare
from train.evaluate import Scores, score, validation_loader
from train.interrupt import Interrupted, Stop, stop_on_signal
from train.labels import LabelSource
from train.record import Record, held
from train.step import CROPS, LOSS, TOP1, TOP5, Step, Student, is_out_of_memory

# How often the sums are read from the device (which waits for it), and saved within a long epoch.
_SECONDS_BETWEEN_LOOKS = 2.0
_SECONDS_BETWEEN_SAVES = 600.0


@dataclass
class Job:
    """One student's run, checked and resolved.

    config: what was asked for, with resolution, crop and precision filled in. network: the student as it starts.
    identity: all that decides the weights the run ends with.
    """

    config: Config
    folder: Path
    network: nn.Module
    normalisation: Normalisation
    identity: dict[str, Any]

    @property
    def checkpoint(self) -> Path:
        return self.folder / "last.pt"


@dataclass
class Progress:
    """Where a run stands: epochs done, steps done in the present one, seconds spent.

    train_seconds and waited_seconds (for data) are of the present epoch, seconds of the whole run with its validation.
    """

    epoch: int = 0
    step: int = 0
    train_seconds: float = 0.0
    waited_seconds: float = 0.0
    seconds: float = 0.0


class Trainer:
    """Trains the networks of some jobs, each in its folder, continuing from the checkpoints there.

    The jobs share crops and labels, and differ in network, optimizer and schedule alone; their checkpoints are of the
    same step. labels: says what crops show. compiled: the step runs as one compiled graph.
    decoder: the name of the decoder at work. run() leaves metrics and checkpoints.
    """

    def __init__(
        self,
        jobs: Sequence[Job],
        data: ConvertedSet,
        rule: CropRule,
        labels: LabelSource,
        *,
        device: torch.device,
        compiled: bool,
    ):
        self.jobs = jobs
        self.data = data
        self.rule = rule
        self.device = device
        self.compiled = compiled
        self.config = config = jobs[0].config
        self._autocast = autocast_type(config.precision)
        prepare(device, config.precision)
        self._rates = [job.config.optimizer.lr * config.batch / job.config.optimizer.lr_batch for job in jobs]
        students = [_student(job, lr, self._autocast, device) for job, lr in zip(jobs, self._rates, strict=True)]
        self.labels = labels.to(device).to(memory_format=torch.channels_last)
        self.step = Step(
            students,
            self.labels,
            loss=config.loss.kind,
            temperature=config.loss.temperature,
            jitter=config.jitter,
            device=device,
            autocast=self._autocast,
            compiled=compiled,
            strict=config.compile == "always",
            cuda_graphs=config.cuda_graphs,
        )
        # The networks that are scored and kept: weights averaged over steps, or the students' own.
        self._averages = [_average(student, config.ema) for student in students] if config.ema else []
        self._scored = [average.module for average in self._averages] or [student.network for student in students]
        self.loader = self._open_loader(rule.resolution)
        self._loaders = {rule.resolution: self.loader}
        self.validation = validation_loader(data, rule=rule, batch=config.batch, **self._loading)
        self.decoder = self.loader.decoder
        self.progress = Progress()
        self._best = [0.0] * len(jobs)
        self._stop = Stop()

    def run(self) -> list[dict[str, Any]]:
        """Trains to the last epoch and returns each job's result.

        Raises Interrupted after Ctrl-C or SIGTERM, and TrainError for a loss that is not finite, too little memory, a
        full disk, or a folder in which another process trains.
        """
        config = self.config
        with ExitStack() as stack:
            for job in self.jobs:
                stack.enter_context(held(job.folder))
            if self.jobs[0].checkpoint.is_file():
                self._restore()
                if self.progress.epoch < config.epochs:
                    print(
                        f"continuing in epoch {self.progress.epoch + 1} of {config.epochs}, "
                        f"after step {self.progress.step} of {self.loader.steps}",
                        flush=True,
                    )
            epochs = self.progress.epoch
            self._stop = stack.enter_context(stop_on_signal())
            records = [
                stack.enter_context(Record(job.folder, job.config, job.identity, epochs=epochs)) for job in self.jobs
            ]
            while self.progress.epoch < config.epochs:
                sums = self.train_epoch()
                started = time.perf_counter()
                scores = [
                    score(
                        network,
                        self.validation,
                        job.normalisation,
                        device=self.device,
                        autocast=self._autocast,
                    )
                    for job, network in zip(self.jobs, self._scored, strict=True)
                ]
                self._end_epoch(sums, scores, records, seconds=time.perf_counter() - started)
                if self._stop.requested and self.progress.epoch < config.epochs:
                    raise self._interrupted()
        seconds = self.progress.seconds
        return [record.result(best=best, seconds=seconds) for record, best in zip(records, self._best, strict=True)]

    @property
    def stopped(self) -> bool:
        """Whether the user asked for a stop, which the last epoch of a run outlives."""
        return self._stop.requested

    def train_epoch(self) -> list[list[float]]:
        """The steps of the present epoch that are still to be done; returns each student's sums (see Student).

        The epoch's seconds are in `progress`, which still stands in this epoch.
        """
        config, progress, loader = self.config, self.progress, self._loader_of(self.progress.epoch)
        name = f"epoch {progress.epoch + 1}/{config.epochs}"
        done, total = progress.step * config.batch, loader.steps * config.batch
        with images_bar(total, name, done=done) as bar:
            batches = loader.epoch(progress.epoch, progress.step)
            mark = looked = saved = time.perf_counter()
            while (batch := next(batches, None)) is not None:
                progress.waited_seconds += time.perf_counter() - mark
                self._set_rates(progress.epoch + progress.step / loader.steps)
                self._train_on(batch)
                progress.step += 1
                for average, student in zip(self._averages, self.step.students, strict=False):
                    average.update(student.network, step=progress.epoch * loader.steps + progress.step)
                bar.update(len(batch.labels))
                now = time.perf_counter()
                progress.train_seconds += now - mark
                mark = now
                if self._stop.requested or now - saved > _SECONDS_BETWEEN_SAVES:
                    self._finite_sums()
                    self._check_weights()
                    self._save("last.pt")
                    saved = time.perf_counter()
                if self._stop.requested:
                    raise self._interrupted()
                if now - looked > _SECONDS_BETWEEN_LOOKS:
                    sums = self._finite_sums()[0]
                    bar.set_postfix_str(
                        f"loss {sums[LOSS] / sums[CROPS]:.3f}, top-1 {100 * sums[TOP1] / sums[CROPS]:.1f} %",
                        refresh=False,
                    )
                    looked = time.perf_counter()
            # Reading the sums waits for the device, which belongs to the epoch's time.
            sums_of_all = self._finite_sums()
            progress.train_seconds += time.perf_counter() - mark
        self._check_weights()
        return sums_of_all

    def _open_loader(self, resolution: int) -> Loader:
        config, rule = self.config, self.rule
        return open_loader(
            self.data.beton("train"),
            resolution=resolution,
            batch_size=config.batch,
            seed=config.seed,
            copies=config.copies,
            order=config.order,
            scale=rule.scale,
            ratio=rule.ratio,
            flip=rule.flip,
            paired=self.labels.pairings,
            fetch=self.labels.fetch,
            **self._loading,
        )

    def _loader_of(self, epoch: int) -> Loader:
        config = self.config
        resolution = growing_resolution(epoch, config.epochs, config.resolution_from, self.rule.resolution)
        if resolution not in self._loaders:
            self._loaders[resolution] = self._open_loader(resolution)
        return self._loaders[resolution]

    @property
    def _loading(self) -> dict[str, Any]:
        return {"decoder": self.config.decoder, "device": self.device, "threads": self.config.threads}

    def _set_rates(self, epoch: float) -> None:
        for job, lr, student in zip(self.jobs, self._rates, self.step.students, strict=True):
            for group in student.optimizer.param_groups:
                group["lr"] = lr * job.config.schedule.factor(epoch, job.config.epochs)

    def _train_on(self, batch: CropBatch) -> None:
        try:
            self.step(batch)
            return
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
        # Here, the failed step's tensors are gone with its exception.
        fitting = self._fitting_batch(batch)
        raise TrainError(
            f"batch={len(batch.labels)}: a step at {batch.crops.shape[-1]} px does not fit in {_memory_of(self.device)}"
            + (f"; --batch {fitting} fits" if fitting else ", nor does the smallest batch; try a smaller --resolution")
        )

    def _fitting_batch(self, batch: CropBatch) -> int | None:
        """The largest half, quarter, ... of the batch with which a step fits; the run must end after this."""
        self.step.use_eager()
        size = len(batch.labels) // 2
        while size > 1:
            for student in self.step.students:
                student.optimizer.zero_grad(set_to_none=True)
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
            try:
                paired = {pairing: crops[:size] for pairing, crops in batch.paired.items()}
                self.step(replace(batch, crops=batch.crops[:size], labels=batch.labels[:size], paired=paired))
                return size
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
            size //= 2
        return None

    def _finite_sums(self) -> list[list[float]]:
        every = [student.sums.tolist() for student in self.step.students]
        for student, sums in zip(self.step.students, every, strict=True):
            if not math.isfinite(sums[LOSS]):
                raise self._diverged(student, "the loss is")
        return every

    def _check_weights(self) -> None:
        """What is kept must be good to go on from; the last step's loss tells nothing of what that step did."""
        for student in self.step.students:
            if not all(parameter.isfinite().all() for parameter in student.network.parameters()):
                raise self._diverged(student, "weights are")

    def _diverged(self, student: Student, what: str) -> TrainError:
        rate = student.optimizer.param_groups[0]["lr"]
        return TrainError(
            f"{student.name}: {what} no longer finite in epoch {self.progress.epoch + 1}, by step "
            f"{self.progress.step}, at learning rate {rate:.4g}; try a smaller --optimizer.lr (the checkpoint before "
            "it is kept)"
        )

    def _end_epoch(
        self, sums: list[list[float]], scores: list[Scores], records: list[Record], *, seconds: float
    ) -> None:
        progress = self.progress
        better = []
        for index, (student, record) in enumerate(zip(self.step.students, records, strict=True)):
            metrics = self._metrics(student, sums[index], scores[index])
            record.write(metrics, name=student.name if len(self.jobs) > 1 else None)
            better.append(scores[index].top1 >= self._best[index])
            self._best[index] = max(self._best[index], scores[index].top1)
            student.sums.zero_()
        self.progress = Progress(epoch=progress.epoch + 1, seconds=progress.seconds + progress.train_seconds + seconds)
        self._save("last.pt")
        self._save("best.pt", better)

    def _metrics(self, student: Student, sums: list[float], scores: Scores) -> dict[str, Any]:
        progress = self.progress
        crops = sums[CROPS]
        return {
            "epoch": progress.epoch + 1,
            "loss": sums[LOSS] / crops,
            "train_top1": 100 * sums[TOP1] / crops,
            "train_top5": 100 * sums[TOP5] / crops,
            "top1": scores.top1,
            "top5": scores.top5,
            "images_per_second_per_device": crops / progress.train_seconds,
            "waiting": progress.waited_seconds / progress.train_seconds,
            "lr": student.optimizer.param_groups[0]["lr"],
        }

    def _save(self, name: str, chosen: Sequence[bool] | None = None) -> None:
        """Writes the checkpoint of each job, or of those chosen."""
        for index, (job, student) in enumerate(zip(self.jobs, self.step.students, strict=True)):
            if chosen is None or chosen[index]:
                state = self._state(job, student, self._scored[index], self._best[index])
                checkpoint.save(job.folder / name, state)

    def _state(self, job: Job, student: Student, scored: nn.Module, best: float) -> dict[str, Any]:
        mean, std = job.normalisation
        return {
            "model": scored.state_dict(),
            # Where the model is an average: the weights that training goes on from.
            "trained": student.network.state_dict() if scored is not student.network else None,
            "network": {
                "name": job.config.model,
                "num_classes": len(self.data.class_names),
                "class_names": list(self.data.class_names),
                "resolution": self.rule.resolution,
                "center_ratio": self.rule.center_ratio,
                "mean": list(mean),
                "std": list(std),
            },
            "optimizer": student.optimizer.state_dict(),
            "scaler": student.scaler.state_dict() if student.scaler else {},
            "generators": checkpoint.generator_states(self.device),
            "sums": student.sums.cpu(),
            "progress": asdict(self.progress) | {"best_top1": best},
        }

    def _restore(self) -> None:
        for index, (job, student) in enumerate(zip(self.jobs, self.step.students, strict=True)):
            state = checkpoint.load(job.checkpoint)
            self._scored[index].load_state_dict(state["model"])
            student.network.load_state_dict(state.get("trained") or state["model"])
            student.optimizer.load_state_dict(state["optimizer"])
            if student.scaler:
                student.scaler.load_state_dict(state["scaler"])
            checkpoint.restore_generators(state["generators"], self.device)
            student.sums.copy_(state["sums"])
            self._best[index] = state["progress"].pop("best_top1")
            self.progress = Progress(**state["progress"])

    def _interrupted(self) -> Interrupted:
        return Interrupted(
            f"stopped in epoch {self.progress.epoch + 1} of {self.config.epochs}, after step {self.progress.step} "
            f"of {self.loader.steps}; to continue, type again:\n  {command_to_continue()}"
        )


def _student(job: Job, lr: float, autocast: torch.dtype | None, device: torch.device) -> Student:
    network = job.network.to(device).to(memory_format=torch.channels_last)
    return Student(
        name=job.config.model,
        network=network,
        optimizer=_optimizer(job.config.optimizer, network.parameters(), lr),
        normalisation=job.normalisation,
        scaler=torch.amp.GradScaler(device.type) if autocast is torch.float16 else None,
    )


def _average(student: Student, decay: float) -> Any:
    # Loading timm takes seconds, which runs without an average need not wait for.
    from timm.utils import ModelEmaV3

    return ModelEmaV3(student.network, decay=decay, use_warmup=True)


def _memory_of(device: torch.device) -> str:
    if device.type == "cuda":
        return f"the {torch.cuda.mem_get_info(device)[1] / 2**30:.0f} GiB of {torch.cuda.get_device_name(device)}"
    return f"the {os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.0f} GiB of this machine"


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
