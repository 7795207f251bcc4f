"""Which images, in which order, cropped where: pure functions of (seed, epoch, image); and how crops are augmented.

Every number is drawn by hashing (seed, epoch, index, copy, draw) with SplitMix64 (Steele, Lea and Flood 2014), so there
is no generator state: any subset, in any order, on any rank, after any restart, gives the same crops. Draws for a whole
step come from a generator made for that step, keyed by a hash of (seed, epoch, step).
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

_MASK = (1 << 64) - 1
_GAMMA = 0x9E3779B97F4A7C15

# Separate streams: an image's position in the order is independent of its crop.
_ORDER, _BOXES, _PAGES, _GENERATION, _COLOURS, _MIXING, _DROPOUT = 1, 2, 3, 4, 5, 6, 7

# RandomResizedCrop gives up after this many proposals and takes the central crop.
_TRIES = 10

# Quasi-random order draws from this many file pages at a time: 64 pages of 8 MiB stay in any page cache.
PAGES_AT_ONCE = 64


@dataclass(frozen=True)
class CropRule:
    """How the crops of a data set are chosen.

    scale: lowest and highest share of the image's area in a training crop. ratio: its lowest and highest width over
    height. flip: half of the training crops are mirrored. center_ratio: side of the validation crop, a central square,
    as a share of the shorter side.
    """

    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: bool = True
    center_ratio: float = 224 / 256

    def training(
        self, indices: ArrayLike, sizes: ArrayLike, *, seed: int, epoch: int, copy: ArrayLike = 0
    ) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
        """Boxes and flips of training crops; see random_boxes."""
        boxes, flips = random_boxes(
            indices, sizes, seed=seed, epoch=epoch, copy=copy, scale=self.scale, ratio=self.ratio
        )
        return boxes, flips & self.flip

    def validation(self, sizes: ArrayLike) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
        """Boxes and flips (none) of validation crops; see center_boxes."""
        boxes = center_boxes(sizes, ratio=self.center_ratio)
        return boxes, np.zeros(len(boxes), dtype=bool)


def epoch_order(
    n: int,
    *,
    seed: int,
    epoch: int,
    rank: int = 0,
    world: int = 1,
    shuffle: bool = True,
    pages: ArrayLike | None = None,
) -> NDArray[np.int64]:
    """The images of one epoch in the order in which this rank visits them.

    Rank r gets positions r, r + world, ... of one common order, so a step over all ranks covers the same images for any
    number of ranks. Shards differ in length by at most one.

    pages: int [n], the file page of each image. The order then visits random groups of pages, and is random within
    a group, so that a file larger than memory is read nearly in sequence.

    Returns int64 [n_rank]. Raises ValueError for a rank outside 0..world-1 or a negative n.
    """
    if n < 0:
        raise ValueError(f"n={n}: the number of images cannot be negative")
    if not 0 <= rank < world:
        raise ValueError(f"rank={rank} is not within world={world}")
    if not shuffle:
        return np.arange(rank, n, world, dtype=np.int64)
    # The hash is a bijection of the index, so no two keys are equal and the sort defines one permutation.
    keys = _hash(_key(_ORDER, seed, epoch), np.arange(n, dtype=np.uint64))
    if pages is None:
        order = np.argsort(keys)
    else:
        page_ids, page_of = np.unique(np.asarray(pages), return_inverse=True)
        if len(page_of) != n:
            raise ValueError(f"pages holds {len(page_of)} entries for n={n} images")
        page_keys = _hash(_key(_PAGES, seed, epoch), page_ids.astype(np.uint64))
        place = np.empty(len(page_ids), dtype=np.int64)
        place[np.argsort(page_keys)] = np.arange(len(page_ids))
        order = np.lexsort((keys, place[page_of] // PAGES_AT_ONCE))
    # A copy: a view would keep the whole order in memory on every rank.
    return order[rank::world].astype(np.int64)


def random_boxes(
    indices: ArrayLike,
    sizes: ArrayLike,
    *,
    seed: int,
    epoch: int,
    copy: ArrayLike = 0,
    scale: tuple[float, float] = (0.08, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
    """The random crop of each image, distributed as in torchvision's RandomResizedCrop, and whether it is flipped.

    The area is uniform in `scale` of the image, the aspect (width / height) log-uniform in `ratio`, the position
    uniform; after ten proposals that do not fit, the largest central crop within `ratio` is taken. A flip has
    probability 1/2.

    indices: int [n], the images. sizes: int [n, 2], the height and width of each of them in pixels.
    copy: which of several crops of the image; an int or int [n].
    Returns boxes int32 [n, 4] (top, left, height, width) in pixels, inside the image, and flips bool [n].
    Raises ValueError for sizes that are not positive or do not match, and for empty or reversed ranges.
    """
    if not 0 < scale[0] <= scale[1] <= 1:
        raise ValueError(f"scale={scale}: need 0 < low <= high <= 1, shares of the image's area")
    if not 0 < ratio[0] <= ratio[1]:
        raise ValueError(f"ratio={ratio}: need 0 < low <= high, width over height")
    indices = np.asarray(indices).astype(np.uint64)
    heights, widths = _heights_widths(sizes, len(indices))
    draws = _hash(_key(_BOXES, seed, epoch), indices)
    draws = _mix(draws + np.asarray(copy).astype(np.uint64) * np.uint64(_GAMMA))

    box_heights, box_widths = _central_sizes(heights, widths, ratio)
    tops, lefts = (heights - box_heights) // 2, (widths - box_widths) // 2
    log_low, log_high = math.log(ratio[0]), math.log(ratio[1])
    todo = np.arange(len(indices))
    for attempt in range(_TRIES):
        state, height, width = draws[todo], heights[todo], widths[todo]
        area = height * width * (scale[0] + _uniform(state, 4 * attempt) * (scale[1] - scale[0]))
        aspect = np.exp(log_low + _uniform(state, 4 * attempt + 1) * (log_high - log_low))
        w = np.rint(np.sqrt(area * aspect)).astype(np.int64)
        h = np.rint(np.sqrt(area / aspect)).astype(np.int64)
        fits = (w > 0) & (h > 0) & (w <= width) & (h <= height)
        hit, state, h, w = todo[fits], state[fits], h[fits], w[fits]
        box_heights[hit], box_widths[hit] = h, w
        tops[hit] = np.floor(_uniform(state, 4 * attempt + 2) * (height[fits] - h + 1)).astype(np.int64)
        lefts[hit] = np.floor(_uniform(state, 4 * attempt + 3) * (width[fits] - w + 1)).astype(np.int64)
        todo = todo[~fits]
        if not len(todo):
            break
    flips = _uniform(draws, 4 * _TRIES) < 0.5
    return np.stack([tops, lefts, box_heights, box_widths], axis=1).astype(np.int32), flips


def center_boxes(sizes: ArrayLike, *, ratio: float = 224 / 256) -> NDArray[np.int32]:
    """The central square whose side is `ratio` of the shorter side: resize to 256, crop 224, as one box.

    sizes: int [n, 2] (height, width) in pixels. Returns int32 [n, 4] (top, left, height, width) in pixels.
    Raises ValueError for a ratio outside (0, 1] and for sizes that are not positive.
    """
    if not 0 < ratio <= 1:
        raise ValueError(f"ratio={ratio}: need a share of the shorter side, above 0 and at most 1")
    heights, widths = _heights_widths(sizes, len(np.asarray(sizes)))
    side = np.maximum(np.rint(np.minimum(heights, widths) * ratio).astype(np.int64), 1)
    return np.stack([(heights - side) // 2, (widths - side) // 2, side, side], axis=1).astype(np.int32)


def whole_boxes(sizes: ArrayLike) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
    """Boxes of whole images, int32 [n, 4], and flips (none), bool [n]. sizes: int [n, 2] (height, width) in pixels."""
    heights, widths = _heights_widths(sizes, len(np.asarray(sizes)))
    zeros = np.zeros_like(heights)
    return np.stack([zeros, zeros, heights, widths], axis=1).astype(np.int32), np.zeros(len(zeros), dtype=bool)


def random_colours(
    count: int, *, seed: int, epoch: int, step: int, part: int = 0, jitter: float, lighting: float
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """How the colours of each crop of a step are changed (kernels/colour.py).

    part: which part of a step the crops are; parts are drawn independently.
    jitter: brightness, contrast and saturation are each multiplied by a factor uniform in 1 - jitter to 1 + jitter.
    lighting: standard deviation of the shift along each principal component of ImageNet's colours.
    Returns the factors float32 [count, 3] and the shifts, in standard deviations of the component, float32 [count, 3].
    """
    draws = _generator(_COLOURS, seed, epoch, step, part)
    factors = 1 + jitter * draws.uniform(-1, 1, (count, 3))
    shifts = lighting * draws.standard_normal((count, 3))
    return factors.astype(np.float32), shifts.astype(np.float32)


@dataclass(frozen=True)
class Mixing:
    """How the crops of a step are mixed in pairs (kernels/mix.py).

    partners: int64 [B], the index in the batch of the crop that is mixed into each; a permutation. box: (top, left,
    bottom, right) in pixels, where it is mixed in. inside: the crop's own share of the pixels in the box; the rest is
    the partner's. kept: its own share of all pixels, and so of the label.
    """

    partners: NDArray[np.int64]
    box: tuple[int, int, int, int]
    inside: float
    kept: float


def random_mixing(
    count: int,
    resolution: int,
    *,
    seed: int,
    epoch: int,
    step: int,
    part: int = 0,
    cutmix: float = 0.0,
    cutmix_beta: float = 1.0,
    mixup: float = 0.0,
    mixup_beta: float = 0.2,
) -> Mixing:
    """How the `count` crops of a step's part (`resolution` pixels per side) are mixed: one box and one share for all.

    cutmix, mixup: the probability of each; their sum is at most 1. CutMix (Yun et al. 2019, section 3.2) puts a box of
    the partner into the crop: with l ~ Beta(cutmix_beta, cutmix_beta) its sides are those of the crop times sqrt(1 -
    l), its centre is uniform in the crop, and the part outside is cut off, so `kept` is computed from its pixels.
    Mixup (Zhang et al. 2018, section 2) takes l ~ Beta(mixup_beta, mixup_beta) of every pixel from the crop.
    """
    draws = _generator(_MIXING, seed, epoch, step, part)
    kind = draws.uniform()
    # Always drawn, so that one option does not change the other draws.
    partners = draws.permutation(count)
    y, x = draws.integers(resolution, size=2).tolist()
    if kind < cutmix:
        side = int(resolution * math.sqrt(1 - draws.beta(cutmix_beta, cutmix_beta)))
        top, left = max(y - side // 2, 0), max(x - side // 2, 0)
        bottom, right = min(y - side // 2 + side, resolution), min(x - side // 2 + side, resolution)
        pasted = (bottom - top) * (right - left)
        return Mixing(partners, (top, left, bottom, right), 0.0, 1 - pasted / resolution**2)
    if kind < cutmix + mixup:
        share = float(draws.beta(mixup_beta, mixup_beta))
        return Mixing(partners, (0, 0, resolution, resolution), share, share)
    return Mixing(partners, (0, 0, 0, 0), 1.0, 1.0)


def seed_of_part(*, seed: int, epoch: int, step: int, part: int) -> int:
    """The seed of the networks' own random numbers (dropout) in one part of a step. Returns 0 to 2**64 - 1."""
    return _key(_DROPOUT, seed, epoch, step, part)


