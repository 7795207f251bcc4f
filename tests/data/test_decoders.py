"""Three decoders, one result: the same crops, against each other and against Pillow."""

import io
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from data import DataError
from data.beton import Beton, Encoded, write_beton
from data.decoders import Request, build_decoder, choose
from data.loader import open_loader

NAMES = ["ffcv", "torchvision", "dali"]
CPU = torch.device("cpu")


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
def test_crops_are_pillows(converted, decoder, train):
    """Within 1 of Pillow; DALI's outermost pixels differ more, because it repeats the edge where Pillow reweighs."""
    path = converted.beton("train")
    beton = Beton(path)
    for batch in batches(path, decoder, train=train):
        error = (batch.crops.int() - by_pillow(beton, batch, 48).int()).abs()
        inner = error[:, :, 1:-1, 1:-1] if decoder == "dali" else error
        assert inner.max() <= 1
        assert error.max() <= 24
        assert error.float().mean() < 0.3


@pytest.mark.parametrize("decoder", NAMES)
def test_batches_say_the_same_about_the_crops(converted, decoder):
    path = converted.beton("train")
    reference, others = batches(path, "ffcv"), batches(path, decoder)
    assert len(reference) == len(others) == 3
    for one, other in zip(reference, others, strict=True):
        for name in ("labels", "indices", "copies", "boxes", "sizes", "flips"):
            assert torch.equal(getattr(one, name), getattr(other, name)), name
        assert other.crops.dtype == torch.uint8
        assert other.crops.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("decoder", NAMES)
def test_threads_do_not_matter(converted, decoder):
    path = converted.beton("train")
    for one, many in zip(batches(path, decoder, threads=1), batches(path, decoder, threads=5), strict=True):
        assert torch.equal(one.crops, many.crops)


@pytest.mark.parametrize("decoder", NAMES)
def test_grayscale_and_one_pixel_boxes(tmp_path, decoder):
    buffer = io.BytesIO()
    Image.fromarray(np.arange(64 * 64, dtype=np.uint32).reshape(64, 64).astype(np.uint8)).save(buffer, "JPEG")
    write_beton(tmp_path / "gray.beton", [Encoded(buffer.getvalue(), 64, 64, 0)], at_most=1)
    beton = Beton(tmp_path / "gray.beton")
    build = build_decoder(decoder, beton, resolution=8, device=CPU, threads=1, max_batch=2)
    boxes = np.array([[63, 63, 1, 1], [0, 0, 64, 64]], dtype=np.int32)
    request = Request(np.zeros(2, dtype=np.int64), boxes, np.array([True, False]))
    (crops,) = build.decode([request])
    pixel = np.asarray(Image.open(io.BytesIO(buffer.getvalue())))[63, 63]
    assert (crops[0] == int(pixel)).all()
    assert torch.equal(crops[1, 0], crops[1, 2])


@pytest.mark.parametrize("decoder", NAMES)
def test_a_damaged_image_is_named(converted, tmp_path, decoder):
    good = Beton(converted.beton("train"))
    rows = [Encoded(good.encoded(i).tobytes(), *good.sizes[i], 0) for i in range(4)]
    rows[2] = rows[2]._replace(jpeg=b"\xff\xd8" + bytes(len(rows[2].jpeg)))
    write_beton(tmp_path / "bad.beton", rows, at_most=4)
    with pytest.raises(DataError, match="bad.beton"):
        batches(tmp_path / "bad.beton", decoder, batch_size=4)


def test_a_wrong_size_in_the_index_is_no_silent_garbage(converted, tmp_path):
    good = Beton(converted.beton("train"))
    height, width = map(int, good.sizes[0])
    write_beton(tmp_path / "w.beton", [Encoded(good.encoded(0).tobytes(), height + 8, width, 0)], at_most=1)
    for decoder in ("ffcv", "torchvision"):
        with pytest.raises(DataError, match="the index says"):
            batches(tmp_path / "w.beton", decoder, batch_size=1)


def test_unknown_decoder():
    with pytest.raises(DataError, match="decoder=opencv: unknown; choose one of auto, ffcv"):
        choose("opencv", CPU)
    assert choose("auto", CPU) == "ffcv"
    assert choose("auto", torch.device("cuda")) == "dali"


@pytest.mark.parametrize("decoder", NAMES)
def test_opening_a_loader_leaves_pytorchs_threads_alone(converted, decoder):
    """Importing FFCV sets PyTorch to one thread, which would halve the speed of training on a CPU."""
    code = (
        "import torch; torch.set_num_threads(3)\n"
        "from data.loader import open_loader\n"
        f"loader = open_loader({str(converted.beton('train'))!r}, resolution=32, batch_size=8, decoder={decoder!r})\n"
        "next(loader.epoch(0)); print(torch.get_num_threads())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.split() == ["3"], done.stderr
