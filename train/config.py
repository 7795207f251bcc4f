"""The configuration of a run: recipes in YAML, overridden option by option.

`configure` makes a `Config` from options by their dotted names ("optimizer.lr"), and `parse` from the words of a
command line. It remembers them, so that `replace` can make another one, for which the recipe is applied again: it may
have other values for another network.
"""

import argparse
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import torch
import yaml
from jsonargparse import ArgumentParser

from command import said_of_options, with_underscores
from train import TrainError
from train import labels as kinds
from train.augment import AugmentConfig
from train.device import Precision
from train.distributed import Reduce
from train.labels import LabelsConfig
from train.labels.ground_truth import GroundTruthLabels
from train.labels.refinery import RefineryLabels
from train.recipe import dotted, read_recipe, read_yaml, without_empty_groups

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

# The most pixels per side of crops, as for the resolution of a converted set.
_MOST_PIXELS = 8192

_Own = TypeVar("_Own", bound="DataclassInstance")


@dataclass(frozen=True)
class OptimizerConfig:
    """How weights are updated.

    Args:
        kind: sgd, as in the papers; adamw, which learns faster in runs of a few minutes; or adamp, which ReLabel uses
            with CutMix (timm's, which waits for the device at each weight tensor)
        lr: learning rate for a batch of lr_batch; it is scaled in proportion for other batch sizes
        lr_batch: the batch size that lr is given for
        momentum: share of the last update that is kept, 0 to 1 (sgd)
        nesterov: look ahead along the momentum (sgd)
        weight_decay: L2 penalty on all weights, decoupled from the gradient in adamw and adamp
    """

    kind: Literal["sgd", "adamw", "adamp"] = "sgd"
    lr: float = 0.1
    lr_batch: int = 256
    momentum: float = 0.9
    nesterov: bool = False
    weight_decay: float = 0.0

    def __post_init__(self):
        if not 0 < self.lr < float("inf"):
            raise TrainError(f"optimizer.lr={self.lr}: must be above 0")
        if self.lr_batch < 1:
            raise TrainError(f"optimizer.lr_batch={self.lr_batch}: must be at least 1")
        if not 0 <= self.momentum < 1:
            raise TrainError(f"optimizer.momentum={self.momentum}: give a share from 0 to below 1")
        if self.kind == "sgd" and self.nesterov and not self.momentum:
            raise TrainError("optimizer.nesterov looks ahead along the momentum; give optimizer.momentum too")
        if self.weight_decay < 0:
            raise TrainError(f"optimizer.weight_decay={self.weight_decay}: must not be below 0")


@dataclass(frozen=True)
class ScheduleConfig:
    """The schedule of the learning rate.

    Args:
        kind: step multiplies it by gamma at each milestone; cosine takes it to 0, batch by batch
        milestones: shares of the run's length, for kind step
        gamma: the factor at a milestone
        warmup: epochs over which it first rises from 0; no more than a quarter of the run
    """

    kind: Literal["step", "cosine"] = "step"
    milestones: tuple[float, ...] = (0.70, 0.85)
    gamma: float = 0.1
    warmup: float = 0.0

    def __post_init__(self):
        if self.warmup < 0:
            raise TrainError(f"schedule.warmup={self.warmup}: must not be below 0")

    def factor(self, epoch: float, epochs: int) -> float:
        """The factor of the learning rate at a point of the run, in epochs from its start."""
        warmup = min(self.warmup, epochs / 4)
        if epoch < warmup:
            return epoch / warmup
        if self.kind == "cosine":
            done = (epoch - warmup) / (epochs - warmup)
            return float(0.5 * (1 + torch.cos(torch.tensor(torch.pi * done, dtype=torch.float64))))
        return float(self.gamma ** sum(epoch >= round(share * epochs) for share in self.milestones))


