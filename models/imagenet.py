"""The classes of ImageNet, as networks trained on it order them, and their names in words."""

from functools import cache
from typing import Any


@cache
def class_ids(outputs: int = 1000) -> tuple[str, ...] | None:
    """The WordNet ids (`n01440764`, ...) of a published ImageNet classifier's outputs, in their order.

    Sorted for the 1000 classes of ILSVRC 2012; a classifier with some other number of outputs is of the larger ImageNet
    in one of its editions. None if no edition has as many classes. The lists are timm's.
    """
    if outputs < 1000:
        return None
    # Loading timm takes seconds.
    from timm.data import ImageNetInfo, infer_imagenet_subset

    edition = infer_imagenet_subset({"num_classes": outputs})
    return tuple(ImageNetInfo(edition).label_names()) if edition else None


def synonyms(wordnet_id: str) -> list[str]:
    """What a class of ImageNet is called (`cassette player`), the usual word first; empty if that is not known."""
    try:
        return _names_in_words().label_name_to_description(wordnet_id).split(", ")
    except KeyError:
        return []


@cache
def _names_in_words() -> Any:
    """Timm's list of ImageNet's classes. Kept, because it reads the words of all 21,000 at first."""
    from timm.data import ImageNetInfo

    return ImageNetInfo()
