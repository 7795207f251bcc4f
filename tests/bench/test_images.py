"""The images that loaders are measured on."""

import io
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from bench import BenchError, images
from data.beton import Beton
from tests.pictures import photograph


def bytes_per_pixel(image: Image.Image, quality: int, subsampling: str) -> float:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality, subsampling=subsampling)
    return len(buffer.getvalue()) / (image.width * image.height)


def test_drawn_images_are_deterministic_and_all_different():
    first, again = (np.asarray(images.draw(3)) for _ in range(2))
    assert np.array_equal(first, again)
    other = np.asarray(images.draw(3 + 19))  # of the same size
    assert first.shape == other.shape
    assert not np.array_equal(first, other)


def test_drawn_images_are_as_large_and_detailed_as_photographs():
    drawn = [images.draw(index) for index in range(38)]
    pixels = [image.width * image.height for image in drawn]
    # ImageNet: median 187,500; of 300 of its images, mean 0.33 and 0.59, deviation 0.12 and 0.28.
    assert np.median(pixels) == 187_500
    stored = [bytes_per_pixel(image, 90, "4:2:0") for image in drawn]
    assert 0.28 < np.mean(stored) < 0.40
    assert np.std(stored) > 0.05
    assert 0.5 < np.mean([bytes_per_pixel(image, 95, "4:4:4") for image in drawn]) < 0.75


@given(count=st.integers(1, 200), number=st.integers(1, 200))
def test_spread_takes_files_evenly_and_in_order(count, number):
    files = [f"{i:03}" for i in range(number)]
    taken = images.spread(files, count)
    assert len(taken) == count
    assert taken == sorted(taken)
    times = [taken.count(file) for file in files]
    assert max(times) - min(times) <= 1


@pytest.mark.parametrize("write", [images.write_plain, images.write_converted])
def test_stored_sets_hold_every_file_reduced(write, tmp_path):
    sizes = [(100, 80), (700, 350)]
    files = [str(tmp_path / f"{i}.jpg") for i in range(2)]
    for i, (file, size) in enumerate(zip(files, sizes, strict=True)):
        photograph(i, *size).save(file)
    write(tmp_path / "set.beton", images.spread(files, 4))
    beton = Beton(tmp_path / "set.beton")
    assert beton.sizes.tolist() == [[100, 80]] * 2 + [[512, 256]] * 2
    for index in range(4):
        with Image.open(io.BytesIO(beton.encoded(index).tobytes())) as image:
            assert image.size == tuple(beton.sizes[index, ::-1])


def test_a_converted_set_gives_its_images_as_files(converted, tmp_path):
    files = images.find(str(converted.folder), tmp_path, most=20)
    beton = Beton(converted.beton("train"))
    assert beton.num_samples > 20
    stored = [beton.encoded(index).tobytes() for index in range(beton.num_samples)]
    places = [stored.index(Path(file).read_bytes()) for file in files]
    assert len(places) == 20
    assert places == sorted(set(places))
    assert places[-1] > 40  # spread over all


@pytest.mark.parametrize("write", [images.write_plain, images.write_converted])
def test_a_damaged_image_is_named_in_the_error(write, tmp_path):
    file = tmp_path / "cut.jpg"
    photograph(0, 60, 60).save(file)
    file.write_bytes(file.read_bytes()[:500])
    with pytest.raises(BenchError, match=r"cut\.jpg: cannot be read .*take it out of DATA"):
        write(tmp_path / "set.beton", [str(file)])
