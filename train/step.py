"""One training step: crops in, labels from their source, students forward and backward, weights moved.

Nothing here waits for the device: the sums and the not-finite flag stay on it until they are read.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from data.loader import CropBatch
from kernels.normalise import Normalisation, Normalise
from train import TrainError
from train.jitter import with_jittered
from train.labels import LabelSource

# What the sums hold, in order.
LOSS, TOP1, TOP5, CROPS = range(4)

# Inductor may drop channels-last in the backward graph (PyTorch 2.13); the networks are laid out for it.
COMPILER_OPTIONS: dict[str, Any] = {"force_layout_optimization": True}


@dataclass
class Student:
    """A network in training, with what moves its weights.

    scaler: scales the loss where gradients in fp16 would underflow; None in other precisions.
    sums: float64 [4] on the device: loss times crops, correct top-1, correct top-5 (of the images' classes), crops;
    counted since they were last set to zero. A loss that is not finite makes sums[LOSS] not finite.
    """

    name: str
    network: nn.Module
    optimizer: torch.optim.Optimizer
    normalisation: Normalisation
    scaler: torch.amp.GradScaler | None = None
    sums: torch.Tensor = field(init=False)


class Step:
    """A step of training students on the labels of `labels`, which are made once for all of them.

    loss, temperature: how the students' outputs are compared with the labels (kernels.refinery_loss).
    jitter: eta of adversarial jitter (train.jitter) with a single student; 0 is none. Jittered crops count in the loss
    and not in the accuracies. autocast: bfloat16, float16, or None for float32 throughout.
    compiled: labels, students and losses as one compiled graph, made in the first step. Where that fails, a line says
    so and the step goes on uncompiled, or under `strict` raises TrainError. cuda_graphs: the compiled graph is
    recorded and replayed, kernels and all, as CUDA graphs.
    """

    def __init__(
        self,
        students: Sequence[Student],
        labels: LabelSource,
        *,
        loss: str = "soft",
        temperature: float = 1.0,
        jitter: float = 0.0,
        device: torch.device,
        autocast: torch.dtype | None,
        compiled: bool,
        strict: bool = False,
        cuda_graphs: bool = False,
    ):
        self.students = students
        self.labels = labels
        self._loss, self._temperature, self._jitter = loss, temperature, jitter
        self._device, self._autocast = device, autocast
        self._normalise = [Normalise(student.normalisation).to(device) for student in students]
        for student in students:
            student.sums = torch.zeros(4, dtype=torch.float64, device=device)
        self._compute: Callable[[CropBatch], tuple[torch.Tensor, torch.Tensor]] = self._losses
        self._untried = self._strict = False
        if compiled:
            options = COMPILER_OPTIONS | ({"triton.cudagraphs": True} if cuda_graphs else {})
            # A graph for each resolution; one for all sizes would be slower at each.
            self._compute = torch.compile(self._losses, fullgraph=True, dynamic=False, options=options)
            self._untried, self._strict = True, strict

    def __call__(self, batch: CropBatch) -> None:
        for student in self.students:
            student.network.train()
        if self._jitter:
            (student,) = self.students
            batch = with_jittered(
                batch,
                self.labels,
                student.network,
                self._normalise[0],
                eta=self._jitter,
                autocast=self._autocast,
            )
        counted = self._first_gradients(batch) if self._untried else self._gradients(batch)
        for student, sums in zip(self.students, counted, strict=True):
            if student.scaler:
                # Neither waits for the device: a fused optimizer skips the step there if a gradient is not finite.
                student.scaler.step(student.optimizer)
                student.scaler.update()
            else:
                student.optimizer.step()
            student.optimizer.zero_grad(set_to_none=True)
            student.sums += sums

    def use_eager(self) -> None:
        """Runs the steps from now on without the compiled graph."""
        self._compute, self._untried = self._losses, False

    def _gradients(self, batch: CropBatch) -> torch.Tensor:
        """Adds the gradients of a batch to the weights; returns what is to be added to the sums, [students, 4]."""
        losses, counted = self._compute(batch)
        scaled = [
            student.scaler.scale(loss) if student.scaler else loss
            for student, loss in zip(self.students, losses, strict=True)
        ]
        torch.stack(scaled).sum().backward()
        return counted

    def _first_gradients(self, batch: CropBatch) -> torch.Tensor:
        """As _gradients, where forward and backward have yet to be compiled."""
        self._untried = False
        buffers = [(buffer, buffer.clone()) for student in self.students for buffer in student.network.buffers()]
        try:
            return self._gradients(batch)
        except Exception as error:  # a compiler fails in as many ways as it has parts
            if is_out_of_memory(error):
                raise
            failure = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        if self._strict:
            raise TrainError(f"compile=always: the step cannot be compiled ({failure}); try --compile never")
        print(f"the step cannot be compiled and runs uncompiled ({failure})", flush=True)
        self.use_eager()
        for student in self.students:
            student.optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)
        return self._gradients(batch)

    def _losses(self, batch: CropBatch) -> tuple[torch.Tensor, torch.Tensor]:
        """The students' losses, float32 [students], and what is to be added to their sums, float64 [students, 4]."""
        with torch.autocast(self._device.type, dtype=self._autocast, enabled=self._autocast is not None):
            targets = self.labels(batch)
            outputs = [
                student.network(normalise(batch.crops))
                for student, normalise in zip(self.students, self._normalise, strict=True)
            ]
        losses, counted = [], []
        crops = torch.full((), len(batch.labels), dtype=torch.float64, device=self._device)
        for logits in outputs:
            loss = targets.loss(logits, kind=self._loss, temperature=self._temperature).mean()
            top1, top5 = correct(logits[: len(batch.labels)], batch.labels)
            losses.append(loss)
            counted.append(torch.stack([loss.detach().double() * crops, top1.double(), top5.double(), crops]))
        return torch.stack(losses), torch.stack(counted)


def correct(logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """How many crops have their class first, and among the first five (or all, of fewer). Two int64 scalars."""
    first = logits.topk(min(5, logits.shape[1]), dim=1).indices == labels[:, None]
    return first[:, 0].sum(), first.sum()


def is_out_of_memory(error: BaseException) -> bool:
    """Whether PyTorch, on any device, could not get the memory that it asked for."""
    seen: BaseException | None = error
    while seen is not None:
        # The CPU's allocator has no exception of its own.
        if isinstance(seen, torch.OutOfMemoryError) or "DefaultCPUAllocator: can't allocate memory" in str(seen):
            return True
        seen = seen.__cause__ or seen.__context__
    return False