@dataclass(frozen=True)
class LossConfig:
    """How the student's output is compared with its labels.

    A crop of class y with label p, for which the student outputs q, has the loss
    weight(y) ((1 - truth) loss(p, q) + truth CE(y, q)), where CE is -log q[y] at temperature 1. A crop mixed from two
    has the mean of both images' losses, weighted by their shares, and a jittered one has the class of its image.

    Args:
        kind: soft, KL from label to output, as in the paper; hard, cross-entropy to the label's most likely class;
            reversed, KL from output to label; l2, the squared difference of probabilities
        temperature: both networks' logits are divided by this
        truth: the share of cross-entropy to the image's own label in the loss, 0 to below 1, for labels that are not
            the ground truth already
        balance: how much more weight classes with few images get, for unbalanced sets: the loss of a class with n
            images is multiplied by n ** -balance, over its mean (0: all images have the same weight; 1: all classes
            have; 0.5: in between, for sets whose rarest classes have only a few images). The crops of an epoch stay the
            same
    """

    kind: Literal["soft", "hard", "reversed", "l2"] = "soft"
    temperature: float = 1.0
    truth: float = 0.0
    balance: float = 0.0

    def __post_init__(self):
        if not 0 <= self.truth < 1:
            raise TrainError(
                f"loss.truth={self.truth:g}: give a share from 0 to below 1; for the ground truth alone, leave out the "
                "refinery"
            )
        if not 0 <= self.balance <= 1:
            raise TrainError(f"loss.balance={self.balance:g}: must be 0 to 1")
        if not self.temperature > 0:
            raise TrainError(f"loss.temperature={self.temperature}: must be above 0")


@dataclass(frozen=True)
class CropConfig:
    """How crops are chosen; options that are not given fit the data set.

    Args:
        scale: lowest and highest share of the image's area in a training crop
        ratio: lowest and highest width over height of a training crop
        flip: mirror half of the training crops
        center_ratio: side of the validation crop as a share of the image's shorter side
    """

    scale: tuple[float, float] | None = None
    ratio: tuple[float, float] | None = None
    flip: bool | None = None
    center_ratio: float | None = None

    def __post_init__(self):
        scale, ratio = self.scale, self.ratio
        if scale and not 0 < scale[0] <= scale[1] <= 1:
            raise TrainError(f"crop.scale={list(scale)}: give two shares of the area, the lower first, up to 1")
        if ratio and not 0 < ratio[0] <= ratio[1]:
            raise TrainError(f"crop.ratio={list(ratio)}: give two ratios of width to height, the lower first")
        if self.center_ratio is not None and not 0 < self.center_ratio <= 1:
            raise TrainError(f"crop.center_ratio={self.center_ratio}: give a share of the shorter side, up to 1")


