"""Determines and checks everything that a command is going to train, before anything slow begins."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import models
from data.sets import ConvertedSet
from models.trained import Trained
from train import labels as kinds
from train.checks import check_job
from train.config import Config
from train.distributed import Group
from train.estimate import Cost, is_short, measured
from train.job import Job, check, find_labels, needs_refinery, resolve
from train.labels.refinery import RefineryLabels
from train.labels.source import Labels
from train.runs import Run, checkpoint, finished_refinery, read_run, recipe_of

# Options that may differ between networks that train together.
OWN = ("model", "optimizer", "schedule")


class Untrained(Trained):
    """The network of a run that is still to be trained, with placeholder weights; its digest is not that of a file."""

    @cached_property
    def digest(self) -> str:
        return "not trained yet"


@dataclass(frozen=True)
class Ahead:
    """The runs of a command.

    refinery: the run that trains the refinery, if none is finished. jobs: the others, in order; as long as there is no
    refinery, their labels are from one that is `Untrained`. configs: theirs, as requested. data, together: the data set
    and the processes of all.
    """

    refinery: Job | None
    jobs: list[Job]
    configs: list[Config]
    data: ConvertedSet
    together: Group | None

    def learning_from(self, run: Run) -> list[Job]:
        """The jobs with the labels of the refinery, which has been trained by now."""
        configs = [each.replace({"refinery": str(run.folder)}) for each in self.configs]
        labels = find_labels(configs, self.data.class_names)
        return [resolve(each, self.data, its, self.together) for each, its in zip(configs, labels, strict=True)]


@dataclass(frozen=True)
class Part:
    """Runs that train together. done: finished epochs, and finished steps of the next one.

    cost: what the training takes; None if it is so short that it was not measured.
    """

    jobs: list[Job]
    done: tuple[int, int] = (0, 0)
    is_refinery: bool = False
    cost: Cost | None = None

    @property
    def seconds(self) -> float:
        """The remaining seconds; 0 if the cost was not measured."""
        return self.cost.seconds(self.jobs[0], self.done) if self.cost else 0.0


def look_ahead(configs: Sequence[Config], together: Group | None = None, *, trained: bool = True) -> Ahead:
    """The runs of these configurations, which have at most one refinery.

    together: the processes that the runs are for (default: all); a missing refinery is trained by all. trained: whether
    the runs are trained, not only their crops labelled; a missing refinery always is. Prints which refinery is used.
    Raises DataError, ModelError or TrainError if any run of the command cannot be trained.
    """
    configs = list(configs)
    refinery = None
    if needs_refinery(configs[0]):
        wanted = configs[0].as_refinery(str(configs[0].refinery), {"pretrained": None, "out": None})
        data, (ground_truth,) = check([wanted, *configs])
        refinery = resolve(wanted, data, ground_truth)
        run = _finished(refinery)
        if run:
            ahead = Ahead(None, [], configs, data, together)
            ahead = replace(ahead, jobs=ahead.learning_from(run))
        else:
            jobs = [resolve(each, data, untrained_labels(refinery, each), together) for each in configs]
            ahead = Ahead(refinery, jobs, configs, data, together)
            _check([refinery])
    else:
        data, labels = check(configs)
        jobs = [resolve(each, data, its, together) for each, its in zip(configs, labels, strict=True)]
        ahead = Ahead(None, jobs, configs, data, together)
    if trained:
        _check(ahead.jobs)
    return ahead


def next_generation(job: Job, config: Config) -> Ahead:
    """The run of a configuration that learns from this job's, finished or not. Raises as look_ahead does."""
    run = None if is_untrained(job) else job.saved_run()
    if run and run.result:
        return look_ahead([config.replace({"refinery": str(run.folder)})])
    student = resolve(config, job.data, untrained_labels(job, config))
    _check([student])
    return Ahead(None, [student], [config], job.data, None)


def _check(jobs: Sequence[Job]) -> None:
    for job in jobs:
        run = _saved(job)
        if not (run and run.result):
            check_job(job)


