"""The main job: the data converted, the refinery there or trained first, then the student.

python -m train --model mobilenet --refinery resnet50
make train MODEL=mobilenet REFINERY=resnet50
"""

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

import models
from data import DataError, decoders
from data.command import fail
from data.convert import ConvertedSet, Unconverted, find_set
from data.loader import Pairing, open_loader
from data.sources import CropRule, scenes_fingerprint
from models import ModelError
from models.weights import load_into, load_weights
from train import TrainError, checkpoint
from train.announce import announce, report
from train.classes import lacking, places_of
from train.config import Config, CropConfig, command_to_continue, growing_resolution, parse
from train.crop_truth import label_quality
from train.device import autocast_type, device_named, precision_on
from train.interrupt import Interrupted
from train.labels import LabelSource
from train.labels.category import Category, taxonomy_table, visual_similarity
from train.labels.ground_truth import GroundTruth
from train.labels.refinery import Refinery
from train.loop import Job, Trainer
from train.runs import Run, finished_refinery, folder_name, read_run
from train.trained import Trained, digest_of, load_trained, parse_spec


def main() -> None:
    arguments = sys.argv[1:]
    config = parse(arguments)
    end_in_one_line(lambda: train(config, arguments))


def end_in_one_line(work: Callable[[], object]) -> None:
    """Runs a command; bad input ends it with one line and status 2, a stop by the user with status 130."""
    try:
        work()
    except (DataError, ModelError, TrainError) as error:
        fail(error)
    except Interrupted as stopped:
        print(stopped, file=sys.stderr, flush=True)
        sys.exit(130)
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr, flush=True)
        sys.exit(130)


def train(config: Config, arguments: Sequence[str]) -> list[Run]:
    """Trains what the configuration asks for, unless it is finished already, its refinery first where that is missing.

    Several networks in `config.model` train together, and each run ends as if it had been alone (but for the random
    numbers of dropout, which they share).
    arguments: the words behind the configuration; with another MODEL they describe the refinery's own training.
    Raises DataError, ModelError or TrainError for bad input, as far as possible before anything slow begins.
    """
    device = device_named(config.device)
    decoders.choose(config.decoder, device)
    configs = _one_each(config, arguments)
    trained_first: list[Config] = []
    if config.refinery and parse_spec(config.refinery)[1] is None:
        trained_first = [parse([*arguments, *_AS_REFINERY, "--model", config.refinery])]
    data, refinery = check([*configs, *trained_first])
    if trained_first:
        refinery = load_trained(str(_refinery_run(trained_first[0], data, device).folder))
    return _runs(configs, data, refinery, device)


def check(configs: Sequence[Config]) -> tuple[ConvertedSet, Trained | None]:
    """Refuses what no run can be made of, so that bad input is told before anything slow begins.

    configs: all on the same data, the first with the refinery of all that have one. Returns their data, converted now
    if it was not yet, and that refinery where it is trained already.
    Raises DataError, ModelError or TrainError.
    """
    first = configs[0]
    for each in configs:
        _check_network(each)
    found = find_set(first.data)
    for each in configs:
        if each.labels.taxonomy:
            taxonomy_table(Path(each.labels.taxonomy), found.class_names)
    refinery: Trained | None = None
    if first.refinery and parse_spec(first.refinery)[1] is not None:
        refinery = load_trained(first.refinery, class_names=found.class_names)
        _check_classes(refinery, found.class_names, first)
    data = found.convert() if isinstance(found, Unconverted) else found
    del found  # and with it what an archive was unpacked to
    for each in configs:
        for side in _resolutions(each, _crop_rule(each, data)):
            models.check_resolution(each.model, side)
    return data, refinery


def _resolutions(config: Config, rule: CropRule) -> list[int]:
    """Pixels a side of the crops in all epochs of a run, each size once."""
    share, epochs = config.resolution_from, config.epochs
    return sorted({growing_resolution(epoch, epochs, share, rule.resolution) for epoch in range(epochs)})


