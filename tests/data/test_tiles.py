"""Restart-grid JPEGs: any decoder reads them, a cut decodes to the same pixels, and damage is detected."""

import io
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from bench.images import draw
from data import tiles
from data.plan import random_boxes
from tests.pictures import photograph

SAMPLE = Path(__file__).parents[3] / "shared" / "data" / "imagenet-sample"


def plain(image: Image.Image, quality: int = 90) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality, subsampling="4:2:0")
    return buffer.getvalue()


def decoded(jpeg: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(jpeg)))


def check_cut(jpeg: bytes, full: np.ndarray, box: tuple[int, int, int, int]) -> float:
    """Cuts the box out; its pixels must be those of the whole image. Returns the share of the image that was cut."""
    array = np.frombuffer(jpeg, np.uint8)
    room = np.empty(len(array), np.uint8)
    region = tiles.cut(array, tiles.layout(array), *box, room)
    assert region.size >= 0
    part = decoded(room[: region.size].tobytes()) if region.size else full
    assert part.shape[:2] == (region.height, region.width)
    top, left, height, width = box
    inside = part[top - region.top :, left - region.left :][:height, :width]
    np.testing.assert_array_equal(inside, full[top : top + height, left : left + width])
    return region.height * region.width / (full.shape[0] * full.shape[1])


@settings(max_examples=60)
@given(
    height=st.integers(1, 400),
    width=st.integers(1, 400),
    quality=st.integers(50, 98),
    seed=st.integers(0, 99),
    data=st.data(),
)
def test_a_cut_has_the_pixels_of_the_whole(height, width, quality, seed, data):
    image = photograph(seed, height + 8, width + 8).crop((0, 0, width, height))
    jpeg = tiles.encode(image, quality)
    assert len(jpeg) < 1.03 * len(plain(image, quality))
    full = decoded(jpeg)
    np.testing.assert_array_equal(full, decoded(plain(image, quality)))
    for _ in range(4):
        h, w = data.draw(st.integers(1, height)), data.draw(st.integers(1, width))
        check_cut(jpeg, full, (data.draw(st.integers(0, height - h)), data.draw(st.integers(0, width - w)), h, w))


