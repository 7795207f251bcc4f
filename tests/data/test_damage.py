"""Damaged files, thousands of them: never a crash, never silent garbage, and the error names file and image."""

import io
import os
import re
import resource
import shutil

import numpy as np
import pytest
import torch

from data import DataError, tiles
from data.beton import Beton, Encoded, write_beton
from data.convert import Storage, encode
from data.decoders import Request, View, build_decoder
from data.loader import open_loader
from data.sets import open_set
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
    """The result of reading the file with one byte changed: crops, or the error's one line. The byte is restored."""
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


def test_a_changed_byte_is_detected_or_changes_no_pixel(path):
    """In a file written here: anywhere in index, images, checksums and table."""
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


@pytest.mark.parametrize("decoder", ["ffcv", "torchvision"])
def test_the_error_says_what_is_wrong_with_an_image(tmp_path, path, decoder):
    whole, plain = (Beton(path).encoded(image).tobytes() for image in (0, 2))
    found = tiles.layout(np.frombuffer(whole, np.uint8))
    lengths = bytearray(whole)
    lengths[found.lengths] ^= 0x40
    for data, why in (
        (b"no image at all", "no JPEG, or its headers are damaged"),
        (bytes(lengths), "its tiles are not where its table says"),
        (plain[: int(0.6 * len(plain))], "(Premature end|incomplete or truncated)"),
    ):
        write_beton(tmp_path / "wrong.beton", [Encoded(data, 90, 100, 0)], at_most=1)
        with pytest.raises(DataError, match=rf"wrong.beton: image 0 cannot be decoded \(.*{why}.*\); convert the set"):
            crops(tmp_path / "wrong.beton", decoder=decoder, only=[0])


@pytest.mark.parametrize("decoder", ["ffcv", "torchvision", "dali"])
def test_a_hidden_frame_header_causes_no_overflow(tmp_path, decoder):
    """libjpeg would decode 2000x2000 pixels here; a reader that mishandles the repeated FF sees 16x16."""
    large, small = (tiles._jpeg(photograph(0, side, side), 90) for side in (2000, 16))
    frames = [tiles.layout(np.frombuffer(jpeg, np.uint8)).frame for jpeg in (large, small)]
    true = large[frames[0] :]
    scan_header = bytes([0xFF, 0xDA, 0, 12, 3, 1, 0, 2, 0x11, 3, 0x11, 0, 63, 0])
    # FF FF C0 00 11: taken for a marker FF of length 0xC000, it ends within this comment, at the false frame.
    lead = large[:2] + b"\xff"
    comment_start = len(lead) + 19
    false_at = len(lead) - 1 + 2 + 0xC000
    filler = bytes(false_at - comment_start - 4)
    content = filler + small[frames[1] : frames[1] + 19] + scan_header + bytes(64)
    comment = b"\xff\xfe" + (len(content) + 2).to_bytes(2, "big") + content
    jpeg = lead + true[:19] + comment + large[2 : frames[0]] + true[19:]
    write_beton(tmp_path / "hidden.beton", [Encoded(jpeg, 16, 16, 0)], at_most=1)
    build = build_decoder(
        decoder,
        Beton(tmp_path / "hidden.beton"),
        views=(View(1, 8),),
        device=torch.device("cpu"),
        threads=1,
        max_batch=1,
    )
    request = Request(np.zeros(1, np.int64), np.array([[[0, 0, 16, 16]]], np.int32), np.zeros((1, 1), np.bool_))
    with pytest.raises(DataError, match="image 0 .*is 2000x2000, the index says 16x16"):
        list(build.decode([request]))


def test_huge_class_ids_are_refused(tmp_path, rows):
    write_beton(tmp_path / "far.beton", [rows[0]._replace(label=10**12)], at_most=1)
    with pytest.raises(DataError, match="far.beton: has a class 1000000000000"):
        open_loader(tmp_path / "far.beton", resolution=24, batch_size=1)