# What turns words for a student of a refinery into those for a network that learns from the ground truth.
ON_GROUND_TRUTH = (
    "--refinery=null",
    "--labels.bn=batch",
    "--labels.resolution=null",
    "--labels.per=crop",
    "--loss.kind=soft",
    "--loss.temperature=1",
    "--jitter=0",
)
_AS_REFINERY = (*ON_GROUND_TRUTH, "--pretrained=null", "--out=null")


def _one_each(config: Config, arguments: Sequence[str]) -> list[Config]:
    """The configuration of each network that `config.model` names; a recipe may say other things of each.

    Where it says what they must share to train together, a line tells that they train apart.
    """
    names = config.model.split()
    if len(names) == 1:
        return [config]
    twice = {name for name in names if names.count(name) > 1}
    if twice or not names:
        raise TrainError(f"model={config.model}: name each network once")
    if config.out:
        raise TrainError(f"out={config.out}: is the folder of one run; leave it out to train {len(names)} networks")
    configs = [parse([*arguments, "--model", name]) for name in names]
    first = asdict(configs[0])
    for other in configs[1:]:
        differing = [key for key, value in asdict(other).items() if value != first[key] and key not in _OWN]
        for key in differing:
            print(
                f"{key}: {configs[0].model} takes {first[key]} and {other.model} {asdict(other)[key]} from recipe "
                f"{config.recipe}, so they train apart; one --{key} for all lets them share the refinery's labels",
                flush=True,
            )
    return configs


# What networks that train together need not share.
_OWN = ("model", "optimizer", "schedule")


def _check_network(config: Config) -> None:
    models.normalisation(config.model)  # refuses an unknown name
    if config.resolution:
        models.check_resolution(config.model, config.resolution)
    if config.pretrained in models.HUBS:
        if not config.model.startswith(f"{config.pretrained}:"):
            raise TrainError(
                f"pretrained={config.pretrained}: has weights for {config.pretrained}:NAME only, and not for "
                f"MODEL={config.model}; give a file of weights"
            )
    elif config.pretrained:
        load_weights(config.pretrained)


def _check_classes(refinery: Trained, class_names: Sequence[str], config: Config) -> None:
    places = places_of(refinery.class_names, class_names)
    theirs, ours = len(refinery.class_names), len(places)
    if -1 in places:
        raise TrainError(
            f"REFINERY={config.refinery}: labels {theirs} classes, and DATA={config.data} has {ours}, of which it "
            f"lacks {lacking(places, class_names)}; train it on DATA first, as MODEL with PRETRAINED"
        )
    if theirs > ours:
        print(f"refinery: of its {theirs} classes, the data's {ours} are used", flush=True)


def _refinery_resolution(refinery: Trained, config: Config, rule: CropRule) -> int | None:
    """Pixels a side to which crops are resized for the refinery; None: it sees them as the student does.

    So it does unless another size is asked for or it takes only the one it was trained at, as most transformers do;
    that one may be many times the student's work. Raises TrainError for a size that it does not take.
    """
    asked, usual = config.labels.resolution, refinery.resolution
    for side in [asked] if asked else _resolutions(config, rule):
        failure = refinery.failure_at(side)
        if failure and (asked or not usual):
            raise TrainError(
                f"REFINERY={config.refinery}: cannot take crops of {side} px ({failure}); give another size with "
                "labels.resolution"
            )
        if failure:
            print(f"refinery: crops are resized to the {usual} px that it takes", flush=True)
            return usual
    if not asked and usual not in (None, rule.resolution):
        print(
            f"refinery: trained at {usual} px, it sees the crops of {rule.resolution} px as they are "
            f"(--labels.resolution {usual} resizes them)",
            flush=True,
        )
    return asked