@pytest.mark.parametrize("width", [16 * columns - 5 for columns in (4, 6, 7, 11, 13, 19, 22, 23, 25, 26, 29, 31, 32)])
def test_every_width_gets_a_grid(width):
    """If the number of MCUs in a row is prime, each row is one tile."""
    jpeg = tiles.encode(photograph(3, 300, width), 90)
    found = tiles.layout(np.frombuffer(jpeg, np.uint8))
    assert found.tiles >= 300 // tiles.MCU
    assert check_cut(jpeg, decoded(jpeg), (100, width // 2, 60, width // 4)) < 0.4


def test_an_image_of_few_bytes_stays_plain():
    image = Image.new("RGB", (32, 32), (40, 90, 120))
    assert tiles.encode(image, 90) == plain(image)


def test_the_lengths_are_those_of_the_segments():
    jpeg = tiles.encode(photograph(0, 200, 320), 90)
    array = np.frombuffer(jpeg, np.uint8)
    found = tiles.layout(array)
    assert (found.height, found.width, found.subsampled) == (200, 320, True)
    lengths = array[found.lengths : found.lengths + 2 * found.tiles].copy().view(">u2").astype(int)
    assert found.scan + lengths.sum() + 2 * found.tiles == len(jpeg)


def test_other_jpegs_are_understood():
    image = photograph(1, 50, 70)
    for options, subsampled in (
        ({"subsampling": "4:2:0"}, True),
        ({"subsampling": "4:2:0", "progressive": True}, True),
        ({"subsampling": "4:4:4"}, False),
        ({"subsampling": "4:2:2"}, False),
    ):
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", **options)
        found = tiles.layout(np.frombuffer(buffer.getvalue(), np.uint8))
        assert (found.height, found.width, found.subsampled, found.tiles) == (50, 70, subsampled, 0)
    buffer = io.BytesIO()
    image.convert("L").save(buffer, "JPEG")
    assert not tiles.layout(np.frombuffer(buffer.getvalue(), np.uint8)).subsampled


def test_subsampling_is_only_that_of_numbered_components():
    """Each byte of the frame's header counts: tiles are only cut where components are 1, 2, 3 with 2x2, 1x1, 1x1."""
    jpeg = np.frombuffer(plain(photograph(1, 50, 70)), np.uint8)
    frame = tiles.layout(jpeg).frame
    for place in (9, 10, 11, 13, 14, 16, 17):
        other = jpeg.copy()
        other[frame + place] += 1
        assert not tiles.layout(other).subsampled, place


def test_an_image_of_another_height_or_width_is_not_taken():
    jpeg = np.frombuffer(tiles.encode(photograph(3, 96, 160), 90), np.uint8)
    box, room = np.array([0, 0, 16, 16]), np.empty(len(jpeg), np.uint8)
    assert tiles.take(jpeg, np.array([96, 160], np.int32), box, room).wrong == 0
    for size in ((97, 160), (96, 161), (96, 0), (1000, 1000)):
        taken = tiles.take(jpeg, np.array(size, np.int32), box, room)
        assert (taken.wrong, taken.height, taken.width) == (tiles.OTHER_SIZE, 96, 160)


def test_markers_are_read_as_libjpeg_reads_them():
    """FF may be repeated before a marker; markers without a length are invalid here, and are not skipped."""
    jpeg = plain(photograph(2, 200, 200))
    frame = tiles.layout(np.frombuffer(jpeg, np.uint8)).frame
    filled = jpeg[:frame] + b"\xff\xff" + jpeg[frame:]
    found = tiles.layout(np.frombuffer(filled, np.uint8))
    assert (found.frame, found.height, found.width) == (frame + 2, 200, 200)
    np.testing.assert_array_equal(decoded(filled), decoded(jpeg))

    for marker in (0x01, 0xD0, 0xD8, 0x00):
        bare = jpeg[:frame] + bytes([0xFF, marker]) + jpeg[frame:]
        assert tiles.layout(np.frombuffer(bare, np.uint8)).frame == 0


def test_comments_of_the_originals_are_not_stored():
    image = photograph(0, 90, 120)
    assert tiles.encode(image, 90) == tiles.encode(commented(image, 50_000), 90)
    assert tiles.encode(image, 90) == tiles.encode(commented(image, 80_000), 90)


def commented(image: Image.Image, length: int) -> Image.Image:
    copy = image.copy()
    copy.info["comment"] = b"x" * length
    return copy


@settings(max_examples=1500)
@given(data=st.data())
def test_damage_never_leads_out_of_bounds(data):
    """For any bytes, a cut stays within its buffers: guard bytes on both sides of the output do not change."""
    jpeg = bytearray(_INTACT)
    for _ in range(data.draw(st.integers(1, 4))):
        # Mostly in the headers and the table, where the damage matters.
        place = data.draw(st.integers(0, _SCAN - 1) | st.integers(0, len(jpeg) - 1))
        jpeg[place] = data.draw(st.integers(0, 255))
    jpeg = jpeg[: data.draw(st.integers(0, len(jpeg)) | st.just(len(jpeg)))]
    array = np.frombuffer(bytes(jpeg), np.uint8)
    guarded = np.full(len(array) + 128, 0xA5, np.uint8)
    found = tiles.layout(array)
    if found.frame:
        assert found.scan <= len(array)
        h, w = data.draw(st.integers(1, 65535)), data.draw(st.integers(1, 65535))
        top, left = data.draw(st.integers(0, 65535)), data.draw(st.integers(0, 65535))
        region = tiles.cut(array, found, top, left, h, w, guarded[64:-64])
        assert -1 <= region.size <= len(array)
    assert (guarded[:64] == 0xA5).all()
    assert (guarded[-64:] == 0xA5).all()


_INTACT = tiles.encode(photograph(7, 120, 192), 90)
_SCAN = tiles.layout(np.frombuffer(_INTACT, np.uint8)).scan


def check_random_crops(images: Iterable[Image.Image]) -> None:
    """Four random crops of each, bit for bit; under 2.5 % more bytes, about half of the area decoded."""
    gridded = stored = 0
    shares = []
    for number, image in enumerate(images):
        image.thumbnail((512, 512))
        jpeg = tiles.encode(image, 90)
        gridded, stored = gridded + len(jpeg), stored + len(plain(image))
        full = decoded(jpeg)
        boxes, _ = random_boxes([number] * 4, [full.shape[:2]] * 4, seed=0, epoch=0, copy=np.arange(4))
        shares += [check_cut(jpeg, full, tuple(box)) for box in boxes.tolist()]
    assert gridded < 1.025 * stored
    assert np.mean(shares) < 0.56


def test_crops_of_drawn_photographs():
    """With the sizes and detail of ImageNet's images, so that every clone tests realistic crops."""
    check_random_crops(draw(index) for index in range(40))


@pytest.mark.skipif(not SAMPLE.is_dir(), reason="the ImageNet originals are not here")
def test_crops_of_the_imagenet_sample():
    check_random_crops(Image.open(file).convert("RGB") for file in sorted(SAMPLE.glob("*/*")))


class Counting(np.ndarray):
    """Bytes that count how often each of them is read individually."""

    def __getitem__(self, key):
        if isinstance(key, (int, np.integer)):
            self.reads[key] += 1
            return np.ndarray.__getitem__(self, key)
        return np.asarray(self)[key]


def test_each_segment_length_is_read_once():
    """The bytes come from a mapped file, which another process may change between check and use."""
    jpeg = np.frombuffer(tiles.encode(photograph(0, 200, 300), 90), np.uint8)
    found = tiles.layout(jpeg)
    assert found.tiles > 5
    counting = jpeg.view(Counting)
    counting.reads = np.zeros(len(jpeg), int)
    box, out = (50, 60, 70, 80), np.zeros(len(jpeg), np.uint8)
    region = tiles.cut.py_func(counting, found, *box, out)
    assert region == tiles.cut(jpeg, found, *box, np.zeros(len(jpeg), np.uint8))
    table = counting.reads[found.lengths : found.lengths + 2 * found.tiles]
    assert table.max() == 1
    assert table.sum() > 5
