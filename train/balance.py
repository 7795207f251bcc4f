"""Weights of classes in the loss, for sets in which some classes have many more images than others."""

import numpy as np
import torch
from numpy.typing import NDArray


def class_weights(images: NDArray[np.int64], power: float) -> torch.Tensor:
    """The weight of each class in the loss: float32 [C], with a mean of 1 over the images.

    images: how many each class has, [C]. A weight is proportional to images ** -power: with power 1 all classes have
    the same weight in the mean loss, with 0 all images have. A class without images has a weight of 0.
    """
    counts = images.astype(np.float64)
    weights = np.where(counts > 0, np.maximum(counts, 1) ** -power, 0.0)
    return torch.from_numpy(weights * counts.sum() / (weights * counts).sum()).float()
