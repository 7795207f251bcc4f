"""The main job: the refinery found or trained first, then the students.

python -m train --model mobilenet --refinery resnet50
make train MODEL=mobilenet REFINERY=resnet50
"""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from command import typed_command
from data.durable import reason
from data.sources import scenes_fingerprint
from train import TrainError
from train.announce import announce, announce_result
from train.config import Config
from train.device import set_threads
from train.distributed import Group
from train.interrupt import Interrupted
from train.job import Job, check, find_labels, needs_refinery, resolve
from train.loop import Trainer
from train.runs import Run, checkpoint, finished_refinery
from train.runs.record import locked
from train.score.crop_truth import label_quality

# What networks that train together need not share.
_OWN = ("model", "optimizer", "schedule")


def train(config: Config) -> list[Run]:
    """Trains what the configuration asks for, unless it is finished already, its refinery first where that is missing.

    Several networks in `config.model` train together, and each run ends as if it had been alone (except for the random
    numbers of dropout, which they share). Returns a run for each, in their order.
    Raises DataError, ModelError or TrainError for bad input, as far as possible before anything slow begins.
    """
    return _train_jobs(with_refinery(_one_each(config)))


def with_refinery(configs: Sequence[Config], together: Group | None = None) -> list[Job]:
    """The runs of these configurations, which have one refinery or none; it is trained first where it is missing.

    together: the processes that the runs are for (default: all); the refinery is trained by all.

    Raises as `train`.
    """
    if needs_refinery(configs[0]):
        refinery = configs[0].as_refinery(str(configs[0].refinery), {"pretrained": None, "out": None})
        data, (ground_truth,) = check([refinery, *configs])
        run = _refinery_run(resolve(refinery, data, ground_truth))
        configs = [each.replace({"refinery": str(run.folder)}) for each in configs]
        labels = find_labels(configs, data.class_names)
    else:
        data, labels = check(configs)
    return [resolve(each, data, its, together) for each, its in zip(configs, labels, strict=True)]


def _one_each(config: Config) -> list[Config]:
    """The configuration of each network that `config.model` names; a recipe may say other things of each.

    Where it says what they must share to train together, a notice is printed that they train apart.
    """
    names = config.model.split()
    if len(names) == 1:
        return [config]
    if not names or len(set(names)) < len(names):
        raise TrainError(f"model={config.model}: name each network once")
    if config.out:
        raise TrainError(f"out={config.out}: is the folder of one run; leave it out to train {len(names)} networks")
    first, *others = configs = [config.replace({"model": name}) for name in names]
    for other in others:
        ours, theirs = asdict(first), asdict(other)
        for key in [key for key, value in theirs.items() if value != ours[key] and key not in _OWN]:
            print(
                f"{key}: {first.model} takes {ours[key]} and {other.model} {theirs[key]} from recipe "
                f"{config.recipe}, so they train apart; one --{key} for all lets them share the refinery's labels",
                flush=True,
            )
    return configs


def _refinery_run(job: Job) -> Run:
    """The finished run that serves as refinery: one that is there, or a new one on ground truth."""
    model, data = job.config.model, job.data.name
    run = finished_refinery(Path(job.config.runs), job.identity)
    if run and run.result:
        print(f"refinery: {run.folder}, top-1 {run.result['top1']:.2f} %, is finished and used as it is", flush=True)
        return run
    print(f"refinery: {model} has no finished run on {data} at {job.resolution} px; trained first", flush=True)
    (run,) = _train_jobs([job])
    print(flush=True)
    return run


def _bring_together(jobs: Sequence[Job]) -> None:
    """Takes networks that have trained together, and of which some are a save ahead, back to where the others stand.

    That is what a kill between their checkpoints leaves. Apart, they would draw other random numbers from then on.
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
                print(f"{job.folder}: goes one save back, to where the networks that train with it are", flush=True)


def _train_jobs(jobs: Sequence[Job]) -> list[Run]:
    """Trains networks in their run folders, or continues them, or finds them finished; returns their runs in order."""
    runs: dict[str, Run] = {}
    unfinished: dict[object, list[Job]] = {}
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
        else:
            # Those that stand elsewhere (one was begun alone, say) cannot share their steps, nor those of other crops.
            reached = checkpoint.position(run.folder) if run else (0, 0)
            shared = str([value for key, value in asdict(job.config).items() if key not in _OWN])
            unfinished.setdefault((reached, shared), []).append(job)
    for together in unfinished.values():
        set_threads(together[0].config.threads)
        trainer = Trainer(together)
        announce(trainer)
        # Of several processes, the first one's words are all's.
        results = trainer.run()
        for student, result in zip(trainer.students, trainer.job.group.given(results), strict=True):
            if student.job.data.source_fingerprint == scenes_fingerprint():
                result["crop_labels"] = label_quality(
                    trainer.loader, trainer.labels, device=student.job.device, autocast=student.job.autocast
                )
            runs[student.name] = student.record.finish(result)
            announce_result(result, student.job)
        # What one process wrote, the others may read now.
        trainer.job.group.wait()
        if trainer.stopped:
            raise Interrupted(f"stopped after a finished run; to go on, type again:\n  {typed_command()}")
    return [runs[job.config.model] for job in jobs]
