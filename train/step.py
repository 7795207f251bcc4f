"""One training step: augment crops, label them, run the students forward and backward, update their weights.

Nothing here waits for the device (except timm's AdamP): the students' sums stay on it until they are read.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch.nn import functional as F

from data.decoders import delivered
from data.loader import CropBatch
from data.plan import seed_of_part
from kernels.normalise import Normalise
from train import TrainError
from train.augment import Augment, kept, partners
from train.device import computing_in
from train.distributed import ALONE, Group, Reduce
from train.failures import is_out_of_memory, reason
from train.jitter import with_jittered
from train.labels.source import LabelSource, Targets
from train.recorded import Capture, Recorder
from train.student import Student

# Without this, Inductor may drop the channels-last layout in the backward graph (PyTorch 2.13).
COMPILER_OPTIONS: dict[str, Any] = {"force_layout_optimization": True}


def forget_compiled_steps(shapes: int) -> None:
    """Resets the compiler, and its limit of graphs, before a training whose crops have `shapes` different shapes.

    PyTorch limits the number of graphs that it compiles for a function in a process, so without this, earlier trainings
    of a chain, or of a refinery that is trained first, would use up the limit.
    """
    torch._dynamo.reset()
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, shapes)


class Step:
    """A training step for several students on the labels of `labels`, which are made once for all of them.

    loss, temperature: how the students' outputs are compared with the labels (kernels.refinery_loss).
    jitter: eta of adversarial jitter (train.jitter) for a single student; 0 for none. Jittered crops count in the loss
    but not in the accuracies. augment: the augmentation of the crops that students see; the accuracies of mixed crops
    use the class of the crop's own image. autocast: bfloat16, float16, or None for float32 throughout.
    compiled: labels, students and losses run as one graph, compiled in the first step of each resolution. If that
    fails, a notice is printed and steps run uncompiled; with `strict`, TrainError is raised.
    cuda_graphs: the whole step, from crops to updated and averaged weights, is recorded as one CUDA graph per shape of
    crops, and replayed; with several replicas as one graph for a part and one for the update, and devices exchange
    gradients between the two. If a step cannot be recorded, a notice with the reason is printed and steps run without;
    if CUDA itself rejects a recording, TrainError is raised.
    capture: how to record instead of CUDA graphs (train.recorded).
    replicas: number of parts of a step over all devices, each with its own batch statistics; running statistics are
    those of the first part.
    truth: share of the cross entropy to the images' own labels in the loss, 0 to below 1. weights: factors of the loss
    for the classes of images, float32 [C]; None for 1 (train.config.LossConfig).
    together, reduce: the processes that share the parts, and how gradients are added (train.distributed). seed: of the
    networks' own random numbers (dropout) with several parts.
    """

    def __init__(
        self,
        students: Sequence[Student],
        labels: LabelSource,
        *,
        loss: str = "soft",
        temperature: float = 1.0,
        jitter: float = 0.0,
        augment: Augment | None = None,
        device: torch.device,
        autocast: torch.dtype | None,
        compiled: bool,
        strict: bool = False,
        cuda_graphs: bool = False,
        replicas: int = 1,
        together: Group = ALONE,
        reduce: Reduce = "sum",
        seed: int = 0,
        truth: float = 0.0,
        weights: torch.Tensor | None = None,
        capture: Capture | None = None,
    ):
        self.students = students
        self.labels = labels
        self._loss, self._temperature, self._jitter, self._augment = loss, temperature, jitter, augment
        self._truth, self._class_weights = truth, None if weights is None else weights.to(device)
        self._device, self._autocast = device, autocast
        self._replicas, self._group, self._reduce, self._seed = replicas, together, reduce, seed
        self._normalise = [Normalise(student.normalisation).to(device) for student in students]
        self._compute: Callable[[CropBatch, Any], torch.Tensor] = self._loss_of_students
        self._compiled, self._strict = compiled, strict
        # Shapes of crops for which compilation has been tried.
        self._tried: set[torch.Size] = set()
        if compiled:
            # One graph per resolution; a dynamic graph for all of them would be slower.
            self._compute = torch.compile(
                self._loss_of_students, fullgraph=True, dynamic=False, options=dict(COMPILER_OPTIONS)
            )
        self._recorder: Recorder | None = None
        # Shapes of crops for which all parts are recorded, and the sums of the parts' gradients.
        self._recorded: set[torch.Size] = set()
        self._total: list[torch.Tensor] = []
        if cuda_graphs:
            self._start_recording(capture)

    def __call__(self, batch: CropBatch, epoch: int = 0, step: int = 0, number: int = 1) -> None:
        """Trains the students on a batch: updates weights and averages, and adds to their sums.

        epoch, step: position in the run (0, 1, ...), which determines the augmentation. number: number of the step in
        the whole run (1, 2, ...), which determines its weight in averages.
        """
        for student in self.students:
            student.network.train()
            student.set_step(number)
        if self._recorder and self._replayed(self._recorder, batch, epoch, step):
            return
        if self._replicas == 1:
            self._whole(batch, self._draws(batch, epoch, step, 0))
            return
        total: list[torch.Tensor | None] | None = None
        parts: list[list[torch.Tensor]] = []
        for part, own in self._parts(batch, epoch, step):
            gradients = self._part(own, self._draws(own, epoch, step, part), part)
            if self._reduce == "tree":
                parts.append(self._filled(gradients))
            else:
                total = gradients if total is None else _added(total, gradients)
        if self._exchanges:
            total = [*self._group.reduce_gradients(parts or [self._filled(total or [])], how=self._reduce)]
        self._move(total or [])

    @property
    def recorded(self) -> bool:
        """Whether steps are replayed, rather than run, from the first step of each shape on."""
        return self._recorder is not None

    @property
    def _exchanges(self) -> bool:
        """Whether Group.reduce_gradients adds the gradients of the parts."""
        return self._replicas > 1 and (self._group.world > 1 or self._reduce == "tree")

    def _parts(self, batch: CropBatch, epoch: int, step: int) -> Iterator[tuple[int, CropBatch]]:
        """Yields this process's parts of a step, with their numbers; each must be computed before the next is taken."""
        mine = self._replicas // self._group.world
        for number in range(mine):
            # Images are interleaved among parts in the same way as the plan interleaves them among processes, so the
            # part of an image does not depend on the number of processes.
            part = self._group.rank + number * self._group.world
            torch.manual_seed(seed_of_part(seed=self._seed, epoch=epoch, step=step, part=part))
            yield part, batch.part(number, mine)

    def _draws(self, batch: CropBatch, epoch: int, step: int, part: int) -> torch.Tensor | None:
        if not self._augment:
            return None
        size = batch.crops.shape[-1]
        return self._augment.draw(len(batch.crops), size, epoch=epoch, step=step, part=part)

    def _whole(self, batch: CropBatch, draws: torch.Tensor | None) -> None:
        """A whole step with a single part."""
        self._move(self._part(batch, draws, 0))

    def _part(self, batch: CropBatch, draws: torch.Tensor | None, part: int) -> list[torch.Tensor | None]:
        """Returns the gradients of a part of the step for each weight, and adds to the students' sums."""
        # Only the first part updates the running statistics.
        statistics = [(buffer, buffer.clone()) for buffer in self._buffers()] if part else []
        gradients = self._gradients_of(batch, draws)
        with torch.no_grad():
            for buffer, before in statistics:
                buffer.copy_(before)
        return gradients

    def _gradients_of(self, batch: CropBatch, draws: torch.Tensor | None) -> list[torch.Tensor | None]:
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
        # Otherwise the graph would be recompiled for each epoch's number.
        batch = replace(batch, epoch=0)
        untried = self._compiled and batch.crops.shape not in self._tried
        return self._first_gradients(batch, draws) if untried else self._gradients(batch, draws)

    def _buffers(self) -> Iterator[torch.Tensor]:
        return (buffer for student in self.students for buffer in student.network.buffers())

    def _weights(self) -> list[torch.nn.Parameter]:
        """The trained weights of all students, in the order of their gradients."""
        return [weight for student in self.students for weight in student.trained()]

    def _filled(self, gradients: Sequence[torch.Tensor | None]) -> list[torch.Tensor]:
        """The gradients, with zeros for missing ones."""
        pairs = zip(self._weights(), gradients, strict=True)
        return [torch.zeros_like(weight) if gradient is None else gradient for weight, gradient in pairs]

    def _move(self, gradients: Sequence[torch.Tensor | None]) -> None:
        """Updates the weights of all students. gradients: of all of them, in the order of _weights."""
        left = list(gradients)
        for student in self.students:
            count = len(student.trained())
            student.move(left[:count])
            del left[:count]

    def _start_recording(self, capture: Capture | None) -> None:
        """Prepares recording of steps, or prints why they cannot be recorded."""
        reading = sorted({type(student.optimizer).__name__ for student in self.students if student.reads_device})
        if reading:
            self._stop_recording(f"{reading[0]} reads from the device in each step")
        elif self._device.type != "cuda" and capture is None:
            self._stop_recording(f"the device is a {self._device.type.upper()}")
        else:
            self._numbers = [student.keep_numbers_on_device() for student in self.students]
            if self._replicas > 1:
                self._total = [torch.zeros_like(weight) for weight in self._weights()]
            self._recorder = Recorder(self._written, self._device, capture)

    def _stop_recording(self, why: str) -> None:
        print(f"cuda_graphs: the step is not recorded and its kernels are launched one by one ({why})", flush=True)
        self._forget_recorded()

    def _forget_recorded(self) -> None:
        self._recorder, self._total = None, []
        for student in self.students:
            student.keep_numbers_on_host()

    def _written(self) -> list[torch.Tensor]:
        """All tensors that a step writes to."""
        return [*(tensor for student in self.students for tensor in student.tensors()), *self._total]

    def _replayed(self, recorder: Recorder, batch: CropBatch, epoch: int, step: int) -> bool:
        """Runs a step as a replay; if it cannot be recorded, prints a notice and returns False with nothing changed."""
        for student, numbers in zip(self.students, self._numbers, strict=True):
            numbers.copy_(
                delivered(torch.tensor(student.numbers, dtype=numbers.dtype), self._device), non_blocking=True
            )
        try:
            if self._replicas == 1:
                recorder.run("step", *self._recordable(self._whole, batch, self._draws(batch, epoch, step, 0)))
                return True
            self._replay_parts(recorder, batch, epoch, step)
        except TrainError:
            raise
        except Exception as error:  # libraries and drivers raise many kinds of errors
            for student in self.students:
                student.forget_half_a_step()
            if is_out_of_memory(error):
                raise
            self._stop_recording(reason(error))
            return False
        return True

    def _replay_parts(self, recorder: Recorder, batch: CropBatch, epoch: int, step: int) -> None:
        if batch.crops.shape not in self._recorded:
            # Everything is recorded before anything is counted or exchanged, so that the step can still be run
            # unrecorded if recording fails.
            for part in self._parts(batch, epoch, step):
                recorder.record(*self._recordable_part(*part, epoch, step))
            recorder.record("move", self._move_total)
            self._recorded.add(batch.crops.shape)
        torch._foreach_zero_(self._total)
        parts: list[list[torch.Tensor]] = []
        for part in self._parts(batch, epoch, step):
            recorder.run(*self._recordable_part(*part, epoch, step))
            if self._reduce == "tree":
                parts.append([gradient.clone() for gradient in self._total])
                torch._foreach_zero_(self._total)
        if self._exchanges:
            # Not recorded: recording NCCL's exchange can only be tested on several GPUs.
            torch._foreach_copy_(self._total, self._group.reduce_gradients(parts or [self._total], how=self._reduce))
        recorder.run("move", self._move_total)

    def _move_total(self) -> None:
        # Clones, since a scaler may write to the gradients.
        self._move([gradient.clone() for gradient in self._total])

    def _recordable_part(self, part: int, batch: CropBatch, epoch: int, step: int) -> tuple[Any, ...]:
        """Returns the arguments for Recorder to record adding the gradients of a part to the total."""

        def add(own: CropBatch, draws: torch.Tensor | None) -> None:
            torch._foreach_add_(self._total, self._filled(self._part(own, draws, part)))

        # All parts except the first restore the running statistics.
        name = "part" if part else "first part"
        return name, *self._recordable(add, batch, self._draws(batch, epoch, step, part))

    def _recordable(
        self, function: Callable[[CropBatch, torch.Tensor | None], Any], batch: CropBatch, draws: torch.Tensor | None
    ) -> tuple[Any, ...]:
        """Returns the function of tensors only, then these tensors: the batch's fields, then the draws."""
        fields = {name: value for name, value in vars(batch).items() if isinstance(value, torch.Tensor)}
        names, pairings = list(fields), list(batch.paired)

        def with_all(*tensors: torch.Tensor) -> None:
            of_batch, rest = tensors[: len(names)], list(tensors[len(names) :])
            paired = {pairing: rest.pop(0) for pairing in pairings}
            made = replace(batch, epoch=0, **dict(zip(names, of_batch, strict=True)), paired=paired)
            function(made, rest[0] if rest else None)

        return with_all, *fields.values(), *batch.paired.values(), *([] if draws is None else [draws])

    def use_eager(self) -> None:
        """From now on, runs steps uncompiled and unrecorded."""
        self._compute, self._compiled = self._loss_of_students, False
        self._forget_recorded()

    def _gradients(self, batch: CropBatch, draws: torch.Tensor | None) -> list[torch.Tensor | None]:
        """Returns the gradients of the batch for each weight, in its memory layout; None for unused weights."""
        loss = self._compute(batch, draws)
        weights = self._weights()
        # Not backward(), which would launch an operator for each weight to store its gradient.
        found = torch.autograd.grad(loss, weights, allow_unused=True)
        return [
            None if gradient is None else _laid_out(gradient, weight)
            for gradient, weight in zip(found, weights, strict=True)
        ]

    def _first_gradients(self, batch: CropBatch, draws: torch.Tensor | None) -> list[torch.Tensor | None]:
        """As _gradients, for the first crops of a shape, for which forward and backward are compiled."""
        self._tried.add(batch.crops.shape)
        written = [*self._buffers(), *(student.sums for student in self.students)]
        before = [tensor.clone() for tensor in written]
        try:
            return self._gradients(batch, draws)
        except Exception as error:  # compilers raise many kinds of errors
            if is_out_of_memory(error):
                raise
            failure = reason(error)
        if self._strict:
            raise TrainError(f"compile=always: the step cannot be compiled ({failure}); try --compile never")
        print(f"the step cannot be compiled and runs uncompiled ({failure})", flush=True)
        self._compute, self._compiled = self._loss_of_students, False
        with torch.no_grad():
            for tensor, old in zip(written, before, strict=True):
                tensor.copy_(old)
        return self._gradients(batch, draws)

    def _loss_of_students(self, batch: CropBatch, draws: torch.Tensor | None) -> torch.Tensor:
        """Returns the sum of the students' scaled losses, float32 [], to be differentiated. Adds to their sums."""
        crops = seen = batch.crops
        if self._augment and draws is not None:
            coloured = self._augment.colour(batch.crops, draws)
            crops = self._augment.mix(coloured, draws)
            seen = {"plain": batch.crops, "coloured": coloured, "mixed": crops}[self.labels.sees]
        with computing_in(self._autocast, self._device):
            targets = self.labels(batch if seen is batch.crops else replace(batch, crops=seen))
            outputs = [
                student.network(normalise(crops))
                for student, normalise in zip(self.students, self._normalise, strict=True)
            ]
        losses = []
        # Jittered crops follow the clean ones.
        labels = batch.labels.repeat(2) if self._jitter else batch.labels
        crops = torch.full((), len(batch.labels), dtype=torch.float64, device=self._device)
        for student, logits in zip(self.students, outputs, strict=True):
            loss = self._loss_of(targets, logits, labels, draws).mean()
            top1, top5 = correct(logits[: len(batch.labels)], batch.labels)
            student.sums.add_(torch.stack([loss.detach().double() * crops, top1.double(), top5.double(), crops]))
            losses.append(loss if student.scale is None else loss * student.scale)
        return torch.stack(losses).sum() / self._replicas

    def _loss_of(
        self, targets: Targets, logits: torch.Tensor, labels: torch.Tensor, draws: torch.Tensor | None
    ) -> torch.Tensor:
        """Returns each crop's loss, float32 [B].

        The loss of a mixed crop is the weighted sum for both images, unless the source labels the mixture itself.
        labels: the images' own labels, int64 [B]; a mixed crop always has those of both images.
        """
        own = self._compared(targets, logits, labels)
        if draws is None or not (self._augment and self._augment.mixes):
            return own
        share, others = kept(draws), partners(draws)
        if self.labels.sees != "mixed":
            theirs = self._compared(targets.at(others), logits, labels[others])
        elif self._truth or self._class_weights is not None:
            theirs = self._compared(targets, logits, labels[others])
        else:
            return own
        return share * own + (1 - share) * theirs

    def _compared(self, targets: Targets, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Returns each crop's loss for these targets and the images' own labels, float32 [B]; see LossConfig."""
        loss = targets.loss(logits, kind=self._loss, temperature=self._temperature)
        if self._truth:
            own = F.cross_entropy(logits.float(), labels, reduction="none")
            loss = (1 - self._truth) * loss + self._truth * own
        return loss if self._class_weights is None else self._class_weights[labels] * loss


def _laid_out(gradient: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Returns the gradient in the memory layout of the weight, as fused optimizers require; copies only if needed."""
    strides = zip(gradient.shape, gradient.stride(), weight.stride(), strict=True)
    if all(size == 1 or ours == theirs for size, ours, theirs in strides):
        return gradient
    return torch.empty_like(weight, requires_grad=False).copy_(gradient)


def _added(total: Sequence[torch.Tensor | None], gradients: Sequence[torch.Tensor | None]) -> list[torch.Tensor | None]:
    """Adds gradients to the total, in place; None where both are None."""
    return [
        ours if theirs is None else theirs if ours is None else ours.add_(theirs)
        for ours, theirs in zip(total, gradients, strict=True)
    ]


def correct(logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns how many crops have their class first, and among the first five (or all if fewer): two int64 scalars."""
    first = logits.topk(min(5, logits.shape[1]), dim=1).indices == labels[:, None]
    return first[:, 0].sum(), first.sum()
