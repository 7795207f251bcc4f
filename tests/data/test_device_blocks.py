"""Blocks on a GPU, with the reference instead of the kernel: the same crops, whether resident or gathered."""

import numpy as np
import pytest
import torch

from data import DataError
from data.beton import Beton, write_beton
from data.convert import Storage, encode
from data.decoders import blocks, choose
from data.loader import Pairing, open_loader
from data.plan import CropRule
from tests.pictures import photograph

SIZES = [(60, 130), (33, 41), (128, 64), (9, 300), (75, 75), (1, 1), (64, 64)]


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("blocks") / "set.beton"
    rows = [
        encode(photograph(number, 200, 320).crop((0, 0, width, height)), Storage("blocks"))
        for number, (height, width) in enumerate(SIZES)
    ]
    write_beton(path, (row._replace(label=number % 2) for number, row in enumerate(rows)), at_most=9, in_blocks=True)
    return path


def loaded(path, *, decoder="blocks", **options):
    paired = (Pairing("same", 9), Pairing("center", 12), Pairing("whole", 7))
    given = {"resolution": 20, "batch_size": 3, "copies": 2, "paired": paired, "seed": 4} | options
    return open_loader(path, decoder=decoder, **given)


@pytest.mark.parametrize("resident", [0.0, 1.0])
@pytest.mark.parametrize(
    "options",
    [{}, {"copies": 1, "paired": (), "crop": CropRule(scale=(0.03, 0.15))}],
    ids=["whole images", "small crops"],
)
def test_crops_equal_those_of_the_cpu(path, resident, options):
    """Small crops need only some rows of blocks, and few begin at the first one."""
    ours, theirs = loaded(path, resident=resident, **options), loaded(path, decoder="ffcv", **options)
    assert ours.decoder == "blocks"
    for epoch in range(3):
        for one, other in zip(ours.epoch(epoch), theirs.epoch(epoch), strict=True):
            assert torch.equal(one.boxes, other.boxes)
            assert one.crops.is_contiguous(memory_format=torch.channels_last)
            pairs = [(one.crops, other.crops), *((one.paired[key], other.paired[key]) for key in one.paired)]
            for mine, his in pairs:
                assert mine.dtype == torch.uint8
                assert (mine.int() - his.int()).abs().max() <= 1
                assert (mine != his).float().mean() < 0.05


def test_validation_crops_equal_those_of_the_cpu(path):
    (one, *_), (other, *_) = (
        list(loaded(path, decoder=decoder, train=False, drop_last=False).epoch(0)) for decoder in ("blocks", "ffcv")
    )
    assert (one.crops.int() - other.crops.int()).abs().max() <= 1


def test_only_the_rows_of_the_boxes_are_gathered(path, monkeypatch):
    read = []
    original = blocks._copy_runs
    monkeypatch.setattr(blocks, "_copy_runs", lambda *given: read.append(int(given[2].sum())) or original(*given))
    list(loaded(path, resident=0.0, copies=1, paired=()).epoch(0))
    assert 0 < sum(read) < Beton(path).lengths.sum()


@pytest.mark.parametrize("at_once", [1, 20_000, 2**28])
def test_uploads_of_any_size_copy_the_whole_set(path, monkeypatch, at_once):
    """One image at a time, some, or all."""
    monkeypatch.setattr(blocks, "_UPLOAD_BYTES", at_once)
    monkeypatch.setattr(blocks, "_RESIDENT", {})
    beton = Beton(path)
    loader = loaded(path, resident=1.0)
    stored = np.concatenate([beton.encoded(index) for index in range(beton.num_samples)])
    assert np.array_equal(loader._decoder._resident.blocks.numpy().view(np.uint8), stored)


def test_loaders_share_the_resident_set(path):
    one, other = (loaded(path, resident=1.0, resolution=side) for side in (20, 24))
    assert one._decoder._resident is other._decoder._resident
    assert len(one._decoder._resident.blocks) * 8 == Beton(path).lengths.sum()


def test_a_set_larger_than_its_share_is_gathered_with_a_notice(path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (20_000, 0))
    beton = Beton(path)
    assert blocks._resident(beton, torch.device("cuda"), 0.5, None) is None
    out = capsys.readouterr().out
    assert "set.beton: takes 2.42e-05 GB, more than 50 % of the 2e-05 GB that are free on the device" in out
    assert blocks._resident(beton, torch.device("cuda"), 0.0, None) is None
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("resident", [0.0, 1.0])
def test_damage_is_named(path, tmp_path, resident):
    data = bytearray(path.read_bytes())
    start = int(Beton(path).starts[2])
    data[start + 5] ^= 1
    (tmp_path / "set.beton").write_bytes(data)
    # Validation drops no incomplete batch, so every image is read.
    with pytest.raises(DataError, match=r"set.beton: image 2 is damaged"):
        list(loaded(tmp_path / "set.beton", resident=resident, drop_last=False).epoch(0))


def test_auto_selects_the_kernel_only_on_a_gpu(path):
    cpu, cuda, beton = torch.device("cpu"), torch.device("cuda"), Beton(path)
    assert choose("auto", cuda, beton) == "blocks"
    assert choose("auto", cpu, beton) == "ffcv"
    assert choose("ffcv", cuda, beton) == "ffcv"
    with pytest.raises(DataError, match="decoder=blocks: unknown"):
        choose("blocks", cuda)


def test_offsets_of_each_plane(path):
    beton = Beton(path)
    offsets = blocks._plane_offsets(beton)
    np.testing.assert_array_equal(offsets[0], [0, 15 * 33, 15 * 33 + 8 * 17])
    np.testing.assert_array_equal(offsets[1:, 0] * 8, beton.lengths.cumsum()[:-1])
