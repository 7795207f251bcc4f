"""A network in training, with all that is its own: what moves, averages, scores and records it."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import models
from data.loader import Loader
from kernels.normalise import Normalisation
from models.weights import load_into, load_weights
from train.config import OptimizerConfig
from train.device import on_device
from train.distributed import ALONE, Group
from train.job import Job
from train.runs.record import Record, Silent
from train.score import Scores, score

# What the sums hold, in order.
LOSS, TOP1, TOP5, CROPS = range(4)


class Student:
    """One network, its optimizer and its accuracies; of a run (see `of`), also what the run keeps on disk.

    lr: the learning rate where the schedule's factor is 1. ema: decay a step of the average of the weights; 0 keeps
    none. autocast: what the networks compute in; with float16, whose gradients would underflow, the loss is scaled.

    scored: the network that is scored and kept, the average or the student itself. scores: its last ones. best: the
    highest top-1 so far, in percent.
    sums: float64 [4] on the device: loss times crops, correct top-1, correct top-5 (of the images' classes), crops;
    counted since they were last set to zero. A loss that is not finite makes sums[LOSS] not finite.
    """

    job: Job
    record: Record
    scores: Scores

    def __init__(
        self,
        name: str,
        network: nn.Module,
        optimizer: OptimizerConfig,
        *,
        normalisation: Normalisation,
        device: torch.device,
        lr: float | None = None,
        ema: float = 0.0,
        autocast: torch.dtype | None = None,
    ):
        self.name = name
        self.network = on_device(network, device)
        self.normalisation = normalisation
        self._device, self._autocast = device, autocast
        self._lr = optimizer.lr if lr is None else lr
        self.optimizer = _optimizer(self.network, optimizer, self._lr)
        self.scaler = torch.amp.GradScaler(device.type) if autocast is torch.float16 else None
        self._average = _average(self.network, ema) if ema else None
        self.scored: nn.Module = self._average.module if self._average else self.network
        self.sums = torch.zeros(4, dtype=torch.float64, device=device)
        self.best = 0.0

    @classmethod
    def of(cls, job: Job) -> "Student":
        """The student of a run, as it starts."""
        config = job.config
        student = cls(
            config.model,
            _build(job),
            config.optimizer,
            normalisation=models.normalisation(config.model),
            device=job.device,
            lr=config.optimizer.lr * config.batch / config.optimizer.lr_batch,
            ema=config.ema,
            autocast=job.autocast,
        )
        kind = Record if job.group.first else Silent
        student.job, student.record = job, kind(job.folder, config, job.identity)
        return student

    @property
    def lr(self) -> float:
        """The present learning rate."""
        return self.optimizer.param_groups[0]["lr"]

    def set_rate(self, factor: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = self._lr * factor

    def scaled(self, loss: torch.Tensor) -> torch.Tensor:
        """The loss as it is to be differentiated."""
        return self.scaler.scale(loss) if self.scaler else loss

    def move(self) -> None:
        """Moves the weights by their gradients, which are then gone."""
        if self.scaler:
            # A fused optimizer skips the step on the device if a gradient is not finite, and nothing waits for it.
            self.scaler.step(self.optimizer)
            self.scaler.update()
        else:
            self.optimizer.step()
        self.forget_gradients()

    def forget_gradients(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)

    def average(self, step: int) -> None:
        """Counts the weights in, where an average is kept. step: how many the run has done."""
        if self._average:
            self._average.update(self.network, step=step)

    def has_finite_weights(self) -> bool:
        return all(bool(weight.isfinite().all()) for weight in self.network.parameters())

    def score(self, loader: Loader, together: Group = ALONE, stop: Callable[[], bool] = lambda: False) -> Scores:
        """The scores of what is kept, on the images of the loaders of all processes. stop: as in train.score."""
        return score(
            self.scored,
            loader,
            self.normalisation,
            device=self._device,
            autocast=self._autocast,
            together=together,
            stop=stop,
        )

    def count(self, scores: Scores) -> None:
        """Takes the scores at the end of an epoch for its own."""
        self.scores, self.best = scores, max(self.best, scores.top1)

    @property
    def is_best(self) -> bool:
        """Whether its last scores are as good as any before."""
        return self.scores.top1 >= self.best

    def state(self) -> dict[str, Any]:
        """What of it a checkpoint holds, from which `restore` goes on with the same bits."""
        return {
            "model": self.scored.state_dict(),
            # Where the model is an average: the weights that training goes on from.
            "trained": self.network.state_dict() if self._average else None,
            "network": self._description(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict() if self.scaler else {},
            "sums": self.sums.cpu(),
            "best_top1": self.best,
        }

    def restore(self, state: dict[str, Any]) -> None:
        self.scored.load_state_dict(state["model"])
        self.network.load_state_dict(state["trained"] or state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.scaler:
            self.scaler.load_state_dict(state["scaler"])
        self.sums.copy_(state["sums"])
        self.best = float(state["best_top1"])

    def _description(self) -> dict[str, Any]:
        """What models.trained needs to know of the network."""
        job, (mean, std) = self.job, self.normalisation
        return {
            "name": self.name,
            "num_classes": len(job.data.class_names),
            "class_names": list(job.data.class_names),
            "resolution": job.resolution,
            "center_ratio": job.crop.center_ratio,
            "mean": list(mean),
            "std": list(std),
            "generation": job.labels.generation,
        }


def _build(job: Job) -> nn.Module:
    config = job.config
    torch.manual_seed(job.seed)
    published = config.pretrained in models.HUBS
    network = models.build(config.model, len(job.data.class_names), pretrained=published)
    if config.pretrained and not published:
        left_out = load_into(network, load_weights(config.pretrained), name=config.model, strict_head=False)
        print(
            f"pre-trained weights from {config.pretrained}{f', except {left_out}' if left_out else ''}",
            flush=True,
        )
    return network


def _average(network: nn.Module, decay: float) -> Any:
    # Loading timm takes seconds, which runs without it need not wait for.
    from timm.utils import ModelEmaV3

    return ModelEmaV3(network, decay=decay, use_warmup=True)


def _optimizer(network: nn.Module, config: OptimizerConfig, lr: float) -> torch.optim.Optimizer:
    if config.kind == "adamw":
        return torch.optim.AdamW(network.parameters(), lr=lr, weight_decay=config.weight_decay, fused=True)
    if config.kind == "adamp":
        from timm.optim import AdamP

        return AdamP(network.parameters(), lr=lr, weight_decay=config.weight_decay)
    sgd = torch.optim.SGD(
        network.parameters(),
        lr=lr,
        momentum=config.momentum,
        nesterov=config.nesterov,
        weight_decay=config.weight_decay,
        fused=True,
    )
    if config.momentum:
        # A fused SGD leaves its memory of gradients unset where the scaler skips its first step (PyTorch 2.14).
        for weight in network.parameters():
            sgd.state[weight]["momentum_buffer"] = torch.zeros_like(weight)
    return sgd