def _refinery_run(config: Config, data: ConvertedSet, device: torch.device) -> Run:
    """The finished run that serves as refinery: one that is there, or a new one on ground truth."""
    config, rule = _resolve(config, data, device)
    run = finished_refinery(Path(config.runs), _identity(config, rule, data, None))
    if run and run.result:
        print(
            f"refinery: {run.folder}, top-1 {run.result['top1']:.2f} %, is finished and used as it is",
            flush=True,
        )
        return run
    print(
        f"refinery: {config.model} has no finished run on {data.name} at {rule.resolution} px; trained first",
        flush=True,
    )
    (run,) = _runs([config], data, None, device)
    print(flush=True)
    return run


def _runs(configs: Sequence[Config], data: ConvertedSet, refinery: Trained | None, device: torch.device) -> list[Run]:
    """Trains networks in their run folders, or continues them, or finds them finished; in the order of the configs."""
    runs: dict[str, Run] = {}
    unfinished: dict[object, list[Config]] = {}
    for config in configs:
        run = _existing(config, data, refinery, device)
        if run and run.result:
            print(
                f"{run.folder} is finished: top-1 {run.result['top1']:.2f} %, top-5 {run.result['top5']:.2f} %",
                flush=True,
            )
            runs[config.model] = run
        else:
            # Those that stand elsewhere (one was begun alone, say) cannot share their steps, nor those of other crops.
            place = checkpoint.place_of(run.weights) if run else (0, 0)
            shared = str([value for key, value in asdict(config).items() if key not in _OWN])
            unfinished.setdefault((place, shared), []).append(config)
    for together in unfinished.values():
        trainer = open_trainer(together, data, refinery, device)
        announce(trainer, refinery, asked=together[0].precision)
        for job, result in zip(trainer.jobs, trainer.run(), strict=True):
            runs[job.config.model] = _finish(trainer, job, result, refinery)
        if trainer.stopped:
            raise Interrupted(f"stopped after a finished run; to go on, type again:\n  {command_to_continue()}")
    return [runs[config.model] for config in configs]


def _existing(config: Config, data: ConvertedSet, refinery: Trained | None, device: torch.device) -> Run | None:
    config, rule = _resolve(config, data, device)
    identity = _identity(config, rule, data, refinery)
    run = read_run(_folder(config, data, identity))
    if run and run.identity != identity:
        raise TrainError(f"{run.folder}: holds a run with another configuration; give another OUT or remove the folder")
    return run


def open_trainer(
    configs: Sequence[Config], data: ConvertedSet, refinery: Trained | None, device: torch.device
) -> Trainer:
    """Builds what trains these networks together; it continues from the checkpoints in their folders."""
    jobs = []
    for each in configs:
        config, rule = _resolve(each, data, device)
        identity = _identity(config, rule, data, refinery)
        normalisation = models.normalisation(config.model)
        jobs.append(Job(config, _folder(config, data, identity), _build(config, data), normalisation, identity))
    labels = _label_source(config, rule, data, refinery, device)
    compiled = config.compile == "always" or (config.compile == "auto" and device.type == "cuda")
    return Trainer(jobs, data, rule, labels, device=device, compiled=compiled)


def _label_source(
    config: Config, rule: CropRule, data: ConvertedSet, refinery: Trained | None, device: torch.device
) -> LabelSource:
    wanted, autocast = config.labels, autocast_type(config.precision)
    if wanted.taxonomy:
        return Category(taxonomy_table(Path(wanted.taxonomy), data.class_names))
    if not refinery:
        return GroundTruth(len(data.class_names), wanted.smoothing)
    center = Pairing("center", rule.resolution) if wanted.per == "image" else None
    labels = Refinery(
        refinery.network,
        refinery.normalisation,
        bn=wanted.bn,
        resolution=_refinery_resolution(refinery, config, rule),
        center=center,
        columns=refinery.columns_of(data.class_names),
        dtype=autocast or torch.float32,
    )
    if wanted.per != "category":
        return labels
    loader = open_loader(
        data.beton("train"),
        resolution=rule.resolution,
        batch_size=config.batch,
        decoder=config.decoder,
        train=False,
        device=device,
        threads=config.threads,
        center_ratio=rule.center_ratio,
    )
    labels = labels.to(device).to(memory_format=torch.channels_last)
    return Category(visual_similarity(labels, loader, device=device, autocast=autocast))


