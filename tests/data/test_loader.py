"""The loader: steps, shards, restarts, copies, pairings and look-ups."""

import gc
import inspect
import io
import itertools
import shutil
import threading
import time

import numpy as np
import pytest
import torch
from PIL import Image

from data import DataError
from data.beton import Beton
from data.loader import Pairing, _class_names, open_loader
from data.plan import CropRule


def loader_of(converted, split="train", **options):
    options = {"resolution": 32, "batch_size": 8, "threads": 2, "decoder": "ffcv"} | options
    return open_loader(converted.beton(split), **options)


def decoding_threads() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if thread.name.startswith("decode")}


def test_options_that_other_programs_use_are_unchanged():
    options = list(inspect.signature(open_loader).parameters.values())
    assert [option.name for option in options] == [
        *("beton_path", "resolution", "batch_size", "decoder", "train", "seed", "device", "copies", "rank", "world"),
        *("threads", "crop", "order", "drop_last", "paired", "fetch", "resident"),
    ]
    assert all(option.kind is option.KEYWORD_ONLY for option in options[1:])
    assert {option.name: option.default for option in options[3:]} == {
        **{"decoder": "auto", "train": True, "seed": 0, "device": "cpu", "copies": 1, "rank": 0, "world": 1},
        **{"threads": None, "crop": CropRule(), "order": "random", "drop_last": None, "paired": (), "fetch": None},
        "resident": 0.5,
    }


def test_describes_the_set(converted):
    loader = loader_of(converted)
    assert (loader.num_samples, loader.num_classes, loader.steps) == (48, 3, 6)
    assert loader.class_names == ("class0", "class1", "class2")
    assert loader.decoder == "ffcv"


def test_training_covers_every_image_once_an_epoch(converted):
    loader = loader_of(converted)
    epochs = [torch.cat([batch.indices for batch in loader.epoch(e)]) for e in (0, 1)]
    for indices in epochs:
        assert sorted(indices.tolist()) == list(range(48))
    assert not torch.equal(*epochs)


