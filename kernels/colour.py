"""Colour jitter and lighting noise (ReLabel's training: Yun et al. 2021; Krizhevsky et al. 2012, section 4.1)."""

import torch
from torch import Tensor

# Weights of red, green and blue in a gray value (ITU-R BT.601).
_GRAY = (0.299, 0.587, 0.114)
# Principal components of the colours of ImageNet's training images, for values in 0..1: each colour's part in the three
# components, and the standard deviations along these.
_VECTORS = ((-0.5675, 0.7192, 0.4009), (-0.5808, -0.0045, -0.8140), (-0.5836, -0.6948, 0.4203))
_DEVIATIONS = (0.2175, 0.0188, 0.0045)


def change_colours(crops: Tensor, factors: Tensor, shifts: Tensor) -> Tensor:
    """Returns crops with changed brightness, contrast, saturation and lighting.

    crops: 0..255, any dtype, [B, 3, R, R]. factors: of brightness b, contrast c and saturation s, [B, 3]. shifts:
    along each principal component of ImageNet's colours, in standard deviations, [B, 3]. Returns float32 [B, 3, R, R];
    values are not clipped to 0..255.

    With g the gray value of a pixel and m the crop's mean gray value, saturation maps x to s x + (1 - s) g, contrast to
    c x + (1 - c) m, brightness to b x. Without clipping in between these commute: any order gives b (c (s x + (1 - s)
    g) + (1 - c) m).
    """
    # Python numbers, since a tensor of constants would be copied to the device in every step.
    brightness, contrast, saturation = factors.float().unbind(1)
    along = (shifts.float() * 255).unbind(1)
    steps = [deviation * shift for deviation, shift in zip(_DEVIATIONS, along, strict=True)]
    light = torch.stack([a * steps[0] + b * steps[1] + c * steps[2] for a, b, c in _VECTORS], dim=1)
    crops = crops.float()
    mean = _gray(crops.mean(dim=(2, 3)))
    same = (brightness * (1 - contrast) * mean)[:, None] + light
    own, gray = brightness * contrast * saturation, brightness * contrast * (1 - saturation)
    grays = _gray(crops) * gray[:, None, None]
    return torch.addcmul(same[:, :, None, None], crops, own[:, None, None, None]) + grays[:, None]


def _gray(colours: Tensor) -> Tensor:
    red, green, blue = colours.unbind(1)
    return _GRAY[0] * red + _GRAY[1] * green + _GRAY[2] * blue