@dataclass(frozen=True)
class Config:
    """Trains an image classifier on the labels that a refinery gives to each crop, or on the ground truth.

    The defaults here are those of options that the recipe does not set (`configure`).

    Args:
        model: the network to train: alexnet, mobilenet, resnet18, ..., timm:NAME or torchvision:NAME; several,
            separated by spaces, train together on one refinery's labels
        refinery: the network that labels the crops: its name (trained first if it has no finished run on this data), a
            run folder, NAME:FILE, or timm:NAME:pretrained or torchvision:NAME:pretrained for published weights
            (default: none, the images' own labels). It may know more classes than the data has; the data's are used
        pretrained: start from a file of weights, or from those that timm or torchvision publish for its network
        data: a folder of images or an archive of one, a .csv of file and class, a folder of ImageNet's tars or of
            Parquet files, a converted set, or scenes, cifar10, svhn, imagenette (docs/images.md)
        recipe: a recipe's name or YAML file (default: quick on scenes, fine-tune with pretrained, else label-refinery)
        epochs: passes over the training images (default: the recipe's, or 200 if it sets none)
        resolution: pixels per side of the crops (default: what fits the data)
        batch: crops in a step (default: the recipe's, or 256 if it sets none)
        copies: crops of each image in an epoch, from one decoding; the epoch has that many times the steps
        order: random, or, for files larger than memory, quasi-random, which draws from some pages of the file at a time
        seed: seed of all random numbers
        out: the run's folder (default: one named by the configuration, below runs/)
        runs: the folder of all run folders
        save_minutes: minutes between checkpoints within an epoch; the most that a kill costs
        device: auto, cpu, cuda or cuda:N
        decoder: auto, ffcv, dali or torchvision
        threads: number that decode, and number that compute on the CPU, in each process (default: one per processor
            that the process may use within its container's limit, divided among the processes of a machine; for
            computing also OMP_NUM_THREADS). On a CPU, the last bits of weights depend on how many compute
        resident: on a GPU, the share of its free memory that a set stored as blocks may take; a larger set stays on the
            host
        precision: bf16 or fp16 autocast, tf32 or fp32; if the device has no units for it, another is used (auto: the
            first of bf16, fp16 and fp32 that it has)
        compile: compile the step; auto does so on CUDA only (on a CPU it takes a minute or two and seldom pays off)
        cuda_graphs: on a GPU, record the whole step as one CUDA graph for each resolution and replay it, which avoids
            launching its kernels one by one; a step that cannot be recorded runs without it, after a notice (not yet
            measured)
        deterministic: on a GPU, the same bits in each run of the same command: algorithms are not selected by timing,
            and those whose sums depend on timing are not used, which makes steps slower (not yet measured); an operator
            without a deterministic algorithm ends the run. On CPUs this option is not needed
        replicas: parts of a batch, each with its own batch statistics, as on its own GPU; several devices (--gpus N)
            divide them among themselves (default: the number of devices)
        reduce: how the gradients of several devices are added: sum; bf16, rounded for the transfer, which halves it;
            tree, in an order that makes the weights the same, bit for bit, for any number of devices
        optimizer: how weights are updated
        schedule: the schedule of the learning rate
        labels: how labels are made
        loss: how outputs are compared with labels
        ema: decay per step of an exponential moving average of the weights, which is then scored (0: none)
        resolution_from: crops in the first third of the run have this share of resolution; over the second third they
            grow to all of it, in steps of 16 pixels (1: constant)
        jitter: eta of adversarial jitter, 1 in the paper: each crop is used a second time, changed so that student and
            refinery disagree more; for students that are already trained (pretrained)
        crop: how crops are chosen
        augment: further augmentation of crops
    """

    model: str = "mobilenet"
    refinery: str | None = None
    pretrained: str | None = None
    data: str = "scenes"
    recipe: str | None = None
    epochs: int = 200
    resolution: int | None = None
    batch: int = 256
    copies: int = 1
    order: Literal["random", "quasi-random"] = "random"
    seed: int = 0
    out: str | None = None
    runs: str = "runs"
    save_minutes: float = 10.0
    device: str = "auto"
    decoder: str = "auto"
    threads: int | None = None
    resident: float = 0.5
    precision: Precision = "auto"
    compile: Literal["auto", "always", "never"] = "auto"
    cuda_graphs: bool = False
    deterministic: bool = False
    replicas: int | None = None
    reduce: Reduce = "sum"
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    labels: LabelsConfig = field(default_factory=LabelsConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    ema: float = 0.0
    resolution_from: float = 1.0
    jitter: float = 0.0
    crop: CropConfig = field(default_factory=CropConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)

    def __post_init__(self):
        for option, value in dotted(asdict(self)).items():
            if value == "":
                raise TrainError(f"{option} is empty: give it a value or leave it out")
        for name in ("epochs", "resolution", "batch", "copies", "threads", "replicas"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise TrainError(f"{name}={value}: must be at least 1")
        if self.resolution and self.resolution > _MOST_PIXELS:
            raise TrainError(f"resolution={self.resolution}: must be at most {_MOST_PIXELS} pixels per side")
        if self.batch % (self.replicas or 1):
            raise TrainError(f"batch={self.batch}: is not a multiple of replicas={self.replicas}; take one")
        if self.save_minutes <= 0:
            raise TrainError(f"save_minutes={self.save_minutes:g}: must be above 0")
        if not 0 <= self.resident <= 1:
            raise TrainError(f"resident={self.resident:g}: give a share of the device's memory, 0 to 1")
        if not 0 <= self.ema < 1:
            raise TrainError(f"ema={self.ema}: give a decay from 0 to below 1, as 0.999")
        if not 0 < self.resolution_from <= 1:
            raise TrainError(f"resolution_from={self.resolution_from}: give a share of resolution, above 0 and up to 1")
        if self.jitter < 0:
            raise TrainError(f"jitter={self.jitter}: must not be below 0")
        if self.jitter and (self.augment.colours or self.augment.mixes):
            raise TrainError(
                f"jitter={self.jitter:g}: moves crops as they were cut; leave out {self.augment.describe()} (augment)"
            )

    @property
    def changed(self) -> set[str]:
        """The options that are not at their defaults, by their dotted names."""
        return {option for option, value in dotted(asdict(self)).items() if value != _defaults()[option]}

    @property
    def given(self) -> dict[str, Any]:
        """The options that were given, by their dotted names, without those added by recipe and defaults.

        For a configuration that was not made by `configure`, all options.
        """
        given = self.__dict__.get("_given")
        return dotted(asdict(self)) if given is None else given

    def replace(self, options: Mapping[str, Any]) -> "Config":
        """This configuration with other options, by their dotted names. Raises TrainError as `configure` does."""
        return configure(self.given | dict(options))

    def reset(self, options: Iterable[str]) -> "Config":
        """This configuration with these options at their defaults, regardless of the recipe."""
        return self.replace({option: _defaults()[option] for option in options})

    def on_ground_truth(self) -> "Config":
        """The same configuration with the images' own labels instead of any others."""
        return self.reset(kinds.foreign_options(GroundTruthLabels))

    def learning_from(self, refinery: str) -> "Config":
        """The same configuration with the labels of this refinery instead of any others."""
        return self.reset(kinds.foreign_options(RefineryLabels)).replace({"refinery": refinery})

    def as_refinery(self, model: str, options: Mapping[str, Any]) -> "Config":
        """The configuration to train the refinery of such runs, with these options.

        That is on ground truth, with the recipe's section for refineries.
        """
        return configure(self.on_ground_truth().given | {"model": model} | dict(options), as_refinery=True)


@cache
def _defaults() -> dict[str, Any]:
    return dotted(asdict(Config()))


def configure(options: Mapping[str, Any], *, as_refinery: bool = False) -> Config:
    """The configuration given by these options, by their dotted names; others come from the recipe.

    as_refinery: the network is to be a refinery, for which a recipe may have its own section. Raises TrainError for
    unknown options, values of the wrong type, and meaningless combinations.
    """
    options = without_empty_groups(options, _defaults())
    recipe = options.get("recipe") or default_recipe(options.get("data"), options.get("pretrained"))
    values = read_recipe(recipe, options.get("model") or Config.model, _defaults(), as_refinery=as_refinery)
    # Checked separately, so that the message names the recipe for a wrong value.
    _typed(values, f"recipe={recipe}: ")
    typed = _typed(values | options | {"recipe": recipe})
    config = Config(**vars(_config_parser().instantiate(typed)))
    # Not a field: it records how the configuration was made, not its values.
    object.__setattr__(config, "_given", options)
    return config


def _typed(options: Mapping[str, Any], source: str = "") -> Any:
    """The options with values converted to their types. Raises TrainError, whose message begins with `source`."""
    try:
        return _config_parser().parse_object(_nested(options))
    except argparse.ArgumentError as error:
        raise TrainError(source + said_of_options(error, list(_defaults()))) from None


def parse(words: Sequence[str]) -> Config:
    """The configuration given by the words of a command line; only for commands.

    --help and --print_config print and end the program; bad words raise argparse.ArgumentError or TrainError.
    """
    about = str(Config.__doc__).partition("\n")[0]
    return parse_both(words, _Nothing, prog="python -m train", about=about)[0]


# Options without a value.
PLAN_FLAGS = ("--dry_run", "--dry-run")


@dataclass(frozen=True)
class Planned:
    """Options of the plan.

    Args:
        dry_run: end after the plan: what is to be trained, for how long, and what is written (images are converted
            for it, and a few steps timed)
    """

    dry_run: bool = False


def parse_planned(words: Sequence[str]) -> tuple[Config, Planned]:
    """Like `parse`, with the options of the plan."""
    about = str(Config.__doc__).partition("\n")[0]
    return parse_both(words, Planned, prog="python -m train", about=about)


def parse_both(
    words: Sequence[str],
    own: type[_Own],
    *,
    prog: str,
    about: str,
    out: str | None = None,
    several_devices: bool = True,
) -> tuple[Config, _Own]:
    """Like `parse`, for a command that also has its own options, the fields of the dataclass `own`.

    prog, about: name and description of the command in --help. out: help of --out, if it is not a run's folder; "" for
    a command that does not take it. several_devices: it supports them (train.launch).
    """
    about += " A recipe's values replace the defaults listed here; --print_config shows those that apply."
    if several_devices:
        # train.launch takes these two before the parser sees the rest.
        about += (
            " --gpus N starts N processes, one per device; --max_restarts K restarts them, up to K times, after one "
            "was killed or failed."
        )
    parser = ArgumentParser(prog=prog, description=about, exit_on_error=False, print_config=None)
    parser.add_argument("--config", action="config", help="a YAML file of options; options after it override it")
    parser.add_argument("--print_config", action="store_true", help="print all options with their values, and end")
    parser.add_class_arguments(own, as_group=False)
    if out is None:
        parser.add_class_arguments(Config, as_group=False)
    else:
        parser.add_argument("--out", type=str | None, help=out or argparse.SUPPRESS)
        parser.add_class_arguments(Config, as_group=False, skip={"out"})
    words = with_underscores(list(words))
    _check_config_file(words)
    try:
        given = dict(parser.parse_args(words, defaults=False).items())
    except argparse.ArgumentError as error:
        known = [
            *_defaults(),
            *(option.name for option in fields(own)),
            "config",
            "print_config",
            "gpus",
            "max_restarts",
        ]
        raise TrainError(said_of_options(error, known)) from None
    print_config = given.pop("print_config", False)
    given.pop("config", None)
    own_names = [option.name for option in fields(own)]
    owned = {name: given.pop(name) for name in own_names if name in given}
    config = configure(given)
    if print_config:
        print(config_text(config), end="")
        sys.exit(0)
    return config, own(**owned)


def _check_config_file(words: Sequence[str]) -> None:
    """Raises TrainError if --config does not name a file of options."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    first.add_argument("--config")
    file = first.parse_known_args(words)[0].config
    if file:
        read_yaml(Path(file))


@dataclass(frozen=True)
class _Nothing:
    """No own options."""


@cache
def _config_parser() -> ArgumentParser:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(Config, as_group=False)
    return parser


def option_words(options: Mapping[str, Any]) -> list[str]:
    """Options by their dotted names as words of a command line."""
    return [
        word
        for option, value in options.items()
        for word in (f"--{option}", value if isinstance(value, str) else json.dumps(value))
    ]


def config_text(config: Config) -> str:
    """The configuration as YAML, which --config reads."""
    return yaml.safe_dump(json.loads(json.dumps(asdict(config))), sort_keys=False)


def default_recipe(data: str | None, pretrained: str | None) -> str:
    """The default recipe. data, pretrained: as in Config, None if not given."""
    if pretrained:
        return "fine-tune"
    return "quick" if data in (None, Config.data) else "label-refinery"


def _nested(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options by dotted names as mappings within mappings."""
    nested: dict[str, Any] = {}
    for option, value in options.items():
        *groups, name = option.split(".")
        inner = nested
        for group in groups:
            inner = inner.setdefault(group, {})
        inner[name] = value
    return nested
