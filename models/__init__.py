"""The networks, by name: those of the papers, and any of timm or torchvision as `timm:<name>`, `torchvision:<name>`.

    network = build("mobilenet0.5", num_classes=1000)
    network = build("timm:resnet50.a1_in1k", num_classes=1000, pretrained=True)

Every network takes float [B, 3, R, R], normalised with its `normalisation`, and returns logits [B, num_classes].
"""

import difflib
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import nn
from torchvision.models import resnet18, resnet34, resnet50, vgg16_bn, vgg19_bn

from command import UserError, first_line
from kernels.normalise import Normalisation
from models.alexnet import AlexNet
from models.darknet import Darknet19
from models.hubs import HUBS, Hub, Published
from models.mobilenet import MobileNet
from models.xnor import XnorResNet50


class ModelError(UserError):
    """A bad input that concerns a network or its weights."""


class _Network(NamedTuple):
    build: Callable[..., nn.Module]  # build(num_classes=...)
    smallest: int = 32  # pixels; the product of the strides


_NETWORKS = {
    "alexnet": _Network(AlexNet, smallest=64),
    "mobilenet": _Network(MobileNet),
    "mobilenet0.75": _Network(partial(MobileNet, width=0.75)),
    "mobilenet0.5": _Network(partial(MobileNet, width=0.5)),
    "mobilenet0.25": _Network(partial(MobileNet, width=0.25)),
    # torchvision's: their stride is in the 3x3 convolution, and most published files have their key names.
    # Blocks that start as identities learn faster (Goyal et al. 2017, section 5.1).
    "resnet18": _Network(partial(resnet18, zero_init_residual=True)),
    "resnet34": _Network(partial(resnet34, zero_init_residual=True)),
    "resnet50": _Network(partial(resnet50, zero_init_residual=True)),
    "resnet50-xnor": _Network(XnorResNet50),
    # With batch normalisation, as the learning rate of 0.1 requires, and, as published, dropout in the classifier.
    "vgg16": _Network(vgg16_bn),
    "vgg19": _Network(vgg19_bn),
    "darknet19": _Network(Darknet19),
}

_IMAGENET: Normalisation = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def names() -> list[str]:
    """Returns the names of the built-in networks; `build` also accepts `timm:<name>` and `torchvision:<name>`."""
    return list(_NETWORKS)


def build(name: str, num_classes: int, *, pretrained: bool = False) -> nn.Module:
    """Returns a newly initialised network in training mode, on the current default device.

    name: one of `names()`, or `timm:<name>` or `torchvision:<name>`, with or without the tag of its weights
        (`timm:resnet18.a1_in1k`, `torchvision:resnet50.IMAGENET1K_V1`).
    pretrained: start from the published weights, downloaded; if `num_classes` differs from theirs, the classifier keeps
        its initialisation. Only for networks of hubs: for the others, and offline, `models.weights` reads files.

    Raises ModelError for an unknown name, fewer than one class, or weights that cannot be fetched.
    """
    hub, plain = _found(name)
    if num_classes < 1:
        raise ModelError(f"{name}: num_classes={num_classes}; a classifier needs at least 1 class")
    if hub is None:
        if pretrained:
            published(name)
        return _NETWORKS[name].build(num_classes=num_classes)
    if not pretrained:
        return hub.build(plain, num_classes)
    try:
        return hub.fetch(plain, num_classes)
    except Exception as error:  # hubs and proxies raise different classes
        raise ModelError(
            f"{name}: its pretrained weights cannot be fetched ({first_line(error)}); pass a file of weights instead"
        ) from error


def constructor(name: str) -> Callable[..., nn.Module]:
    """Returns the callable that builds a built-in network from num_classes: a class, a function or a partial."""
    return _NETWORKS[name].build


def check_resolution(name: str, resolution: int) -> None:
    """Checks that the network accepts crops of `resolution` pixels per side and returns one logit per class.

    A hub's network is run on the meta device, without memory for weights or activations. Raises ModelError otherwise.
    """
    hub, plain = _found(name)
    if hub is None:
        smallest = _NETWORKS[name].smallest
        if resolution < smallest:
            raise ModelError(f"{name}: resolution={resolution} is too small; it takes {smallest} px and up")
        return
    classes = 2
    try:
        with torch.device("meta"), torch.no_grad():
            # Two crops, because batch normalisation in training refuses a single value per channel.
            logits = hub.build(plain, classes)(torch.empty(2, 3, resolution, resolution))
    except Exception as error:  # whatever its layers raise for an unsupported size
        takes = hub.published(plain).takes
        raise ModelError(f"{name}: cannot take resolution={resolution} ({first_line(error)}); {takes}") from error
    if getattr(logits, "shape", None) != (2, classes):
        raise ModelError(f"{name}: does not give one logit per class; choose a network that classifies")


def normalisation(name: str) -> Normalisation:
    """Returns the mean and standard deviation of red, green and blue, for values in 0..1, that the network expects.

    ImageNet's for the built-in networks; for a hub's network those of its published weights. Raises ModelError
    for an unknown name.
    """
    hub, plain = _found(name)
    return hub.published(plain).normalisation if hub else _IMAGENET


def published(name: str) -> Published:
    """Returns properties of a hub's published weights. Raises ModelError for a built-in or unknown network."""
    hub, plain = _found(name)
    if hub is None:
        raise ModelError(
            f"{name}: has no weights to fetch; pass a file of weights instead, or take torchvision:NAME or timm:NAME"
        )
    return hub.published(plain)


def _found(name: str) -> tuple[Hub | None, str]:
    """Returns the hub of a network (None for a built-in one) and its name there. Raises ModelError if it is unknown."""
    if name in _NETWORKS:
        return None, name
    hub, colon, plain = name.partition(":")
    if colon and hub in HUBS and plain in HUBS[hub].names():
        return HUBS[hub], plain
    known = [f"{hub}:{plain}" for hub in HUBS for plain in HUBS[hub].names()]
    near = difflib.get_close_matches(name.lower(), [*_NETWORKS, *known])
    hint = f"did you mean {' or '.join(near)}? " if near else ""
    theirs = " or ".join(f"{hub}:<name>" for hub in HUBS)
    raise ModelError(f"unknown network {name!r}: {hint}take one of {', '.join(_NETWORKS)}, {theirs}")