def seed_of_generation(seed: int, generation: int) -> int:
    """The seed of the crops and first weights of a run: a hash of the user's seed and of the run's generation.

    generation: 0 for a network that learns from the ground truth, its refinery's + 1 for a student. So a student starts
    from other weights than its refinery did and sees other crops, as in Label Refinery (section 3), and all students
    of one refinery see the same crops. Returns 0 to 2**64 - 1.
    """
    return _key(_GENERATION, seed, generation)


def _central_sizes(
    heights: NDArray[np.int64], widths: NDArray[np.int64], ratio: tuple[float, float]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Heights and widths of the largest crops whose aspect lies within `ratio`."""
    aspect = widths / heights
    h = np.where(aspect < ratio[0], np.rint(widths / ratio[0]).astype(np.int64), heights)
    w = np.where(aspect > ratio[1], np.rint(heights * ratio[1]).astype(np.int64), widths)
    return np.clip(h, 1, heights), np.clip(w, 1, widths)


def _heights_widths(sizes: ArrayLike, n: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    array = np.asarray(sizes).astype(np.int64)
    if array.shape != (n, 2):
        raise ValueError(f"sizes has shape {array.shape}; expected ({n}, 2): height and width of each image")
    if n and array.min() < 1:
        raise ValueError("sizes holds a height or width below 1 pixel")
    return array[:, 0], array[:, 1]


def _key(*parts: int) -> int:
    key = 0
    for part in parts:
        key = int(_mix(np.array([(key + (part & _MASK) * _GAMMA + _GAMMA) & _MASK], dtype=np.uint64))[0])
    return key


def _generator(*parts: int) -> np.random.Generator:
    """A generator that is a function of only these parts (Philox: Salmon et al. 2011)."""
    return np.random.Generator(np.random.Philox(key=_key(*parts)))


def _hash(key: int, values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    return _mix(values * np.uint64(_GAMMA) + np.uint64(key))


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """SplitMix64's finaliser: a bijection of 64-bit words."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _uniform(state: NDArray[np.uint64], draw: int) -> NDArray[np.float64]:
    """The draw-th number of each state, uniform in [0, 1) with 53 bits."""
    bits = _mix(state + np.uint64(((draw + 1) * _GAMMA) & _MASK))
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53
