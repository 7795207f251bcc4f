"""A network in training with its optimizer, average, scores and record."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

import models
from kernels.normalise import Normalisation
from models.weights import load_into, load_weights
from train.config import OptimizerConfig
from train.device import on_device
from train.job import Job
from train.runs.record import Record, Silent
from train.score import Scores

# Indices into Student.sums.
LOSS, TOP1, TOP5, CROPS = range(4)


class Student:
    """One network, its optimizer and its accuracies; for a run (see `of`), also the job and its record on disk.

    lr: the learning rate at which the schedule's factor is 1 (default: the optimizer's). ema: decay per step of the
    average of the weights; 0 for no average. autocast: dtype that the networks compute in; with float16, the loss is
    scaled so that gradients do not underflow.

    The host sets two values before each step, `numbers`. By default they are Python numbers; after
    `keep_numbers_on_device`, steps read them from a tensor, so that a recorded step (train.recorded) sees new values.

    Attributes: scored: the network that is scored and saved: the average, or the student itself. scores: the last ones.
    best: the highest top-1 so far, in percent. sums: float64 [4] on the device: loss times crops, correct top-1,
    correct top-5 (by the images' classes), crops; since they were last set to zero. A loss that is not finite makes
    sums[LOSS] not finite.
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
        if self.scaler:
            # Creates its tensors, which would otherwise be created in the first step.
            self.scaler.scale(torch.zeros((), device=device))
        self._average = _average(self.network, ema) if ema else None
        self.scored: nn.Module = self._average.module if self._average else self.network
        self._averaged = _shared_by(self.network, self.scored) if ema else ([], [])
        self._numbers: torch.Tensor | None = None
        self._rate, self._share = self._lr, 1.0
        self.sums = torch.zeros(4, dtype=torch.float64, device=device)
        self.best = 0.0

    @classmethod
    def of(cls, job: Job) -> "Student":
        """Builds the student of a run, in its initial state."""
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
        """The current learning rate."""
        return self._rate

    def set_rate(self, factor: float) -> None:
        """Sets the learning rate of the next step. factor: of the schedule."""
        self._rate = self._lr * factor
        if self._numbers is None:
            for group in self.optimizer.param_groups:
                group["lr"] = self._rate

    def set_step(self, step: int) -> None:
        """Sets the weight of the next step in the average, if there is one. step: its number in the run (1, 2, ...)."""
        if self._average:
            self._share = 1.0 - self._average.get_decay(step)

    @property
    def numbers(self) -> tuple[float, float]:
        """The learning rate of the next step, and the share of its weights in the average."""
        return self._rate, self._share

    def keep_numbers_on_device(self) -> torch.Tensor:
        """Makes steps read `numbers` from the returned tensor [2]; callers must write them to it before each step."""
        if self._numbers is None:
            # On a GPU, a fused optimizer requires float32; on a CPU, float64 has the same value as the Python number.
            dtype = torch.float64 if self._device.type == "cpu" else torch.float32
            self._numbers = torch.tensor(self.numbers, dtype=dtype, device=self._device)
            self._seat_rate()
        return self._numbers

    def keep_numbers_on_host(self) -> None:
        """Reverts `keep_numbers_on_device`."""
        self._numbers = None
        self._seat_rate()

    def _seat_rate(self) -> None:
        """Sets the optimizer's learning rate to the number or the tensor."""
        for group in self.optimizer.param_groups:
            group["lr"] = self._rate if self._numbers is None else self._numbers[0]
            if "capturable" in group:
                # PyTorch's option for steps that read no host values.
                group["capturable"] = self._numbers is not None

    @property
    def reads_device(self) -> bool:
        """Whether updating the weights makes the host wait for the device."""
        return not self.optimizer.defaults.get("fused")

    @property
    def scale(self) -> torch.Tensor | None:
        """The factor of the loss before it is differentiated, float32 []; None for 1."""
        return self.scaler._scale if self.scaler else None

    def move(self, gradients: Sequence[torch.Tensor | None]) -> None:
        """Updates the weights, and their average if there is one.

        gradients: for each of `trained()`, None for none. With float16 they are those of the scaled loss; if one is not
        finite, the weights do not change.
        """
        for weight, gradient in zip(self.trained(), gradients, strict=True):
            weight.grad = gradient
        if self.scaler:
            # If a gradient is not finite, a fused optimizer skips the step on the device, without making the host wait.
            self.scaler.step(self.optimizer)
            self.scaler.update()
        else:
            self.optimizer.step()
        self.forget_gradients()
        averages, weights = self._averaged
        if averages:
            with torch.no_grad():
                if self._numbers is None:
                    torch._foreach_lerp_(averages, weights, weight=self._share)
                else:
                    torch._foreach_lerp_(averages, weights, [self._numbers[1]] * len(averages))

    def trained(self) -> list[nn.Parameter]:
        """The weights that are trained."""
        return [weight for weight in self.network.parameters() if weight.requires_grad]

    def forget_gradients(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)

    def forget_half_a_step(self) -> None:
        """After a failed step, removes its gradients and the scaler's state for it."""
        self.forget_gradients()
        if self.scaler:
            self.scaler._per_optimizer_states.clear()

    def tensors(self) -> Iterator[torch.Tensor]:
        """Yields all tensors that a step writes to: weights, buffers, averages, optimizer state, scale and sums."""
        yield from self.network.state_dict(keep_vars=True).values()
        if self._average:
            yield from self.scored.state_dict(keep_vars=True).values()
        for state in self.optimizer.state.values():
            yield from (value for value in state.values() if isinstance(value, torch.Tensor))
        if self.scaler:
            yield from (each for each in (self.scaler._scale, self.scaler._growth_tracker) if each is not None)
        yield self.sums

    def has_finite_weights(self) -> bool:
        return all(bool(weight.isfinite().all()) for weight in self.network.parameters())

    def count(self, scores: Scores) -> None:
        """Stores the scores of an epoch's validation."""
        self.scores, self.best = scores, max(self.best, scores.top1)

    @property
    def is_best(self) -> bool:
        """Whether the last top-1 is at least as high as every earlier one."""
        return self.scores.top1 >= self.best

    def state(self) -> dict[str, Any]:
        """Returns the student's part of a checkpoint, from which `restore` continues with the same bits."""
        return {
            "model": self.scored.state_dict(),
            # If the model is an average: the weights that training continues from.
            "trained": self.network.state_dict() if self._average else None,
            "network": self._description(),
            "optimizer": self._optimizer_state(),
            "scaler": self.scaler.state_dict() if self.scaler else {},
            "sums": self.sums.cpu(),
            "best_top1": self.best,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Continues from what `state` returned. Tensors keep their addresses, which a recorded step depends on.

        Raises LookupError, AttributeError, TypeError, ValueError or RuntimeError if the state does not fit.
        """
        self.scored.load_state_dict(state["model"])
        self.network.load_state_dict(state["trained"] or state["model"])
        before = {weight: dict(kept) for weight, kept in self.optimizer.state.items()}
        self.optimizer.load_state_dict(state["optimizer"])
        for weight, kept in self.optimizer.state.items():
            for name, tensor in before.get(weight, {}).items():
                if isinstance(tensor, torch.Tensor) and name in kept:
                    kept[name] = tensor.copy_(kept[name])
        self._rate = float(self.optimizer.param_groups[0]["lr"])
        self._seat_rate()
        if self.scaler:
            self.scaler.load_state_dict(state["scaler"])
        self.sums.copy_(state["sums"])
        self.best = float(state["best_top1"])

    def _optimizer_state(self) -> dict[str, Any]:
        """The optimizer's state, which does not depend on whether the learning rate is on the device."""
        state = self.optimizer.state_dict()
        state["param_groups"] = [
            group | {"lr": self._rate} | ({"capturable": False} if "capturable" in group else {})
            for group in state["param_groups"]
        ]
        return state

    def _description(self) -> dict[str, Any]:
        """The description of the network that models.trained reads."""
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
    # Imported here: timm takes seconds to load, and most runs do not need it.
    from timm.utils import ModelEmaV3

    return ModelEmaV3(network, decay=decay, use_warmup=True)


def _shared_by(network: nn.Module, average: nn.Module) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Returns the tensors of the average, and the corresponding tensors of the network.

    Integer buffers, which count batches, are not averaged: both networks share the same tensor.
    """
    counters = {name: buffer for name, buffer in network.named_buffers() if not buffer.is_floating_point()}
    for name, buffer in counters.items():
        owner, _, attribute = name.rpartition(".")
        setattr(average.get_submodule(owner), attribute, buffer)
    theirs = average.state_dict(keep_vars=True)
    pairs = [(theirs[name], own) for name, own in network.state_dict(keep_vars=True).items() if name not in counters]
    return [average for average, _ in pairs], [own for _, own in pairs]


def _optimizer(network: nn.Module, config: OptimizerConfig, lr: float) -> torch.optim.Optimizer:
    if config.kind == "adamw":
        adamw = torch.optim.AdamW(network.parameters(), lr=lr, weight_decay=config.weight_decay, fused=True)
        for weight in adamw.param_groups[0]["params"]:
            # AdamW would create these in its first step, which may be recorded.
            adamw.state[weight] = {
                "step": torch.zeros((), dtype=torch.float32, device=weight.device),
                "exp_avg": torch.zeros_like(weight),
                "exp_avg_sq": torch.zeros_like(weight),
            }
        return adamw
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
        # A fused SGD leaves its momentum uninitialised if the scaler skips the first step (PyTorch 2.14).
        for weight in network.parameters():
            sgd.state[weight]["momentum_buffer"] = torch.zeros_like(weight)
    return sgd
