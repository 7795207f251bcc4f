"""The configuration of a run: recipes in YAML, overridden option by option on the command line."""

import argparse
import json
import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import yaml

from data.command import fail, run_command
from train import TrainError
from train.device import Precision

# Each resolution on the way up compiles once, so there are not many.
_RESOLUTION_STEP = 16

RECIPES = Path(__file__).parent / "recipes"


@dataclass
class OptimizerConfig:
    """How weights move.

    Args:
        kind: sgd, as in the papers, or adamw, which learns faster where a run is only minutes long
        lr: learning rate for a batch of lr_batch; other batches scale it in proportion
        lr_batch: the batch that lr is meant for
        momentum: share of the last move that is kept, 0 to 1 (sgd)
        nesterov: look ahead along the momentum (sgd)
        weight_decay: L2 penalty on all weights, decoupled from the gradient in adamw
    """

    kind: Literal["sgd", "adamw"] = "sgd"
    lr: float = 0.1
    lr_batch: int = 256
    momentum: float = 0.9
    nesterov: bool = False
    weight_decay: float = 0.0


@dataclass
class ScheduleConfig:
    """How the learning rate falls.

    Args:
        kind: step multiplies it by gamma at each milestone; cosine takes it to 0, batch by batch
        milestones: shares of the run's length, for kind step
        gamma: what a milestone multiplies by
        warmup: epochs over which it first rises from 0
    """

    kind: Literal["step", "cosine"] = "step"
    milestones: tuple[float, ...] = (0.70, 0.85)
    gamma: float = 0.1
    warmup: float = 0.0

    def factor(self, epoch: float, epochs: int) -> float:
        """What the learning rate is multiplied by at a point of the run, in epochs from its start."""
        if epoch < self.warmup:
            return epoch / self.warmup
        if self.kind == "cosine":
            done = (epoch - self.warmup) / max(epochs - self.warmup, 1e-9)
            return float(0.5 * (1 + torch.cos(torch.tensor(torch.pi * done, dtype=torch.float64))))
        return float(self.gamma ** sum(epoch >= round(share * epochs) for share in self.milestones))


# What a report says of `labels.per`, behind the name of the refinery.
PER_WORDS = {"crop": "", "image": ", one an image", "category": ", one a category"}


@dataclass
class LabelsConfig:
    """What the labels are made of.

    Args:
        smoothing: without a refinery, the share of each label spread over all classes, 0 to 1
        bn: the refinery's batch normalisation uses the statistics of the batch (as the paper does) or its running
            ones, which is faster, since they are folded into the convolutions
        resolution: pixels a side at which the refinery sees the crops; fewer are faster, and published weights are at
            their best at what they were trained at (default: as the student, if the refinery takes that size)
        per: what has a label of its own: each crop, as in the paper; each image, whose central crop the refinery labels
            once for all its crops; or each category, whose label is the refinery's mean over its images
        taxonomy: without a refinery, a file of WordNet's is-a relation ("parent child" lines): each category's label
            is its similarity to all (Wu and Palmer)
    """

    smoothing: float = 0.0
    bn: Literal["batch", "running"] = "batch"
    resolution: int | None = None
    per: Literal["crop", "image", "category"] = "crop"
    taxonomy: str | None = None


@dataclass
class LossConfig:
    """How the student's output is compared with the refinery's.

    Args:
        kind: soft, KL from label to output, as in the paper; hard, cross-entropy to the label's likeliest class;
            reversed, KL from output to label; l2, the squared difference of probabilities
        temperature: what both networks' logits are divided by
    """

    kind: Literal["soft", "hard", "reversed", "l2"] = "soft"
    temperature: float = 1.0


