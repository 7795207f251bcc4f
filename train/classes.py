"""Which of a network's outputs stand for the classes of a set.

Classes are compared by name. Of the classes of ImageNet that is their WordNet id, so that a network of all 1000 labels
or is scored on a set of any of them.
"""

import re
from collections.abc import Sequence

from models.imagenet import class_ids

_NUMBERS = frozenset(map(str, range(1000)))


def by_id(class_names: Sequence[str]) -> tuple[str, ...]:
    """The names, but the WordNet ids for those of folders numbered 0 to 999, which is how ImageNetV2 names them.

    The numbers are the places of ImageNet's classes in their order (as text, 10 would come before 2).
    """
    imagenet = class_ids() if set(class_names) == _NUMBERS else None
    return tuple(imagenet[int(name)] for name in class_names) if imagenet else tuple(class_names)


def are_imagenet(class_names: Sequence[str]) -> bool:
    """Whether all are classes of ImageNet, in any of its editions."""
    return all(re.fullmatch(r"n\d{8}", name) for name in by_id(class_names))


def places_of(theirs: Sequence[str], ours: Sequence[str]) -> list[int]:
    """For each of our classes its place among theirs, -1 for one that they lack."""
    places = {name: place for place, name in enumerate(by_id(theirs))}
    return [places.get(name, -1) for name in by_id(ours)]


def lacking(places: Sequence[int], class_names: Sequence[str]) -> str:
    """Names the first few of the classes whose place is -1."""
    names = [name for name, place in zip(class_names, places, strict=True) if place < 0]
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
