"""The networks, by name: the papers' own, and any timm model as `timm:<name>`.

    network = build("mobilenet0.5", num_classes=1000)

Every network takes float [B, 3, R, R], normalised with its `normalisation`, and gives logits
[B, num_classes].
"""

import difflib
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import nn
from torchvision.models import resnet18, resnet34, resnet50, vgg16_bn, vgg19_bn

from kernels.normalise import Normalisation
from models.alexnet import AlexNet
from models.darknet import Darknet19
from models.mobilenet import MobileNet
from models.xnor import XnorResNet50

if TYPE_CHECKING:
    from timm.models import PretrainedCfg


class ModelError(ValueError):
    """A bad input to this room: one line that names the network or file and says what to do."""


class _Network(NamedTuple):
    build: Callable[..., nn.Module]  # build(num_classes=...)
    smallest: int = 32  # px; what the strides multiply to


_NETWORKS = {
    "alexnet": _Network(AlexNet, smallest=64),
    "mobilenet": _Network(MobileNet),
    "mobilenet0.75": _Network(partial(MobileNet, width=0.75)),
    "mobilenet0.5": _Network(partial(MobileNet, width=0.5)),
    "mobilenet0.25": _Network(partial(MobileNet, width=0.25)),
    # torchvision's own: their stride is in the 3x3, and their key names are those of most published files.
    # Blocks that begin as identities learn sooner (Goyal et al. 2017, section 5.1).
    "resnet18": _Network(partial(resnet18, zero_init_residual=True)),
    "resnet34": _Network(partial(resnet34, zero_init_residual=True)),
    "resnet50": _Network(partial(resnet50, zero_init_residual=True)),
    "resnet50-xnor": _Network(XnorResNet50),
    # With batch normalisation, which the learning rate of 0.1 wants, and as published with dropout in the classifier.
    "vgg16": _Network(vgg16_bn),
    "vgg19": _Network(vgg19_bn),
    "darknet19": _Network(Darknet19),
}

_TIMM = "timm:"

_IMAGENET: Normalisation = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def names() -> list[str]:
    """The built-in networks; `build` takes `timm:<name>` besides, for each name in `timm.list_models()`."""
    return list(_NETWORKS)


def build(name: str, num_classes: int, *, pretrained: bool = False) -> nn.Module:
    """A freshly initialised network in training mode, on the current default device.

    name: one of `names()`, or `timm:<name>` with or without the tag of its weights (`timm:resnet18.a1_in1k`).
    pretrained: start from timm's own weights, fetched from the network; where `num_classes` is not
        theirs, the classifier keeps its initialisation. Only for timm's models: for the others, and without
        a network, `models.weights` reads files.

    Raises ModelError for an unknown name, fewer than one class, or weights that cannot be fetched.
    """
    timm_name = _timm_name(name)
    if num_classes < 1:
        raise ModelError(f"{name}: num_classes={num_classes}; a classifier needs at least 1 class")
    if timm_name is None:
        if pretrained:
            raise ModelError(f"{name}: has no weights to fetch; pass a file of weights instead")
        return _NETWORKS[name].build(num_classes=num_classes)
    import timm

    if not pretrained:
        return timm.create_model(timm_name, num_classes=num_classes)
    try:
        return timm.create_model(timm_name, num_classes=num_classes, pretrained=True)
    except Exception as error:  # each hub and each proxy fails with another class
        raise ModelError(
            f"{name}: its pretrained weights cannot be fetched ({_first_line(error)}); pass a file of weights instead"
        ) from error


def check_resolution(name: str, resolution: int) -> None:
    """Check that the network takes square crops of `resolution` px and gives one logit a class.

    A timm model is tried with shapes alone, without memory for weights or activations. Raises ModelError.
    """
    timm_name = _timm_name(name)
    if timm_name is None:
        smallest = _NETWORKS[name].smallest
        if resolution < smallest:
            raise ModelError(f"{name}: resolution={resolution} is too small; it takes {smallest} px and up")
        return
    classes = 2
    try:
        with torch.device("meta"), torch.no_grad():
            # Two crops, because batch normalisation in training refuses a single value a channel.
            logits = build(name, classes)(torch.empty(2, 3, resolution, resolution))
    except Exception as error:  # whatever its layers raise at a size they were not made for
        config = _timm_config(timm_name)
        if config.fixed_input_size:
            wants = f"it takes {config.input_size[-1]} px only"
        elif config.min_input_size:
            wants = f"it takes {config.min_input_size[-1]} px and up"
        else:
            wants = f"it was made for {config.input_size[-1]} px"
        raise ModelError(f"{name}: cannot take resolution={resolution} ({_first_line(error)}); {wants}") from error
    if getattr(logits, "shape", None) != (2, classes):
        raise ModelError(f"{name}: does not give one logit a class; choose a network that classifies")


def normalisation(name: str) -> Normalisation:
    """The mean and the standard deviation of red, green and blue, in the range 0 to 1, that the network expects.

    ImageNet's for the built-in networks; for a timm model those of its published weights. Raises ModelError
    for an unknown name.
    """
    timm_name = _timm_name(name)
    if timm_name is None:
        return _IMAGENET
    config = _timm_config(timm_name)
    (red, green, blue), (red_std, green_std, blue_std) = config.mean, config.std
    return (red, green, blue), (red_std, green_std, blue_std)


def _timm_name(name: str) -> str | None:
    """The part after `timm:`, or None for a built-in network; any other name raises ModelError."""
    if name in _NETWORKS:
        return None
    # Loading timm takes seconds, which the built-in networks need not wait for.
    import timm

    known = [_TIMM + timm_name for timm_name in timm.list_models() + timm.list_pretrained()]
    if name in known:
        return name.removeprefix(_TIMM)
    near = difflib.get_close_matches(name.lower(), [*_NETWORKS, *known])
    hint = f"did you mean {' or '.join(near)}? " if near else ""
    raise ModelError(f"unknown network {name!r}: {hint}take one of {', '.join(_NETWORKS)} or timm:<name>")


def _timm_config(timm_name: str) -> "PretrainedCfg":
    import timm
    from timm.models import PretrainedCfg

    # timm, too, takes the defaults for a model without published weights.
    return timm.get_pretrained_cfg(timm_name) or PretrainedCfg()


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
