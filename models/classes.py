"""The mapping from the classes of a set to a network's outputs.

Classes are compared by name. ImageNet's classes are named by WordNet ids, so that a network with all 1000 classes can
label, or be scored on, a set with any of them.
"""

import re
from collections import Counter
from collections.abc import Sequence

from models.imagenet import class_ids, synonyms

_NUMBERS = frozenset(map(str, range(1000)))


def by_id(class_names: Sequence[str]) -> tuple[str, ...]:
    """Returns the names, or the WordNet ids for folders numbered 0 to 999, as in ImageNetV2.

    The numbers are ImageNet's class ids (sorted as text, 10 would come before 2).
    """
    imagenet = class_ids() if set(class_names) == _NUMBERS else None
    return tuple(imagenet[int(name)] for name in class_names) if imagenet else tuple(class_names)


def are_imagenet(class_names: Sequence[str]) -> bool:
    """Whether all are classes of any edition of ImageNet."""
    return all(map(_is_wordnet_id, by_id(class_names)))


def readable(class_names: Sequence[str]) -> tuple[str, ...]:
    """Returns readable class names: the usual words for ImageNet's classes, the given names for all others.

    They are distinct: if two classes share the usual word, further synonyms are added, or the WordNet id.
    """
    ids = by_id(class_names)
    known = [synonyms(name) if _is_wordnet_id(name) else [] for name in ids]
    names = [words[0] if words else name for words, name in zip(known, class_names, strict=True)]
    for longer in (
        [", ".join(words) or name for words, name in zip(known, names, strict=True)],
        [f"{name} ({id})" if words else name for name, words, id in zip(names, known, ids, strict=True)],
    ):
        count = Counter(names)
        names = [more if count[name] > 1 else name for name, more in zip(names, longer, strict=True)]
    return tuple(names)


def class_columns(outputs: Sequence[str], class_names: Sequence[str]) -> list[int]:
    """Returns for each class the index of the network's output for it, or -1 if there is none.

    outputs: the classes of the network's outputs, in order.
    """
    columns = {name: column for column, name in enumerate(by_id(outputs))}
    return [columns.get(name, -1) for name in by_id(class_names)]


def lacking(columns: Sequence[int], class_names: Sequence[str]) -> str:
    """Returns the names of the first few classes whose column is -1, as text."""
    names = [name for name, column in zip(class_names, columns, strict=True) if column < 0]
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def _is_wordnet_id(name: str) -> bool:
    return re.fullmatch(r"n\d{8}", name) is not None
