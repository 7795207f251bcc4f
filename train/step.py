"""One training step: crops in, augmented, labels from their source, students forward and backward, weights moved.

Nothing here waits for the device: the students' sums stay on it until they are read.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch.nn import functional as F

from data.loader import CropBatch
from data.plan import seed_of_part
from kernels.normalise import Normalise
from train import TrainError
from train.augment import Augment, kept, partners
from train.device import computing_in
from train.distributed import ALONE, Group, Reduce
from train.jitter import with_jittered
from train.labels.source import LabelSource, Targets
from train.student import Student

# Inductor may drop channels-last in the backward graph (PyTorch 2.13); the networks are laid out for it.
COMPILER_OPTIONS: dict[str, Any] = {"force_layout_optimization": True}


def forget_compiled_steps(shapes: int) -> None:
    """Makes room for the graphs of a training whose crops come in so many shapes.

    PyTorch counts the graphs of a function over all steps of a process, and refuses more than a few: a chain or a
    refinery that is trained first would use them up for the trainings that follow.
    """
    torch._dynamo.reset()
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, shapes)


class Step:
    """A step of training students on the labels of `labels`, which are made once for all of them.

    loss, temperature: how the students' outputs are compared with the labels (kernels.refinery_loss).
    jitter: eta of adversarial jitter (train.jitter) with a single student; 0 is none. Jittered crops count in the loss
    and not in the accuracies. augment: what is done to crops before the students see them; of mixed ones the accuracies
    count the class of the crop's own image. autocast: bfloat16, float16, or None for float32 throughout.
    compiled: labels, students and losses as one compiled graph, made in the first step of each resolution. Where that
    fails, a notice is printed and the steps go on uncompiled, or under `strict` TrainError is raised. cuda_graphs: the
    compiled graph is recorded and replayed, kernels and all, as CUDA graphs.
    replicas: parts of a step, of all devices, each with batch statistics of its own; the running ones are the first's.
    truth, weights: the share of cross entropy to the images' own labels in the loss, 0 to below 1, and what the losses
    of each class's images are multiplied by, float32 [C], None for 1 (train.config.LossConfig).
    together, reduce: who computes them, and how their gradients are added (train.distributed). seed: with several
    parts, of what networks draw themselves.
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
    ):
        self.students = students
        self.labels = labels
        self._loss, self._temperature, self._jitter, self._augment = loss, temperature, jitter, augment
        self._truth, self._class_weights = truth, None if weights is None else weights.to(device)
        self._device, self._autocast = device, autocast
        self._replicas, self._group, self._reduce, self._seed = replicas, together, reduce, seed
        self._normalise = [Normalise(student.normalisation).to(device) for student in students]
        self._compute: Callable[[CropBatch, Any], tuple[torch.Tensor, torch.Tensor]] = self._losses
        self._compiled, self._strict = compiled, strict
        # Shapes of crops for which there is a graph.
        self._tried: set[torch.Size] = set()
        if compiled:
            options = COMPILER_OPTIONS | ({"triton.cudagraphs": True} if cuda_graphs else {})
            # A graph for each resolution; one for all sizes would be slower at each.
            self._compute = torch.compile(self._losses, fullgraph=True, dynamic=False, options=options)

    def __call__(self, batch: CropBatch, epoch: int = 0, step: int = 0) -> None:
        """epoch, step: where in the run it is (0, 1, ...), of which its augmentation is a function."""
        for student in self.students:
            student.network.train()
        mine = self._replicas // self._group.world
        counted: torch.Tensor | None = None
        gradients: list[list[torch.Tensor]] = []
        for number in range(mine):
            # A batch deals the images of a step out in turns, as the plan does; so their part is a matter of the plan.
            part = self._group.rank + number * self._group.world
            more = self._part(batch.part(number, mine), epoch, step, part)
            counted = more if counted is None else counted + more
            if self._replicas > 1 and self._reduce == "tree":
                gradients.append(self._taken_gradients())
        if self._replicas > 1 and (self._group.world > 1 or self._reduce == "tree"):
            self._put_gradients(self._group.reduce_gradients(gradients or [self._taken_gradients()], how=self._reduce))
        assert counted is not None
        for student, sums in zip(self.students, counted, strict=True):
            student.move()
            student.sums += sums

    def _part(self, batch: CropBatch, epoch: int, step: int, part: int) -> torch.Tensor:
        """Adds the gradients of a part of the step to the weights; returns what is to be added to the sums."""
        if self._replicas > 1:
            torch.manual_seed(seed_of_part(seed=self._seed, epoch=epoch, step=step, part=part))
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
        draws = None
        if self._augment:
            size = batch.crops.shape[-1]
            draws = self._augment.draw(len(batch.crops), size, epoch=epoch, step=step, part=part)
            # The graph copies the batch, and would be compiled anew for the number of each epoch.
            batch = replace(batch, epoch=0)
        untried = self._compiled and batch.crops.shape not in self._tried
        # The first part alone counts in the running statistics.
        statistics = [(buffer, buffer.clone()) for buffer in self._buffers()] if part else []
        counted = self._first_gradients(batch, draws) if untried else self._gradients(batch, draws)
        with torch.no_grad():
            for buffer, before in statistics:
                buffer.copy_(before)
        return counted

    def _buffers(self) -> Iterator[torch.Tensor]:
        return (buffer for student in self.students for buffer in student.network.buffers())

    def _weights(self) -> list[torch.Tensor]:
        """All that is trained, and has a gradient in every step."""
        return [weight for student in self.students for weight in student.network.parameters() if weight.requires_grad]

    def _taken_gradients(self) -> list[torch.Tensor]:
        """The gradients of all weights, which are then gone; 0 where a step has none."""
        found = []
        for weight in self._weights():
            found.append(torch.zeros_like(weight) if weight.grad is None else weight.grad)
            weight.grad = None
        return found

    def _put_gradients(self, gradients: Sequence[torch.Tensor]) -> None:
        for weight, gradient in zip(self._weights(), gradients, strict=True):
            weight.grad = gradient

    def use_eager(self) -> None:
        """Runs the steps from now on without the compiled graph."""
        self._compute, self._compiled = self._losses, False

    def _gradients(self, batch: CropBatch, draws: torch.Tensor | None) -> torch.Tensor:
        """Adds the gradients of a batch to the weights; returns what is to be added to the sums, [students, 4]."""
        losses, counted = self._compute(batch, draws)
        scaled = [student.scaled(loss) for student, loss in zip(self.students, losses, strict=True)]
        (torch.stack(scaled).sum() / self._replicas).backward()
        return counted

    def _first_gradients(self, batch: CropBatch, draws: torch.Tensor | None) -> torch.Tensor:
        """As _gradients, where forward and backward have yet to be compiled for crops of this shape."""
        self._tried.add(batch.crops.shape)
        buffers = [(buffer, buffer.clone()) for buffer in self._buffers()]
        try:
            return self._gradients(batch, draws)
        except Exception as error:  # a compiler fails in as many ways as it has parts
            if is_out_of_memory(error):
                raise
            failure = reason(error)
        if self._strict:
            raise TrainError(f"compile=always: the step cannot be compiled ({failure}); try --compile never")
        print(f"the step cannot be compiled and runs uncompiled ({failure})", flush=True)
        self.use_eager()
        for student in self.students:
            student.forget_gradients()
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)
        return self._gradients(batch, draws)

    def _losses(self, batch: CropBatch, draws: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """The students' losses, float32 [students], and what is to be added to their sums, float64 [students, 4]."""
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
        losses, counted = [], []
        # Jittered crops lie behind the clean ones.
        labels = batch.labels.repeat(2) if self._jitter else batch.labels
        crops = torch.full((), len(batch.labels), dtype=torch.float64, device=self._device)
        for logits in outputs:
            loss = self._loss_of(targets, logits, labels, draws).mean()
            top1, top5 = correct(logits[: len(batch.labels)], batch.labels)
            losses.append(loss)
            counted.append(torch.stack([loss.detach().double() * crops, top1.double(), top5.double(), crops]))
        return torch.stack(losses), torch.stack(counted)

    def _loss_of(
        self, targets: Targets, logits: torch.Tensor, labels: torch.Tensor, draws: torch.Tensor | None
    ) -> torch.Tensor:
        """Each crop's loss, float32 [B]: of a mixed crop the weighted sum of two, unless the mixture has a label.

        labels: the images' own, int64 [B], of which a mixed crop always has two.
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
        """Each crop's loss by these targets and own labels of images, float32 [B]; see LossConfig."""
        loss = targets.loss(logits, kind=self._loss, temperature=self._temperature)
        if self._truth:
            own = F.cross_entropy(logits.float(), labels, reduction="none")
            loss = (1 - self._truth) * loss + self._truth * own
        return loss if self._class_weights is None else self._class_weights[labels] * loss


def correct(logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """How many crops have their class first, and among the first five (or all, of fewer). Two int64 scalars."""
    first = logits.topk(min(5, logits.shape[1]), dim=1).indices == labels[:, None]
    return first[:, 0].sum(), first.sum()


def reason(error: Exception) -> str:
    """The first line that says what went wrong; a compiler's first one may only say which part of it failed."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return next((line for line in lines if not line.endswith("raised:")), type(error).__name__)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether PyTorch, on any device, could not get the memory that it asked for."""
    seen: BaseException | None = error
    while seen is not None:
        # The CPU's allocator has no exception of its own.
        if isinstance(seen, torch.OutOfMemoryError) or "DefaultCPUAllocator: can't allocate memory" in str(seen):
            return True
        seen = seen.__cause__ or seen.__context__
    return False
