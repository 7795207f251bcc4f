"""Block storage: planes are stored with small errors, other readers agree, and a box needs only its own blocks."""

import io
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from data import DataError, blocks
from data.beton import PAGE_SIZE, Beton, Encoded, write_beton
from data.convert import Storage, encode
from data.decoders import Request, View, build_decoder
from data.loader import Pairing, open_loader
from tests.data.test_convert import run_convert
from tests.pictures import photograph, write_class_folders

SAMPLE = Path(__file__).parents[3] / "shared" / "data" / "imagenet-sample"
CPU = torch.device("cpu")

# For each code, how many sevenths of the way from endpoint 0 to endpoint 1.
STEPS = np.array([0, 7, 1, 2, 3, 4, 5, 6])


def unpacked(encoded: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Endpoints int [n, 2] and codes int [n, 16] of blocks uint8 [..., n * 8], as the standard describes them."""
    parts = encoded.reshape(-1, 8).astype(np.int64)
    words = sum(parts[:, 2 + i] << 8 * i for i in range(6))
    return parts[:, :2], np.stack([words >> 3 * i & 7 for i in range(16)], axis=1)


def packed(endpoints: np.ndarray, codes: np.ndarray) -> np.ndarray:
    words = sum(codes[:, i].astype(np.int64) << 3 * i for i in range(16))
    return np.concatenate([endpoints, np.stack([words >> 8 * i & 255 for i in range(6)], axis=1)], 1).astype(np.uint8)


def dds(encoded: np.ndarray, height: int, width: int) -> Image.Image:
    """The plane as Pillow reads it: a DDS file of BC4."""
    head = struct.pack("<4s7I44x", b"DDS ", 124, 0x81007, height, width, encoded.size, 0, 0)
    head += struct.pack("<2I4s5I", 32, 4, b"BC4U", 0, 0, 0, 0, 0) + struct.pack("<5I", 0x1000, 0, 0, 0, 0)
    return Image.open(io.BytesIO(head + encoded.tobytes()))


@st.composite
def planes(draw) -> np.ndarray:
    height, width = draw(st.integers(1, 70)), draw(st.integers(1, 150))
    rng = np.random.default_rng(draw(st.integers(0, 999)))
    low, high = sorted((draw(st.integers(0, 255)), draw(st.integers(0, 255))))
    plane = rng.integers(low, high + 1, (height, width), dtype=np.uint8)
    # Flat areas beside noise; two values only.
    kind = draw(st.sampled_from(["noise", "flat", "two"]))
    if kind == "flat":
        plane[:, : width // 2] = low
    if kind == "two":
        plane = np.where(plane > (low + high) // 2, high, low).astype(np.uint8)
    return plane


@settings(max_examples=150)
@given(plane=planes())
def test_a_plane_comes_back(plane):
    height, width = plane.shape
    encoded = blocks.encode_plane(plane)
    assert encoded.shape == (-(-height // 4), -(-width // 4) * 8)
    endpoints, codes = unpacked(encoded)
    assert (endpoints[:, 0] > endpoints[:, 1]).all()
    found = blocks.decode_plane(encoded, height, width)

    # By the standard, rounded to the nearest.
    steps = STEPS[codes]
    exact = ((7 - steps) * endpoints[:, :1] + steps * endpoints[:, 1:]) / 7
    grid = np.floor(exact + 0.5).reshape(-1, -(-width // 4), 4, 4).swapaxes(1, 2).reshape(-(-height // 4) * 4, -1)
    np.testing.assert_array_equal(found, grid[:height, :width])
    # Pillow truncates.
    assert np.abs(np.asarray(dds(encoded, height, width)).astype(int) - found).max() <= 1

    # Each block is at least as good as eight even, rounded steps between its extremes.
    padded = np.pad(plane, ((0, -height % 4), (0, -width % 4)), mode="edge").astype(float)
    cells = padded.reshape(-1, 4, padded.shape[1] // 4, 4).swapaxes(1, 2).reshape(-1, 16)
    low, high = cells.min(axis=1, keepdims=True), cells.max(axis=1, keepdims=True)
    span = np.maximum(high - low, 1)
    even = np.floor(high - np.floor((high - cells) * 7 / span + 0.5) * span / 7 + 0.5)
    shown = grid.reshape(-1, 4, padded.shape[1] // 4, 4).swapaxes(1, 2).reshape(-1, 16)
    assert (((shown - cells) ** 2).sum(axis=1) <= ((even - cells) ** 2).sum(axis=1)).all()


@pytest.mark.parametrize("value", [0, 1, 127, 128, 254, 255])
def test_flat_blocks_are_exact_for_every_reader(value):
    """Equal endpoints would select another mode, whose last two codes are 0 and 255."""
    encoded = blocks.encode_plane(np.full((9, 70), value, np.uint8))
    endpoints, _ = unpacked(encoded)
    assert (endpoints[:, 0] > endpoints[:, 1]).all()
    assert (blocks.decode_plane(encoded, 9, 70) == value).all()
    assert (np.asarray(dds(encoded, 9, 70)) == value).all()


def test_all_endpoints_and_codes_are_expanded_right():
    endpoints = np.stack(np.meshgrid(np.arange(256), np.arange(256), indexing="ij"), axis=2).reshape(-1, 2)
    codes = (np.arange(16) + np.arange(len(endpoints))[:, None]) % 8
    found = blocks.decode_plane(packed(endpoints, codes).reshape(1, -1), 4, 4 * len(endpoints))
    steps = STEPS[codes]
    exact = (7 - steps) * endpoints[:, :1] + steps * endpoints[:, 1:]
    expected = np.floor(exact / 7 + 0.5)
    np.testing.assert_array_equal(found.reshape(4, -1, 4).swapaxes(0, 1).reshape(-1, 16), expected)


def test_endpoints_are_moved_to_where_they_fit():
    """One outlier in a block: least squares ignore it, where the extremes would coarsen all the others."""
    plane = photograph(1, 120, 160).convert("L")
    pixels = np.asarray(plane).copy()
    pixels[2::4, 1::4] += 60
    error = blocks.decode_plane(blocks.encode_plane(pixels), 120, 160).astype(float) - pixels
    cells = pixels.reshape(30, 4, 40, 4).swapaxes(1, 2).reshape(-1, 16).astype(float)
    high, span = cells.max(axis=1, keepdims=True), np.ptp(cells, axis=1, keepdims=True)
    even = high - np.floor((high - cells) * 7 / span + 0.5) * span / 7 - cells
    assert (error**2).mean() < 0.92 * (even**2).mean()


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 9), (2, 3), (7, 1), (31, 64), (33, 65), (101, 203)])
def test_an_image_of_any_size_comes_back(height, width):
    image = photograph(4, height + 4, width + 4).crop((0, 0, width, height))
    stored = np.frombuffer(blocks.encode(image), np.uint8)
    assert len(stored) == blocks.size(height, width)
    found = blocks.decode(stored, height, width)
    assert found.shape == (height, width, 3)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=90, subsampling="4:2:0")
    jpeg = np.asarray(Image.open(buffer)).astype(float)
    ours = np.sqrt(((found.astype(float) - np.asarray(image)) ** 2).mean())
    assert ours < np.sqrt(((jpeg - np.asarray(image)) ** 2).mean()) + 2


def test_gray_and_saturated_colours():
    gray = Image.merge("RGB", [photograph(0, 50, 50).convert("L")] * 3)
    found = blocks.decode(np.frombuffer(blocks.encode(gray), np.uint8), 50, 50)
    assert (found == found[..., :1]).all()
    for colour in ("red", "lime", "blue", "white", "black", "yellow"):
        flat = Image.new("RGB", (19, 5), colour)
        found = blocks.decode(np.frombuffer(blocks.encode(flat), np.uint8), 5, 19).astype(int)
        # The error of JFIF's 8 bits of chroma.
        assert np.abs(found - np.asarray(flat)).max() <= 2


@settings(max_examples=60)
@given(data=st.data(), height=st.integers(1, 90), width=st.integers(1, 200))
def test_a_box_reads_only_its_own_blocks(data, height, width):
    """With all other bytes overwritten, the crop is the same, and equals that of the whole image's planes."""
    h, w = data.draw(st.integers(1, height)), data.draw(st.integers(1, width))
    top, left = data.draw(st.integers(0, height - h)), data.draw(st.integers(0, width - w))
    image = photograph(height * 200 + width, height + 4, width + 4).crop((0, 0, width, height))
    stored = np.frombuffer(blocks.encode(image), np.uint8)
    part = blocks.around(height, width, top, left, h, w)
    kept = np.zeros(len(stored), bool)
    start = 0
    for (rows, columns), window in (
        ((height, width), part.luma),
        (((height + 1) // 2, (width + 1) // 2), part.chroma),
        (((height + 1) // 2, (width + 1) // 2), part.chroma),
    ):
        count = blocks.across(rows) * blocks.across(columns)
        plane = kept[start : start + count * 8].reshape(blocks.across(rows), -1, 8)
        plane[window.row : window.row + window.rows, window.column : window.column + window.columns] = True
        start += count * 8
    assert start == len(stored)
    # At most a block more on each side of the box in Y, two where Cb and Cr begin a block earlier.
    assert kept.sum() <= (h + 14) * (w + 14) / 16 * 8 + 2 * (h + 18) * (w + 18) / 64 * 8
    spoilt = np.where(kept, stored, 255 - stored)
    room = np.empty(3 * (height + blocks.PADDING) * (width + blocks.PADDING) + 64, np.uint8)
    room[-64:] = 0xA5
    whole = blocks.expand_planes(stored, height, width, blocks.around(height, width, 0, 0, height, width), room.copy())
    made = blocks.expand_planes(spoilt, height, width, part, room)
    assert (room[-64:] == 0xA5).all()
    for plane, full, window in zip(made, whole, (part.luma, part.chroma, part.chroma), strict=True):
        rows, columns = window.rows * 4, window.columns * 4
        expected = full[window.row * 4 :, window.column * 4 :][:rows, :columns]
        np.testing.assert_array_equal(plane[:, :columns], expected)


# ---- converted sets of blocks


def write_set(path: Path, pictures: list[Image.Image]) -> Beton:
    rows = (encode(picture, Storage("blocks"))._replace(label=i) for i, picture in enumerate(pictures))
    write_beton(path, rows, at_most=len(pictures), in_blocks=True)
    return Beton(path)


@pytest.fixture(scope="module")
def beton(tmp_path_factory) -> Beton:
    pictures = [photograph(i, 60 + 7 * i, 130 - 9 * i) for i in range(10)]
    pictures += [photograph(11, 40, 40).crop((0, 0, 1, 1)), photograph(12, 40, 40).crop((0, 0, 1, 33))]
    return write_set(tmp_path_factory.mktemp("blocks") / "set.beton", pictures)


def test_a_set_reads_back(beton):
    assert beton.in_blocks
    assert not beton.raw.any()
    assert beton.labels.tolist() == list(range(12))
    assert beton.sizes.tolist()[-2:] == [[1, 1], [33, 1]]
    assert beton.encoded(3).tobytes() == blocks.encode(photograph(3, 81, 103))


def reference(beton: Beton, index: int, box, flip: bool, resolution: int) -> np.ndarray:
    top, left, height, width = map(int, box)
    image = Image.fromarray(blocks.decode(beton.encoded(index), *map(int, beton.sizes[index])))
    crop = image.crop((left, top, left + width, top + height)).resize((resolution,) * 2, Image.Resampling.BILINEAR)
    return np.asarray(crop)[:, ::-1] if flip else np.asarray(crop)


def test_crops_agree_with_pillow(beton):
    """Crops, copies, paired crops; within 1 except for saturated colours, which are clipped after the resize here."""
    pairings = (Pairing("same", 24), Pairing("center", 40), Pairing("whole", 32))
    loader = open_loader(beton.path, resolution=48, batch_size=6, seed=3, copies=2, paired=pairings, threads=2)
    assert loader.decoder == "ffcv"
    steps = 0
    for batch in loader.epoch(1):
        steps += 1
        views = {"same": (batch.boxes, batch.flips)}
        views["center"] = (torch.from_numpy(loader._crop.validation(batch.sizes)[0]), torch.zeros(6, dtype=bool))
        views["whole"] = (torch.cat([torch.zeros_like(batch.sizes), batch.sizes], dim=1), torch.zeros(6, dtype=bool))
        for crops, kind in ((batch.crops, "same"), *((batch.paired[p], p.box) for p in pairings)):
            boxes, flips = views[kind]
            expected = np.stack(
                [
                    reference(beton, int(index), box, bool(flip), crops.shape[-1])
                    for index, box, flip in zip(batch.indices, boxes.numpy(), flips, strict=True)
                ]
            )
            error = np.abs(crops.permute(0, 2, 3, 1).numpy().astype(int) - expected)
            assert (error > 2).mean() < 0.01
            assert error.max() <= 24
            assert error.mean() < 0.6
    assert steps == loader.steps == 4


def test_a_crop_does_not_depend_on_which_blocks_are_expanded(beton):
    """Bit for bit: from its own blocks, and from all blocks, which a second crop of the whole image needs."""
    rng = np.random.default_rng(0)
    one, two = (
        build_decoder("ffcv", beton, views=(View(copies, 20),), device=CPU, threads=1, max_batch=10)
        for copies in (1, 2)
    )
    indices, sizes = np.arange(10), beton.sizes[:10]
    whole = np.concatenate([np.zeros_like(sizes), sizes], axis=1)
    for _ in range(40):
        extents = np.maximum(rng.random((10, 2)) * sizes, 1).astype(np.int32)
        corners = (rng.random((10, 2)) * (sizes - extents + 1)).astype(np.int32)
        boxes = np.stack([np.concatenate([corners, extents], axis=1), whole], axis=1).astype(np.int32)
        flips = rng.random((10, 2)) < 0.5
        ((alone,),) = one.decode([Request(indices, boxes[:, :1], flips[:, :1])])
        ((both,),) = two.decode([Request(indices, boxes, flips)])
        assert torch.equal(alone, both[:10])


def test_other_decoders_refuse_blocks_in_one_line(beton):
    for decoder in ("dali", "torchvision"):
        with pytest.raises(
            DataError, match=f"^decoder={decoder}: cannot read a set stored as blocks; use decoder=auto$"
        ):
            open_loader(beton.path, resolution=24, batch_size=2, decoder=decoder)
        with pytest.raises(DataError, match="stored as blocks"):
            build_decoder(decoder, beton, views=(View(1, 8),), device=CPU, threads=1, max_batch=2)


def test_stock_ffcv_opens_it_as_bytes(beton):
    from ffcv.fields import BytesField, IntField
    from ffcv.reader import Reader

    reader = Reader(str(beton.path))
    kinds = {name: type(handler) for name, handler in reader.handlers.items()}
    assert kinds == {"bytes": BytesField, "height": IntField, "width": IntField, "label": IntField}
    stored, height, width, label = (reader.metadata[name] for name in reader.metadata.dtype.names)
    np.testing.assert_array_equal(np.stack([height, width], axis=1), beton.sizes)
    np.testing.assert_array_equal(label, beton.labels)
    np.testing.assert_array_equal(stored["ptr"], beton.starts)
    np.testing.assert_array_equal(stored["size"], beton.lengths)
    np.testing.assert_array_equal(reader.alloc_table["size"], beton.lengths)


BOXES = np.array([[[3, 5, 40, 50]], [[0, 0, 60, 90]], [[10, 11, 1, 1]]], dtype=np.int32)


def crops(path: Path, indices=(0, 1, 2)) -> torch.Tensor:
    build = build_decoder("ffcv", Beton(path), views=(View(1, 16),), device=CPU, threads=1, max_batch=3)
    request = Request(np.array(indices), BOXES[list(indices)], np.zeros((len(indices), 1), dtype=bool))
    ((batch,),) = build.decode([request])
    return batch


def test_a_changed_byte_is_detected_or_changes_no_pixel(beton, tmp_path):
    path = tmp_path / "set.beton"
    path.write_bytes(beton.path.read_bytes())
    good, rng, size = crops(path), np.random.default_rng(0), path.stat().st_size
    end = int(beton.starts[-1] + beton.lengths[-1])
    spans = [(0, 24 + 4 * 1041 + 12 * 40), (size - 12 * 24, size), (end, end + 48)]
    spans += [(int(beton.starts[i]), int(beton.starts[i] + beton.lengths[i])) for i in range(3)]
    noticed = 0
    with open(path, "r+b", buffering=0) as file:
        for case in range(600):
            place = int(rng.integers(*spans[case % len(spans)]))
            file.seek(place)
            before = file.read(1)
            file.seek(place)
            file.write(bytes([rng.integers(256)]))
            try:
                assert torch.equal(crops(path), good), f"byte {place} was not noticed"
            except DataError as error:
                noticed += 1
                assert "\n" not in str(error)
                assert "set.beton" in str(error)
                hit = [i for i in range(3) if 0 <= place - beton.starts[i] < beton.lengths[i]]
                assert all(f"image {i} is damaged" in str(error) for i in hit)
            file.seek(place)
            file.write(before)
    assert noticed > 300


@pytest.mark.parametrize(
    ("height", "width"), [(61, 130), (60, 200), (0, 130), (-60, 130), (1 << 40, 130), (60, (1 << 32) + 130), (65536, 1)]
)
def test_sizes_that_do_not_fit_the_bytes_are_refused_without_a_seal(tmp_path, height, width):
    row = encode(photograph(0, 60, 130), Storage("blocks"))
    write_beton(tmp_path / "set.beton", [row._replace(height=height, width=width)], at_most=1, in_blocks=True)
    data = (tmp_path / "set.beton").read_bytes()
    (tmp_path / "set.beton").write_bytes(data.replace(b"label-refinery 1", bytes(16), 1))
    with pytest.raises(DataError, match="set.beton: .*; convert the set again"):
        Beton(tmp_path / "set.beton")


def test_a_file_without_a_seal_works(beton, tmp_path):
    path = tmp_path / "unsealed.beton"
    path.write_bytes(beton.path.read_bytes().replace(b"label-refinery 1", bytes(16), 1))
    assert torch.equal(crops(path), crops(beton.path))


def test_images_larger_than_a_page_are_skipped_naming_the_option(tmp_path):
    side = 3400
    assert blocks.size(side, side) > PAGE_SIZE
    with pytest.raises(ValueError, match="use a lower --max_resolution"):
        encode(Image.new("RGB", (side, side)), Storage("blocks", 4000))
    # The largest that fit: 11 megapixels.
    assert blocks.size(3344, 3344) <= PAGE_SIZE


def test_convert_writes_blocks(tmp_path):
    root = write_class_folders(tmp_path / "set", 2, 4)
    Image.new("RGB", (1, 1), "red").save(root / "class0" / "tiny.png")
    Image.fromarray(np.asarray(photograph(3, 60, 61).convert("L"))).save(root / "class1" / "gray.png")
    done = run_convert("--data", root, "--out", tmp_path / "out", "--storage", "blocks", "--max_resolution", 100)
    assert done.returncode == 0, done.stderr
    made = Beton(tmp_path / "out" / "train.beton")
    assert made.in_blocks
    assert made.num_samples + Beton(tmp_path / "out" / "val.beton").num_samples == 10
    assert made.sizes.max() == 100


@pytest.mark.skipif(not SAMPLE.is_dir(), reason="the ImageNet originals are not here")
def test_photographs_are_nearer_than_jpegs_of_quality_90():
    """A tenth of the sample; over all of it, the mean is 37.7 dB (JPEG: 37.1) and the median 38.2 dB (36.3)."""
    ours, theirs = [], []
    for file in sorted(SAMPLE.glob("*/*"))[::10]:
        image = Image.open(file).convert("RGB")
        image.thumbnail((512, 512), Image.Resampling.BICUBIC)
        ours.append(
            psnr(blocks.decode(np.frombuffer(blocks.encode(image), np.uint8), image.height, image.width), image)
        )
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=90, subsampling="4:2:0")
        theirs.append(psnr(np.asarray(Image.open(buffer)), image))
    assert np.mean(ours) > np.mean(theirs)
    assert np.median(ours) > np.median(theirs)


def psnr(pixels: np.ndarray, image: Image.Image) -> float:
    """In dB, at most 60: identical pixels would be infinitely good."""
    error = ((pixels.astype(float) - np.asarray(image)) ** 2).mean()
    return 10 * np.log10(255**2 / max(error, 255**2 / 1e6))


def test_encoded_bytes_of_any_other_length_are_refused(tmp_path):
    row = encode(photograph(0, 60, 130), Storage("blocks"))
    write_beton(tmp_path / "set.beton", [Encoded(row.data[:-8], 60, 130, 0)], at_most=1, in_blocks=True)
    with pytest.raises(DataError, match="another number of blocks"):
        Beton(tmp_path / "set.beton")
