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


@pytest.mark.parametrize("decoder", ["ffcv", "torchvision", "dali"])
def test_a_batch_is_complete_on_the_stream_that_takes_it(converted, decoder):
    """On any stream, with pending work on it, while memory is reused."""
    loader = open_loader(
        converted.beton("train"), resolution=96, batch_size=8, decoder=decoder, device="cuda", copies=2
    )
    expected = [(batch.crops.cpu(), batch.labels.cpu()) for batch in loader.epoch(0)]
    for _ in range(3):
        found = []
        with torch.cuda.stream(torch.cuda.Stream()):
            for batch in loader.epoch(0):
                torch.cuda._sleep(20_000_000)
                found.append((batch.crops.clone(), batch.labels.clone()))
                del batch
        torch.cuda.synchronize()
        for (crops, labels), (all_crops, all_labels) in zip(found, expected, strict=True):
            assert torch.equal(crops.cpu(), all_crops)
            assert torch.equal(labels.cpu(), all_labels)


@pytest.mark.parametrize("decoder", ["ffcv", "torchvision", "dali"])
def test_a_graph_is_captured_while_batches_are_made(converted, decoder):
    """And while old ones are freed. The capture must cover only its own thread (thread_local)."""
    loader = open_loader(
        converted.beton("train"), resolution=96, batch_size=8, decoder=decoder, device="cuda", copies=2
    )
    held = torch.zeros(8, 3, 96, 96, device="cuda", dtype=torch.float64)
    for epoch in range(2):
        for batch in loader.epoch(epoch):
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                total = (held * 2).sum()
            held.copy_(batch.crops)
            graph.replay()
            assert total.item() == 2 * batch.crops.sum().item()


@pytest.mark.parametrize("decoder", ["ffcv", "dali"])
def test_batches_kept_for_later_do_not_change(converted, decoder):
    loader = open_loader(converted.beton("train"), resolution=48, batch_size=8, decoder=decoder, device="cuda")
    kept = []
    for batch in loader.epoch(0):
        kept.append((batch.crops, batch.crops.clone()))
    for crops, at_once in kept:
        assert torch.equal(crops, at_once)
