"""Normalisation of uint8 crops for the input of a network."""

import torch
from torch import nn

# Mean and standard deviation of the three channels, for values in 0..1.
Normalisation = tuple[tuple[float, float, float], tuple[float, float, float]]


class Normalise(nn.Module):
    """Computes (crops / 255 - mean) / std per channel.

    Takes crops of any dtype, 0..255, [B, 3, R, R]; returns float32 [B, 3, R, R] in their memory format.
    """

    scale: torch.Tensor
    shift: torch.Tensor

    def __init__(self, normalisation: Normalisation):
        super().__init__()
        mean, std = torch.tensor(normalisation, dtype=torch.float64)
        # Buffers move to the device with the module; they are not saved in checkpoints.
        self.register_buffer("scale", (1 / (255 * std)).float().view(1, 3, 1, 1), persistent=False)
        self.register_buffer("shift", (-mean / std).float().view(1, 3, 1, 1), persistent=False)

    def forward(self, crops: torch.Tensor) -> torch.Tensor:
        # The compiler fuses this with the following operations into one pointwise kernel, so a Triton version would
        # gain nothing (not measured).
        return torch.addcmul(self.shift, crops.float(), self.scale)
