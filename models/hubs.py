"""The networks of timm and torchvision: their names, their published weights, and the inputs that these expect.

A name may have the tag of its weights (`resnet50.a1_in1k`, `resnet50.IMAGENET1K_V1`); without one, the default weights
are used.
"""

import socket
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING
from urllib.parse import urlsplit
from urllib.request import getproxies

import torch
from torch import nn
from torchvision import models as torchvision_models

from kernels.normalise import Normalisation

if TYPE_CHECKING:
    from timm.models import PretrainedCfg

# Seconds within which a reachable hub answers.
_PATIENCE = 5


@dataclass(frozen=True)
class Published:
    """Properties of a network's published weights.

    num_classes: classes of their classifier, 0 if they have none. normalisation: mean and std of their input.
    resolution: pixels per side. center_ratio: side of the validation crop as a share of the image's shorter side.
    takes: the input sizes that the network accepts, as text.
    """

    num_classes: int
    normalisation: Normalisation
    resolution: int
    center_ratio: float
    takes: str


class Hub(ABC):
    """A library of networks with published weights."""

    @abstractmethod
    def names(self) -> list[str]:
        """Returns the names of all networks, with and without the tags of their weights."""

    @abstractmethod
    def build(self, name: str, num_classes: int) -> nn.Module:
        """Returns a newly initialised network."""

    @abstractmethod
    def fetch(self, name: str, num_classes: int) -> nn.Module:
        """Returns the network with its published weights; a classifier for other classes keeps its initialisation.

        Raises the error of the library or of the connection if the weights cannot be fetched.
        """

    @abstractmethod
    def published(self, name: str) -> Published: ...


class Timm(Hub):
    # Importing timm takes seconds; other networks do not need it.

    def names(self) -> list[str]:
        import timm

        return timm.list_models() + timm.list_pretrained()

    def build(self, name: str, num_classes: int) -> nn.Module:
        import timm

        return timm.create_model(name, num_classes=num_classes)

    def fetch(self, name: str, num_classes: int) -> nn.Module:
        import timm
        from huggingface_hub import constants

        # Without a connection the hub's client would retry for 45 seconds, twice if the weights are in its cache. In
        # offline mode it uses the cache immediately.
        unreachable = connection_error(constants.ENDPOINT)
        before = constants.HF_HUB_OFFLINE
        constants.HF_HUB_OFFLINE = before or unreachable is not None
        try:
            return timm.create_model(name, num_classes=num_classes, pretrained=True)
        except Exception:
            # The client's message about offline mode would be misleading.
            if unreachable:
                raise unreachable from None
            raise
        finally:
            constants.HF_HUB_OFFLINE = before

    def published(self, name: str) -> Published:
        config = self._config(name)
        (red, green, blue), (red_std, green_std, blue_std) = config.mean, config.std
        resolution = config.input_size[-1]
        if config.fixed_input_size:
            takes = f"it takes {resolution} px only"
        elif config.min_input_size:
            takes = f"it takes {config.min_input_size[-1]} px and up"
        else:
            takes = f"it was made for {resolution} px"
        return Published(
            num_classes=config.num_classes,
            normalisation=((red, green, blue), (red_std, green_std, blue_std)),
            resolution=resolution,
            center_ratio=min(config.crop_pct, 1.0),  # some pad the image
            takes=takes,
        )

    def _config(self, name: str) -> "PretrainedCfg":
        import timm
        from timm.models import PretrainedCfg

        # timm also uses the defaults for a model without published weights.
        return timm.get_pretrained_cfg(name) or PretrainedCfg()


class Torchvision(Hub):
    def names(self) -> list[str]:
        plain = torchvision_models.list_models(module=torchvision_models)
        tags = [(name, weights) for name in plain for weights in torchvision_models.get_model_weights(name)]
        # Some weights have no classifier.
        return plain + [f"{name}.{weights.name}" for name, weights in tags if weights.meta["categories"]]

    def build(self, name: str, num_classes: int) -> nn.Module:
        plain = name.partition(".")[0]
        try:
            return torchvision_models.get_model(plain, num_classes=num_classes)
        except NotImplementedError:
            # RegNets read tensor values in their constructor, which the meta device does not have.
            device = torch.get_default_device()
            with torch.device("cpu"):
                return torchvision_models.get_model(plain, num_classes=num_classes).to(device)

    def fetch(self, name: str, num_classes: int) -> nn.Module:
        weights = self._weights(name)
        plain = name.partition(".")[0]
        if num_classes == self.published(name).num_classes:
            return torchvision_models.get_model(plain, weights=weights)
        network = self.build(name, num_classes)
        given, own = weights.get_state_dict(progress=True, check_hash=True), network.state_dict()
        # The classifier's tensors differ only in their first dimension.
        head = [key for key in given if key in own and given[key].shape[0:1] != own[key].shape[0:1]]
        network.load_state_dict({key: own[key] if key in head else given[key] for key in given})
        return network

    def published(self, name: str) -> Published:
        weights = self._weights(name)
        preset = weights.transforms()
        (red, green, blue), (red_std, green_std, blue_std) = preset.mean, preset.std
        return Published(
            num_classes=len(weights.meta["categories"]),
            normalisation=((red, green, blue), (red_std, green_std, blue_std)),
            resolution=preset.crop_size[0],
            center_ratio=preset.crop_size[0] / preset.resize_size[0],
            takes=f"it was made for {preset.crop_size[0]} px",
        )

    def _weights(self, name: str) -> torchvision_models.WeightsEnum:
        plain, _, tag = name.partition(".")
        return torchvision_models.get_model_weights(plain)[tag or "DEFAULT"]


HUBS: dict[str, Hub] = {"timm": Timm(), "torchvision": Torchvision()}


def connection_error(url: str) -> OSError | None:
    """Returns why a server cannot be reached, or None if it can be, or if there is a proxy."""
    place = urlsplit(url)
    if getproxies().keys() & {place.scheme, "all"}:
        return None
    try:
        socket.create_connection((place.hostname, place.port or 443), timeout=_PATIENCE).close()
    except OSError as error:
        return OSError(f"{place.hostname}: {error.strerror or 'no answer'}")
    return None
