"""Which of a network's outputs stand for the classes of a set.

Classes are compared by name. Of the classes of ImageNet that is their WordNet id, so that a network of all 1000 labels
or is scored on a set of any of them.
"""

import re
from collections.abc import Sequence

from models.imagenet import class_ids

_NUMBERS = frozenset(map(str, range(1000)))


def by_id(class_names: Sequence[str]) -> tuple[str, ...]:
    """The names, except for folders numbered 0 to 999, as ImageNetV2 names them: of these the WordNet ids.

    The numbers are ImageNet's class ids (sorted as text, 10 would come before 2).
    """
    imagenet = class_ids() if set(class_names) == _NUMBERS else None
    return tuple(imagenet[int(name)] for name in class_names) if imagenet else tuple(class_names)


def are_imagenet(class_names: Sequence[str]) -> bool:
    """Whether all are classes of ImageNet, in any of its editions."""
    return all(re.fullmatch(r"n\d{8}", name) for name in by_id(class_names))


def class_columns(outputs: Sequence[str], class_names: Sequence[str]) -> list[int]:
    """For each class, which of a network's outputs stands for it; -1 for a class that the network lacks.

    outputs: the classes of the network's outputs, in their order.
    """
    columns = {name: column for column, name in enumerate(by_id(outputs))}
    return [columns.get(name, -1) for name in by_id(class_names)]


def lacking(columns: Sequence[int], class_names: Sequence[str]) -> str:
    """Names the first few of the classes whose column is -1."""
    names = [name for name, column in zip(class_names, columns, strict=True) if column < 0]
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
