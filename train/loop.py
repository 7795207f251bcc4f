"""The training loop of one or several runs: epochs of steps, a validation after each, checkpoints and metrics."""

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import Any

import torch

from command import typed_command
from data.loader import CropBatch, Loader
from data.progress import images_bar
from train import TrainError
from train.balance import class_weights
from train.checks import said_memory
from train.device import computing_in, on_device, set_tf32_and_allocator, without_deterministic
from train.failures import is_out_of_memory
from train.interrupt import Interrupted, Stop, stop_on_signal
from train.job import Job
from train.labels.ground_truth import GroundTruthLabels
from train.length import Cost, Remaining, said_seconds
from train.report.analysis import readable
from train.runs import checkpoint
from train.runs.crops import labelled_crops
from train.score import Answers, Stopped, score_all, validation_loader
from train.step import Step, forget_compiled_steps
from train.student import CROPS, LOSS, TOP1, TOP5, Student
from train.waiting import Waiting

# How often the sums are read from the device, which makes the host wait.
_SECONDS_BETWEEN_LOOKS = 2.0
# How often several processes agree on whether to stop or save.
_SECONDS_BETWEEN_AGREEMENTS = 0.5


@dataclass
class Progress:
    """The progress of a run: finished epochs, finished steps of the current epoch, and time.

    train_seconds, waited_seconds (for data): in the current epoch. seconds: in all finished epochs, with validation.
    """

    epoch: int = 0
    step: int = 0
    train_seconds: float = 0.0
    waited_seconds: float = 0.0
    seconds: float = 0.0


