"""Applies a network's classifier to every cell of its last feature map, not to their mean (ReLabel, section 3.1)."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models import ModelError

# Relative to the largest logit; rounding errors are far smaller.
_TOLERANCE = 1e-3
# Pixels per side at which networks of any common stride have several cells.
_LARGER = (64, 128, 256)


class CellLogits(nn.Module):
    """Computes the logits of every cell: float [B, 3, R, R] to [B, C, S, S]. Their mean is the network's output.

    network: a network that averages its feature map and classifies the mean by a linear layer, or classifies every cell
    by a convolution and averages the result; it runs in evaluation mode. name: its name, for errors. resolution: pixels
    per side of an image that it accepts. The attribute `head` describes the head that was found. Raises ModelError for
    other networks.
    """

    def __init__(self, network: nn.Module, name: str, resolution: int):
        super().__init__()
        self.network = network.eval().requires_grad_(False)
        self._classifier: nn.Linear | None = None
        # With a single cell, the output of every module equals its mean: larger images have more cells.
        sides = (resolution, *(side for side in _LARGER if side > resolution))
        found = next(filter(None, (_found(network, side) for side in sides)), None)
        features, self._classifier = found or (None, None)
        if features is None:
            raise ModelError(
                f"{name}: its head is not the mean of a feature map and a linear layer, which label maps need; take "
                "another refinery"
            )
        names = {module: path for path, module in network.named_modules()}
        self.head = f"the mean of {names[features]}" + (
            f", then {names[self._classifier]}" if self._classifier else ", which classifies every cell"
        )
        self._cells: Tensor | None = None
        features.register_forward_hook(self._keep)

    def train(self, mode: bool = True) -> "CellLogits":
        return super().train(False)

    def forward(self, x: Tensor) -> Tensor:
        self.network(x)
        cells, self._cells = self._cells, None
        assert cells is not None
        if self._classifier is None:
            return cells
        return F.linear(cells.movedim(1, -1), self._classifier.weight, self._classifier.bias).movedim(-1, 1)

    def _keep(self, module: nn.Module, inputs: Any, output: Tensor) -> None:
        self._cells = output


@torch.inference_mode()
def _found(network: nn.Module, resolution: int) -> tuple[nn.Module, nn.Linear | None] | None:
    """Returns the module whose output is averaged, and the linear layer after it or None.

    Returns None if the network has no such head, or does not accept images of this size.
    """
    made: list[tuple[nn.Module, Tensor]] = []
    linear: list[tuple[nn.Linear, Tensor, Tensor]] = []

    def remember(module: nn.Module, inputs: Any, output: Any) -> None:
        if isinstance(output, Tensor) and output.ndim == 4:
            made.append((module, output))
        if isinstance(module, nn.Linear) and output.ndim == 2:
            linear.append((module, inputs[0], output))

    hooks = [module.register_forward_hook(remember) for module in network.modules()]
    weight = next(network.parameters())
    probe = torch.randn(2, 3, resolution, resolution, generator=torch.Generator().manual_seed(0)).to(weight)
    try:
        logits = network(probe)
    except (RuntimeError, ValueError, AssertionError):
        return None  # the network does not accept images of this size
    finally:
        for hook in hooks:
            hook.remove()
    # The last of them, since activations may change a map in place.
    for module, output in reversed(made):
        if _averages_to(output, logits):
            return module, None
    for layer, taken, given in reversed(linear):
        if _close(given, logits):
            for module, output in reversed(made):
                if _averages_to(output, taken):
                    return module, layer
    return None


def _averages_to(cells: Tensor, mean: Tensor) -> bool:
    return cells.shape[:2] == mean.shape and cells.shape[-1] > 1 and _close(cells.mean((2, 3)), mean)


def _close(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and bool((one - other).abs().max() <= _TOLERANCE * other.abs().max())
