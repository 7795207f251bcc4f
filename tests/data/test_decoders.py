"""Three decoders, one result: the same crops, against each other and against Pillow."""

import io
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from PIL import Image

from data import DataError
from data.beton import Beton, Encoded, write_beton
from data.convert import Storage, encode
from data.decoders import Request, View, build_decoder, choose, parts_of
from data.decoders.prefetch import Prefetcher
from data.loader import open_loader
from data.plan import CropRule, random_boxes
from tests.pictures import photograph

NAMES = ["ffcv", "torchvision", "dali"]
CPU = torch.device("cpu")
SMALL = {"resolution": 32, "batch_size": 8, "threads": 2, "copies": 2}


def batches(path, decoder, **options):
    options = {"resolution": 48, "batch_size": 16, "seed": 7, "threads": 2} | options
    return list(open_loader(path, decoder=decoder, **options).epoch(3))


def by_pillow(beton: Beton, batch, resolution: int) -> torch.Tensor:
    crops = []
    for index, (top, left, height, width), flip in zip(batch.indices, batch.boxes.tolist(), batch.flips, strict=True):
        image = Image.open(io.BytesIO(beton.encoded(int(index)).tobytes())).convert("RGB")
        crop = image.crop((left, top, left + width, top + height)).resize((resolution,) * 2, Image.Resampling.BILINEAR)
        crops.append(np.asarray(crop)[:, ::-1] if flip else np.asarray(crop))
    return torch.from_numpy(np.stack(crops).copy()).permute(0, 3, 1, 2)


@pytest.mark.parametrize("decoder", NAMES)
@pytest.mark.parametrize("train", [True, False])
def test_crops_agree_with_pillow(converted, decoder, train):
    """Within 1 of Pillow, with two exceptions.

    DALI's outermost pixels differ more, because it repeats the edge where Pillow reweighs. FFCV's path converts to RGB
    after the resize, where libjpeg converts and rounds and clips before: within 2, and more in saturated colours.
    """
    path = converted.beton("train")
    beton = Beton(path)
    for batch in batches(path, decoder, train=train):
        error = (batch.crops.int() - by_pillow(beton, batch, 48).int()).abs()
        inner = error[:, :, 1:-1, 1:-1] if decoder == "dali" else error
        if decoder == "ffcv":
            assert (error > 2).float().mean() < 0.005
        else:
            assert inner.max() <= 1
        assert error.max() <= 24
        assert error.float().mean() < 0.35


