"""The length of runs: their steps, and the remaining seconds of a command."""

from dataclasses import dataclass

from train.job import Job


def steps_of(job: Job) -> int:
    """Steps in an epoch."""
    return job.data.num_images("train") // job.batch * job.config.copies


def steps_left(job: Job, done: tuple[int, int] = (0, 0)) -> float:
    """The steps of a run after `epochs` epochs and `steps` of the next one; steps with smaller crops count less."""
    epochs, steps = done
    weights = [step_weight(job, epoch) for epoch in range(epochs, job.config.epochs)]
    return steps_of(job) * sum(weights) - (steps * weights[0] if weights else 0)


def step_weight(job: Job, epoch: int) -> float:
    """The cost of a step of an epoch (0, 1, ...) relative to one with crops of full size."""
    return (job.resolution_in(epoch) / job.resolution) ** 2


@dataclass(frozen=True)
class Cost:
    """Seconds of a training on this machine: of a step with crops of full size, and of all validation images."""

    step: float
    validation: float

    def seconds(self, job: Job, done: tuple[int, int] = (0, 0)) -> float:
        """Seconds of a whole run, or of the rest of it after some epochs and some steps of the next one."""
        return self.step * steps_left(job, done) + self.validation * (job.config.epochs - done[0])


class Remaining:
    """The remaining seconds of a command during one of its trainings, estimated from its steps so far.

    cost: measured beforehand, used until there is more. later: seconds of the rest of the command.
    """

    def __init__(self, job: Job, *, cost: Cost | None = None, later: float = 0.0):
        self._job, self._later = job, later
        self._step = cost.step if cost else 0.0
        self._validation = cost.validation if cost else 0.0
        # Of this start, without its first step, which may compile.
        self._begun, self._steps, self._seconds = False, 0.0, 0.0

    def count_step(self, epoch: int, seconds: float) -> None:
        if self._begun:
            self._steps += step_weight(self._job, epoch)
            self._seconds += seconds
            self._step = self._seconds / self._steps
        self._begun = True

    def count_validation(self, seconds: float) -> None:
        self._validation = seconds

    def seconds(self, epoch: int, step: int) -> float:
        """The remaining seconds after this many epochs and steps of the next one."""
        return Cost(self._step, self._validation).seconds(self._job, (epoch, step)) + self._later


def said_seconds(seconds: float) -> str:
    """A duration as text: 40 s, 12 min, 3 h 20 min, 4 days 3 h."""
    if seconds < 90:
        return f"{max(round(seconds), 1)} s"
    minutes = round(seconds / 60)
    if minutes < 90:
        return f"{minutes} min"
    hours, minutes = divmod(round(seconds / 600) * 10, 60)
    if hours < 48:
        return f"{hours} h {minutes} min" if minutes else f"{hours} h"
    days, hours = divmod(round(seconds / 3600), 24)
    return f"{days} days {hours} h" if hours else f"{days} days"
