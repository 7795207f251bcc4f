"""The `.beton` format: round trips, stock FFCV as the independent reader and writer, and damaged files."""

import io
import subprocess
import sys
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from data import DataError
from data.beton import Beton, Encoded, write_beton
from data.convert import Storage, encode
from tests.pictures import photograph


def jpeg(seed: int, height: int, width: int) -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def images():
    return [Encoded(jpeg(i, 20 + i, 30 + 2 * i), 20 + i, 30 + 2 * i, i % 3) for i in range(12)]


@pytest.fixture
def path(tmp_path, images):
    assert write_beton(tmp_path / "set.beton", images, at_most=20) == 12
    return tmp_path / "set.beton"


def test_reads_back_what_was_written(path, images):
    beton = Beton(path)
    assert beton.num_samples == 12
    assert beton.sizes.tolist() == [[image.height, image.width] for image in images]
    assert beton.labels.tolist() == [image.label for image in images]
    for i, image in enumerate(images):
        assert beton.encoded(i).tobytes() == image.data


@settings(max_examples=20)
@given(
    rows=st.lists(
        # Any height and width that this many bytes may have.
        st.tuples(
            st.binary(min_size=66, max_size=300),
            st.tuples(st.integers(1, 65535), st.just(1)) | st.tuples(st.just(1), st.integers(1, 65535)),
            st.integers(0, 10**9),
        ).map(lambda row: (row[0], *row[1], row[2])),
        max_size=30,
    ),
    room=st.integers(0, 100),
)
def test_any_bytes_come_back(rows, room, tmp_path_factory):
    path = tmp_path_factory.mktemp("any") / "any.beton"
    write_beton(path, (Encoded(*row) for row in rows), at_most=len(rows) + room)
    beton = Beton(path)
    assert [(beton.encoded(i).tobytes(), *beton.sizes[i], beton.labels[i]) for i in range(beton.num_samples)] == rows


def test_same_images_same_bytes(tmp_path, images):
    for name in "ab":
        write_beton(tmp_path / name, images, at_most=12)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_images_do_not_cross_pages(tmp_path):
    big = [Encoded(bytes([i]) * 3_000_000, 10, 10, i) for i in range(5)]
    write_beton(tmp_path / "big", big, at_most=5)
    beton = Beton(tmp_path / "big")
    last = (beton.starts + beton.lengths - 1) // (8 << 20)
    np.testing.assert_array_equal(beton.pages, last)
    assert all(beton.encoded(i).tobytes() == image.data for i, image in enumerate(big))


# In a separate process: its loader changes numba's type of all byte arrays, and later compilations in this process may
# never end.
STOCK_LOADER = """
import sys
import numpy as np
from ffcv.fields.basics import IntDecoder
from ffcv.fields.rgb_image import CenterCropRGBImageDecoder
from ffcv.loader import Loader, OrderOption

pipelines = {"image": [CenterCropRGBImageDecoder((16, 16), ratio=1.0)], "label": [IntDecoder()]}
loader = Loader(sys.argv[1], batch_size=4, num_workers=1, order=OrderOption.SEQUENTIAL, pipelines=pipelines)
batches = [(crops.copy(), labels.copy()) for crops, labels in loader]
np.savez(sys.argv[2], crops=np.concatenate([b[0] for b in batches]), labels=np.concatenate([b[1] for b in batches]))
"""


def test_stock_ffcv_opens_it(tmp_path):
    """Restart-grid JPEGs, plain ones and raw pixels, by FFCV's own Loader."""
    pictures = [photograph(i, 120 + i, 200 + 3 * i) for i in range(12)]
    rows = [encode(picture, Storage("raw" if i % 3 == 2 else "jpeg", 180)) for i, picture in enumerate(pictures)]
    rows[0] = Encoded(jpeg(0, 40, 60), 40, 60, 0)
    write_beton(tmp_path / "set.beton", (row._replace(label=i) for i, row in enumerate(rows)), at_most=12)
    read = tmp_path / "read.npz"
    subprocess.run([sys.executable, "-c", STOCK_LOADER, tmp_path / "set.beton", read], check=True)
    batches = np.load(read)
    assert batches["labels"].ravel().tolist() == list(range(12))
    for i, theirs in enumerate(batches["crops"]):
        row = rows[i]
        image = (
            Image.frombytes("RGB", (row.width, row.height), row.data) if row.raw else Image.open(io.BytesIO(row.data))
        )
        # Its resize averages and its decoder rounds coarsely, so this only checks that the pictures are similar.
        top, left = (row.height - min(row.height, row.width)) // 2, (row.width - min(row.height, row.width)) // 2
        side = min(row.height, row.width)
        ours = image.crop((left, top, left + side, top + side)).resize((16, 16), Image.Resampling.BOX)
        assert np.corrcoef(theirs.ravel().astype(float), np.asarray(ours).ravel().astype(float))[0, 1] > 0.9


