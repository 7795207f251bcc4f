"""The interface of every kind of labels: a `Labels` before the run, which opens a `LabelSource` for its steps.

A label source has two parts. `fetch` runs with the loader, on the host, and reads files;
`forward` runs on the device, inside the compiled graph, and makes the targets of a batch.
"""

from abc import ABC, abstractmethod
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional as F

from data.loader import CropBatch, Pairing
from data.plan import CropRule
from data.sets import ConvertedSet
from kernels.refinery_loss import probabilities_loss, refinery_loss, sparse_loss


@dataclass
class Targets:
    """The targets of the student for each crop, in one of four forms.

    ids: class ids int64 [B]. logits: a refinery's logits [B, C]. probabilities: [B, C], rows sum to 1.
    sparse: (classes int64 [B, K], their probabilities [B, K], the probability of each other class [B]).
    """

    ids: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    probabilities: torch.Tensor | None = None
    sparse: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None

    def classes(self) -> torch.Tensor:
        """The most likely class of each crop: int64 [B]."""
        if self.ids is not None:
            return self.ids
        if self.sparse is not None:
            classes, values, _ = self.sparse
            return classes.gather(1, values.argmax(dim=1, keepdim=True))[:, 0]
        scores = self.logits if self.logits is not None else self.probabilities
        assert scores is not None
        return scores.argmax(dim=1)

    def at(self, places: torch.Tensor) -> "Targets":
        """The targets of the crops at these indices in the batch, int64 [N]."""
        if self.sparse is not None:
            classes, values, rest = self.sparse
            return Targets(sparse=(classes[places], values[places], rest[places]))
        parts = {name: part[places] for name, part in vars(self).items() if part is not None}
        return Targets(**parts)

    def distribution(self, num_classes: int) -> torch.Tensor:
        """Each crop's label as probabilities of all classes: float32 [B, C], rows sum to 1."""
        if self.ids is not None:
            return F.one_hot(self.ids, num_classes).float()
        if self.logits is not None:
            return self.logits.float().softmax(dim=1)
        if self.sparse is not None:
            classes, values, rest = self.sparse
            return rest.float()[:, None].repeat(1, num_classes).scatter(1, classes, values.float())
        assert self.probabilities is not None
        return self.probabilities.float()

    def loss(self, student: torch.Tensor, *, kind: str = "soft", temperature: float = 1.0) -> torch.Tensor:
        """Each crop's loss, float32 [B]. student: logits [B, C]. kind, temperature: see kernels.refinery_loss.

        Class ids always use cross-entropy.
        """
        if self.ids is not None:
            return F.cross_entropy(student.float(), self.ids, reduction="none")
        if self.logits is not None:
            return refinery_loss(student, self.logits, kind=kind, temperature=temperature)
        if self.sparse is not None:
            return sparse_loss(student, *self.sparse, kind=kind, temperature=temperature)
        assert self.probabilities is not None
        return probabilities_loss(student, self.probabilities, kind=kind, temperature=temperature)


class LabelSource(nn.Module):
    """Makes the targets of a step. Subclasses override forward, and fetch if labels are in files.

    pairings: further crops of each image that forward needs. sees: which version of augmented crops it labels: plain,
    as they were cut; coloured; or mixed (train.augment).
    """

    pairings: tuple[Pairing, ...] = ()
    sees: str = "plain"

    def fetch(self, indices: NDArray[np.int64], copies: NDArray[np.int64], epoch: int) -> torch.Tensor | None:
        """A host tensor [B, ...] for these crops (indices and copies int64 [B]), or None if nothing has to be read."""
        return None

    def forward(self, batch: CropBatch) -> Targets:
        raise NotImplementedError


@dataclass(frozen=True)
class Plan:
    """The crops that labels were made for: those of a seed, some epochs, a crop rule, and a number of copies.

    resolution: their pixels per side. epochs: how many there are; a longer run starts again at the first.
    """

    seed: int
    crop: CropRule
    copies: int
    resolution: int
    epochs: int


