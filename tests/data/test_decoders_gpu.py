"""Decoding on a GPU: the same crops, up to nvJPEG's own rounding."""

import pytest
import torch

from data.loader import open_loader

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("decoder", ["ffcv", "torchvision", "dali"])
def test_same_crops_as_on_the_cpu(converted, decoder):
    options = {"resolution": 48, "batch_size": 16, "seed": 7, "copies": 2}
    reference = open_loader(converted.beton("train"), decoder="ffcv", **options).epoch(3)
    on_gpu = open_loader(converted.beton("train"), decoder=decoder, device="cuda", **options).epoch(3)
    for one, other in zip(reference, on_gpu, strict=True):
        assert other.crops.is_cuda
        assert other.crops.is_contiguous(memory_format=torch.channels_last)
        for name in ("labels", "indices", "boxes", "sizes", "flips"):
            assert torch.equal(getattr(one, name), getattr(other, name).cpu()), name
        error = (one.crops.int() - other.crops.cpu().int()).abs().float()
        assert error.mean() < (0.01 if decoder == "ffcv" else 1.5)


@pytest.mark.parametrize("decoder", ["ffcv", "dali"])
def test_batches_kept_for_later_do_not_change(converted, decoder):
    loader = open_loader(converted.beton("train"), resolution=48, batch_size=8, decoder=decoder, device="cuda")
    kept = []
    for batch in loader.epoch(0):
        kept.append((batch.crops, batch.crops.clone()))
    for crops, at_once in kept:
        assert torch.equal(crops, at_once)
