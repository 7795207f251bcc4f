"""Damaged files, thousands of them: never a crash, never silent garbage, and the error names file and image."""

import io
import re

import numpy as np
import pytest
import torch

from data import DataError
from data.beton import Beton, Encoded, write_beton
from data.convert import Storage, encode
from data.decoders import Request, View, build_decoder
from tests.pictures import photograph

IMAGES = 4
BOXES = np.array([[[10, 20, 60, 70]], [[0, 0, 90, 100]], [[30, 1, 40, 99]], [[5, 5, 20, 20]]], dtype=np.int32)


@pytest.fixture(scope="module")
def rows():
    """Two gridded JPEGs, a progressive one of another writer, and raw pixels."""
    kinds = ["jpeg", "jpeg", "jpeg", "raw"]
    rows = [encode(photograph(i, 90, 100), Storage(kind))._replace(label=i) for i, kind in enumerate(kinds)]
    buffer = io.BytesIO()
    photograph(2, 90, 100).save(buffer, "JPEG", progressive=True, subsampling="4:4:4")
    rows[2] = Encoded(buffer.getvalue(), 90, 100, 2)
    return rows


@pytest.fixture(scope="module")
def path(rows, tmp_path_factory):
    path = tmp_path_factory.mktemp("damage") / "set.beton"
    write_beton(path, rows, at_most=IMAGES)
    return path


def crops(path, decoder="ffcv", only=None) -> torch.Tensor:
    beton = Beton(path)
    indices = np.arange(IMAGES) if only is None else np.array(only)
    build = build_decoder(
        decoder, beton, views=(View(1, 24),), device=torch.device("cpu"), threads=1, max_batch=len(indices)
    )
    ((batch,),) = build.decode([Request(indices, BOXES[indices], np.zeros((len(indices), 1), dtype=bool))])
    return batch


def outcome(path, place: int, value: int, **options) -> torch.Tensor | str:
    """What comes of the file with one byte changed: the crops, or the error's one line. The byte is put back."""
    with open(path, "r+b", buffering=0) as file:
        file.seek(place)
        before = file.read(1)
        file.seek(place)
        file.write(bytes([value]))
        try:
            return crops(path, **options)
        except DataError as error:
            assert "\n" not in str(error)
            return str(error)
        finally:
            file.seek(place)
            file.write(before)


def test_a_changed_byte_is_noticed_or_does_not_matter(path):
    """Of a file written here: anywhere in index, images, checksums and table."""
    beton = Beton(path)
    good = crops(path)
    rng = np.random.default_rng(0)
    size = path.stat().st_size
    end = int(beton.starts[-1] + beton.lengths[-1])
    spans = [(0, 2400), (size - IMAGES * 24, size), (end, end + 4 * IMAGES)]
    spans += [(start, start + length) for start, length in zip(beton.starts, beton.lengths, strict=True)]
    noticed = 0
    for case in range(1800):
        low, high = spans[case % len(spans)]
        place, value = int(rng.integers(low, high)), int(rng.integers(256))
        found = outcome(path, place, value)
        if isinstance(found, str):
            noticed += 1
            assert "set.beton" in found
            image = [i for i in range(IMAGES) if 0 <= place - beton.starts[i] < beton.lengths[i]]
            if image:
                assert f"image {image[0]} is damaged" in found
        else:
            assert torch.equal(found, good), f"byte {place} to {value} was not noticed"
    assert noticed > 1000


@pytest.fixture(scope="module")
def unsealed(rows, tmp_path_factory):
    """The JPEGs in a file as of another writer: without the seal, nothing but the decoder can notice."""
    path = tmp_path_factory.mktemp("damage") / "unsealed.beton"
    write_beton(path, rows[:3], at_most=3)
    data = path.read_bytes()
    path.write_bytes(data.replace(b"label-refinery 1", bytes(16), 1))
    return path


@pytest.mark.parametrize(("decoder", "cases"), [("ffcv", 2500), ("torchvision", 300), ("dali", 60)])
def test_damaged_jpegs_of_other_writers_never_crash(unsealed, decoder, cases):
    beton = Beton(unsealed)
    rng = np.random.default_rng(1)
    refused = 0
    for case in range(cases):
        image = case % 3
        # Half of them in the headers, where sizes, tables and the grid are.
        reach = 900 if case % 2 else int(beton.lengths[image])
        place = int(beton.starts[image] + rng.integers(min(reach, beton.lengths[image])))
        found = outcome(unsealed, place, int(rng.integers(256)), decoder=decoder, only=[image])
        if isinstance(found, str):
            refused += 1
            assert re.search(rf"unsealed.beton: image {image} ", found), found
        else:
            assert found.shape == (1, 3, 24, 24)
    assert refused > cases // 20


@pytest.mark.parametrize("decoder", ["ffcv", "torchvision", "dali"])
def test_a_jpeg_cut_short_is_refused(tmp_path, path, decoder):
    good = Beton(path)
    for image in range(3):
        data = good.encoded(image).tobytes()
        for keep in (0.3, 0.6, 0.95):
            rows = [Encoded(data[: int(len(data) * keep)], 90, 100, 0)]
            write_beton(tmp_path / "short.beton", rows, at_most=1)
            beton = Beton(tmp_path / "short.beton")
            build = build_decoder(
                decoder, beton, views=(View(1, 24),), device=torch.device("cpu"), threads=1, max_batch=1
            )
            whole = np.array([[[0, 0, 90, 100]]], dtype=np.int32)
            with pytest.raises(DataError, match="short.beton: image 0 "):
                list(build.decode([Request(np.zeros(1, dtype=np.int64), whole, np.zeros((1, 1), dtype=bool))]))
