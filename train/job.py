"""A run with everything filled in, used from the first step to the result."""

import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

import models
from data import decoders
from data.convert import ensure_converted
from data.decoders.prefetch import default_threads
from data.loader import Loader, open_loader
from data.plan import CropRule, seed_of_generation
from data.sets import ConvertedSet, find_set
from models.trained import digest_of, names_network_alone
from models.weights import load_weights
from train import TrainError
from train import labels as kinds
from train.augment import Augment
from train.checks import check_batch, check_folder, check_memory
from train.config import Config, CropConfig, OptimizerConfig, ScheduleConfig
from train.device import autocast_type, device_named, precision_on
from train.distributed import Group, group
from train.fit import fit_line, fitted
from train.labels.refinery import RefineryLabels
from train.labels.source import Labels, LabelSource
from train.runs import Run, folder_name, read_run

# Crops grow in steps of this many pixels: each size is compiled once, so there should be few.
_RESOLUTION_STEP = 16


@dataclass(frozen=True)
class Job:
    """One network's run.

    config: the requested options, with resolution, crop and precision filled in. asked_precision: as the user gave it.
    data, crop: the images, and how they are cropped. labels: what the network learns from. device: where it trains.
    seed, crop_seed: of the first weights and of the crops; equal, unless the labels were made for crops of another
    seed. identity: everything that determines the final weights, as read back from JSON. folder: the run's. fit: how it
    differs from the recipe, whose numbers do not fit the set, in one line; None if it does not.
    """

    config: Config
    asked_precision: str
    data: ConvertedSet
    crop: CropRule
    labels: Labels
    device: torch.device
    seed: int
    crop_seed: int
    group: Group
    identity: dict[str, Any]
    folder: Path
    fit: str | None = None

    @property
    def resolution(self) -> int:
        """Pixels per side of the crops, once they have grown."""
        assert self.config.resolution
        return self.config.resolution

    @property
    def resolutions(self) -> list[int]:
        """Pixels per side of the crops of all epochs, each size once, in ascending order."""
        return _resolutions(self.config, self.resolution)

    def resolution_in(self, epoch: int) -> int:
        """Pixels per side of the crops in an epoch (0, 1, ...)."""
        return growing_resolution(epoch, self.config.epochs, self.config.resolution_from, self.resolution)

    def plan_epoch(self, epoch: int) -> int:
        """The epoch of the plan (data.plan) whose crops the run sees in an epoch (0, 1, ...)."""
        plan = self.labels.plan
        return epoch % plan.epochs if plan else epoch

    @property
    def batch(self) -> int:
        """Crops in a step, of all devices."""
        return self.config.batch

    @property
    def replicas(self) -> int:
        """Number of parts of a batch, each with its own batch statistics."""
        assert self.config.replicas
        return self.config.replicas

    @property
    def autocast(self) -> torch.dtype | None:
        return autocast_type(self.config.precision)

    @property
    def compiled(self) -> bool:
        """Whether the step is to run compiled."""
        return self.config.compile == "always" or (self.config.compile == "auto" and self.device.type == "cuda")

    @property
    def augment(self) -> Augment | None:
        """The augmentation of its crops on the device; None for none."""
        config = self.config.augment
        if not (config.colours or config.mixes):
            return None
        return Augment(config, seed=self.seed, epochs=self.config.epochs, device=self.device)

    @property
    def loading(self) -> dict[str, Any]:
        """The arguments that all loaders of the run have in common."""
        return {
            "decoder": self.config.decoder,
            # The processes of a machine share its processors.
            "threads": self.config.threads or max(default_threads() // self.group.beside, 1),
            "resident": self.config.resident,
            "device": self.device,
        }

    def open_crops(
        self, labels: LabelSource | None = None, *, resolution: int | None = None, drop_last: bool = True
    ) -> Loader:
        """The loader of its training crops, with further crops as these labels need them.

        resolution: pixels per side (default: that of the last epochs). drop_last: drop images that do not fill a batch.
        """
        return open_loader(
            self.data.beton("train"),
            resolution=resolution or self.resolution,
            batch_size=self.batch // self.group.world,
            seed=self.crop_seed,
            copies=self.config.copies,
            order=self.config.order,
            rank=self.group.rank,
            world=self.group.world,
            crop=self.crop,
            drop_last=drop_last,
            paired=labels.pairings if labels else (),
            fetch=labels.fetch if labels else None,
            **self.loading,
        )

    def saved_run(self) -> Run | None:
        """The run in its folder, finished or not, or None. Raises TrainError if it has another configuration."""
        run = read_run(self.folder)
        if run and run.identity != self.identity:
            if run.identity | {"epochs": self.config.epochs} == self.identity:
                raise TrainError(
                    f"{self.folder}: holds this run with {run.identity['epochs']} epochs, over which its learning rate "
                    f"falls; one of {self.config.epochs} starts from the beginning: give another OUT (with "
                    f"PRETRAINED={run.weights} it starts from its weights)"
                )
            raise TrainError(
                f"{self.folder}: holds a run with another configuration; give another OUT or remove the folder"
            )
        return run


def of_other_length(job: Job) -> Run | None:
    """A finished run beside a job's folder that differs only in its number of epochs."""
    for folder in sorted(job.folder.parent.glob(f"{job.folder.name.rpartition('-')[0]}-*")):
        with suppress(TrainError):
            run = read_run(folder)
            same = run and run.result and run.identity != job.identity
            if run and same and run.identity | {"epochs": job.config.epochs} == job.identity:
                return run
    return None


def check(configs: Sequence[Config]) -> tuple[ConvertedSet, list[Labels]]:
    """Raises for configurations that cannot be run, before anything slow begins.

    configs: all on the same data. Returns the data, converted now if necessary, and the labels of each configuration,
    except those whose refinery is still to be trained. Raises DataError, ModelError or TrainError.
    """
    for config in configs:
        decoders.choose(config.decoder, device_named(config.device))
        kinds.check(config)
        _check_network(config)
    found = find_set(configs[0].data)
    labels = find_labels([config for config in configs if not needs_refinery(config)], found.class_names)
    for config in configs:
        check_folder(Path(config.out or config.runs), "the run")
        if not isinstance(found, ConvertedSet):
            # Before hours of converting; checked again afterwards, since some images may turn out to be damaged.
            images, world = len(found.source.train.labels), group().world
            filled = fitted(config, images, config.replicas or world)
            check_batch(filled, images, config.data, world)
            check_memory(filled, config.resolution or 0, device_named(config.device), world)
    # By one process if there are several; the others find it done.
    data = group().in_turn(lambda: ensure_converted(find_set(configs[0].data) if group().rank else found))
    known = iter(labels)
    for config in configs:
        its = None if needs_refinery(config) else next(known)
        if its:
            its.check_data(data)
        for side in _resolutions(config, _resolution(config, data, its)):
            models.check_resolution(config.model, side)
    return data, labels


def find_labels(configs: Sequence[Config], class_names: Sequence[str]) -> list[Labels]:
    """The labels of each configuration for data of these classes; equal ones are read once.

    Raises TrainError and ModelError as Labels.find does.
    """

    def asked(config: Config) -> Config:
        # Students of one refinery may differ only in this.
        return replace(config, model="any", optimizer=OptimizerConfig(), schedule=ScheduleConfig())

    found: dict[Config, Labels] = {}
    for config in configs:
        if asked(config) not in found:
            found[asked(config)] = kinds.find(config, class_names)
    return [found[asked(config)] for config in configs]


def needs_refinery(config: Config) -> bool:
    """Whether the refinery is given only by its network: then a finished run of it is used, or it is trained first."""
    return issubclass(kinds.kind_of(config), RefineryLabels) and names_network_alone(str(config.refinery))


def resolve(config: Config, data: ConvertedSet, labels: Labels, together: Group | None = None) -> Job:
    """The run of a configuration that `check` has passed, on these data and with these labels.

    together: the processes that share it (default: all).
    """
    device = device_named(config.device)
    asked = {name: value for name, value in asdict(config.crop).items() if value is not None}
    plan = labels.plan
    # Validation crops follow the data, whatever crops the labels were made for.
    usual = replace(plan.crop, center_ratio=data.crop.center_ratio) if plan else data.crop
    crop = replace(usual, **asked)
    seed = seed_of_generation(config.seed, labels.generation)
    together = together or group()
    replicas = config.replicas or together.world
    _check_replicas(config, replicas, together)
    images = data.num_images("train")
    filled = replace(
        fitted(config, images, replicas),
        replicas=replicas,
        resolution=_resolution(config, data, labels),
        crop=CropConfig(**asdict(crop)),
        precision=precision_on(device, config.precision),
    )
    identity = _identity(filled, data, crop, labels)
    folder = Path(config.out) if config.out else Path(config.runs) / data.name / folder_name(identity)
    return Job(
        config=filled,
        asked_precision=config.precision,
        data=data,
        crop=crop,
        labels=labels,
        device=device,
        seed=seed,
        crop_seed=plan.seed if plan else seed,
        group=together,
        identity=identity,
        folder=folder,
        fit=fit_line(config, filled, images),
    )


def _resolution(config: Config, data: ConvertedSet, labels: Labels | None) -> int:
    """Pixels per side of a run's crops: as given, else those of its labels, else what fits the data."""
    plan = labels.plan if labels else None
    return config.resolution or (plan.resolution if plan else data.resolution)


def _identity(config: Config, data: ConvertedSet, crop: CropRule, labels: Labels) -> dict[str, Any]:
    """Everything that determines the final weights of a run.

    Except for what affects only rounding (decoder, threads, compiler, device): see train.runs.record.
    """
    pretrained = config.pretrained
    if pretrained and pretrained not in models.HUBS:
        pretrained = digest_of(Path(pretrained))
    identity: dict[str, Any] = {
        "data": {"name": data.name, "fingerprint": data.fingerprint},
        "model": config.model,
        "pretrained": pretrained,
        "refinery": labels.refinery,
        "generation": labels.generation,
        "labels": kinds.identity_of(labels),
        "loss": asdict(config.loss),
        "ema": config.ema,
        "resolution_from": config.resolution_from,
        "jitter": config.jitter,
        "augment": asdict(config.augment),
        "crop": asdict(crop),
        "resolution": config.resolution,
        "epochs": config.epochs,
        "batch": config.batch,
        "copies": config.copies,
        "order": config.order,
        "optimizer": asdict(config.optimizer),
        "schedule": asdict(config.schedule),
        "precision": config.precision,
        "seed": config.seed,
    }
    # So that runs from before this option keep their identity.
    if not (config.augment.colours or config.augment.mixes):
        del identity["augment"]
    for name in ("truth", "balance"):
        if not identity["loss"][name]:
            del identity["loss"][name]
    if config.replicas and config.replicas > 1:
        identity |= {"replicas": config.replicas, "reduced": "bf16" if config.reduce == "bf16" else "fp32"}
    # As read back from JSON, so that it compares equal with that of a run's folder.
    return json.loads(json.dumps(identity))


def growing_resolution(epoch: int, epochs: int, share: float, last: int) -> int:
    """Pixels per side in an epoch (0, 1, ...) of a run whose crops grow from `share` of `last` to `last`.

    They stay small for the first third of the run and grow in the second, in steps of 16 px.
    """
    if share == 1:
        return last
    first = min(max(round(share * last / _RESOLUTION_STEP), 1) * _RESOLUTION_STEP, last)
    grown = min(max(3 * epoch / epochs - 1, 0.0), 1.0)
    return first + int(grown * (last - first) / _RESOLUTION_STEP) * _RESOLUTION_STEP if grown < 1 else last


def _resolutions(config: Config, last: int) -> list[int]:
    share, epochs = config.resolution_from, config.epochs
    return sorted({growing_resolution(epoch, epochs, share, last) for epoch in range(epochs)})


def _check_replicas(config: Config, replicas: int, together: Group) -> None:
    if replicas % together.world:
        raise TrainError(
            f"replicas={replicas}: cannot be divided evenly among {together.world} devices; take a multiple of that"
        )
    if config.batch % replicas:
        raise TrainError(f"batch={config.batch}: is not a multiple of the number of replicas, {replicas}; take one")


def _check_network(config: Config) -> None:
    models.normalisation(config.model)  # raises for an unknown name
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
