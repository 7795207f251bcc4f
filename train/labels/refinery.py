"""An online refinery: a trained network that labels the crop that the student sees (Label Refinery, section 3)."""

from collections.abc import Iterable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal

import torch
from torch import nn
from torch.nn import functional as F

from data.loader import CropBatch, Loader, Pairing, open_loader
from kernels.normalise import Normalisation, Normalise
from models.classes import lacking
from models.folding import fold
from models.trained import Trained, load_trained
from train import TrainError
from train.device import computing_in
from train.labels.source import Asked, Crops, Labels, LabelSource, Targets

# Suffix of the name of the labelling network.
_PER = {"crop": "", "image": ", one per image", "category": ", one per category"}

# Only shapes matter for folding batch normalisation; every network that has it accepts this size.
_USUAL_RESOLUTION = 224

# Number of batches, and the most crops per batch, of averaged statistics.
_AVERAGED_BATCHES, _AVERAGED_BATCH = 16, 256


@dataclass(frozen=True)
class RefineryOptions:
    """Options of a refinery's labels.

    Args:
        bn: the refinery's batch normalisation uses the statistics of the batch (as the paper does); their average over
            16 batches of training crops, taken once before the first step; or the running ones of its own training.
            The last two are folded into the convolutions, which is faster
        resolution: pixels per side at which the refinery sees the crops; fewer are faster, and published weights are
            best at the size they were trained at (default: the student's size, if the refinery accepts it)
        per: one label for each crop, as in the paper; for each image, whose central crop the refinery labels once for
            all its crops; or for each category, the refinery's mean over its images
    """

    bn: Literal["batch", "averaged", "running"] = "batch"
    resolution: int | None = None
    per: Literal["crop", "image", "category"] = "crop"


@dataclass(frozen=True)
class RefineryLabels(Labels):
    """A trained network's labels of each crop, or of each image's central crop.

    trained: the network. asked_as: how the user named it.
    """

    trained: Trained
    asked_as: str
    given: RefineryOptions

    options = (
        "refinery",
        "labels.bn",
        "labels.resolution",
        "labels.per",
        "loss.kind",
        "loss.temperature",
        "loss.truth",
        "jitter",
        "augment.refinery_sees",
    )
    elsewhere = "is for a refinery's labels; give a refinery too"

    @classmethod
    def asked(cls, given: RefineryOptions, config: Asked) -> bool:
        return bool(config.refinery)

    @classmethod
    def check(cls, given: RefineryOptions, config: Asked) -> None:
        if given.bn != "running" and config.batch == 1:
            raise TrainError(
                "batch=1: a refinery with batch statistics needs more than one crop; use labels.bn=running"
            )
        if given.bn == "averaged" and "resolution_from" in config.changed and not given.resolution:
            raise TrainError(
                "labels.bn=averaged takes the statistics of crops of one size, and resolution_from lets them grow; "
                "give labels.resolution, the size at which the refinery sees them all"
            )
        if given.resolution is not None and given.resolution < 1:
            raise TrainError(f"labels.resolution={given.resolution}: must be at least 1")
        if "augment.refinery_sees" in config.changed and given.per != "crop":
            raise TrainError(
                f"augment.refinery_sees={config.augment.refinery_sees}: the labels of labels.per={given.per} are of "
                "central crops, which are not augmented; leave it out"
            )
        if config.jitter and given.per != "crop":
            raise TrainError("jitter needs a label for every crop; leave labels.per out")
        if config.jitter and len(config.model.split()) > 1:
            raise TrainError("jitter moves crops for one student; name one model")
        if config.jitter and not config.pretrained:
            raise TrainError("jitter is for a student that is trained already; name its weights with pretrained")

    @classmethod
    def find(cls, given: RefineryOptions, config: Asked, class_names: Sequence[str]) -> "RefineryLabels":
        assert config.refinery
        trained = load_trained(config.refinery, class_names=class_names)
        columns = trained.columns_of(class_names)
        theirs, ours = len(trained.class_names), len(class_names)
        if columns and -1 in columns:
            raise TrainError(
                f"REFINERY={config.refinery}: labels {theirs} classes, and DATA={config.data} has {ours}, of which it "
                f"lacks {lacking(columns, class_names)}; train it on DATA first, as MODEL with PRETRAINED"
            )
        if theirs > ours:
            print(f"refinery: of its {theirs} classes, the data's {ours} are used", flush=True)
        return cls(trained, config.refinery, given)

    @classmethod
    def origin(cls, identity: dict[str, Any]) -> str:
        return identity["refinery"]["network"] + _PER[identity["labels"]["per"]]

    @property
    def generation(self) -> int:
        return self.trained.generation + 1

    @property
    def refinery(self) -> dict[str, str]:
        return {"network": self.trained.name, "weights": self.trained.digest}

    @property
    def identity(self) -> dict[str, Any]:
        return {"bn": self.given.bn, "resolution": self.given.resolution, "per": self.given.per}

    def describe(self) -> str:
        sees = f", at {self.given.resolution} px" if self.given.resolution else ""
        return (
            f"refinery {self.trained.name} ({self.trained.origin}), with {self.given.bn} statistics"
            f"{_PER[self.given.per]}{sees}"
        )

    def open(self, crops: Crops) -> LabelSource:
        center = Pairing("center", crops.resolution) if self.given.per == "image" else None
        with computing_in(crops.autocast, crops.device):
            return Refinery(
                self.trained.network,
                self.trained.normalisation,
                bn=self.given.bn,
                over=_some(crops, center).epoch(0) if self.given.bn == "averaged" else (),
                resolution=self._resolution(crops),
                center=center,
                columns=self.trained.columns_of(crops.data.class_names),
                dtype=crops.autocast or torch.float32,
                sees=crops.config.augment.refinery_sees,
            )

    def _resolution(self, crops: Crops) -> int | None:
        """Pixels per side to which crops are resized for the refinery, as from `seen_at`; prints a notice if they may
        be unexpected.

        Raises TrainError for a size that it does not accept.
        """
        asked, usual = self.given.resolution, self.trained.resolution
        side = seen_at(self.trained, asked, crops.resolutions)
        for each in [side] if side else crops.resolutions:
            failure = self.trained.failure_at(each)
            if failure:
                raise TrainError(
                    f"REFINERY={self.asked_as}: cannot take crops of {each} px ({failure}); give another size with "
                    "labels.resolution"
                )
        if side and not asked:
            print(f"refinery: crops are resized to the {side} px that it takes", flush=True)
        elif not side and usual not in (None, crops.resolution):
            print(
                f"refinery: trained at {usual} px, it sees the crops of {crops.resolution} px as they are "
                f"(--labels.resolution {usual} resizes them)",
                flush=True,
            )
        return side


