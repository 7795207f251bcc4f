"""Many ranks: coverage, the bytes that crops are made from, simulated caches, and the part end to end."""

import json
from collections import OrderedDict

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bench import BenchError, images
from bench.__main__ import run
from bench.scale import touched
from bench.scale.common_order import misses, placed, steps_of_machine
from bench.scale.measure import _WAYS, check_coverage, first_share
from data import plan, tiles
from data.beton import PAGE_SIZE, Beton, Encoded, write_beton
from data.decoders import Request, View, build_decoder
from tests.pictures import photograph


def parts_of(n, world, **options):
    return [plan.epoch_order(n, seed=3, epoch=0, rank=rank, world=world, **options) for rank in range(world)]


@given(n=st.integers(1, 300), world=st.integers(1, 6), batch=st.integers(1, 5))
def test_the_plan_passes_the_check(n, world, batch):
    common = plan.epoch_order(n, seed=3, epoch=0)
    assert check_coverage(n, common, parts_of(n, world), world * batch) == n // (world * batch)


def test_the_check_finds_wrong_parts():
    common, parts = plan.epoch_order(100, seed=3, epoch=0), parts_of(100, 4)
    twice = [parts[0], parts[0], *parts[2:]]
    with pytest.raises(BenchError, match="do not contain each of 100 images once"):
        check_coverage(100, common, twice, 8)
    with pytest.raises(BenchError, match="do not contain each of 100 images once"):
        check_coverage(100, common, [*parts[:3], parts[3][:-1]], 8)
    uneven = [np.concatenate([parts[0], parts[1][-3:]]), parts[1][:-3], *parts[2:]]
    with pytest.raises(BenchError, match="11 full steps; a single rank has 12"):
        check_coverage(100, common, uneven, 8)
    shards = list(common.reshape(4, 25))
    with pytest.raises(BenchError, match="a step has other images"):
        check_coverage(100, common, shards, 8)


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """Files of both storages with six images, the last too small for tiles."""
    folder = tmp_path_factory.mktemp("touched")
    files = [str(folder / f"{i}.png") for i in range(6)]
    for i, file in enumerate(files):
        photograph(i, *((281, 350 + 7 * i) if i < 5 else (20, 20))).save(file)
    paths = {"jpeg": folder / "jpeg.beton", "blocks": folder / "blocks.beton"}
    images.write_converted(paths["jpeg"], files, images.JPEG)
    images.write_converted(paths["blocks"], files, images.BLOCKS)
    return paths


def crops(beton: Beton, name: str, boxes: np.ndarray) -> torch.Tensor:
    options = {"views": (View(1, 40),), "device": torch.device("cpu"), "threads": 1, "max_batch": len(boxes)}
    decoder = build_decoder(name, beton, **options)
    request = Request(np.arange(len(boxes)), boxes[:, None], np.zeros((len(boxes), 1), bool))
    ((made,),) = decoder.decode([request])
    return made


@pytest.mark.parametrize(("storage", "name"), list(_WAYS))
def test_a_crop_is_made_from_the_bytes_that_are_counted(stored, tmp_path, storage, name):
    """Overwriting all other bytes does not change the crops."""
    beton = Beton(stored[storage])
    decoder = "blocks" if "GPU" in name else "ffcv"
    for epoch in range(4):
        boxes, _ = plan.random_boxes(np.arange(6), beton.sizes, seed=1, epoch=epoch)
        spoilt = bytearray(stored[storage].read_bytes())
        spoilt[spoilt.index(b"label-refinery 1")] = 0  # disables checksums
        for index, box in enumerate(boxes):
            runs = _WAYS[storage, name](beton, index, box)
            assert (runs[:, 0] < runs[:, 1]).all()
            assert (runs[1:, 0] >= runs[:-1, 1]).all()
            start, end = beton.starts[index], beton.starts[index] + beton.lengths[index]
            assert start <= runs[0, 0]
            assert runs[-1, 1] <= end
            kept = np.zeros(end - start, bool)
            for first, last in runs - start:
                kept[first:last] = True
            # The headers contain the lengths of tiles that are not read.
            data = np.where(kept, beton.bytes[start:end], 255 - beton.bytes[start:end])
            spoilt[start:end] = data.astype(np.uint8).tobytes()
        (tmp_path / "spoilt.beton").write_bytes(spoilt)
        found = crops(Beton(tmp_path / "spoilt.beton"), decoder, boxes)
        torch.testing.assert_close(found, crops(beton, decoder, boxes), rtol=0, atol=0)


