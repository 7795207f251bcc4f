"""The resizer, against Pillow and exact arithmetic, without a shift of half a pixel."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from data.decoders.resize import crop_resize, crop_resize_planes
from tests.pictures import photograph


def pillow(image, top, left, height, width, flip, resolution):
    crop = Image.fromarray(image[top : top + height, left : left + width])
    resized = np.asarray(crop.resize((resolution, resolution), Image.Resampling.BILINEAR))
    return resized[:, ::-1] if flip else resized


def triangle(size: int, resolution: int) -> np.ndarray:
    """The filter by its definition: float64 [resolution, size]."""
    step = size / resolution
    centers = (np.arange(resolution)[:, None] + 0.5) * step
    weights = np.maximum(1 - np.abs((np.arange(size) + 0.5 - centers) / max(step, 1)), 0)
    return weights / weights.sum(axis=1, keepdims=True)


def upsampled(plane: np.ndarray, length: int) -> np.ndarray:
    """Along the first axis as libjpeg's fancy upsampling: 3/4 of the near sample, 1/4 of the far one; float64."""
    at = np.arange(length)
    near = at // 2
    far = np.clip(near + np.where(at % 2, 1, -1), 0, len(plane) - 1)
    return 0.75 * plane[near] + 0.25 * plane[far]


boxes = st.fixed_dictionaries(
    {
        "height": st.integers(1, 90),
        "width": st.integers(1, 90),
        "resolution": st.integers(1, 70),
        "flip": st.booleans(),
        "seed": st.integers(0, 1000),
    }
)


@settings(max_examples=150)
@given(case=boxes, data=st.data())
def test_within_one_of_pillow(case, data):
    """Pillow rounds to bytes between its two passes, and so differs from this by 1 now and then."""
    height, width, resolution = case["height"], case["width"], case["resolution"]
    image = np.random.default_rng(case["seed"]).integers(0, 256, (height, width, 3), dtype=np.uint8)
    h, w = data.draw(st.integers(1, height)), data.draw(st.integers(1, width))
    top, left = data.draw(st.integers(0, height - h)), data.draw(st.integers(0, width - w))
    out = np.empty((resolution, resolution, 3), dtype=np.uint8)
    crop_resize(image, top, left, h, w, case["flip"], out)
    error = np.abs(out.astype(int) - pillow(image, top, left, h, w, case["flip"], resolution))
    assert error.max() <= 1
    box = image[top : top + h, left : left + w].astype(float)
    exact = np.einsum("yi,ijc,xj->yxc", triangle(h, resolution), box, triangle(w, resolution))
    assert np.abs(out - (exact[:, ::-1] if case["flip"] else exact)).max() < 0.6


@settings(max_examples=150)
@given(case=boxes, data=st.data())
def test_planes_become_what_their_upsampled_image_would(case, data):
    """Against float64: chroma upsampled in full, cropped, resized, converted; for any part that contains the box."""
    height, width, resolution = case["height"], case["width"], case["resolution"]
    rng = np.random.default_rng(case["seed"])
    half = (height + 1) // 2, (width + 1) // 2
    luma = rng.integers(0, 256, (half[0] * 2, half[1] * 2), dtype=np.uint8)
    cb, cr = rng.integers(0, 256, (2, *half), dtype=np.uint8)
    h, w = data.draw(st.integers(1, height)), data.draw(st.integers(1, width))
    top, left = data.draw(st.integers(0, height - h)), data.draw(st.integers(0, width - w))
    # The part begins anywhere up to one pixel before the box, at an even place, and ends as late.
    y, x = (data.draw(st.integers(0, max(start - 1, 0) // 2)) * 2 for start in (top, left))
    bottom = data.draw(st.integers(min((top + h) // 2 + 1, half[0]), half[0]))
    right = data.draw(st.integers(min((left + w) // 2 + 1, half[1]), half[1]))
    part = [np.ascontiguousarray(luma[y : bottom * 2, x : right * 2])]
    part += [np.ascontiguousarray(plane[y // 2 : bottom, x // 2 : right]) for plane in (cb, cr)]
    out = np.empty((resolution, resolution, 3), dtype=np.uint8)
    crop_resize_planes(*part, y, x, height, width, top, left, h, w, case["flip"], out)

    full = [luma[:height, :width].astype(float)]
    full += [upsampled(upsampled(plane.astype(float), height).T, width).T for plane in (cb, cr)]
    ys, xs = triangle(h, resolution), triangle(w, resolution)
    light, blue, red = (ys @ plane[top : top + h, left : left + w] @ xs.T for plane in full)
    blue, red = blue - 128, red - 128
    exact = np.stack([light + 1.402 * red, light - 0.344136 * blue - 0.714136 * red, light + 1.772 * blue], axis=2)
    exact = np.clip(exact[:, ::-1] if case["flip"] else exact, 0, 255)
    assert np.abs(out - exact).max() < 0.65


@pytest.mark.parametrize(("size", "resolution"), [(1500, 40), (2000, 7), (3000, 33), (40, 300)])
def test_far_from_the_original_size(size, resolution):
    """Reductions by a factor of hundreds give each input little weight: rounding errors must not add up."""
    image = photograph(size, size // 2 + 1, size)
    pixels = np.array(image)
    out = np.empty((resolution, resolution, 3), dtype=np.uint8)
    crop_resize(pixels, 0, 0, *pixels.shape[:2], True, out)
    exact = np.einsum("yi,ijc->yjc", triangle(pixels.shape[0], resolution), pixels.astype(float))
    exact = np.einsum("yjc,xj->yxc", exact, triangle(size, resolution))[:, ::-1]
    assert np.abs(out - exact).max() < 0.75


@pytest.mark.parametrize("value", [0, 1, 127, 254, 255])
def test_a_flat_colour_does_not_change(value):
    for size, resolution in ((1, 5), (7, 3), (300, 224), (61, 64), (2000, 8)):
        out = np.empty((resolution, resolution, 3), dtype=np.uint8)
        crop_resize(np.full((size, size, 3), value, np.uint8), 0, 0, size, size, False, out)
        assert (out == value).all()
        grey = np.full((size + size % 2, size + size % 2), value, np.uint8)
        chroma = np.full(((size + 1) // 2, (size + 1) // 2), 128, np.uint8)
        crop_resize_planes(grey, chroma, chroma.copy(), 0, 0, size, size, 0, 0, size, size, False, out)
        assert (out == value).all()


def test_the_filter_reads_nothing_outside_the_box():
    image = np.zeros((60, 60, 3), dtype=np.uint8)
    image[20:40, 10:50] = 200
    out = np.empty((8, 8, 3), dtype=np.uint8)
    crop_resize(image, 20, 10, 20, 40, False, out)
    assert (out == 200).all()


def test_no_shift():
    """A ramp does not change: a shift of half a pixel would add half a step everywhere."""
    image = np.repeat(np.arange(0, 240, 4, dtype=np.uint8)[None, :, None], 60, axis=0).repeat(3, axis=2)
    for resolution in (15, 30, 120):
        out = np.empty((resolution, resolution, 3), dtype=np.uint8)
        crop_resize(image, 0, 0, 60, 60, False, out)
        step = 60 / resolution
        expected = 4 * ((np.arange(resolution) + 0.5) * step - 0.5)
        inner = slice(2, -2)
        assert np.abs(out[5, inner, 0] - expected[inner]).max() <= 1.0
        assert abs(np.mean(out[5, inner, 0] - expected[inner])) < 0.3
