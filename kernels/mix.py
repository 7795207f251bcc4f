"""CutMix (Yun et al. 2019) and Mixup (Zhang et al. 2018) of the crops of a batch, as one operation."""

import torch
from torch import Tensor


def mix(crops: Tensor, partners: Tensor, boxes: Tensor, inside: Tensor) -> Tensor:
    """Mixes into each crop a share of another one's pixels within a box: float32 [B, 3, R, R], channels-last as the
    crops.

    crops: of any type, [B, 3, R, R]. partners: the index in the batch of the other crop, int64 [B]. boxes: (top, left,
    bottom, right) in pixels, the last two exclusive, [B, 4]. inside: the crop's own share of the pixels in the box, 0
    to 1, [B]; outside the box all pixels are its own. CutMix has 0 in a box, Mixup a share in the whole crop.
    """
    crops = crops.float()
    at = torch.arange(crops.shape[-1], device=crops.device)
    top, left, bottom, right = boxes[:, :, None].unbind(1)
    rows, columns = (at >= top) & (at < bottom), (at >= left) & (at < right)
    within = rows[:, None, :, None] & columns[:, None, None, :]
    own = torch.where(within, inside.float()[:, None, None, None], 1.0)
    others = crops[partners].contiguous(memory_format=torch.channels_last)
    # A share of 0 or 1 leaves one crop's pixels exactly.
    return own * crops + (1 - own) * others
