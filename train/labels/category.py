"""One soft label per class, for every crop of its images (Label Refinery, Table 5)."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from data.loader import CropBatch, Loader, open_loader
from data.progress import images_bar
from models.trained import digest_of
from train import TrainError
from train.device import computing_in, on_device
from train.labels.refinery import RefineryLabels, RefineryOptions
from train.labels.source import Asked, Crops, Labels, LabelSource, Targets

# Similarities are 0 to 1; divided by this they become logits. The paper does not say how it normalised them. For
# ImageNet's 1000 classes, a label then gives the class itself a tenth on average, and its near relatives the next
# largest shares.
_TAXONOMY_TEMPERATURE = 0.1


@dataclass(frozen=True)
class TaxonomyOptions:
    """Options of labels by a taxonomy.

    Args:
        taxonomy: without a refinery, a file of WordNet's is-a relation ("parent child" lines): each category's label is
            its similarity to all categories (Wu and Palmer)
    """

    taxonomy: str | None = None


@dataclass(frozen=True)
class TaxonomyLabels(Labels):
    """One label per class, by the classes' similarity in a taxonomy. table: see taxonomy_table."""

    file: Path
    table: torch.Tensor

    options = ("labels.taxonomy", "loss.kind", "loss.temperature", "loss.truth")
    elsewhere = "takes the place of a refinery; give one of them"

    @classmethod
    def asked(cls, given: TaxonomyOptions, config: Asked) -> bool:
        return bool(given.taxonomy)

    @classmethod
    def check(cls, given: TaxonomyOptions, config: Asked) -> None:
        if config.refinery:
            raise TrainError(f"labels.taxonomy {cls.elsewhere}")

    @classmethod
    def find(cls, given: TaxonomyOptions, config: Asked, class_names: Sequence[str]) -> "TaxonomyLabels":
        file = Path(str(given.taxonomy))
        return cls(file, taxonomy_table(file, class_names))

    @classmethod
    def origin(cls, identity: dict[str, Any]) -> str:
        return "a taxonomy"

    @property
    def identity(self) -> dict[str, Any]:
        return {"taxonomy": digest_of(self.file)}

    def describe(self) -> str:
        return f"one per category, by {self.file}"

    def open(self, crops: Crops) -> LabelSource:
        return Category(self.table)


@dataclass(frozen=True)
class CategoryLabels(RefineryLabels):
    """One label per class: the mean of a refinery's labels of the class's images."""

    @classmethod
    def asked(cls, given: RefineryOptions, config: Asked) -> bool:
        return bool(config.refinery) and given.per == "category"

    @classmethod
    def check(cls, given: RefineryOptions, config: Asked) -> None:
        super().check(given, config)
        if given.bn != "running":
            # The images of one class follow each other: their own batch statistics would remove what they have in
            # common.
            raise TrainError("labels.per=category needs labels.bn=running, as in the paper")

    def open(self, crops: Crops) -> LabelSource:
        refinery = on_device(super().open(crops), crops.device)
        loader = open_loader(
            crops.data.beton("train"),
            resolution=crops.resolution,
            batch_size=crops.batch,
            train=False,
            crop=crops.crop,
            **crops.loading,
        )
        return Category(visual_similarity(refinery, loader, device=crops.device, autocast=crops.autocast))


class Category(LabelSource):
    """The row of the image's class in a table: float [C, C], rows sum to 1."""

    table: torch.Tensor

    def __init__(self, table: torch.Tensor):
        super().__init__()
        self.register_buffer("table", table, persistent=False)

    def forward(self, batch: CropBatch) -> Targets:
        return Targets(probabilities=self.table[batch.labels])


