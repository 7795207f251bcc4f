"""Decoders of other projects: the boxes that they cut, and the pixels of the crops."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from bench.peers import Files, OnGpu, Spdl, TorchCodec
from bench.task import Task
from data import plan
from tests.pictures import photograph

SIDE, BATCH = 24, 4


@pytest.fixture
def task(tmp_path):
    """Eight files of four images, each image twice; one is a PNG."""
    files = []
    for i in range(4):
        files.append(str(tmp_path / f"{i}.{'png' if i == 3 else 'jpg'}"))
        photograph(i, 60 + 9 * i, 90 - 7 * i).save(files[-1])
    return Task([file for file in files for _ in range(2)], None, SIDE, BATCH, 2, 2, "cpu")


def expected(task: Task, number: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the epoch's order of images, int64 [n], and their crops by Pillow, uint8 [n, 3, SIDE, SIDE]."""
    crops = []
    order = plan.epoch_order(len(task.files), seed=0, epoch=number)
    for index in order:
        image = Image.open(task.files[index])
        boxes, flips = plan.random_boxes([index], [image.size[::-1]], seed=0, epoch=number)
        top, left, height, width = boxes[0].tolist()
        crop = image.crop((left, top, left + width, top + height)).resize((SIDE, SIDE), Image.Resampling.BILINEAR)
        pixels = np.asarray(crop)[:, ::-1] if flips[0] else np.asarray(crop)
        crops.append(pixels.transpose(2, 0, 1))
    return order, np.stack(crops)


def test_requests_contain_all_files_with_the_boxes_of_the_plan(task):
    files = Files(task)
    assert files.sizes.tolist() == [[60 + 9 * (i // 2), 90 - 7 * (i // 2)] for i in range(8)]
    requests = list(files.requests(3))
    indices = np.concatenate([request.indices for request in requests])
    assert sorted(indices) == list(range(8))
    assert [request.boxes.shape for request in requests] == [(BATCH, 1, 4)] * 2
    boxes, flips = plan.random_boxes(indices, files.sizes[indices], seed=0, epoch=3)
    assert np.array_equal(np.concatenate([request.boxes[:, 0] for request in requests]), boxes)
    assert np.array_equal(np.concatenate([request.flips[:, 0] for request in requests]), flips)


def test_batches_of_a_gpu_decoder_are_read_cut_and_resized_in_order(task):
    def build(_task):
        def decode(files, boxes):
            images = [torch.from_numpy(np.array(Image.open(io.BytesIO(file)))).permute(2, 0, 1) for file in files]
            return [image[:, t : t + h, x : x + w] for image, (t, x, h, w) in zip(images, boxes.tolist(), strict=True)]

        return decode

    _, crops = expected(task, 1)
    batches = list(OnGpu(task, build=build).epoch(1))
    assert [batch.shape for batch in batches] == [(BATCH, 3, SIDE, SIDE)] * 2
    assert abs(torch.cat(batches).numpy().astype(int) - crops).max() <= 1


def test_torchcodec_gives_the_crops_of_the_plan(task):
    pytest.importorskip("torchcodec")
    _, crops = expected(task, 1)
    made = torch.cat(list(TorchCodec(task).epoch(1))).numpy().astype(int)
    assert abs(made - crops).max() <= 2


def test_spdl_gives_the_crops_of_the_plan_in_any_order(task):
    pytest.importorskip("spdl.pipeline")
    pytest.importorskip("spdl.io")
    _, crops = expected(task, 1)
    try:
        made = torch.cat(list(Spdl(task).epoch(1))).numpy().astype(int)
    except RuntimeError as error:
        pytest.skip(f"FFmpeg's libraries: {error}")
    assert made.shape == crops.shape
    differences = np.array([[abs(crop - other).mean() for other in made] for crop in crops.astype(int)])
    assert sorted(differences.argmin(axis=1)) == list(range(len(crops)))
    # FFmpeg cuts chroma at whole chroma pixels, which are twice as large; on photographs the difference is below 0.5.
    assert differences.min(axis=1).max() < 10