def test_no_more_bytes_are_counted_than_are_needed(stored):
    """As many tiles as in the JPEG that is cut, and blocks that cover the box with a small border."""
    jpeg, in_blocks = Beton(stored["jpeg"]), Beton(stored["blocks"])
    fewer = 0
    for epoch in range(4):
        boxes, _ = plan.random_boxes(np.arange(6), jpeg.sizes, seed=1, epoch=epoch)
        for index, box in enumerate(boxes):
            data = jpeg.encoded(index)
            found = tiles.layout(data)
            cut = tiles.cut(data, found, *box.tolist(), np.empty(len(data), np.uint8))
            table = 10 + 2 * found.tiles  # the table of lengths, which the cut JPEG does not have
            runs = touched.tiles_read(jpeg, index, box)
            assert (runs[:, 1] - runs[:, 0]).sum() == (cut.size + table if cut.size else len(data))
            fewer += bool(cut.size)
            (height, width), wide = box[2:].tolist(), int(in_blocks.sizes[index, 1])
            bytes_of = [
                int(np.diff(read(in_blocks, index, box)).sum())
                for read in (touched.blocks_read, touched.rows_of_blocks_read)
            ]
            assert bytes_of[0] <= 8 * 1.5 * (height / 4 + 6) * (width / 4 + 6)
            assert bytes_of[1] <= 8 * 1.5 * (height / 4 + 6) * (wide / 4 + 2)
    assert fewer > 5


def test_units_and_reads():
    found = touched.units(np.array([[10, 20], [4090, 4097], [9000, 9001], [30000, 30001]]), 4096)
    assert found.tolist() == [0, 1, 2, 7]
    assert touched.reads(found) == 2


@given(epochs=st.integers(1, 20), ranks=st.integers(1, 10))
def test_bounds_of_the_share_of_first_uses(epochs, ranks):
    assert 1 / epochs <= first_share(ranks, epochs) * (1 + 1e-9)
    assert first_share(ranks, epochs) <= 1 + 1e-9
    assert first_share(1, epochs) == pytest.approx(1 / epochs)


def test_the_share_of_first_uses_is_that_of_the_plan():
    used = [plan.epoch_order(8000, seed=0, epoch=epoch, rank=1, world=8) for epoch in range(12)]
    share = len(np.unique(np.concatenate(used))) / sum(map(len, used))
    assert share == pytest.approx(first_share(8, 12), abs=0.01)


def test_images_are_placed_as_in_a_file(tmp_path):
    lengths = np.array([3_000_000, 3_000_000, 3_000_000, PAGE_SIZE, 5, 2_000_000, 6_388_608 - 5, 4])
    write_beton(tmp_path / "set.beton", (Encoded(bytes(n), 1, 1, 0) for n in lengths.tolist()), at_most=len(lengths))
    starts = Beton(tmp_path / "set.beton").starts
    np.testing.assert_array_equal(placed(lengths), starts - starts[0])


@given(units=st.lists(st.integers(0, 8), max_size=60), capacity=st.integers(1, 10), share=st.floats(0, 1))
def test_misses_are_those_of_an_lru_cache(units, capacity, share):
    before = int(share * len(units))
    cache: OrderedDict[int, None] = OrderedDict()
    missed = 0
    for now, unit in enumerate(units):
        missed += now >= before and unit not in cache
        cache[unit] = None
        cache.move_to_end(unit)
        if len(cache) > capacity:
            cache.popitem(last=False)
    assert misses(np.array(units, np.int32), 9, capacity, before) == missed


def test_a_machine_reads_the_images_of_its_ranks():
    n, machines, batch = 2000, 4, 3
    order = plan.epoch_order(n, seed=0, epoch=0)
    ranks = [plan.epoch_order(n, seed=0, epoch=0, rank=rank, world=32) for rank in range(16, 24)]
    steps = list(steps_of_machine(order, machines=machines, batch=batch, in_file_order=False))
    assert len(steps) == n // 96
    for number, step in enumerate(steps):
        theirs = np.concatenate([rank[number * batch : (number + 1) * batch] for rank in ranks])
        assert sorted(step) == sorted(theirs)
    in_order = list(steps_of_machine(order, machines=machines, batch=batch, in_file_order=True))
    for number, step in enumerate(in_order):
        np.testing.assert_array_equal(step, np.sort(order[number * 96 : (number + 1) * 96])[48:72])


@pytest.mark.slow
def test_the_part_runs_end_to_end(tmp_path):
    run(only="scale", quick=True, epochs=1, crops=16, resolution=32, out=str(tmp_path))
    (path,) = tmp_path.glob("*-scale-*.json")
    rows = json.loads(path.read_text())["rows"]
    groups = {name: [row for row in rows if row["group"] == name] for name in ("plan", "start", "reads", "order")}
    assert [(row["ranks"], row["steps"], row["left_out"]) for row in groups["plan"]] == [
        (ranks, 78, 20_011 - 78 * 256) for ranks in (1, 8, 64)
    ]
    # 8 bytes for each of the rank's images.
    assert groups["plan"][2]["order_kept_bytes"] < 20_011 / 64 * 8 + 2000
    assert [row["steps"] for row in groups["start"]] == [9, 78, 78]
    assert all(0 < row["open_seconds"] + row["batch_seconds"] < row["seconds"] for row in groups["start"])
    for row in groups["reads"]:
        assert row["bytes"] <= row["bytes_4k"] <= row["bytes_ahead"]
    assert len(groups["order"]) == 8
    text = path.with_suffix(".md").read_text()
    assert text.count("Computed from measured bytes; not measured on a file system.") == 2
    assert text.count("\n## ") == 5