def test_reads_what_stock_ffcv_wrote(tmp_path):
    from ffcv.fields import FloatField, IntField, RGBImageField
    from ffcv.writer import DatasetWriter

    pictures = [np.full((10 + i, 20, 3), 20 * i, dtype=np.uint8) for i in range(6)]

    class Dataset:
        def __len__(self):
            return len(pictures)

        def __getitem__(self, i):
            return 0.5, i % 2, pictures[i]

    fields = {"weight": FloatField(), "label": IntField(), "image": RGBImageField(write_mode="jpg")}
    DatasetWriter(str(tmp_path / "stock.beton"), fields, num_workers=1).from_indexed_dataset(Dataset())
    beton = Beton(tmp_path / "stock.beton")
    assert beton.sizes[:, 0].tolist() == [10, 11, 12, 13, 14, 15]
    assert beton.labels.tolist() == [0, 1, 0, 1, 0, 1]
    decoded = np.asarray(Image.open(io.BytesIO(beton.encoded(4).tobytes())))
    assert np.abs(decoded.astype(int) - pictures[4]).max() <= 2


def test_fingerprint_follows_the_content(tmp_path, images):
    def fingerprint(rows):
        write_beton(tmp_path / "f", rows, at_most=len(rows))
        return Beton(tmp_path / "f").fingerprint

    first = fingerprint(images)
    assert fingerprint(images) == first
    assert fingerprint(images[:-1]) != first
    assert fingerprint([images[0]._replace(label=2), *images[1:]]) != first
    assert fingerprint([images[0]._replace(data=images[0].data + b"x"), *images[1:]]) != first


@pytest.mark.parametrize("keep", [0, 10, 24, 1000, 5000, 9_000_000])
def test_a_file_cut_short_is_refused_by_name(path, keep):
    data = path.read_bytes()
    path.write_bytes(data[:keep])
    with pytest.raises(DataError, match="set.beton"):
        Beton(path)


def test_other_files_are_refused(tmp_path):
    (tmp_path / "photo.beton").write_bytes(jpeg(0, 100, 100))
    with pytest.raises(DataError, match="photo.beton: not a .beton file"):
        Beton(tmp_path / "photo.beton")
    with pytest.raises(DataError, match="absent.beton: cannot be opened"):
        Beton(tmp_path / "absent.beton")
    with pytest.raises(DataError, match="cannot be opened"):
        Beton(tmp_path)


def test_a_file_of_another_version_is_refused(path):
    data = path.read_bytes()
    path.write_bytes(data.replace(b"label-refinery 1", b"label-refinery 2", 1))
    with pytest.raises(DataError, match="set.beton: written by another version"):
        Beton(path)


def test_an_image_larger_than_a_page_is_refused_and_leaves_no_file(tmp_path):
    with pytest.raises(DataError, match="image 0"):
        write_beton(tmp_path / "huge", [Encoded(bytes(9 << 20), 10, 10, 0)], at_most=1)
    assert not (tmp_path / "huge").exists()


def test_a_failing_source_leaves_nothing(tmp_path, images):
    def rows():
        yield images[0]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_beton(tmp_path / "half", rows(), at_most=2)
    assert not (tmp_path / "half").exists()


def test_a_file_larger_than_memory_opens(path):
    """A sparse one: mapping it must not reserve memory for all of it."""
    data = path.read_bytes()
    table = len(data) - 12 * 24
    hole = 1 << 40
    with open(path, "r+b") as file:
        file.truncate(table)
        file.seek(table + hole)
        file.write(data[table:])
        # Moving the table invalidates the seal, as it should.
        file.seek(16)
        file.write((table + hole).to_bytes(8, "little"))
    with pytest.raises(DataError, match="its index is damaged"):
        Beton(path)
    unsealed = data.index(b"label-refinery 1")
    with open(path, "r+b") as file:
        file.seek(unsealed)
        file.write(bytes(16))
    assert (
        Beton(path).encoded(3).tobytes()
        == Beton(path).bytes[Beton(path).starts[3] :][: Beton(path).lengths[3]].tobytes()
    )


def test_opening_takes_little_memory_beyond_the_index(tmp_path):
    """Index and allocation table are 56 bytes per image; one process per GPU reads them."""
    n = 20_000
    write_beton(tmp_path / "set.beton", (Encoded(bytes(3), 1, 1, i % 7, raw=True) for i in range(n)), at_most=n)
    tracemalloc.start()
    try:
        beton = Beton(tmp_path / "set.beton")
        kept, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert beton.lengths.tolist() == [3] * n
    assert most < 135 * n
    assert kept < 55 * n


def test_the_allocation_table_may_be_in_any_order(path, images):
    before = Beton(path)
    stored = bytearray(path.read_bytes())
    table = int(np.frombuffer(stored, "<u8", 1, 16)[0])
    rows = np.frombuffer(bytes(stored[table:]), np.uint8).reshape(-1, 24)
    stored[table:] = rows[::-1].tobytes()
    stored[stored.index(b"label-refinery 1")] = 0  # as other writers' files: without a seal
    path.write_bytes(stored)
    after = Beton(path)
    np.testing.assert_array_equal(after.lengths, before.lengths)
    assert [after.encoded(i).tobytes() for i in range(12)] == [image.data for image in images]


def test_an_image_without_bytes_is_refused(tmp_path):
    with pytest.raises(DataError, match="image 0: 0 bytes"):
        write_beton(tmp_path / "none", [Encoded(b"", 10, 10, 0)], at_most=1)