def _folder(config: Config, data: ConvertedSet, identity: dict[str, Any]) -> Path:
    return Path(config.out) if config.out else Path(config.runs) / data.name / folder_name(identity)


def _build(config: Config, data: ConvertedSet) -> nn.Module:
    torch.manual_seed(config.seed)
    published = config.pretrained in models.HUBS
    network = models.build(config.model, len(data.class_names), pretrained=published)
    if config.pretrained and not published:
        left_out = load_into(network, load_weights(config.pretrained), name=config.model, strict_head=False)
        print(
            f"pre-trained weights from {config.pretrained}{f', except {left_out}' if left_out else ''}",
            flush=True,
        )
    return network


def _finish(trainer: Trainer, job: Job, result: dict[str, Any], refinery: Trained | None) -> Run:
    """Adds what the run's labels were worth, where that can be known, and writes its result."""
    if trainer.data.source_fingerprint == scenes_fingerprint():
        autocast = autocast_type(job.config.precision)
        result["crop_labels"] = label_quality(trainer.loader, trainer.labels, device=trainer.device, autocast=autocast)
    path = job.folder / "result.json"
    try:
        path.write_text(json.dumps(result, indent=1) + "\n")
    except OSError as error:
        raise TrainError(f"{path}: cannot be written ({error.strerror})") from None
    report(result, job.folder, refinery)
    return Run(job.folder, job.identity, result)


def _resolve(config: Config, data: ConvertedSet, device: torch.device) -> tuple[Config, CropRule]:
    """The configuration with what depends on the data and the device filled in, and its crop rule."""
    rule = _crop_rule(config, data)
    crop = CropConfig(scale=rule.scale, ratio=rule.ratio, flip=rule.flip, center_ratio=rule.center_ratio)
    precision = precision_on(device, config.precision)
    return replace(config, resolution=rule.resolution, crop=crop, precision=precision), rule


def _crop_rule(config: Config, data: ConvertedSet) -> CropRule:
    asked = {name: value for name, value in asdict(config.crop).items() if value is not None}
    if config.resolution:
        asked["resolution"] = config.resolution
    return replace(data.crop, **asked)


def _identity(config: Config, rule: CropRule, data: ConvertedSet, refinery: Trained | None) -> dict[str, Any]:
    """All that decides the weights a run ends with; how fast it gets there (decoder, threads, compiler) is left out."""
    pretrained = config.pretrained
    if pretrained and pretrained not in models.HUBS:
        pretrained = digest_of(Path(pretrained))
    labels = asdict(config.labels)
    if config.labels.taxonomy:
        labels["taxonomy"] = digest_of(Path(config.labels.taxonomy))
    identity = {
        "data": {"name": data.name, "fingerprint": data.fingerprint()},
        "model": config.model,
        "pretrained": pretrained,
        "refinery": {"network": refinery.name, "weights": refinery.digest()} if refinery else None,
        "labels": labels,
        "loss": asdict(config.loss),
        "ema": config.ema,
        "resolution_from": config.resolution_from,
        "jitter": config.jitter,
        "crop": asdict(rule),
        "resolution": rule.resolution,
        "epochs": config.epochs,
        "batch": config.batch,
        "copies": config.copies,
        "order": config.order,
        "optimizer": asdict(config.optimizer),
        "schedule": asdict(config.schedule),
        "precision": config.precision,
        "seed": config.seed,
    }
    # As JSON gives it back, so that it compares equal with what was read from a run's folder.
    return json.loads(json.dumps(identity))
