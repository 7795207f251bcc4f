"""The laws of the plan: bounds, determinism, independence of order and subset, and torchvision's distribution."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.transforms import RandomResizedCrop

from data.plan import (
    CropRule,
    center_boxes,
    epoch_order,
    random_boxes,
    random_colours,
    random_mixing,
    seed_of_generation,
    seed_of_part,
)

keys = st.integers(min_value=-(2**63), max_value=2**63 - 1)
sizes_of = st.lists(st.tuples(st.integers(1, 4000), st.integers(1, 4000)), min_size=1, max_size=40)


def inside(boxes, sizes):
    boxes, sizes = boxes.astype(np.int64), np.asarray(sizes)
    return (
        (boxes[:, :2] >= 0).all() and (boxes[:, 2:] >= 1).all() and (boxes[:, :2] + boxes[:, 2:] <= sizes[:, :2]).all()
    )


@given(sizes=sizes_of, seed=keys, epoch=st.integers(0, 10**6), low=st.floats(0.01, 1.0), aspect=st.floats(1.0, 5.0))
def test_boxes_lie_inside_their_images(sizes, seed, epoch, low, aspect):
    boxes, flips = random_boxes(
        np.arange(len(sizes)), sizes, seed=seed, epoch=epoch, scale=(low, 1.0), ratio=(1 / aspect, aspect)
    )
    assert boxes.dtype == np.int32
    assert boxes.shape == (len(sizes), 4)
    assert flips.dtype == bool
    assert inside(boxes, sizes)


@given(seed=keys, epoch=st.integers(0, 1000), subset=st.lists(st.integers(0, 199), min_size=1, max_size=30))
def test_a_crop_depends_only_on_its_image(seed, epoch, subset):
    sizes = np.random.default_rng(0).integers(30, 600, (200, 2))
    everything, all_flips = random_boxes(np.arange(200), sizes, seed=seed, epoch=epoch)
    boxes, flips = random_boxes(subset, sizes[subset], seed=seed, epoch=epoch)
    np.testing.assert_array_equal(boxes, everything[subset])
    np.testing.assert_array_equal(flips, all_flips[subset])


def test_seed_epoch_copy_and_image_all_matter():
    sizes = np.full((300, 2), 300)
    images = np.arange(300)
    first = random_boxes(images, sizes, seed=1, epoch=1)[0]
    for other in ({"seed": 2, "epoch": 1}, {"seed": 1, "epoch": 2}, {"seed": 1, "epoch": 1, "copy": 1}):
        assert (random_boxes(images, sizes, **other)[0] != first).any(axis=1).mean() > 0.98
    assert len(np.unique(first, axis=0)) > 290


def test_copies_can_differ_within_a_call():
    sizes, images = np.full((50, 2), 200), np.arange(50)
    copies = np.arange(50) % 3
    mixed, _ = random_boxes(images, sizes, seed=0, epoch=0, copy=copies)
    for copy in range(3):
        alone, _ = random_boxes(images, sizes, seed=0, epoch=0, copy=copy)
        np.testing.assert_array_equal(mixed[copies == copy], alone[copies == copy])


def test_the_draws_of_a_crop_are_independent():
    """Area, aspect, position and flip of a crop, of its other copy, of the next image and of the next epoch."""
    n, side = 6000, 1000
    sizes = np.full((n + 1, 2), side)

    def drawn(**key):
        # In a large image every first proposal fits, so that each quantity shows its own draw.
        boxes, flips = random_boxes(np.arange(n + 1), sizes, scale=(0.1, 0.3), ratio=(0.8, 1.25), **key)
        top, left, height, width = boxes.T.astype(float)
        return np.stack([height * width, width / height, top / (side - height), left / (side - width), flips])

    first = drawn(seed=1, epoch=1)
    others = [drawn(seed=1, epoch=1, copy=1), drawn(seed=1, epoch=2), drawn(seed=2, epoch=1)]
    table = np.concatenate([first[:, :-1], first[:, 1:], *(other[:, :-1] for other in others)])
    correlation = np.corrcoef(table) - np.eye(len(table))
    # Of 6000 independent pairs it is 0 +- 0.013.
    assert np.abs(correlation).max() < 0.06


@pytest.mark.parametrize("size", [(300, 400), (100, 1000), (64, 64), (500, 120)])
def test_boxes_have_torchvisions_distribution(size):
    """Two-sample Kolmogorov-Smirnov on each coordinate; 1.95 / sqrt(n / 2) is its 0.1 % threshold."""
    n, scale, ratio = 6000, (0.08, 1.0), (3 / 4, 4 / 3)
    torch.manual_seed(0)
    image = torch.empty(3, *size)
    theirs = np.array([RandomResizedCrop.get_params(image, list(scale), list(ratio)) for _ in range(n)])
    ours, flips = random_boxes(np.arange(n), np.tile(size, (n, 1)), seed=3, epoch=5, scale=scale, ratio=ratio)
    for column in range(4):
        values = np.union1d(theirs[:, column], ours[:, column])
        cumulated = [np.searchsorted(np.sort(x[:, column]), values, side="right") / n for x in (theirs, ours)]
        assert np.abs(cumulated[0] - cumulated[1]).max() < 1.95 / np.sqrt(n / 2)
    assert abs(flips.mean() - 0.5) < 0.03


def test_the_fallback_equals_torchvisions():
    """Where no proposal fits, the largest central crop within the ratio is taken, to the pixel."""
    for size in [(10, 3000), (3000, 10)]:
        torch.manual_seed(0)
        theirs = RandomResizedCrop.get_params(torch.empty(3, *size), [0.9, 1.0], [3 / 4, 4 / 3])
        ours, _ = random_boxes([0], [size], seed=0, epoch=0, scale=(0.9, 1.0))
        assert tuple(ours[0]) == tuple(theirs)


def test_the_fallback_comes_after_ten_proposals():
    """For crops of nearly all of a square image, most proposals are too wide or too high."""
    n, side = 20_000, 100
    boxes, _ = random_boxes(np.arange(n), np.full((n, 2), side), seed=0, epoch=0, scale=(0.98, 1.0))
    rng = np.random.default_rng(0)
    area = side**2 * rng.uniform(0.98, 1.0, 400_000)
    aspect = np.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3), len(area)))
    fits = (np.rint(np.sqrt(area * aspect)) <= side) & (np.rint(np.sqrt(area / aspect)) <= side)
    assert 0.03 < fits.mean() < 0.2
    # The fallback is the whole image, which few proposals equal.
    whole = fits & (np.rint(np.sqrt(area * aspect)) == side) & (np.rint(np.sqrt(area / aspect)) == side)
    found = 1 - (boxes[:, 2:] == side).all(axis=1).mean()
    wanted = (1 - (1 - fits.mean()) ** 10) * (1 - whole.sum() / fits.sum())
    assert abs(found - wanted) < 0.012


@given(n=st.integers(0, 500), seed=keys, epoch=st.integers(0, 1000), world=st.integers(1, 7))
def test_ranks_partition_the_images(n, seed, epoch, world):
    shards = [epoch_order(n, seed=seed, epoch=epoch, rank=rank, world=world) for rank in range(world)]
    assert sorted(np.concatenate(shards)) == list(range(n))
    assert max(map(len, shards)) - min(map(len, shards)) <= 1
    whole = epoch_order(n, seed=seed, epoch=epoch)
    for rank, shard in enumerate(shards):
        np.testing.assert_array_equal(shard, whole[rank::world])


@given(world_and_batch=st.tuples(st.integers(1, 6), st.integers(1, 6)), n=st.integers(0, 400), seed=keys)
def test_a_global_step_has_the_same_images_for_any_number_of_ranks(world_and_batch, n, seed):
    world, batch = world_and_batch
    pages = np.arange(n) // 3
    for options in ({}, {"pages": pages}, {"shuffle": False}):
        whole = epoch_order(n, seed=seed, epoch=0, **options)
        shards = [epoch_order(n, seed=seed, epoch=0, rank=rank, world=world, **options) for rank in range(world)]
        for step in range(n // (world * batch)):
            together = np.concatenate([shard[step * batch : (step + 1) * batch] for shard in shards])
            assert sorted(together) == sorted(whole[step * batch * world : (step + 1) * batch * world])


def test_a_rank_keeps_only_its_share_in_memory():
    pages = np.arange(1000) // 10
    for options in ({}, {"pages": pages}, {"shuffle": False}):
        order = epoch_order(1000, seed=0, epoch=0, rank=3, world=8, **options)
        assert order.base is None
        assert order.nbytes == 125 * 8


def test_epochs_and_seeds_reorder():
    orders = [epoch_order(1000, seed=seed, epoch=epoch) for seed in (0, 1) for epoch in (0, 1)]
    for i, one in enumerate(orders):
        assert (one == np.arange(1000)).mean() < 0.02
        for other in orders[i + 1 :]:
            assert (one == other).mean() < 0.02
    np.testing.assert_array_equal(epoch_order(1000, seed=0, epoch=1), orders[1])
    np.testing.assert_array_equal(epoch_order(10, seed=0, epoch=0, shuffle=False), np.arange(10))


@given(full_pages=st.integers(1, 700), seed=keys)
@settings(max_examples=30)
def test_quasi_random_order_stays_within_a_group_of_pages(full_pages, seed):
    n = 4 * full_pages
    pages = np.arange(n) // 4
    order = epoch_order(n, seed=seed, epoch=0, pages=pages)
    assert sorted(order) == list(range(n))
    for start in range(0, n, 256):
        assert len(np.unique(pages[order[start : start + 256]])) <= 64


@given(sizes=sizes_of, ratio=st.floats(0.05, 1.0))
def test_center_boxes_are_central_squares(sizes, ratio):
    boxes = center_boxes(sizes, ratio=ratio).astype(np.int64)
    assert inside(boxes, sizes)
    np.testing.assert_array_equal(boxes[:, 2], boxes[:, 3])
    margins = np.asarray(sizes) - boxes[:, 2:] - 2 * boxes[:, :2]
    assert ((margins == 0) | (margins == 1)).all()


def test_center_box_of_an_imagenet_image():
    assert center_boxes([(375, 500)]).tolist() == [[23, 86, 328, 328]]


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: random_boxes([0], [(10, 10)], seed=0, epoch=0, scale=(0.5, 0.1)), "scale"),
        (lambda: random_boxes([0], [(10, 10)], seed=0, epoch=0, ratio=(2.0, 1.0)), "ratio"),
        (lambda: random_boxes([0, 1], [(10, 10)], seed=0, epoch=0), "sizes"),
        (lambda: random_boxes([0], [(0, 10)], seed=0, epoch=0), "below 1 pixel"),
        (lambda: epoch_order(5, seed=0, epoch=0, rank=2, world=2), "rank=2"),
        (lambda: epoch_order(-1, seed=0, epoch=0), "negative"),
        (lambda: epoch_order(5, seed=0, epoch=0, pages=[0]), "pages"),
        (lambda: center_boxes([(10, 10)], ratio=0.0), "ratio"),
    ],
)
def test_bad_arguments_are_named(call, says):
    with pytest.raises(ValueError, match=says):
        call()


def test_a_whole_epoch_of_imagenet_is_planned_quickly():
    """1.28 million boxes take about half a second on one core; the bound leaves room for a busy machine."""
    import time

    n = 1_281_167
    sizes = np.random.default_rng(0).integers(100, 600, (n, 2))
    started = time.process_time()
    random_boxes(np.arange(n), sizes, seed=0, epoch=0)
    assert time.process_time() - started < 2.0


def test_a_crop_rule_calls_the_plan_with_its_numbers():
    sizes, images = np.random.default_rng(0).integers(30, 600, (200, 2)), np.arange(200)
    rule = CropRule(scale=(0.2, 0.4), ratio=(0.9, 1.2), center_ratio=0.5)
    boxes, flips = random_boxes(images, sizes, seed=3, epoch=4, copy=2, scale=(0.2, 0.4), ratio=(0.9, 1.2))
    ours = rule.training(images, sizes, seed=3, epoch=4, copy=2)
    np.testing.assert_array_equal(ours[0], boxes)
    np.testing.assert_array_equal(ours[1], flips)
    assert 0.3 < flips.mean() < 0.7
    unflipped = CropRule(rule.scale, rule.ratio, flip=False).training(images, sizes, seed=3, epoch=4, copy=2)
    np.testing.assert_array_equal(unflipped[0], boxes)
    assert not unflipped[1].any()
    central = rule.validation(sizes)
    np.testing.assert_array_equal(central[0], center_boxes(sizes, ratio=0.5))
    assert not central[1].any()


@given(seed=keys, generation=st.integers(0, 50))
def test_each_generation_has_a_different_seed(seed, generation):
    ours = seed_of_generation(seed, generation)
    assert ours == seed_of_generation(seed, generation)
    assert 0 <= ours < 2**64
    others = [seed_of_generation(seed, generation + 1), seed_of_generation((seed + 1) % 2**63, generation), seed]
    assert ours not in others
    torch.Generator().manual_seed(ours)  # takes all of its bits


@given(seed=keys, epoch=st.integers(0, 300), step=st.integers(0, 10_000), count=st.integers(1, 40))
def test_mixing_is_a_permutation_and_counts_its_pixels(seed, epoch, step, count):
    for side in (1, 7, 32):
        for options in ({"cutmix": 1.0}, {"mixup": 1.0}, {}):
            mixing = random_mixing(count, side, seed=seed, epoch=epoch, step=step, **options)
            assert sorted(mixing.partners) == list(range(count))
            top, left, bottom, right = mixing.box
            assert 0 <= top <= bottom <= side
            assert 0 <= left <= right <= side
            own = np.ones((side, side))
            own[top:bottom, left:right] = mixing.inside
            np.testing.assert_allclose(mixing.kept, own.mean(), atol=1e-9)
            if not options:
                assert (mixing.box, mixing.kept) == ((0, 0, 0, 0), 1)


def test_mixing_follows_the_papers_laws():
    def drawn(**options):
        return [random_mixing(2, 64, seed=0, epoch=step // 100, step=step % 100, **options) for step in range(3000)]

    # CutMix as published, with another generator.
    rng = np.random.default_rng(1)
    wanted = []
    for share in rng.beta(1, 1, 3000):
        side, (y, x) = int(64 * np.sqrt(1 - share)), rng.integers(64, size=2)
        (top, left), (bottom, right) = (
            np.clip(np.array([y, x]) + end, 0, 64) for end in (-(side // 2), side - side // 2)
        )
        wanted.append(1 - (bottom - top) * (right - left) / 64**2)
    cut = drawn(cutmix=1.0)
    assert abs(np.mean([each.kept for each in cut]) - np.mean(wanted)) < 0.02
    assert abs(np.std([each.kept for each in cut]) - np.std(wanted)) < 0.02
    for place in range(2):  # in the middle, along both axes
        assert abs(np.mean([each.box[place] + each.box[place + 2] for each in cut]) / 128 - 0.5) < 0.02
    assert not any(each.inside for each in cut)
    blended = drawn(mixup=1.0, mixup_beta=0.5)
    assert all(each.box == (0, 0, 64, 64) and each.inside == each.kept for each in blended)
    assert abs(np.var([each.kept for each in blended]) - 1 / 8) < 0.01  # 1 / (4 (2 beta + 1))
    rarely = drawn(cutmix=0.3, mixup=0.2)
    kinds = [each.box == (0, 0, 64, 64) for each in rarely], [each.kept == 1 for each in rarely]
    assert abs(np.mean(kinds[0]) - 0.2) < 0.03
    assert abs(np.mean(kinds[1]) - 0.5) < 0.05
    assert len({tuple(each.partners) for each in cut}) == 2


def test_colours_follow_their_laws():
    factors, shifts = random_colours(20_000, seed=0, epoch=1, step=2, jitter=0.4, lighting=0.1)
    assert factors.shape == shifts.shape == (20_000, 3)
    np.testing.assert_allclose(factors.min(axis=0), 0.6, atol=1e-3)
    np.testing.assert_allclose(factors.max(axis=0), 1.4, atol=1e-3)
    np.testing.assert_allclose(factors.std(axis=0), 0.8 / np.sqrt(12), rtol=0.02)
    np.testing.assert_allclose(shifts.std(axis=0), 0.1, rtol=0.02)
    assert abs(np.corrcoef(np.concatenate([factors, shifts], axis=1).T) - np.eye(6)).max() < 0.03


def test_augmentation_is_a_function_of_seed_epoch_and_step():
    def drawn(seed, epoch, step):
        colours = random_colours(4, seed=seed, epoch=epoch, step=step, jitter=0.4, lighting=0.1)
        return str((colours, random_mixing(4, 224, seed=seed, epoch=epoch, step=step, cutmix=1)))

    places = [(seed, epoch, step) for seed in (-1, 0, 2**63) for epoch in (0, 1) for step in (0, 1)]
    assert len({drawn(*place) for place in places}) == len(places)
    assert drawn(0, 1, 2) == drawn(0, 1, 2)


def test_crops_do_not_change_between_versions():
    """Stored labels and continued runs depend on these crops: other versions must draw the same."""
    assert epoch_order(12, seed=3, epoch=5).tolist() == [3, 2, 1, 7, 5, 10, 9, 4, 0, 11, 6, 8]
    paged = epoch_order(300, seed=3, epoch=5, pages=np.arange(300) // 2)
    assert paged[:8].tolist() == [98, 230, 170, 78, 76, 49, 158, 57]
    boxes, flips = random_boxes(
        [0, 1, 70_000, 3], [(300, 400), (64, 48), (40, 900), (500, 333)], seed=-7, epoch=2, copy=1
    )
    assert boxes.tolist() == [[69, 177, 155, 117], [2, 2, 60, 46], [0, 423, 40, 53], [183, 104, 261, 209]]
    assert flips.tolist() == [True, True, False, True]
    assert seed_of_generation(3, 1) == 6231551546301463856
    assert seed_of_part(seed=3, epoch=1, step=2, part=1) == 9511587561524832782
    where = {"seed": 3, "epoch": 1, "step": 2, "part": 1}
    factors, shifts = random_colours(2, jitter=0.4, lighting=0.1, **where)
    np.testing.assert_allclose(factors[0], [0.60890085, 0.69717628, 1.24033606], rtol=1e-6)
    np.testing.assert_allclose(shifts[0], [0.05887915, 0.00472947, 0.09943102], rtol=1e-5)
    mixing = random_mixing(6, 64, cutmix=1, **where)
    assert (mixing.partners.tolist(), mixing.box) == ([4, 2, 5, 3, 1, 0], (0, 27, 37, 64))
    assert random_mixing(6, 64, mixup=1, **where).kept == pytest.approx(0.28475511)
