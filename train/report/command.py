"""The effect of refined labels in figures: the analysis of Label Refinery (section 4.1) for your own runs.

python -m train.report --runs "runs/scenes/resnet50-... runs/scenes/mobilenet-from-resnet50-..."
make report RUNS="runs/scenes/resnet50-... runs/scenes/mobilenet-from-resnet50-..."
"""

import contextlib
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from data import DataError, decoders
from data.beton import Beton
from data.convert import ensure_converted
from data.decoders.prefetch import default_threads
from data.plan import CropRule
from data.sets import ConvertedSet, find_set
from models import ModelError
from models.trained import load_trained, names_network_alone
from train import TrainError
from train.device import device_named, precision_on, set_tf32_and_allocator, set_threads
from train.labels.refinery import seen_at
from train.report import page
from train.report.analysis import (
    Compute,
    Labelling,
    Subject,
    accuracies,
    choose_images,
    named_images,
    readable,
)
from train.runs import Run, all_runs, key_of, progress_of, read_run, table_text

# How many images Figures 7 and 8 show by default.
_EXAMPLES = 4


def report(
    runs: str,
    data: str | None = None,
    out: str | None = None,
    images: str | None = None,
    validation_images: str | None = None,
    seed: int = 1000,
    batch: int = 256,
    decoder: str = "auto",
    device: str = "auto",
    threads: int | None = None,
) -> None:
    """Draws finished runs' accuracy on each class and labels of crops, as PNG files and one page, report.html.

    Args:
        runs: run folders in the order of generations, separated by spaces (with quotes around paths that contain
            spaces); the first may be the refinery
        data: the set that they were trained on, if it is no longer where it was
        out: the folder to write (default: report-KEY beside the first run)
        images: training images for Figures 2, 3 (the first two) and 7, by index, e.g. "5 17" (default: four chosen by
            the seed)
        validation_images: validation images for Figure 8, by index (default: four chosen by the seed)
        seed: of the random crops and choices; must differ from the runs' own, so that the crops are new to them
        batch: crops at a time
        decoder: auto, ffcv, dali or torchvision
        device: auto, cpu, cuda or cuda:N
        threads: number that decode, and number that compute on the CPU (default: one per processor)
    """
    where = device_named(device)
    set_threads(threads)
    decoders.choose(decoder, where)
    for name, value in {"batch": batch, "threads": threads}.items():
        if value is not None and value < 1:
            raise TrainError(f"{name}={value}: must be at least 1")
    compute = Compute(where, decoder, threads or default_threads(), batch)
    members = _finished(runs)
    _check_alike(members, seed)
    subjects = [_subject(run, number, compute) for number, run in enumerate(members, 1)]
    set_tf32_and_allocator(where, subjects[0].precision)
    for subject in subjects:
        if subject.trained.class_names != subjects[0].trained.class_names:
            raise TrainError(f"{subject.run.folder}: was trained on other classes than {subjects[0].run.folder}")
    data_set = _set_of(subjects[0], data)
    train, val = Beton(data_set.beton("train")), Beton(data_set.beton("val"))
    seen = named_images("images", images, train) or choose_images(train, _EXAMPLES, seed=seed)
    unseen = named_images("validation_images", validation_images, val) or choose_images(val, _EXAMPLES, seed=seed)
    identity = {
        "runs": [subject.run.folder.name for subject in subjects],
        "data": data_set.fingerprint,
        "images": [seen, unseen],
        "seed": seed,
    }
    folder = Path(out) if out else subjects[0].run.folder.parent / f"report-{key_of(identity)}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise TrainError(f"{folder}: cannot be made ({error.strerror}); name another folder with OUT") from None
    found = page.ReportData(
        subjects=subjects,
        accuracies=[accuracies(subject, data_set, seed=seed, compute=compute) for subject in subjects],
        data=data_set,
        class_names=readable(data_set.class_names),
        same_images=data_set.fingerprint == subjects[0].run.identity["data"]["fingerprint"],
        train=train,
        val=val,
        labelling=_labelling(subjects),
        seed=seed,
        compute=compute,
    )
    try:
        written = page.write(found, seen, unseen, folder)
    except OSError as error:
        raise TrainError(f"{folder}: the report cannot be written ({error.strerror})") from None
    print(f"\n{table_text([page.HEADS, *page.rows(found)])}\n{written}, and its figures beside it")


