"""The classes of ImageNet, as networks trained on it order them, and their names in words."""

from functools import cache
from typing import Any


@cache
def class_ids(outputs: int = 1000) -> tuple[str, ...] | None:
    """The WordNet ids (`n01440764`, ...) of a published ImageNet classifier's outputs, in order.

    Sorted for the 1000 classes of ILSVRC 2012; other numbers of outputs belong to editions of the larger ImageNet. None
    if no edition has this many classes. The lists are timm's.
    """
    if outputs < 1000:
        return None
    # Importing timm takes seconds.
    from timm.data import ImageNetInfo, infer_imagenet_subset

    edition = infer_imagenet_subset({"num_classes": outputs})
    return tuple(ImageNetInfo(edition).label_names()) if edition else None


def synonyms(wordnet_id: str) -> list[str]:
    """The names of an ImageNet class (`cassette player`), the usual one first; empty if they are not known."""
    try:
        return _names_in_words().label_name_to_description(wordnet_id).split(", ")
    except KeyError:
        return []


@cache
def _names_in_words() -> Any:
    """timm's list of ImageNet's classes. Cached, because it first reads the words of all 21,000."""
    from timm.data import ImageNetInfo

    return ImageNetInfo()
