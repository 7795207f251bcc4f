"""The one resizer, against Pillow: which crops as it should, and where the half pixels lie."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from data.decoders.resize import crop_resize


def pillow(image, top, left, height, width, flip, resolution):
    crop = Image.fromarray(image[top : top + height, left : left + width])
    # Rows first, then columns: Pillow swaps the two where that is cheaper, which rounds a few pixels the other way.
    resized = crop.resize((resolution, height), Image.Resampling.BILINEAR)
    resized = np.asarray(resized.resize((resolution, resolution), Image.Resampling.BILINEAR))
    return resized[:, ::-1] if flip else resized


@settings(max_examples=150)
@given(
    height=st.integers(1, 90),
    width=st.integers(1, 90),
    resolution=st.integers(1, 70),
    flip=st.booleans(),
    seed=st.integers(0, 1000),
    data=st.data(),
)
def test_bit_for_bit_as_pillow(height, width, resolution, flip, seed, data):
    image = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    h, w = data.draw(st.integers(1, height)), data.draw(st.integers(1, width))
    top, left = data.draw(st.integers(0, height - h)), data.draw(st.integers(0, width - w))
    out = np.empty((resolution, resolution, 3), dtype=np.uint8)
    crop_resize(image, top, left, h, w, flip, out)
    np.testing.assert_array_equal(out, pillow(image, top, left, h, w, flip, resolution))


def test_the_filter_sees_nothing_outside_the_box():
    image = np.zeros((60, 60, 3), dtype=np.uint8)
    image[20:40, 10:50] = 200
    out = np.empty((8, 8, 3), dtype=np.uint8)
    crop_resize(image, 20, 10, 20, 40, False, out)
    assert (out == 200).all()


def test_no_shift():
    """A ramp stays the same ramp: half a pixel of shift would add half a step everywhere."""
    image = np.repeat(np.arange(0, 240, 4, dtype=np.uint8)[None, :, None], 60, axis=0).repeat(3, axis=2)
    for resolution in (15, 30, 120):
        out = np.empty((resolution, resolution, 3), dtype=np.uint8)
        crop_resize(image, 0, 0, 60, 60, False, out)
        step = 60 / resolution
        expected = 4 * ((np.arange(resolution) + 0.5) * step - 0.5)
        inner = slice(2, -2)
        assert np.abs(out[5, inner, 0] - expected[inner]).max() <= 1.0
        assert abs(np.mean(out[5, inner, 0] - expected[inner])) < 0.3