@pytest.mark.parametrize("decoder", ["ffcv", "torchvision", "dali"])
def test_more_pixels_than_bytes_can_hold_are_refused_before_allocation(tmp_path, rows, decoder):
    """In index and header alike, so that no decoder sees a contradiction."""
    jpeg = rows[0].data
    frame = tiles.layout(np.frombuffer(jpeg, np.uint8)).frame
    side = (16000).to_bytes(2, "big")
    forged = Encoded(jpeg[: frame + 5] + side + side + jpeg[frame + 9 :], 16000, 16000, 0)
    write_beton(tmp_path / "bomb.beton", [rows[1], forged], at_most=2)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(DataError, match=r"bomb.beton: image 1 is 16000x16000 pixels by the index, which its \d+ bytes"):
        next(open_loader(tmp_path / "bomb.beton", resolution=24, batch_size=1, decoder=decoder).epoch(0))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 50_000


def test_an_image_larger_than_memory_is_named(tmp_path, rows):
    write_beton(tmp_path / "vast.beton", [rows[0]._replace(height=65535, width=65535)], at_most=1)
    with pytest.raises(DataError, match="vast.beton: image 0 "):
        next(open_loader(tmp_path / "vast.beton", resolution=24, batch_size=1, decoder="ffcv").epoch(0))


def opened(path, rows, decoder):
    """A loader that has used all images once, of a file of JPEGs."""
    write_beton(path, rows[:2], at_most=2)
    # With an older time: changes may follow each other faster than the resolution of some file systems' clocks.
    os.utime(path, ns=(0, 0))
    loader = open_loader(path, resolution=24, batch_size=1, decoder=decoder, threads=1)
    assert len(list(loader.epoch(0))) == 2
    return loader


@pytest.mark.parametrize("decoder", ["ffcv", "torchvision", "dali"])
def test_writes_to_a_file_in_use_are_detected(tmp_path, rows, decoder):
    """After checksums have been compared."""
    loader = opened(tmp_path / "set.beton", rows, decoder)
    with open(tmp_path / "set.beton", "r+b") as file:
        file.seek(Beton(tmp_path / "set.beton").starts[1] + 2000)
        file.write(b"changed")
    with pytest.raises(DataError, match="set.beton: was written to while it was in use; convert the set again"):
        list(loader.epoch(1))


def test_truncation_of_a_file_in_use_is_detected(tmp_path, rows):
    """Before the missing bytes are read, which would end the process."""
    loader = opened(tmp_path / "set.beton", rows, "ffcv")
    whole = (tmp_path / "set.beton").stat()
    os.truncate(tmp_path / "set.beton", whole.st_size - 24)
    os.utime(tmp_path / "set.beton", ns=(whole.st_atime_ns, whole.st_mtime_ns))
    with pytest.raises(DataError, match="set.beton: was written to"):
        list(loader.epoch(1))


def test_a_change_within_an_epoch_is_detected(tmp_path, rows):
    write_beton(tmp_path / "set.beton", rows[:2] * 8, at_most=16)
    loader = open_loader(tmp_path / "set.beton", resolution=24, batch_size=1, threads=1)
    batches = loader.epoch(0)
    next(batches)
    os.utime(tmp_path / "set.beton", ns=(0, 0))
    with pytest.raises(DataError, match="set.beton: was written to"):
        list(batches)


@pytest.mark.parametrize("replaced", [True, False])
def test_a_file_replaced_or_removed_in_use_stays_open(tmp_path, rows, replaced):
    loader = opened(tmp_path / "set.beton", rows, "ffcv")
    before = [batch.crops for batch in loader.epoch(1)]
    if replaced:
        write_beton(tmp_path / "other.beton", rows[1:2], at_most=1)
        os.replace(tmp_path / "other.beton", tmp_path / "set.beton")
    else:
        (tmp_path / "set.beton").unlink()
    assert all(map(torch.equal, [batch.crops for batch in loader.epoch(1)], before))


def test_a_set_replaced_by_other_images_is_not_opened_as_the_old_one(converted, tmp_path):
    folder = shutil.copytree(converted.folder, tmp_path / "set")
    known = open_set(folder)
    assert known.fingerprint == converted.fingerprint
    shutil.copy(known.beton("train"), tmp_path / "copy")
    os.replace(tmp_path / "copy", folder / "train.beton")
    assert known.beton("train") == folder / "train.beton"
    os.replace(folder / "val.beton", folder / "train.beton")
    with pytest.raises(DataError, match="train.beton: was replaced by other images while it was in use"):
        known.beton("train")
    # A missing file is reported by the code that opens it.
    assert known.beton("val") == folder / "val.beton"
