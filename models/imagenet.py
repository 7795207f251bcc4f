"""The classes of ImageNet, in the order of networks' outputs, and their names in words."""

from functools import cache
from typing import Any


@cache
def class_ids(outputs: int = 1000) -> tuple[str, ...] | None:
    """Returns the WordNet ids (`n01440764`, ...) of a published ImageNet classifier's outputs, in order.

    For 1000 outputs these are the classes of ILSVRC 2012, sorted; other numbers belong to editions of the larger
    ImageNet. Returns None if no edition has this many classes. The lists are timm's.
    """
    if outputs < 1000:
        return None
    # Importing timm takes seconds.
    from timm.data import ImageNetInfo, infer_imagenet_subset

    edition = infer_imagenet_subset({"num_classes": outputs})
    return tuple(ImageNetInfo(edition).label_names()) if edition else None


def synonyms(wordnet_id: str) -> list[str]:
    """Returns the names of an ImageNet class (`cassette player`), the usual one first; [] if they are not known."""
    try:
        return _names_in_words().label_name_to_description(wordnet_id).split(", ")
    except KeyError:
        return []


@cache
def _names_in_words() -> Any:
    """Returns timm's list of ImageNet's classes. Cached, because reading the names of all 21,000 takes time."""
    from timm.data import ImageNetInfo

    return ImageNetInfo()