@torch.inference_mode()
def visual_similarity(
    refinery: LabelSource, loader: Loader, *, device: torch.device, autocast: torch.dtype | None
) -> torch.Tensor:
    """The mean of a refinery's labels of each class's images, float32 [C, C], rows sum to 1.

    loader: every image once, its central crop. A class without images gets its own one-hot label.
    """
    total = torch.zeros(loader.num_classes, loader.num_classes, dtype=torch.float64, device=device)
    images = torch.zeros(loader.num_classes, 1, dtype=torch.float64, device=device)
    with images_bar(loader.num_samples, "labels of classes", leave=False) as bar:
        for batch in loader.epoch(0):
            with computing_in(autocast, device):
                logits = refinery(batch).logits
            assert logits is not None
            total.index_add_(0, batch.labels, logits.double().softmax(dim=1))
            images.index_add_(0, batch.labels, torch.ones_like(images[:1]).expand(len(batch.labels), 1))
            bar.update(len(batch.labels))
    own = torch.eye(loader.num_classes, dtype=torch.float64, device=device)
    return torch.where(images > 0, total / images.clamp(min=1), own).float()


def taxonomy_table(is_a: Path, class_names: Sequence[str]) -> torch.Tensor:
    """softmax(similarity / 0.1) of each pair of classes, float32 [C, C], rows sum to 1.

    is_a, class_names: see wu_palmer. Raises TrainError for a file that cannot be read or lacks a class.
    """
    similarity = torch.from_numpy(wu_palmer(read_is_a(is_a), class_names, is_a))
    return (similarity / _TAXONOMY_TEMPERATURE).softmax(dim=1).float()


def read_is_a(path: Path) -> dict[str, list[str]]:
    """The parents of each node, from lines of "parent child" as ImageNet publishes WordNet's is-a relation."""
    parents: dict[str, list[str]] = defaultdict(list)
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise TrainError(f"labels.taxonomy={path}: cannot be read ({error})") from None
    for number, line in enumerate(lines, 1):
        if line.strip():
            words = line.split()
            if len(words) != 2:
                raise TrainError(f'{path}:{number}: expected two words, "parent child"')
            parents[words[1]].append(words[0])
    return dict(parents)


def wu_palmer(parents: dict[str, list[str]], names: Sequence[str], path: Path) -> NDArray[np.float64]:
    """Wu and Palmer's similarity of nodes (1994), [C, C]: 2 d(s) / (d(a) + d(b)), s their deepest common ancestor.

    d counts the nodes on the longest path down from a root, so that a root has 1 and a node more than any of its
    ancestors: only a node itself has similarity 1 to it, even if nodes have several parents. An ancestor of a node may
    be the node itself. Without a common ancestor the similarity is 0.
    Raises TrainError naming `path` for names that are not in it and for a cycle.
    """
    known = set(parents) | {parent for several in parents.values() for parent in several}
    missing = [name for name in names if name not in known]
    if missing:
        raise TrainError(
            f"labels.taxonomy={path}: lacks {len(missing)} of the {len(names)} classes, {', '.join(missing[:3])}"
            f"{', ...' if len(missing) > 3 else ''}; its nodes must be named as the class folders are"
        )
    depths: dict[str, int] = {}

    def depth(node: str, below: frozenset[str] = frozenset()) -> int:
        if node in below:
            raise TrainError(f"labels.taxonomy={path}: {node} is its own ancestor")
        if node not in depths:
            depths[node] = 1 + max((depth(parent, below | {node}) for parent in parents.get(node, ())), default=0)
        return depths[node]

    def ancestors(node: str) -> set[str]:
        reached, waiting = {node}, [node]
        while waiting:
            new = set(parents.get(waiting.pop(), ())) - reached
            reached |= new
            waiting += new
        return reached

    above = {name: {node: depth(node) for node in ancestors(name)} for name in names}
    similarity = np.empty((len(names), len(names)))
    for i, a in enumerate(names):
        for j, b in enumerate(names[: i + 1]):
            common = max((above[a][node] for node in above[a].keys() & above[b].keys()), default=0)
            similarity[i, j] = similarity[j, i] = 2 * common / (above[a][a] + above[b][b])
    return similarity