@pytest.mark.parametrize("decoder", NAMES)
def test_unsaturated_colours_agree_closely(tmp_path, decoder):
    """Without clipping, no decoder differs by more than 2; without noise, a shift would be visible."""
    pictures = [Image.eval(photograph(seed, 230, 310), lambda value: 70 + value * 115 // 255) for seed in range(8)]
    write_beton(tmp_path / "soft.beton", (encode(picture, Storage()) for picture in pictures), at_most=8)
    beton = Beton(tmp_path / "soft.beton")
    for batch in batches(beton.path, decoder, batch_size=8, resolution=64, copies=3):
        error = (batch.crops.int() - by_pillow(beton, batch, 64).int()).abs()
        assert error[:, :, 1:-1, 1:-1].max() <= 2
        assert error.float().mean() < 0.35


@pytest.mark.parametrize("decoder", NAMES)
def test_no_crop_is_shifted(tmp_path, decoder):
    """Diagonal ramps in brightness and colour: a shift of half a pixel would be half a step everywhere."""
    y, x = np.mgrid[0:160, 0:160]
    ramps = np.stack([48 + (x + y) // 2, 48 + (159 - x + y) // 2, 48 + (x + 159 - y) // 2], axis=2).astype(np.uint8)
    write_beton(tmp_path / "ramps.beton", [encode(Image.fromarray(ramps), Storage(quality=100))], at_most=1)
    for epoch in range(6):
        loader = open_loader(
            tmp_path / "ramps.beton", resolution=96, batch_size=1, decoder=decoder, crop=CropRule(flip=False)
        )
        (batch,) = loader.epoch(epoch)
        top, left, height, width = batch.boxes[0].tolist()
        rows = top + (np.arange(96)[:, None] + 0.5) * height / 96 - 0.5
        columns = left + (np.arange(96)[None] + 0.5) * width / 96 - 0.5
        exact = 48 + np.stack([columns + rows, 159 - columns + rows, columns + 159 - rows]) / 2 - 0.25
        # Mean errors in pixels of the image; in their differences a bias of rounding cancels, and a shift doubles.
        error = (batch.crops[0].numpy() - exact)[:, 2:-2, 2:-2].mean(axis=(1, 2)) * 2
        assert abs(error[0] - error[1]) / 2 < 0.2
        assert abs(error[0] - error[2]) / 2 < 0.2


@pytest.mark.parametrize("decoder", NAMES)
def test_copies_are_the_crops_of_single_epochs(converted, decoder):
    """Decoding once for several crops changes nothing: each copy is the crop of its box."""
    path = converted.beton("train")
    beton = Beton(path)
    made = batches(path, decoder, copies=3)
    assert len({(int(i), int(k)) for b in made for i, k in zip(b.indices, b.copies, strict=True)}) == 48 * 3
    for batch in made:
        assert len(set(batch.indices.tolist())) == 16
        assert (batch.crops.int() - by_pillow(beton, batch, 48).int()).abs().float().mean() < 0.5


@pytest.mark.parametrize("decoder", NAMES)
def test_raw_storage(tmp_path, decoder):
    rows = [encode(photograph(seed, 60 + seed, 90), Storage("raw", 80))._replace(label=seed) for seed in range(6)]
    write_beton(tmp_path / "raw.beton", rows, at_most=6)
    beton = Beton(tmp_path / "raw.beton")
    assert beton.raw.all()
    for batch in batches(beton.path, decoder, batch_size=3, copies=2):
        for index, (top, left, h, w), flip, crop in zip(
            batch.indices.tolist(), batch.boxes.tolist(), batch.flips, batch.crops, strict=True
        ):
            image = Image.fromarray(beton.encoded(index).reshape(*beton.sizes[index], 3))
            reference = image.crop((left, top, left + w, top + h)).resize((48, 48), Image.Resampling.BILINEAR)
            reference = np.asarray(reference)[:, ::-1] if flip else np.asarray(reference)
            error = np.abs(crop.permute(1, 2, 0).numpy().astype(int) - reference)
            assert error[1:-1, 1:-1].max() <= 1


@pytest.mark.parametrize("decoder", NAMES)
def test_jpegs_of_other_writers(tmp_path, decoder):
    """Everything that a stock file may hold: other subsampling, progressive, no restart grid, an EXIF orientation."""
    image = photograph(5, 70, 100)
    rows = []
    turned = Image.Exif()
    turned[0x0112] = 3
    kinds = ({"subsampling": "4:4:4"}, {"subsampling": "4:2:2"}, {"progressive": True}, {"subsampling": "4:2:0"})
    for options in (*kinds, {"exif": turned}):
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=95, **options)
        rows.append(Encoded(buffer.getvalue(), 70, 100, 0))
    write_beton(tmp_path / "others.beton", rows, at_most=5)
    beton = Beton(tmp_path / "others.beton")
    for batch in batches(beton.path, decoder, batch_size=5, copies=2):
        error = (batch.crops.int() - by_pillow(beton, batch, 48).int()).abs()
        assert error.float().mean() < 0.5
        assert (error > 2).float().mean() < (0.05 if decoder == "dali" else 0.01)


@pytest.mark.parametrize("decoder", NAMES)
def test_all_decoders_return_the_same_fields(converted, decoder):
    path = converted.beton("train")
    reference, others = batches(path, "ffcv"), batches(path, decoder)
    assert len(reference) == len(others) == 3
    for one, other in zip(reference, others, strict=True):
        for name in ("labels", "indices", "copies", "boxes", "sizes", "flips"):
            assert torch.equal(getattr(one, name), getattr(other, name)), name
        assert other.crops.dtype == torch.uint8
        assert other.crops.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("decoder", NAMES)
def test_the_number_of_threads_does_not_change_crops(converted, decoder):
    path = converted.beton("train")
    for one, many in zip(batches(path, decoder, threads=1), batches(path, decoder, threads=5), strict=True):
        assert torch.equal(one.crops, many.crops)


@pytest.mark.parametrize("decoder", NAMES)
def test_grayscale_and_one_pixel_boxes(tmp_path, decoder):
    buffer = io.BytesIO()
    Image.fromarray(np.arange(64 * 64, dtype=np.uint32).reshape(64, 64).astype(np.uint8)).save(buffer, "JPEG")
    write_beton(tmp_path / "gray.beton", [Encoded(buffer.getvalue(), 64, 64, 0)], at_most=1)
    beton = Beton(tmp_path / "gray.beton")
    build = build_decoder(decoder, beton, views=(View(1, 8),), device=CPU, threads=1, max_batch=2)
    boxes = np.array([[[63, 63, 1, 1]], [[0, 0, 64, 64]]], dtype=np.int32)
    request = Request(np.zeros(2, dtype=np.int64), boxes, np.array([[True], [False]]))
    ((crops,),) = build.decode([request])
    pixel = np.asarray(Image.open(io.BytesIO(buffer.getvalue())))[63, 63]
    assert (crops[0] == int(pixel)).all()
    assert torch.equal(crops[1, 0], crops[1, 2])


def test_parts_hold_the_pixels_of_their_boxes(tmp_path):
    """In a batch with and without tiles, raw images and one image twice, each part has the position that it states."""
    pictures = [photograph(seed, 200 + 9 * seed, 310 - 11 * seed) for seed in range(6)]
    rows = [encode(picture, Storage("raw" if seed == 4 else "jpeg")) for seed, picture in enumerate(pictures)]
    buffer = io.BytesIO()
    pictures[5].save(buffer, "JPEG", quality=90, subsampling="4:4:4")
    rows[5] = rows[5]._replace(data=buffer.getvalue())
    write_beton(tmp_path / "parts.beton", rows, at_most=6)
    beton = Beton(tmp_path / "parts.beton")
    indices = np.array([3, 0, 4, 5, 1, 0, 2, 4])
    boxes, _ = random_boxes(indices, beton.sizes[indices], seed=1, epoch=0, copy=np.arange(8), scale=(0.05, 0.3))
    cut = 0
    for index, (top, left, height, width), part in zip(
        indices.tolist(), boxes.tolist(), parts_of(beton, indices, boxes), strict=True
    ):
        if beton.raw[index]:
            whole = beton.encoded(index).reshape(*beton.sizes[index], 3)
            assert part.data.shape == (height, width, 3)
            found = part.data
        else:
            whole = np.asarray(Image.open(io.BytesIO(beton.encoded(index).tobytes())))
            found = np.asarray(Image.open(io.BytesIO(part.data.tobytes())))
            found = found[top - part.top :, left - part.left :][:height, :width]
            cut += len(part.data) < beton.lengths[index]
        np.testing.assert_array_equal(found, whole[top : top + height, left : left + width])
    assert cut >= 4


def test_each_thread_has_one_job_a_batch():
    asked = [Request(np.arange(n), np.zeros((n, 1, 4), np.int32), np.zeros((n, 1), np.bool_)) for n in (10, 1, 7, 16)]
    jobs = []

    def fill(request, first, last, outs):
        jobs.append((len(request.indices), first, last))
        outs[0][:, first:last] = len(request.indices)

    prefetcher = Prefetcher(fill, views=(View(2, 4),), device=CPU, threads=3)
    for request, (made,) in zip(asked, prefetcher.batches(asked), strict=True):
        assert made.shape == (2 * len(request.indices), 3, 4, 4)
        assert (made == len(request.indices)).all()
    expected = {
        10: [(0, 3), (3, 6), (6, 10)],
        1: [(0, 1)],
        7: [(0, 2), (2, 4), (4, 7)],
        16: [(0, 5), (5, 10), (10, 16)],
    }
    assert sorted(jobs) == sorted((n, *part) for n, parts in expected.items() for part in parts)


@pytest.mark.parametrize("decoder", NAMES)
def test_a_damaged_image_is_named(converted, tmp_path, decoder):
    good = Beton(converted.beton("train"))
    rows = [Encoded(good.encoded(i).tobytes(), *good.sizes[i], 0) for i in range(4)]
    rows[2] = rows[2]._replace(data=b"\xff\xd8" + bytes(len(rows[2].data)))
    write_beton(tmp_path / "bad.beton", rows, at_most=4)
    with pytest.raises(DataError, match="bad.beton: image 2 "):
        batches(tmp_path / "bad.beton", decoder, batch_size=4)


@pytest.mark.parametrize("wrong", [(8, 0), (-8, 0), (0, 8), (0, -8)])
def test_a_wrong_size_in_the_index_is_detected(converted, tmp_path, wrong):
    good = Beton(converted.beton("train"))
    height, width = (int(side) + more for side, more in zip(good.sizes[0], wrong, strict=True))
    write_beton(tmp_path / "w.beton", [Encoded(good.encoded(0).tobytes(), height, width, 0)], at_most=1)
    for decoder in ("ffcv", "torchvision"):
        with pytest.raises(DataError, match=f"the index says {width}x{height}"):
            batches(tmp_path / "w.beton", decoder, batch_size=1)


def test_unknown_decoder():
    with pytest.raises(DataError, match="decoder=opencv: unknown; choose one of auto, ffcv"):
        choose("opencv", CPU)


def test_auto_is_the_fastest_for_storage_threads_and_device(converted, tmp_path):
    jpegs, gpu = Beton(converted.beton("train")), torch.device("cuda")
    raw = [encode(photograph(seed, 40, 40), Storage("raw")) for seed in range(2)]
    write_beton(tmp_path / "raw.beton", raw, at_most=2)
    write_beton(tmp_path / "mixed.beton", [raw[0], encode(photograph(1, 40, 40), Storage())], at_most=2)
    for threads in (1, 64):
        assert choose("auto", CPU, jpegs, threads=threads) == "ffcv"
        assert choose("auto", gpu, Beton(tmp_path / "raw.beton"), threads=threads) == "ffcv"
        assert choose("auto", gpu, Beton(tmp_path / "mixed.beton"), threads=threads) == "ffcv"
    pytest.importorskip("nvidia.dali")
    assert choose("auto", gpu, jpegs, threads=7) == "dali"
    assert choose("auto", gpu, jpegs, threads=8) == "ffcv"


def test_the_decoder_selected_by_auto_is_printed_once(converted, capsys):
    options = {"resolution": 32, "batch_size": 8, "threads": 3}
    open_loader(converted.beton("train"), decoder="auto", rank=1, world=2, **options)
    open_loader(converted.beton("train"), decoder="torchvision", **options)
    assert "decoder=" not in capsys.readouterr().err
    for split in ("train", "val"):
        open_loader(converted.beton(split), decoder="auto", **options)
    assert capsys.readouterr().err == "decoder=auto: ffcv, for JPEGs on cpu with 3 decoding threads\n"


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """1,280 small images, of which 64 differ."""
    pictures = [encode(photograph(seed, 60, 80), Storage()) for seed in range(64)]
    path = tmp_path_factory.mktemp("many") / "many.beton"
    write_beton(path, (picture for _ in range(20) for picture in pictures), at_most=1280)
    return path


@pytest.mark.parametrize("decoder", NAMES)
def test_a_batch_costs_the_training_thread_at_most_half_a_millisecond(many, decoder):
    """Processor time for 256 images; the limit is three to eight times the usual time."""
    loader = open_loader(many, resolution=32, batch_size=256, decoder=decoder, threads=2, copies=2)
    taken = []
    for epoch in range(2):
        batches = loader.epoch(epoch)
        while True:
            started = time.thread_time()
            batch = next(batches, None)
            taken.append(time.thread_time() - started)
            if batch is None:
                break
    assert len(taken) == 22
    assert sorted(taken)[len(taken) // 2] < 0.0005


def test_dali_keeps_its_pipeline(converted):
    """From epoch to epoch, also after an abandoned one; overlapping epochs have a second pipeline."""
    loader = open_loader(converted.beton("train"), resolution=32, batch_size=8, decoder="dali", threads=1, copies=2)
    expected = [batch.crops for batch in open_loader(converted.beton("train"), **SMALL, decoder="dali").epoch(0)]
    list(loader.epoch(5))
    (pipeline,) = loader._decoder._idle
    for left_after in (1, 2, 11, 12):
        left = loader.epoch(7)
        for _ in range(left_after):
            next(left)
        left.close()
        for found, crops in zip(loader.epoch(0), expected, strict=True):
            assert torch.equal(found.crops, crops)
        assert loader._decoder._idle == [pipeline]
    one, other = loader.epoch(0), loader.epoch(0)
    for found, beside, crops in zip(one, other, expected, strict=True):
        assert torch.equal(found.crops, crops)
        assert torch.equal(beside.crops, crops)
    assert len(loader._decoder._idle) == 2


def test_damage_in_discarded_batches_does_not_fail_the_next_epoch(converted, tmp_path):
    good = Beton(converted.beton("train"))
    rows = [Encoded(good.encoded(i).tobytes(), *good.sizes[i], 0) for i in range(6)]
    # Truncated: only the decoder detects it, after the headers were read and while later batches are made.
    rows[3] = rows[3]._replace(data=rows[3].data[: len(rows[3].data) // 2])
    write_beton(tmp_path / "bad.beton", rows, at_most=6)
    beton = Beton(tmp_path / "bad.beton")
    decoder = build_decoder("dali", beton, views=(View(1, 16),), device=CPU, threads=1, max_batch=1)
    whole = [np.array([[[0, 0, *beton.sizes[i]]]], np.int32) for i in range(6)]
    requests = [Request(np.array([i]), whole[i], np.zeros((1, 1), np.bool_)) for i in range(6)]
    for _ in range(2):
        left = decoder.decode(requests)
        next(left)
        left.close()
        assert len(list(decoder.decode(requests[:3]))) == 3
    with pytest.raises(DataError, match="bad.beton: image 3 cannot be decoded"):
        list(decoder.decode(requests))


@pytest.mark.slow
def test_too_little_memory_for_dali_is_not_reported_as_a_damaged_image(many):
    code = (
        "import re, resource\n"
        "from data.loader import open_loader\n"
        f"loader = open_loader({str(many)!r}, resolution=20000, batch_size=64, decoder='dali', threads=1)\n"
        "used = int(re.search(r'VmSize:\\s+(\\d+)', open('/proc/self/status').read())[1]) * 1024\n"
        "resource.setrlimit(resource.RLIMIT_AS, (used + 2**32,) * 2)\n"
        "try:\n    next(loader.epoch(0))\nexcept ValueError as error:\n    print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.stdout.startswith("decoder=dali: not enough memory on cpu for batches of 64 images ("), done.stderr
    assert done.stdout.endswith("; take a smaller batch, or decoder=ffcv\n")


@pytest.mark.slow
@pytest.mark.parametrize("decoder", NAMES)
def test_opening_a_loader_does_not_change_pytorchs_threads(converted, decoder):
    """Importing FFCV sets PyTorch to one thread, which would halve the speed of training on a CPU."""
    code = (
        "import torch; torch.set_num_threads(3)\n"
        "from data.loader import open_loader\n"
        f"loader = open_loader({str(converted.beton('train'))!r}, resolution=32, batch_size=8, decoder={decoder!r})\n"
        "next(loader.epoch(0)); print(torch.get_num_threads())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.split() == ["3"], done.stderr


@pytest.mark.parametrize("decoder", ["ffcv", "dali", "torchvision"])
def test_batches_can_be_made_in_inference_mode(converted, decoder):
    """As when a network is scored."""
    loading = {"resolution": 32, "batch_size": 8, "decoder": decoder, "train": False}
    expected = [batch.crops for batch in open_loader(converted.beton("val"), **loading).epoch(0)]
    with torch.inference_mode():
        found = [batch.crops for batch in open_loader(converted.beton("val"), **loading).epoch(0)]
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours, theirs)
