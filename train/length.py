"""How long runs are: their steps, and the seconds that are left of a command."""

from dataclasses import dataclass

from train.job import Job


def steps_of(job: Job) -> int:
    """Steps in an epoch."""
    return job.data.num_images("train") // job.batch * job.config.copies


def steps_left(job: Job, done: tuple[int, int] = (0, 0)) -> float:
    """The steps of a run after so many epochs and steps of the next one; those of smaller crops count less."""
    epochs, steps = done
    weights = [step_weight(job, epoch) for epoch in range(epochs, job.config.epochs)]
    return steps_of(job) * sum(weights) - (steps * weights[0] if weights else 0)


def step_weight(job: Job, epoch: int) -> float:
    """What a step of an epoch (0, 1, ...) takes, as a share of one with crops of full size."""
    return (job.resolution_in(epoch) / job.resolution) ** 2


@dataclass(frozen=True)
class Cost:
    """What a training takes on this machine, in seconds: a step with crops of full size, and all validation images."""

    step: float
    validation: float

    def seconds(self, job: Job, done: tuple[int, int] = (0, 0)) -> float:
        """Of a whole run, or of what is left of it after so many epochs and steps of the next one."""
        return self.step * steps_left(job, done) + self.validation * (job.config.epochs - done[0])


class Remaining:
    """The seconds that are left of a command while one of its trainings goes on, by what its steps have taken so far.

    cost: what was measured beforehand, until there is more. later: seconds of what follows in the command.
    """

    def __init__(self, job: Job, *, cost: Cost | None = None, later: float = 0.0):
        self._job, self._later = job, later
        self._step = cost.step if cost else 0.0
        self._validation = cost.validation if cost else 0.0
        # Of this start: its first step, which may compile, is left out.
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
        """After so many epochs and steps of the next one."""
        return Cost(self._step, self._validation).seconds(self._job, (epoch, step)) + self._later


def said_seconds(seconds: float) -> str:
    """A duration, as people say it: 40 s, 12 min, 3 h 20 min, 4 days 3 h."""
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
