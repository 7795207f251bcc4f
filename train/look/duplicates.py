"""Images that a set holds more than once, identical as stored."""

import hashlib
from collections import defaultdict
from dataclasses import dataclass

import numpy as np

from data.beton import Beton
from data.progress import images_bar

SPLITS = ("train", "val")


@dataclass(frozen=True)
class Duplicates:
    """Images with the same stored bytes.

    members: (split, index) of each, training images first. labels: the classes that the set gives to them, ascending.
    """

    members: tuple[tuple[str, int], ...]
    labels: tuple[int, ...]

    @property
    def across(self) -> bool:
        """Whether the group has both training and validation images."""
        return len({split for split, _ in self.members}) > 1

    @property
    def contradictory(self) -> bool:
        return len(self.labels) > 1


def find_duplicates(train: Beton, val: Beton) -> list[Duplicates]:
    """All groups of identical images: first those with several classes, then those in both splits, then the largest.

    Identical files are stored as identical bytes. Only images with the same size and checksum are read. Raises
    DataError for damaged images.
    """
    betons = dict(zip(SPLITS, (train, val), strict=True))
    alike: dict[tuple[int, ...], list[tuple[str, int]]] = defaultdict(list)
    for split, beton in betons.items():
        checksums = np.zeros(beton.num_samples, np.int64) if beton.checksums is None else beton.checksums
        keys = np.column_stack([beton.lengths, beton.sizes, checksums]).tolist()
        for index, key in enumerate(keys):
            alike[tuple(key)].append((split, index))
    candidates = [group for group in alike.values() if len(group) > 1]
    equal: dict[bytes, list[tuple[str, int]]] = defaultdict(list)
    with images_bar(sum(map(len, candidates)), "duplicates", leave=False) as bar:
        for group in candidates:
            for split, index in group:
                equal[hashlib.blake2b(betons[split].encoded(index).data).digest()].append((split, index))
            bar.update(len(group))
    found = [
        Duplicates(tuple(group), tuple(sorted({int(betons[split].labels[index]) for split, index in group})))
        for group in equal.values()
        if len(group) > 1
    ]
    return sorted(found, key=lambda each: (not each.contradictory, not each.across, -len(each.members)))
