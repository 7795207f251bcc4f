"""CutMix (Yun et al. 2019) and Mixup (Zhang et al. 2018) of a batch of crops, as one operation."""

import torch
from torch import Tensor


def mix(crops: Tensor, partners: Tensor, boxes: Tensor, inside: Tensor) -> Tensor:
    """Mixes each crop with another one's pixels within a box. Returns float32 [B, 3, R, R], channels-last.

    crops: any dtype, [B, 3, R, R], channels-last. partners: the index in the batch of the other crop, int64 [B]. boxes:
    (top, left, bottom, right) in pixels, the last two exclusive, [B, 4]. inside: the weight of the crop's own pixels in
    the box, 0 to 1, [B]; outside the box it is 1. CutMix uses 0 in a box, Mixup a weight in the whole crop.
    """
    crops = crops.float()
    at = torch.arange(crops.shape[-1], device=crops.device)
    top, left, bottom, right = boxes[:, :, None].unbind(1)
    rows, columns = (at >= top) & (at < bottom), (at >= left) & (at < right)
    within = rows[:, None, :, None] & columns[:, None, None, :]
    own = torch.where(within, inside.float()[:, None, None, None], 1.0)
    others = crops[partners].contiguous(memory_format=torch.channels_last)
    # A weight of 0 or 1 gives one crop's pixels exactly.
    return own * crops + (1 - own) * others
