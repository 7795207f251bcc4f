"""The main command: finds or trains the refinery, then trains the students.

python -m train --model mobilenet --refinery resnet50
make train MODEL=mobilenet REFINERY=resnet50
"""

from collections.abc import Sequence
from dataclasses import asdict

from command import typed_command
from data.durable import reason
from data.sources import scenes_fingerprint
from train import TrainError
from train.ahead import OWN, Ahead, Part, groups, look_ahead, parts_of, with_costs
from train.announce import announce, announce_plan, announce_result
from train.config import Config
from train.device import set_threads
from train.interrupt import Interrupted
from train.job import Job
from train.loop import Trainer
from train.runs import Run, checkpoint
from train.runs.record import locked
from train.score.crop_truth import label_quality


def train(config: Config, *, dry_run: bool = False) -> list[Run]:
    """Trains the networks of the configuration, unless they are finished already, and first a missing refinery.

    Several networks in `config.model` train together, and each run ends as if it had been trained alone (except for the
    random numbers of dropout, which they share). Returns a run for each, in order. First prints what will be trained,
    for how long and what is written; dry_run: ends there, without runs.
    Raises DataError, ModelError or TrainError for bad input, before anything slow begins.
    """
    ahead = look_ahead(_one_each(config))
    _say_apart(ahead.jobs)
    parts = with_costs(parts_of(ahead), always=dry_run)
    announce_plan(parts, dry_run=dry_run)
    if dry_run:
        return []
    return train_jobs(with_refinery(ahead, parts), parts)


def with_refinery(ahead: Ahead, parts: Sequence[Part], later: float = 0.0) -> list[Job]:
    """The planned runs, after training their refinery if it was missing.

    parts: what is to be trained. later: seconds of the rest of the command.
    """
    if not ahead.refinery:
        return ahead.jobs
    (run,) = train_jobs([ahead.refinery], parts[:1], later + sum(part.seconds for part in parts[1:]))
    print(flush=True)
    return ahead.learning_from(run)


def _one_each(config: Config) -> list[Config]:
    """The configuration of each network in `config.model`; a recipe may have other values for each."""
    names = config.model.split()
    if len(names) == 1:
        return [config]
    if not names or len(set(names)) < len(names):
        raise TrainError(f"model={config.model}: name each network once")
    if config.out:
        raise TrainError(f"out={config.out}: is the folder of one run; leave it out to train {len(names)} networks")
    return [config.replace({"model": name}) for name in names]


def _say_apart(jobs: Sequence[Job]) -> None:
    """Prints a notice if a recipe has different values for networks where they must be equal to train together."""
    first, *others = jobs
    ours = asdict(first.config)
    for other in others:
        for key in [key for key, value in asdict(other.config).items() if value != ours[key] and key not in OWN]:
            print(
                f"{key}: {first.config.model} takes {ours[key]} and {other.config.model} "
                f"{getattr(other.config, key)} from recipe {first.config.recipe}, so they train apart; one --{key} for "
                "all lets them share the refinery's labels",
                flush=True,
            )


def _bring_together(jobs: Sequence[Job]) -> None:
    """Takes networks that have trained together, if some are one save ahead, back to the save of the others.

    A kill between their checkpoints causes this. Trained apart, they would draw other random numbers from then on.
    """
    if len(jobs) == 1:
        return
    standing = {job.config.model: checkpoint.standing(job.folder) for job in jobs}
    for job in jobs:
        model = job.config.model
        reached, others = standing[model]
        with_it = [
            at for other, (at, its) in standing.items() if other in (others or ()) and (its is None or model in its)
        ]
        behind = min(with_it, default=reached)
        if behind < reached:
            with locked(job.folder):
                try:
                    gone = checkpoint.go_back(job.folder, behind)
                except OSError as error:
                    raise TrainError(f"{job.folder}: cannot be written ({reason(error, job.folder)})") from None
            if gone:
                print(
                    f"{job.folder}: goes back to the previous checkpoint, where the networks that train with it are",
                    flush=True,
                )


def train_jobs(jobs: Sequence[Job], parts: Sequence[Part] = (), later: float = 0.0) -> list[Run]:
    """Trains networks in their run folders, or continues them, unless they are finished; returns their runs in order.

    parts: their measured costs. later: seconds of the rest of the command.
    """
    runs: dict[str, Run] = {}
    jobs[0].group.check_same(
        {f"{key} of {job.config.model}": job.identity[key] for job in jobs for key in job.identity}
    )
    found = {job.config.model: job.saved_run() for job in jobs}
    jobs[0].group.in_turn(
        lambda: _bring_together([job for job in jobs if not ((run := found[job.config.model]) and run.result)])
    )
    for job in jobs:
        run = found[job.config.model]
        if run and run.result:
            top1, top5 = run.result["top1"], run.result["top5"]
            print(f"{run.folder} is finished: top-1 {top1:.2f} %, top-5 {top5:.2f} %", flush=True)
            runs[job.config.model] = run
    costs = {part.jobs[0].config.model: part.cost for part in parts}
    waiting = [(together, costs.get(together[0].config.model)) for _, together in groups(jobs, found)]
    for number, (together, cost) in enumerate(waiting):
        after = sum(cost.seconds(others[0]) for others, cost in waiting[number + 1 :] if cost)
        set_threads(together[0].config.threads)
        trainer = Trainer(together, cost=cost, later=later + after)
        announce(trainer)
        # The first process prints for all.
        results = trainer.run()
        for student, result in zip(trainer.students, trainer.job.group.given(results), strict=True):
            if student.job.data.source_fingerprint == scenes_fingerprint():
                result["crop_labels"] = label_quality(
                    trainer.loader, trainer.labels, device=student.job.device, autocast=student.job.autocast
                )
            runs[student.name] = student.record.finish(result)
            announce_result(result, student.job)
        # From here on the other processes may read what one wrote.
        trainer.job.group.wait()
        if trainer.stopped:
            raise Interrupted(f"stopped after a finished run; to continue, type again:\n  {typed_command()}")
    return [runs[job.config.model] for job in jobs]