def _finished(folders: str) -> list[Run]:
    try:
        names = shlex.split(folders)
    except ValueError as error:
        raise TrainError(f"RUNS={folders}: cannot be read ({error})") from None
    if not names:
        raise TrainError("RUNS is empty; name run folders, with spaces between them")
    found: list[Run] = []
    for name in names:
        run = read_run(Path(name))
        if not run:
            raise TrainError(f"{name}: not the folder of a run (make runs lists them)")
        if not run.result:
            raise TrainError(f"{name}: is not finished ({progress_of(run)}); type its command again to continue it")
        if any(run.folder.resolve() == other.folder.resolve() for other in found):
            raise TrainError(f"{name}: is named twice")
        found.append(run)
    return found


def _subject(run: Run, number: int, compute: Compute) -> Subject:
    crop = run.identity["crop"]
    rule = CropRule(**crop | {key: tuple(crop[key]) for key in ("scale", "ratio")})
    # Absolute, since a folder may have the name of a network.
    trained = load_trained(str(run.folder.absolute()))
    precision = precision_on(compute.device, run.identity["precision"])
    return Subject(run, f"{number} {run.identity['model']}", trained, run.identity["resolution"], rule, precision)


def _check_alike(runs: Sequence[Run], seed: int) -> None:
    first = runs[0]
    for run in runs:
        ours, theirs = first.identity["data"], run.identity["data"]
        if theirs["fingerprint"] != ours["fingerprint"]:
            raise TrainError(
                f"{run.folder}: was trained on other images ({theirs['name']}) than {first.folder} ({ours['name']}); "
                "a report takes runs of one set"
            )
        if run.crop_seed == seed:
            raise TrainError(
                f"seed={seed}: {run.folder} was trained on its crops; give another, whose crops are new to every run"
            )


def _set_of(first: Subject, data: str | None) -> ConvertedSet:
    """The given set, or the one that the runs were trained on."""
    folder = first.run.folder
    name = data or _config_of(first.run)["data"]
    try:
        found = find_set(name)
    except DataError as error:
        raise error if data else DataError(f"{error}; say with DATA where {folder}'s images are now") from None
    theirs, ours = len(first.trained.class_names), len(found.class_names)
    if tuple(found.class_names) != first.trained.class_names:
        raise TrainError(
            f"DATA={name}: has {ours} {'other ' if ours == theirs else ''}classes, and {folder} was trained on {theirs}"
        )
    ready = ensure_converted(found)
    if not data and ready.fingerprint != first.run.identity["data"]["fingerprint"]:
        raise TrainError(
            f"{ready.folder}: its images are no longer those that {folder} was trained on; DATA={name} takes them "
            "all the same"
        )
    return ready


def _config_of(run: Run) -> dict[str, Any]:
    """The options of a run."""
    path = run.folder / "config.yaml"
    try:
        config = yaml.safe_load(path.read_text())
    except (OSError, yaml.YAMLError, ValueError, RecursionError):
        config = None
    if not isinstance(config, dict) or not isinstance(config.get("data"), str):
        raise TrainError(f"{path}: missing or damaged; say with DATA what the run was trained on")
    return config


def _labelling(subjects: Sequence[Subject]) -> Labelling:
    """The refinery of the first run that has one, as it labelled for that run; else the first run."""
    student = next((subject for subject in subjects if subject.run.identity["refinery"]), None)
    if student:
        wanted, labels = student.run.identity["refinery"], student.run.identity["labels"]
        for spec in _refineries(student, subjects):
            with contextlib.suppress(ModelError):
                refinery = load_trained(spec, class_names=student.trained.class_names)
                if refinery.digest == wanted["weights"]:
                    whose = f"{refinery.name}, the refinery of run {student.name}, with the weights it had"
                    resolution = seen_at(refinery, labels["resolution"], [student.resolution])
                    # One batch's statistics approximate averaged ones, whose batches are not loaded here.
                    bn = "running" if labels["bn"] == "running" else "batch"
                    return Labelling(refinery, whose, student, bn=bn, resolution=resolution)
    first = subjects[0]
    whose = f"run {first.name}, weights of its last epoch (last.pt)"
    if student:
        whose += f", because the refinery of run {student.name} was not found"
    return Labelling(first.trained, whose, first, bn="batch", resolution=None)


def _refineries(student: Subject, subjects: Sequence[Subject]) -> list[str]:
    """Where a run's refinery may be: among the runs of the report, where it was during training, beside the run."""
    specs = [str(subject.run.folder.absolute()) for subject in subjects]
    with contextlib.suppress(TrainError):
        asked = _config_of(student.run)["refinery"]
        # None if the labels were read from files.
        specs += [asked] if asked and not names_network_alone(asked) else []
    network = student.run.identity["refinery"]["network"]
    beside = [run for run in all_runs(student.run.folder.absolute().parent) if run.identity["model"] == network]
    return [*specs, *(str(run.folder) for run in beside if run.result)]