@dataclass
class CropConfig:
    """Where crops lie; what is left out fits the data set.

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


@dataclass
class Config:
    """Trains an image classifier, from the labels that a refinery gives to each crop or from the ground truth.

    Args:
        model: the network to train: alexnet, mobilenet, resnet18, ..., timm:NAME or torchvision:NAME; several, with
            spaces between them, train together on one refinery's labels
        refinery: who labels the crops: a network's name (trained first if it has no finished run on this data),
            a run folder, NAME:FILE, or timm:NAME:pretrained or torchvision:NAME:pretrained for published weights;
            left out: the images' own labels. Of a refinery that knows more classes than the data has, those are used
        pretrained: start from a file of weights, or from those that timm or torchvision publish for its network
        data: a folder of images, a converted set, or scenes, cifar10, svhn, imagenette
        recipe: a recipe's name or YAML file (default: quick on scenes, fine-tune with pretrained, else label-refinery)
        epochs: passes over the training images
        resolution: pixels a side of the crops (default: what fits the data)
        batch: crops in a step
        copies: crops of each image in an epoch, from one decoding; the epoch has that many times the steps
        order: random, or for files larger than memory quasi-random, which draws from some pages of the file at a time
        seed: start of every random number
        out: the run's folder (default: one of its own below runs/)
        runs: where run folders lie
        device: auto, cpu, cuda or cuda:N
        decoder: auto, ffcv, dali or torchvision
        threads: decoding threads (default: one a processor)
        precision: bf16 or fp16 autocast, tf32 or fp32; what the device has no units for is replaced by what it has
            (auto: the first of bf16, fp16 and fp32 that it has)
        compile: compiles the step; auto does so on CUDA only (on a CPU it costs a minute or two first and seldom pays)
        cuda_graphs: record the compiled step as CUDA graphs, for networks so small that launching kernels takes longer
            than running them
        optimizer: how weights move
        schedule: how the learning rate falls
        labels: what the labels are made of
        loss: how outputs are compared with labels
        ema: decay a step of an exponential moving average of the weights, which is then what is scored (0: none)
        resolution_from: the share of resolution at which crops are small in the first third of the run; over the second
            third they grow to all of it, in steps of 16 px (1: the same throughout)
        jitter: eta of adversarial jitter, 1 in the paper: each crop is trained on once more, moved to where student and
            refinery disagree more; for students that are trained already (pretrained)
        crop: where crops lie
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
    device: str = "auto"
    decoder: str = "auto"
    threads: int | None = None
    precision: Precision = "auto"
    compile: Literal["auto", "always", "never"] = "auto"
    cuda_graphs: bool = False
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    labels: LabelsConfig = field(default_factory=LabelsConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    ema: float = 0.0
    resolution_from: float = 1.0
    jitter: float = 0.0
    crop: CropConfig = field(default_factory=CropConfig)

    def __post_init__(self):
        positive = {"epochs": self.epochs, "batch": self.batch, "copies": self.copies}
        positive["optimizer.lr_batch"] = self.optimizer.lr_batch
        for name, value in positive.items():
            if value < 1:
                raise TrainError(f"{name}={value}: must be at least 1")
        if not 0 <= self.labels.smoothing < 1:
            raise TrainError(f"labels.smoothing={self.labels.smoothing}: give a share from 0 to below 1")
        if self.refinery and self.labels.smoothing:
            raise TrainError("labels.smoothing is for ground truth; a refinery's labels are soft already")
        if not self.loss.temperature > 0:
            raise TrainError(f"loss.temperature={self.loss.temperature}: must be above 0")
        if not 0 <= self.ema < 1:
            raise TrainError(f"ema={self.ema}: give a decay from 0 to below 1, as 0.999")
        if not 0 < self.resolution_from <= 1:
            raise TrainError(f"resolution_from={self.resolution_from}: give a share of resolution, above 0 and up to 1")
        self._check_optimizer()
        self._check_crop()
        if self.jitter < 0:
            raise TrainError(f"jitter={self.jitter}: must not be below 0")
        if self.labels.taxonomy and (self.refinery or self.labels.smoothing):
            raise TrainError("labels.taxonomy takes the place of a refinery and of labels.smoothing; give one of them")
        if not (self.refinery or self.labels.taxonomy) and self.loss != LossConfig():
            raise TrainError("loss is for soft labels; give a refinery too")
        if not self.refinery:
            for name, given in {
                "labels.resolution": self.labels.resolution,
                "labels.per": self.labels.per != "crop",
                "jitter": self.jitter,
            }.items():
                if given:
                    raise TrainError(f"{name} is for a refinery's labels; give a refinery too")
        if self.jitter and self.labels.per != "crop":
            raise TrainError("jitter needs a label for every crop; leave labels.per out")
        if self.labels.per == "category" and self.labels.bn == "batch":
            # The images of one class come one after the other: their own statistics would take away what they share.
            raise TrainError("labels.per=category needs labels.bn=running, as in the paper")
        if self.jitter and len(self.model.split()) > 1:
            raise TrainError("jitter moves crops for one student; name one model")
        if self.jitter and not self.pretrained:
            raise TrainError("jitter is for a student that is trained already; name its weights with pretrained")
        if self.refinery and self.labels.bn == "batch" and self.batch == 1:
            raise TrainError(
                "batch=1: a refinery with batch statistics needs more than one crop; use labels.bn=running"
            )

    def _check_optimizer(self) -> None:
        given = self.optimizer
        if not 0 < given.lr < float("inf"):
            raise TrainError(f"optimizer.lr={given.lr}: must be above 0")
        if not 0 <= given.momentum < 1:
            raise TrainError(f"optimizer.momentum={given.momentum}: give a share from 0 to below 1")
        if given.kind == "sgd" and given.nesterov and not given.momentum:
            raise TrainError("optimizer.nesterov looks ahead along the momentum; give optimizer.momentum too")
        if given.weight_decay < 0:
            raise TrainError(f"optimizer.weight_decay={given.weight_decay}: must not be below 0")
        if self.schedule.warmup < 0:
            raise TrainError(f"schedule.warmup={self.schedule.warmup}: must not be below 0")

    def _check_crop(self) -> None:
        crop = self.crop
        if crop.scale and not 0 < crop.scale[0] <= crop.scale[1] <= 1:
            raise TrainError(f"crop.scale={list(crop.scale)}: give two shares of the area, the lower first, up to 1")
        if crop.ratio and not 0 < crop.ratio[0] <= crop.ratio[1]:
            raise TrainError(f"crop.ratio={list(crop.ratio)}: give two ratios of width to height, the lower first")
        if crop.center_ratio is not None and not 0 < crop.center_ratio <= 1:
            raise TrainError(f"crop.center_ratio={crop.center_ratio}: give a share of the shorter side, up to 1")


def first_resolution(share: float, last: int) -> int:
    """Pixels a side at which a run begins whose crops grow to `last`: that share of it, in whole steps of 16 px."""
    return min(max(round(share * last / _RESOLUTION_STEP), 1) * _RESOLUTION_STEP, last) if share < 1 else last


def growing_resolution(epoch: int, epochs: int, share: float, last: int) -> int:
    """Pixels a side in an epoch (0, 1, ...) of a run whose crops grow from `share` of `last` to `last`; see Config."""
    first = first_resolution(share, last)
    grown = min(max(3 * epoch / epochs - 1, 0.0), 1.0)
    return first + int(grown * (last - first) / _RESOLUTION_STEP) * _RESOLUTION_STEP if grown < 1 else last


def parse(arguments: Sequence[str]) -> Config:
    """The configuration that these command-line words describe; the recipe's values stand where they say nothing.

    A bad word ends the program with one line; --help and --print_config print and end it.
    """
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name in ("model", "data", "recipe", "pretrained", "config"):
        first.add_argument(f"--{name}")
    try:
        words = vars(first.parse_known_args(arguments)[0])
    except argparse.ArgumentError as error:
        fail(error)
    try:
        if words["config"]:
            words = _read_yaml(Path(words["config"])) | {key: value for key, value in words.items() if value}
        model, data = words.get("model") or Config.model, words.get("data") or Config.data
        recipe = words.get("recipe") or default_recipe(data, words.get("pretrained"))
        values = read_recipe(recipe, model) | {"recipe": recipe}
    except TrainError as error:
        fail(error)
    # The recipe's values go first, as words, so that they are checked and typed as the user's own that follow.
    recipe_words = [
        f"--{key}={json.dumps(value) if not isinstance(value, str) else value}" for key, value in values.items()
    ]
    return run_command(Config, prog="python -m train", errors=(TrainError,), args=[*recipe_words, *arguments])


def default_recipe(data: str, pretrained: str | None) -> str:
    if pretrained and pretrained != "null":
        return "fine-tune"
    return "quick" if data == "scenes" else "label-refinery"


def read_recipe(recipe: str, model: str) -> dict[str, Any]:
    """A recipe's values as dotted keys, with those of its `networks` section for this model (longest prefix) on top."""
    path = RECIPES / f"{recipe}.yaml"
    if not path.is_file():
        path = Path(recipe)
    if not path.is_file():
        known = ", ".join(sorted(file.stem for file in RECIPES.glob("*.yaml")))
        raise TrainError(f"recipe={recipe}: neither a recipe ({known}) nor a file")
    values = _read_yaml(path)
    networks = values.pop("networks", {})
    matching = max((name for name in networks if model.startswith(name)), key=len, default=None)
    values = _dotted(values) | (_dotted(networks[matching]) if matching else {})
    unknown = sorted(set(values) - set(_dotted(asdict(Config()))))
    if unknown:
        raise TrainError(f"{path}: unknown keys {', '.join(unknown)}; python -m train --help lists them")
    return values


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(path.read_text())
    except OSError as error:
        raise TrainError(f"{path}: cannot be read ({error.strerror})") from None
    except (yaml.YAMLError, UnicodeDecodeError):
        raise TrainError(f"{path}: not YAML") from None
    if not isinstance(values, dict):
        raise TrainError(f"{path}: expected a mapping of options to values")
    return values


def _dotted(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _dotted(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def command_to_continue() -> str:
    """The command that the user typed, to be typed again."""
    spec = sys.modules["__main__"].__spec__
    module = spec.name.removesuffix(".__main__") if spec else "train"
    return os.environ.get("TYPED_COMMAND") or f"python -m {module} {shlex.join(sys.argv[1:])}"