class Asked(Protocol):
    """What kinds of labels use of a run's configuration (train.config.Config), besides their own options."""

    @property
    def model(self) -> str: ...
    @property
    def refinery(self) -> str | None: ...
    @property
    def pretrained(self) -> str | None: ...
    @property
    def data(self) -> str: ...
    @property
    def batch(self) -> int: ...
    @property
    def order(self) -> str: ...
    @property
    def precision(self) -> str: ...
    @property
    def epochs(self) -> int: ...
    @property
    def copies(self) -> int: ...
    @property
    def crop(self) -> Any: ...  # scale, ratio and flip as in CropRule, each None if it was left out
    @property
    def jitter(self) -> float: ...
    @property
    def augment(self) -> Any: ...  # refinery_sees
    @property
    def loss(self) -> Any: ...  # kind, temperature
    @property
    def changed(self) -> Collection[str]: ...  # the options that are not at their defaults


class Crops(Protocol):
    """What kinds of labels use of the run (train.job.Job) whose crops they label."""

    @property
    def config(self) -> Asked: ...  # with everything filled in
    @property
    def data(self) -> ConvertedSet: ...
    @property
    def crop(self) -> CropRule: ...
    @property
    def resolution(self) -> int: ...  # pixels per side, once they have grown
    @property
    def resolutions(self) -> Sequence[int]: ...  # pixels per side in the run's epochs, each size once
    @property
    def batch(self) -> int: ...
    @property
    def device(self) -> torch.device: ...
    @property
    def autocast(self) -> torch.dtype | None: ...
    @property
    def loading(self) -> dict[str, Any]: ...  # arguments of all loaders of the run


class Labels(ABC):
    """One kind of labels of a run: its options and their checks, its part of the run's identity, its description.

    The class represents the kind; an instance is the result of `find`. To add a kind, write its file with a subclass;
    add that to KINDS in train/labels/__init__.py and its options, a dataclass, to the bases of LabelsConfig. Its
    methods take these as `given`, and all other options as `config`.

    options: the options of Config that apply to this kind, by their dotted names. elsewhere: the message, after the
    option's name, if one of them is given with another kind.
    """

    options: ClassVar[tuple[str, ...]]
    elsewhere: ClassVar[str]

    @classmethod
    @abstractmethod
    def asked(cls, given: Any, config: Asked) -> bool:
        """Whether the configuration asks for this kind."""

    @classmethod
    @abstractmethod
    def check(cls, given: Any, config: Asked) -> None:
        """Raises TrainError for options that have no effect or contradict each other. Nothing is read."""

    @classmethod
    @abstractmethod
    def find(cls, given: Any, config: Asked, class_names: Sequence[str]) -> "Labels":
        """Opens the origin of the labels, for data of these classes: fast, before the data are converted.

        Raises TrainError or ModelError if it cannot label these classes.
        """

    @classmethod
    @abstractmethod
    def origin(cls, identity: dict[str, Any]) -> str:
        """The origin of a run's labels, in a few words, from the run's identity."""

    @property
    def generation(self) -> int:
        """0 for labels without a network, else one more than that of the network that gave them."""
        return 0

    @property
    def refinery(self) -> dict[str, str] | None:
        """network, weights (a digest): the network that gave the labels, for the run's identity; None without one."""
        return None

    @property
    def plan(self) -> Plan | None:
        """The crops that the labels were made for; None if any crop can be labelled."""
        return None

    def check_data(self, data: ConvertedSet) -> None:
        """Raises TrainError if the labels are of other data than these."""
        return None  # most can label any

    @property
    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """Other properties of the labels that determine a run's final weights, as JSON values."""

    @abstractmethod
    def describe(self) -> str:
        """A description of the labels in one line, printed when a run begins."""

    @abstractmethod
    def open(self, crops: Crops) -> LabelSource:
        """The source that labels the crops of a run; slow if much has to be computed first."""