class Trainer:
    """Trains the networks of some jobs, each in its own folder, continuing from the checkpoints there.

    The jobs share crops and labels, and differ only in network, optimizer and schedule; their checkpoints must be of
    the same step. Everything shared is taken from the first one, `job`. run() writes metrics and checkpoints.

    cost, later: for the first estimates of the remaining time in the progress bar (train.length.Remaining).
    Attributes: students, step, labels: what is trained, and how. loader: of training crops at the final resolution.
    validation: the loader of the validation images.
    Raises DataError, ModelError or TrainError for errors that only occur when all of these are opened.
    """

    def __init__(self, jobs: Sequence[Job], *, cost: Cost | None = None, later: float = 0.0):
        self.job = job = jobs[0]
        config = job.config
        set_tf32_and_allocator(job.device, config.precision, deterministic=config.deterministic)
        if job.compiled:
            forget_compiled_steps(len(job.resolutions))
        self.students = [Student.of(each) for each in jobs]
        self.labels = on_device(job.labels.open(job), job.device)
        self._loaders: dict[int, Loader] = {}
        self.loader = self.loader_at(job.resolution)
        self.step = Step(
            self.students,
            self.labels,
            loss=config.loss.kind,
            temperature=config.loss.temperature,
            jitter=config.jitter,
            augment=job.augment,
            device=job.device,
            autocast=job.autocast,
            compiled=job.compiled,
            strict=config.compile == "always",
            cuda_graphs=config.cuda_graphs,
            replicas=job.replicas,
            together=job.group,
            reduce=config.reduce,
            seed=job.seed,
            truth=config.loss.truth,
            weights=class_weights(self.loader.images_per_class, config.loss.balance) if config.loss.balance else None,
        )
        self.validation = validation_loader(
            job.data,
            resolution=job.resolution,
            crop=job.crop,
            batch=config.batch // job.group.world,
            rank=job.group.rank,
            world=job.group.world,
            **job.loading,
        )
        self._answer = Answers(
            [(student.scored, student.normalisation) for student in self.students],
            device=job.device,
            autocast=job.autocast,
            compiled=job.compiled,
        )
        self.progress = Progress()
        self._waiting = Waiting(job.device)
        self._remaining = Remaining(job, cost=cost, later=later)
        self._stop = Stop()
        # Whether the run is before its first step, whose crops are shown.
        self._at_start = False
        # Steps between agreements of all processes.
        self._apart = 1

    def run(self) -> list[dict[str, Any]]:
        """Trains until the last epoch is finished, and returns each job's result.

        Raises Interrupted after Ctrl-C, SIGTERM or SIGHUP, and TrainError for a loss that is not finite, too little
        memory, a full disk, or a folder in which another process trains.
        """
        epochs = self.job.config.epochs
        with ExitStack() as stack:
            for student in self.students:
                stack.enter_context(student.record)
            self._restore()
            self._begin()
            self._stop = stack.enter_context(stop_on_signal())
            while self.progress.epoch < epochs:
                self.train_epoch()
                self.validate()
                (stop,) = self.job.group.largest([self._stop.requested])
                if stop and self.progress.epoch < epochs:
                    raise self._interrupted()
        return [student.record.result(best=student.best, seconds=self.progress.seconds) for student in self.students]

    @property
    def stopped(self) -> bool:
        """Whether the user asked for a stop, in any process; a run that is complete by then still finishes."""
        return bool(self.job.group.largest([self._stop.requested])[0])

    def train_epoch(self) -> None:
        """Runs the remaining steps of the current epoch. Raises as run() does.

        Leaves the epoch's sums in the students, and its seconds in `progress`, which is not advanced to the next epoch.
        """
        job, progress = self.job, self.progress
        loader = self.loader_at(job.resolution_in(progress.epoch))
        name = f"epoch {progress.epoch + 1}/{job.config.epochs}"
        batch_size = job.batch
        with images_bar(loader.steps * batch_size, name, done=progress.step * batch_size) as bar:
            mark = looked = saved = time.perf_counter()
            for batch in self._fetched(loader.epoch(job.plan_epoch(progress.epoch), progress.step)):
                if self._at_start:
                    # Not counted as training time.
                    mark += self._show(batch)
                self._set_rates(progress.epoch + progress.step / loader.steps)
                number = progress.epoch * loader.steps + progress.step + 1
                self.train_on(batch, progress.epoch, progress.step, number)
                progress.step += 1
                bar.update(batch_size)
                now = time.perf_counter()
                progress.train_seconds += now - mark
                took, mark = now - mark, now
                self._remaining.count_step(progress.epoch, took)
                stop, save, look = self._agreed(now - saved, now - looked, took)
                if stop or save:
                    self._save()
                    saved = time.perf_counter()
                if stop:
                    raise self._interrupted()
                if look:
                    self._check_losses()
                    sums = job.group.sum(self.students[0].sums).tolist()
                    said = f"loss {sums[LOSS] / sums[CROPS]:.3f}, top-1 {100 * sums[TOP1] / sums[CROPS]:.1f} %"
                    left = said_seconds(self._remaining.seconds(progress.epoch, progress.step))
                    bar.set_postfix_str(f"{said}; {left} left in all", refresh=False)
                    looked = time.perf_counter()
            # This waits for the device, and is counted as time of the epoch.
            self._check_losses()
            progress.train_seconds += time.perf_counter() - mark

    def _agreed(self, since_save: float, since_look: float, took: float) -> tuple[bool, bool, bool]:
        """Returns whether to stop, to save and to check losses: the same in all processes, by the first one's clock.

        since_save, since_look: seconds since the last time. took: seconds of the last step. Several processes exchange
        this only every few steps, since it makes all wait for the slowest.
        """
        group = self.job.group
        if group.world > 1 and self.progress.step % self._apart:
            return False, False, False
        own = [self._stop.requested, 0.0, 0.0, 0.0]
        if group.first:
            apart = max(_SECONDS_BETWEEN_AGREEMENTS // max(took, 1e-6), 1)
            own[1:] = [since_save > 60 * self.job.config.save_minutes, since_look > _SECONDS_BETWEEN_LOOKS, apart]
        stop, save, look, apart = group.largest(own)
        self._apart = int(apart)
        return bool(stop), bool(save), bool(look)

    def validate(self) -> None:
        """Scores the students and ends the epoch: records its metrics and writes checkpoints. Raises as run() does."""
        self._check_weights()
        done, started = self.progress, time.perf_counter()
        for student in self.students:
            self.job.group.share_buffers({student.network, student.scored})
        try:
            found = score_all(self._answer, self.validation, self.job.group, stop=lambda: self._stop.requested)
        except Stopped:
            # A continued run repeats the whole validation.
            self._save()
            raise self._interrupted() from None
        took = time.perf_counter() - started
        self._remaining.count_validation(took)
        seconds = done.seconds + done.train_seconds + took
        for student, scores in zip(self.students, found, strict=True):
            student.count(scores)
            student.record.add(self._metrics(student), name=student.name if len(self.students) > 1 else None)
            student.sums.zero_()
        self.progress = Progress(epoch=done.epoch + 1, seconds=seconds)
        for student in self.students:
            student.record.save(self._state(student), best=student.is_best)

    def loader_at(self, resolution: int) -> Loader:
        """Returns the loader of training crops of this size in pixels per side; opens it on first use."""
        if resolution not in self._loaders:
            self._loaders[resolution] = self.job.open_crops(self.labels, resolution=resolution)
        return self._loaders[resolution]

    def _begin(self) -> None:
        """Records this start in the runs' folders, and prints where it continues and what has changed."""
        job, progress = self.job, self.progress
        start = {
            "device": torch.cuda.get_device_name(job.device) if job.device.type == "cuda" else "CPU",
            "decoder": self.loader.decoder,
            "compiled": job.compiled,
            "threads": torch.get_num_threads(),
            "devices": job.group.world,
            "torch": torch.__version__,
        }
        if job.config.deterministic and job.device.type == "cuda":
            start["deterministic"] = True
            print("deterministic: no search for the fastest algorithms; steps are slower (not measured)", flush=True)
        (changes, *_) = [student.record.begin(start, progress.epoch, progress.step) for student in self.students]
        self._at_start = not (progress.epoch or progress.step)
        if (progress.epoch or progress.step) and progress.epoch < job.config.epochs:
            print(
                f"continuing in epoch {progress.epoch + 1} of {job.config.epochs}, "
                f"after step {progress.step} of {self.loader.steps}",
                flush=True,
            )
            if changes:
                print(f"the last bits may differ from those of a run without a stop: {', '.join(changes)}", flush=True)

    def _fetched(self, batches: Iterator[CropBatch]) -> Iterator[CropBatch]:
        while True:
            with self._waiting.measured():
                batch = next(batches, None)
            if batch is None:
                return
            yield batch

    def _show(self, batch: CropBatch) -> float:
        """Adds a picture of the run's first crops and labels to its plots; returns the seconds that this took."""
        self._at_start = False
        started, job = time.perf_counter(), self.job
        if job.group.first:
            # The crops of one replica, so that batch statistics are those of training.
            part = batch.part(0, job.replicas // job.group.world)
            try:
                with torch.no_grad(), computing_in(job.autocast, job.device):
                    targets = self.labels(part)
            except RuntimeError as error:
                if is_out_of_memory(error):
                    return 0.0  # the step raises a better error
                raise
            own = isinstance(job.labels, GroundTruthLabels)
            source = None if own else "refinery" if job.labels.refinery else "label"
            picture = labelled_crops(part, targets, readable(job.data.class_names), labelled_by=source)
            for student in self.students:
                student.record.show(picture)
        return time.perf_counter() - started

    def _set_rates(self, epoch: float) -> None:
        for student in self.students:
            config = student.job.config
            student.set_rate(config.schedule.factor(epoch, config.epochs))

    def train_on(self, batch: CropBatch, epoch: int, step: int, number: int = 1) -> None:
        """Runs a step (see Step). If it does not fit in memory, raises TrainError with a batch size that does."""
        try:
            self.step(batch, epoch, step, number)
            return
        except RuntimeError as error:
            if operator := without_deterministic(error):
                raise TrainError(
                    f"deterministic: PyTorch {torch.__version__} has no deterministic {operator}; leave "
                    "--deterministic out, or train another network"
                ) from None
            if not is_out_of_memory(error):
                raise
        # Outside the except clause, where the failed step's tensors have been freed with the exception.
        if self.job.group.world > 1:
            # The other processes wait within the step, so smaller batches cannot be tried.
            raise TrainError(
                f"batch={self.job.batch}: a step at {batch.crops.shape[-1]} px, of which each device computes "
                f"{len(batch.labels)} crops, does not fit in {said_memory(self.job.device)}; take a smaller batch"
            )
        fitting = self._fitting_batch(batch)
        raise TrainError(
            f"batch={len(batch.labels)}: a step at {batch.crops.shape[-1]} px does not fit in "
            + said_memory(self.job.device)
            + (f"; --batch {fitting} fits" if fitting else ", nor does the smallest batch; try a smaller --resolution")
        )

    def _fitting_batch(self, batch: CropBatch) -> int | None:
        """Runs steps to find the largest half, quarter, ... of the batch that fits; the run must end after this."""
        self.step.use_eager()
        size = len(batch.labels) // 2
        while size > 1:
            for student in self.students:
                student.forget_gradients()
            if self.job.device.type == "cuda":
                torch.cuda.empty_cache()
            try:
                self.step(batch.first(size))
                return size
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
            size //= 2
        return None

    def _check_losses(self) -> None:
        """Waits for the device; raises TrainError if a loss is not finite."""
        for student in self.students:
            if not self.job.group.sum(student.sums).isfinite().all():
                raise self._diverged(student, "the loss is")
        self.progress.waited_seconds += self._waiting.taken()

    def _check_weights(self) -> None:
        """Raises TrainError if weights are not finite: the last step's loss is computed before its update."""
        for student in self.students:
            if not student.has_finite_weights():
                raise self._diverged(student, "weights are")

    def _diverged(self, student: Student, what: str) -> TrainError:
        kept = " (the checkpoint before it is kept)" if student.record.has_checkpoint else ""
        return TrainError(
            f"{student.name}: {what} no longer finite in epoch {self.progress.epoch + 1}, by step "
            f"{self.progress.step}, at learning rate {student.lr:.4g}; try a smaller --optimizer.lr{kept}"
        )

    def _metrics(self, student: Student) -> dict[str, Any]:
        progress, sums = self.progress, self.job.group.sum(student.sums).tolist()
        crops = sums[CROPS]
        return {
            "epoch": progress.epoch + 1,
            "loss": sums[LOSS] / crops,
            "train_top1": 100 * sums[TOP1] / crops,
            "train_top5": 100 * sums[TOP5] / crops,
            "top1": student.scores.top1,
            "top5": student.scores.top5,
            "val_images": student.scores.images,
            # JSON cannot represent infinity and NaN.
            "val_loss": student.scores.loss if math.isfinite(student.scores.loss) else None,
            "images_per_second_per_device": crops / progress.train_seconds / self.job.group.world,
            "waiting": progress.waited_seconds / progress.train_seconds,
            "lr": student.lr,
        }

    def _save(self) -> None:
        """Writes checkpoints within an epoch."""
        self._check_losses()
        self._check_weights()
        for student in self.students:
            self.job.group.share_buffers({student.network, student.scored})
            student.record.save(self._state(student))

    def _state(self, student: Student) -> dict[str, Any]:
        generators = checkpoint.generator_states(self.job.device)
        sums = self.job.group.sum(student.sums).cpu()
        return student.state() | {
            "sums": sums,
            "generators": generators,
            "progress": asdict(self.progress),
            # The runs that share the random generators.
            "together": [each.name for each in self.students],
        }

    def _restore(self) -> None:
        for student in self.students:
            state = self.job.group.given(student.record.saved())
            if state:
                try:
                    student.restore(state)
                    checkpoint.restore_generators(state["generators"], self.job.device)
                    self.progress = Progress(**state["progress"])
                except (LookupError, AttributeError, TypeError, ValueError, RuntimeError) as error:
                    if is_out_of_memory(error):
                        raise
                    raise TrainError(
                        f"{student.job.folder / checkpoint.LAST}: lacks something that this run needs to continue; put "
                        "back a copy of it, or give another OUT"
                    ) from None
                if not self.job.group.first:
                    student.sums.zero_()  # counted once, in the first process

    def _interrupted(self) -> Interrupted:
        return Interrupted(
            f"stopped in epoch {self.progress.epoch + 1} of {self.job.config.epochs}, after step {self.progress.step} "
            f"of {self.loader.steps}; to continue, type again:\n  {typed_command()}"
        )