def test_labels_belong_to_the_images(converted):
    for batch in loader_of(converted).epoch(0):
        assert torch.equal(batch.labels, batch.indices // 16)


@pytest.mark.parametrize("copies", [1, 3])
def test_start_step_continues_with_the_same_bits(converted, copies):
    """With copies, also from within the crops of one block of images."""
    loader = loader_of(converted, seed=5, copies=copies, paired=(Pairing("same", 16), Pairing("center", 16)))
    whole = list(loader.epoch(2))
    for start in (1, 4, 5, 6 * copies):
        rest = list(loader.epoch(2, start))
        assert len(rest) == 6 * copies - start
        for one, other in zip(whole[start:], rest, strict=True):
            for name in ("crops", "indices", "copies", "labels", "boxes", "flips"):
                assert torch.equal(getattr(one, name), getattr(other, name)), name
            for pairing, crops in one.paired.items():
                assert torch.equal(crops, other.paired[pairing])


@pytest.mark.parametrize("decoder", ["ffcv", "torchvision", "dali"])
def test_an_abandoned_epoch_does_not_affect_the_next(converted, decoder):
    loader = loader_of(converted, decoder=decoder)
    whole = next(iter(loader.epoch(0)))
    for _ in itertools.islice(loader.epoch(1), 1):
        pass
    assert torch.equal(next(iter(loader.epoch(0))).crops, whole.crops)


def test_a_pass_is_the_next_epoch(converted):
    loader = loader_of(converted)
    first, second = list(loader), list(loader)
    assert len(first) == len(second) == len(loader) == loader.steps
    for epoch, batches in enumerate([first, second]):
        assert {batch.epoch for batch in batches} == {epoch}
        for ours, batch in zip(batches, loader.epoch(epoch), strict=True):
            assert torch.equal(ours.crops, batch.crops)
            assert torch.equal(ours.indices, batch.indices)


def test_an_abandoned_pass_counts_and_leaves_no_work_running(converted):
    before = decoding_threads()
    loader = loader_of(converted)
    for epoch in range(20):
        for batch in loader:
            assert batch.epoch == epoch
            break
    assert len(decoding_threads() - before) <= 2
    # A pass is numbered when it is started, not at its first batch.
    begun = iter(loader)
    assert next(iter(loader)).epoch == 21
    assert next(begun).epoch == 20


def test_a_deleted_loader_leaves_no_threads(converted):
    before = decoding_threads()
    loader = loader_of(converted)
    left = iter(loader)
    next(left)
    assert decoding_threads() - before
    del loader, left
    ends = time.monotonic() + 60
    while decoding_threads() - before and time.monotonic() < ends:
        # A thread's current work keeps the decoder alive a little longer.
        gc.collect()
        time.sleep(0.05)
    assert not decoding_threads() - before


def test_set_epoch_sets_the_next_pass_and_those_after_it(converted):
    loader = loader_of(converted)
    loader.set_epoch(7)
    assert [next(iter(loader)).epoch for _ in range(3)] == [7, 8, 9]
    for epoch in (2, 3, 3, 0):
        loader.set_epoch(epoch)
        assert next(iter(loader)).epoch == epoch
    # Passes over a chosen epoch do not count.
    next(loader.epoch(30))
    assert next(iter(loader)).epoch == 1
    with pytest.raises(DataError, match="^epoch=-1: must be at least 0"):
        loader.set_epoch(-1)


def test_a_batch_unpacks_to_crops_and_labels(converted):
    batch = next(loader_of(converted).epoch(0))
    crops, labels = batch
    assert crops is batch.crops
    assert labels is batch.labels


def test_parts_of_a_batch_are_interleaved(converted):
    batch = next(loader_of(converted, paired=(Pairing("same", 16),)).epoch(0))
    for number in range(3):
        part = batch.part(number, 3)
        for name in ("crops", "labels", "indices", "copies", "boxes", "sizes", "flips"):
            assert torch.equal(getattr(part, name), getattr(batch, name)[number::3]), name
        assert torch.equal(part.paired[Pairing("same", 16)], batch.paired[Pairing("same", 16)][number::3])
        assert part.crops.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(batch.part(0, 1).crops, batch.crops)


def test_ranks_train_on_equal_full_batches(converted):
    ranks = [list(loader_of(converted, batch_size=5, rank=rank, world=3).epoch(0)) for rank in range(3)]
    assert [len(batches) for batches in ranks] == [3, 3, 3]
    seen = torch.cat([batch.indices for batches in ranks for batch in batches])
    assert len(seen) == len(seen.unique()) == 45
    # 48 images are 10, 10, 10, 9 and 9: two batches of 5 would leave two ranks behind.
    assert [loader_of(converted, batch_size=5, rank=rank, world=5).steps for rank in range(5)] == [1] * 5


def test_a_step_over_all_ranks_equals_that_of_one_process(converted):
    one = list(loader_of(converted, batch_size=8).epoch(0))
    two = [list(loader_of(converted, batch_size=4, rank=rank, world=2).epoch(0)) for rank in range(2)]
    for step, batch in enumerate(one):
        together = torch.cat([two[0][step].indices, two[1][step].indices])
        assert sorted(together.tolist()) == sorted(batch.indices.tolist())


def test_evaluation_drops_nothing_and_counts_nothing_twice(converted):
    for world, size in ((1, 4), (2, 4), (4, 4), (4, 3)):
        seen = [
            batch.indices
            for rank in range(world)
            for batch in loader_of(converted, "val", train=False, batch_size=size, rank=rank, world=world).epoch(0)
        ]
        assert sorted(torch.cat(seen).tolist()) == list(range(15))


def test_evaluation_takes_central_squares_unflipped(converted):
    for batch in loader_of(converted, "val", train=False, crop=CropRule(center_ratio=0.5)).epoch(0):
        short = batch.sizes.min(dim=1).values
        assert torch.equal(batch.boxes[:, 2], batch.boxes[:, 3])
        assert (batch.boxes[:, 2] - short * 0.5).abs().max() <= 0.5
        assert not batch.flips.any()


def test_copies_are_different_crops_of_the_same_images(converted):
    loader = loader_of(converted, copies=3)
    assert loader.steps == 18
    batches = list(loader.epoch(0))
    for block in range(6):
        trio = batches[3 * block : 3 * block + 3]
        assert all(torch.equal(batch.indices, trio[0].indices) for batch in trio)
        assert [batch.copies.unique().tolist() for batch in trio] == [[0], [1], [2]]
        assert not torch.equal(trio[0].boxes, trio[1].boxes)
    assert torch.equal(batches[0].crops, next(iter(loader_of(converted).epoch(0))).crops)


def test_flips_follow_the_rule(converted):
    flipped = torch.cat([batch.flips for e in range(4) for batch in loader_of(converted).epoch(e)])
    assert 0.3 < flipped.float().mean() < 0.7
    assert not any(batch.flips.any() for batch in loader_of(converted, crop=CropRule(flip=False)).epoch(0))


def test_paired_crops(converted):
    same, center = Pairing("same", 16), Pairing("center", 24)
    plain = list(loader_of(converted).epoch(0))
    paired = list(loader_of(converted, paired=(same, center)).epoch(0))
    for one, other in zip(plain, paired, strict=True):
        assert torch.equal(one.crops, other.crops)
        assert set(other.paired) == {same, center}
        assert other.paired[same].shape == (8, 3, 16, 16)
        assert other.paired[center].shape == (8, 3, 24, 24)
    images = {int(i): c for b in paired for i, c in zip(b.indices, b.paired[center], strict=True)}
    order = loader_of(converted, resolution=24, train=False)
    for batch in order.epoch(0):
        for index, crop in zip(batch.indices, batch.crops, strict=True):
            assert torch.equal(images[int(index)], crop)
    with pytest.raises(ValueError, match="box=corner"):
        Pairing("corner", 16)


def test_paired_crops_of_copies(converted):
    """The paired training crop differs for each copy; the central crop is the same for all."""
    same, center = Pairing("same", 32), Pairing("center", 24)
    batches = list(loader_of(converted, copies=3, paired=(same, center)).epoch(0))
    for place, batch in enumerate(batches):
        assert torch.equal(batch.paired[same], batch.crops)
        assert batch.paired[center].shape == (8, 3, 24, 24)
        assert torch.equal(batch.paired[center], batches[place - place % 3].paired[center])
    assert not torch.equal(batches[0].crops, batches[1].crops)


def test_whole_images_are_squashed_to_squares(converted):
    whole = Pairing("whole", 16)
    beton = Beton(converted.beton("train"))
    for batch in loader_of(converted, train=False, paired=(whole,)).epoch(0):
        for index, crop in zip(batch.indices.tolist(), batch.paired[whole], strict=True):
            image = Image.open(io.BytesIO(beton.encoded(index).tobytes())).resize((16, 16), Image.Resampling.BILINEAR)
            found = crop.permute(1, 2, 0).numpy().astype(int)
            assert np.abs(found - np.asarray(image.convert("RGB")).astype(int)).mean() < 2


def test_fetch_is_called_for_each_batch(converted):
    def fetch(indices, copies, epoch):
        return torch.from_numpy(indices * 100 + copies * 10 + epoch)

    for batch in loader_of(converted, copies=2, fetch=fetch).epoch(4):
        assert torch.equal(batch.labels_on_disk, batch.indices * 100 + batch.copies * 10 + 4)


def test_quasi_random_order_takes_pages_in_groups(converted, monkeypatch):
    """A file of few images has one page; other pages stand for those of a large one."""
    monkeypatch.setattr("data.plan.PAGES_AT_ONCE", 2)
    seen = {}
    for order in ("quasi-random", "random"):
        loader = loader_of(converted, order=order)
        loader._beton.pages = np.arange(48) // 8
        groups = torch.cat([batch.indices for batch in loader.epoch(0)]).chunk(3)
        assert sorted(torch.cat(groups).tolist()) == list(range(48))
        seen[order] = {len(set((group // 8).tolist())) for group in groups}
    assert seen["quasi-random"] == {2}
    assert max(seen["random"]) > 2


def test_sequential_order_is_that_of_the_file(converted):
    sequential = torch.cat([batch.indices for batch in loader_of(converted, order="sequential").epoch(0)])
    np.testing.assert_array_equal(sequential, np.arange(48))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"order": "sorted"}, "order=sorted"),
        ({"decoder": "nvjpeg"}, "decoder=nvjpeg"),
        ({"batch_size": 49}, "no batch of 49"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"copies": 0}, "copies=0"),
    ],
)
def test_bad_options_are_named(converted, options, says):
    with pytest.raises(DataError, match=says):
        loader_of(converted, **options)


def test_class_ids_out_of_range_are_refused(converted, tmp_path):
    beton = Beton(converted.beton("train"))
    beton.labels = np.array([0, 3])
    with pytest.raises(DataError, match=r"train.beton: holds class 3, but set.json names 3 classes"):
        _class_names(beton)

    shutil.copy(beton.path, tmp_path / "alone.beton")
    alone = Beton(tmp_path / "alone.beton")
    assert _class_names(alone) == ("0", "1", "2")
    alone.labels = np.array([0, 1_000_000])
    with pytest.raises(DataError, match=r"alone.beton: has a class 1000000; at most 1000000 classes are supported"):
        _class_names(alone)
