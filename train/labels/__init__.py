"""The kinds of labels, and which of them a configuration uses.

A new kind is a file beside this one and an entry in `KINDS`; its options, if any, are a further base of `LabelsConfig`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from train import TrainError
from train.labels.category import CategoryLabels, TaxonomyLabels, TaxonomyOptions
from train.labels.ground_truth import GroundTruthLabels, GroundTruthOptions
from train.labels.maps import MapLabels
from train.labels.refinery import RefineryLabels, RefineryOptions
from train.labels.source import Asked, Labels
from train.labels.store import StoredOptions
from train.labels.stored import StoredLabels

# By their names in identities of runs. The first one that is asked for is used.
KINDS: dict[str, type[Labels]] = {
    "stored": StoredLabels,
    "maps": MapLabels,
    "taxonomy": TaxonomyLabels,
    "category": CategoryLabels,
    "refinery": RefineryLabels,
    "ground_truth": GroundTruthLabels,
}


@dataclass(frozen=True)
class LabelsConfig(GroundTruthOptions, RefineryOptions, TaxonomyOptions, StoredOptions):
    """Options of all kinds of labels."""


class Configured(Asked, Protocol):
    """A run's configuration, including label options."""

    @property
    def labels(self) -> LabelsConfig: ...


def kind_of(config: Configured) -> type[Labels]:
    """The kind of labels of a configuration."""
    return next(kind for kind in KINDS.values() if kind.asked(config.labels, config))


def check(config: Configured) -> None:
    """Raises TrainError for label options that have no effect or contradict each other. Nothing is read."""
    kind = kind_of(config)
    kind.check(config.labels, config)
    for option, owner in foreign_options(kind).items():
        if option in config.changed:
            raise TrainError(f"{option} {owner.elsewhere}")


def find(config: Configured, class_names: Sequence[str]) -> Labels:
    """The labels of a configuration, for data of these classes; see Labels.find."""
    return kind_of(config).find(config.labels, config, class_names)


def foreign_options(kind: type[Labels]) -> dict[str, type[Labels]]:
    """The options that have no effect with a kind of labels, each with a kind that it belongs to."""
    return {option: other for other in KINDS.values() for option in other.options if option not in kind.options}


def identity_of(labels: Labels) -> dict[str, Any]:
    """The labels' part of a run's identity."""
    (name,) = (name for name, kind in KINDS.items() if kind is type(labels))
    return {"kind": name} | labels.identity


def origin_of(identity: dict[str, Any]) -> str:
    """The origin of a run's labels, in a few words, from the run's identity."""
    return KINDS[identity["labels"]["kind"]].origin(identity)
