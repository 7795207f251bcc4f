"""Folds batch normalisation with running statistics into the layers before it."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

# Relative to the largest logit; rounding errors are far smaller.
_TOLERANCE = 1e-3


@torch.no_grad()
def fold(network: nn.Module, resolution: int) -> int:
    """Folds each batch normalisation of a network in evaluation mode into the layer before it.

    The network's output stays the same within rounding; the folded layers become identities. Layers are paired by data
    flow in a forward pass at `resolution` pixels per side. Returns how many were folded: 0, with the network unchanged,
    if the logits would differ.
    """
    weight = next(network.parameters())
    probe = torch.randn(2, 3, resolution, resolution, generator=torch.Generator().manual_seed(0)).to(weight)
    with _float32(probe.device):
        pairs, expected = _pairs(network, probe)
    parents = {child: (parent, name) for parent in network.modules() for name, child in parent.named_children()}
    before = [(*parents[module], module) for pair in pairs for module in pair]
    for layer, norm in pairs:
        fuse: Any = fuse_linear_bn_eval if isinstance(layer, nn.Linear) else fuse_conv_bn_eval
        _replace(*parents[layer], fuse(layer, norm))
        _replace(*parents[norm], nn.Identity())
    with _float32(probe.device):
        logits = network(probe)
    # This detects a layer whose output is used by more than its normalisation.
    if (logits - expected).abs().max() > _TOLERANCE * expected.abs().max():
        for parent, name, module in before:
            _replace(parent, name, module)
        return 0
    return len(pairs)


@contextmanager
def _float32(device: torch.device) -> Iterator[None]:
    """Networks compute in float32, also within autocast and where TF32 is allowed: both round by more than the
    tolerance."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32
    matmul.allow_tf32 = cudnn.allow_tf32 = False
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = before


def _pairs(network: nn.Module, probe: torch.Tensor) -> tuple[list[tuple[nn.Module, nn.Module]], torch.Tensor]:
    """Returns pairs of a convolution or linear layer and the normalisation of its output, and the logits of `probe`."""
    made: dict[int, tuple[nn.Module, torch.Tensor]] = {}  # the output is kept, so that its id stays unique
    pairs = []

    def remember(module: nn.Module, inputs: Any, output: torch.Tensor) -> None:
        made[id(output)] = (module, output)

    def pair(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        if id(inputs[0]) in made:
            pairs.append((made[id(inputs[0])][0], module))

    hooks = []
    for module in network.modules():
        if type(module) in (nn.Conv2d, nn.Linear):
            hooks.append(module.register_forward_hook(remember))
        elif type(module) in (nn.BatchNorm2d, nn.BatchNorm1d) and module.running_mean is not None:
            hooks.append(module.register_forward_pre_hook(pair))
    try:
        logits = network(probe)
    finally:
        for hook in hooks:
            hook.remove()
    return pairs, logits


def _replace(parent: nn.Module, name: str, module: nn.Module) -> None:
    parent._modules[name] = module