def _saved(job: Job) -> Run | None:
    """The run in a job's folder. Raises TrainError if it is another one, as far as that is known yet."""
    run = read_run(job.folder)
    if run and run.identity["refinery"] and is_untrained(job):
        # Nothing is known about the refinery's weights yet, except that they are not those of a finished run.
        assert job.identity["refinery"]
        job = replace(job, identity=job.identity | {"refinery": run.identity["refinery"]})
    return job.saved_run()


def is_untrained(job: Job) -> bool:
    """Whether a job's labels are from a refinery that is still to be trained."""
    return isinstance(job.labels, RefineryLabels) and isinstance(job.labels.trained, Untrained)


def untrained_labels(refinery: Job, config: Config) -> Labels:
    """The labels of a configuration as they will be once this refinery is trained, from an untrained network."""
    name, class_names = refinery.config.model, refinery.data.class_names
    if config.labels.resolution:
        models.check_resolution(name, config.labels.resolution)
    network = Untrained(
        models.build(name, len(class_names)),
        name,
        None,
        class_names,
        models.normalisation(name),
        refinery.resolution,
        refinery.crop.center_ratio,
        refinery.labels.generation,
    )
    kind = kinds.kind_of(config)
    assert issubclass(kind, RefineryLabels)
    return kind(network, name, config.labels)


def _finished(job: Job) -> Run | None:
    """The finished run to use as refinery instead of training this one; prints which one, or that there is none."""
    model, config = job.config.model, job.config
    run, other = finished_refinery(Path(config.runs), job.identity, str(config.recipe))
    if run and run.result:
        print(f"refinery: {run.folder}, top-1 {run.result['top1']:.2f} %, is finished and used as it is", flush=True)
        return run
    print(
        f"refinery: {model} has no finished run on {job.data.name} at {job.resolution} px"
        + (f" of recipe {config.recipe} and {config.epochs} epochs" if other else "")
        + "; trained first",
        flush=True,
    )
    if other and other.result:
        print(
            f"refinery: {other.folder} (recipe {recipe_of(other)}, {other.identity['epochs']} epochs, top-1 "
            f"{other.result['top1']:.2f} %) is taken only if it is named: REFINERY={other.folder}",
            flush=True,
        )
    return None


def groups(jobs: Sequence[Job], found: dict[str, Run | None]) -> list[tuple[tuple[int, int], list[Job]]]:
    """The unfinished jobs, those that train together in one list, and their progress.

    found: the run of each job's model, if there is one.
    """
    unfinished: dict[Any, list[Job]] = {}
    for job in jobs:
        run = found[job.config.model]
        if not (run and run.result):
            # Jobs with different progress (one was started alone, for example) or other crops cannot share steps.
            reached = checkpoint.position(run.folder) if run else (0, 0)
            shared = str([value for key, value in asdict(job.config).items() if key not in OWN])
            unfinished.setdefault((reached, shared), []).append(job)
    return [(reached, together) for (reached, _), together in unfinished.items()]


def parts_of(ahead: Ahead) -> list[Part]:
    """The parts to be trained, in order, not measured yet. Raises TrainError if a folder holds another run."""
    found = {job.config.model: None if is_untrained(job) else job.saved_run() for job in ahead.jobs}
    parts = [Part(together, reached) for reached, together in groups(ahead.jobs, found)]
    if not ahead.refinery:
        return parts
    run = ahead.refinery.saved_run()
    reached = checkpoint.position(run.folder) if run else (0, 0)
    return [Part([ahead.refinery], reached, is_refinery=True), *parts]


def with_costs(parts: Sequence[Part], *, always: bool = False) -> list[Part]:
    """The parts with their cost, unless all are so short that measuring would be noticed. always: measure these too."""
    if not always and all(is_short(part.jobs[0]) for part in parts):
        return list(parts)
    return [replace(part, cost=measured(part.jobs)) for part in parts]