def _some(crops: Crops, center: Pairing | None) -> Loader:
    """Loads training crops of the run's size, the same in every process of a run."""
    return open_loader(
        crops.data.beton("train"),
        resolution=crops.resolution,
        batch_size=min(crops.batch, _AVERAGED_BATCH),
        crop=crops.crop,
        paired=(center,) if center else (),
        **crops.loading,
    )


def seen_at(trained: Trained, asked: int | None, resolutions: Sequence[int]) -> int | None:
    """Pixels per side to which crops of these sizes are resized for a refinery; None: it sees them as the student does.

    It does unless another size is given, or it accepts only the size it was trained at, as most transformers do; that
    may cost many times the student's work.
    """
    if asked or not trained.resolution or not any(trained.failure_at(side) for side in resolutions):
        return asked
    return trained.resolution


class Refinery(LabelSource):
    """The network's logits for each crop. Its weights and running statistics do not change; dropout is off.

    columns: the indices of the data's classes among its outputs, for a network with more classes; None: they are the
    same. The other outputs are dropped, so that the label is the softmax over the data's classes: the network's
    probabilities given that the crop shows one of these. The student could not learn those of classes that it lacks.

    bn: "batch" normalises with the statistics of the current batch, as the network itself was trained, which the
    paper found to label more accurately (section 3); "running" uses the stored ones, folded into the convolutions;
    "averaged" first replaces these by the mean, over the first 16 batches of `over`, of each batch's mean and variance.
    Later crops have the same distribution, so this equals an average over the last few batches, without another pass
    over memory and without a state to save.
    over: batches of crops, on the device of the network; used only for this.
    normalisation: mean and std of its input. resolution: pixels per side that crops are resized to for it; None: as
    they are. center: the central crop that it labels instead of each training crop ("soft static", Table 4); None: it
    labels the training crop itself.
    dtype: of its convolutions and linear layers under autocast, and so of their stored weights. sees: which version of
    training crops it labels: mixed, coloured or plain; see LabelSource.
    """

    columns: torch.Tensor | None

    def __init__(
        self,
        network: nn.Module,
        normalisation: Normalisation,
        *,
        bn: str = "batch",
        over: Iterable[CropBatch] = (),
        resolution: int | None = None,
        center: Pairing | None = None,
        columns: Sequence[int] | None = None,
        dtype: torch.dtype = torch.float32,
        sees: str = "mixed",
    ):
        super().__init__()
        self.network = deepcopy(network).requires_grad_(False)
        self.normalise = Normalise(normalisation)
        self.bn = bn
        self.resolution = resolution
        self.pairings = (center,) if center else ()
        self.sees = "plain" if center else sees
        self.register_buffer("columns", None if columns is None else torch.tensor(columns), persistent=False)
        norms: list[Any] = [m for m in self.network.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        self.eval()
        if bn == "averaged" and norms:
            self._average(norms, over)
        if bn == "batch":
            for module in norms:
                # Without running statistics, batch normalisation uses the batch's own, also in evaluation mode.
                module.track_running_stats = False
                module.running_mean = module.running_var = module.num_batches_tracked = None
        elif norms:
            fold(self.network, resolution or _USUAL_RESOLUTION)
        for module in self.network.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                module.to(dtype)

    @torch.no_grad()
    def _average(self, norms: Sequence[Any], over: Iterable[CropBatch]) -> None:
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # the mean over all batches so far
            norm.train()
        for batch in islice(over, _AVERAGED_BATCHES):
            self.to(batch.crops.device)(batch)
        for norm in norms:
            norm.eval()

    def train(self, mode: bool = True) -> "Refinery":
        # A refinery is never in training mode: its dropout stays off.
        return super().train(False)

    def forward(self, batch: CropBatch) -> Targets:
        if self.bn == "batch" and batch.crops.shape[0] == 1:
            raise TrainError(
                "batch=1: batch statistics of a single crop mean nothing; use a larger batch or bn=running"
            )
        crops = self.normalise(batch.paired[self.pairings[0]] if self.pairings else batch.crops)
        if self.resolution and crops.shape[-1] != self.resolution:
            crops = F.interpolate(crops, size=(self.resolution, self.resolution), mode="bilinear", antialias=True)
        logits = self.network(crops)
        return Targets(logits=logits if self.columns is None else logits[:, self.columns])
