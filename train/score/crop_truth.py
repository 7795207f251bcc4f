"""How often labels are right about the crop itself, on `scenes`, where the truth about every crop is known."""

from typing import Any

import numpy as np
import torch

from data import scenes
from data.loader import Loader
from data.progress import images_bar
from train.device import computing_in
from train.labels.source import LabelSource


@torch.inference_mode()
def label_quality(
    loader: Loader, labels: LabelSource, *, device: torch.device, autocast: torch.dtype | None
) -> dict[str, Any]:
    """Compares the labels of one epoch's training crops with what the crops show.

    loader: the training loader of `scenes`. labels: the label source; its most likely class counts.
    Returns `crops` (how many show something), and in percent of them `image_label_right` and `label_right`.
    """
    shown = image_right = label_right = 0
    with images_bar(loader.num_samples, "truth about crops", leave=False) as bar:
        for batch in loader.epoch(0):
            with computing_in(autocast, device):
                likeliest = labels(batch).classes().cpu().numpy()
            truth = scenes.crop_truth("train", batch.indices.cpu().numpy(), batch.boxes.cpu().numpy())
            seen = truth >= 0
            shown += int(seen.sum())
            image_right += int(np.sum(seen & (batch.labels.cpu().numpy() == truth)))
            label_right += int(np.sum(seen & (likeliest == truth)))
            bar.update(len(truth))
    return {
        "crops": shown,
        "image_label_right": 100 * image_right / max(shown, 1),
        "label_right": 100 * label_right / max(shown, 1),
    }
