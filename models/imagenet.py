"""The classes of ImageNet, as networks trained on it order them."""

from functools import cache


@cache
def class_ids(outputs: int = 1000) -> tuple[str, ...] | None:
    """The WordNet ids (`n01440764`, ...) of a published ImageNet classifier's outputs, in their order.

    Sorted for the 1000 classes of ILSVRC 2012; a classifier with some other number of outputs is of the larger ImageNet
    in one of its editions. None where no edition has as many classes. The lists are timm's.
    """
    if outputs < 1000:
        return None
    # Loading timm takes seconds.
    from timm.data import ImageNetInfo, infer_imagenet_subset

    edition = infer_imagenet_subset({"num_classes": outputs})
    return tuple(ImageNetInfo(edition).label_names()) if edition else None
