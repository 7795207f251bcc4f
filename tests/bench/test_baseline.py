"""The baseline that the loop is compared with trains on the refinery's labels of its crops."""

import pytest
import torch
from torch.nn import functional as F

from bench.baseline import Baseline
from bench.pair import Pair
from bench.settings import resolve
from data.sources import image_files


@pytest.fixture
def baseline(image_folder):
    """A baseline on eight images in batches of four."""
    settings = resolve(
        quick=True,
        device="cpu",
        precision="fp32",
        data=None,
        refinery=None,
        compile=None,
        gpus=None,
        resolution=32,
        batch=4,
        epochs=1,
        crops=8,
        steps=2,
        threads="1",
        contenders="ours",
        pairs="resnet18:mobilenet0.25",
    )
    files = [str(file) for file in image_files(image_folder / "train").files][::6]
    return Baseline(Pair(*settings.pairs[0], settings), files, workers=1)


def test_the_student_approaches_the_refinery(baseline):
    refinery, student = baseline._refinery, baseline._student
    # An untrained refinery and student both predict nearly uniform distributions.
    with torch.no_grad():
        refinery.fc.bias += torch.randn(len(refinery.fc.bias), generator=torch.Generator().manual_seed(0)) * 3
    baseline._optimizer.param_groups[0]["lr"] = 0.05
    torch.manual_seed(1)
    crops = torch.stack([baseline._loader.dataset[i][0] for i in range(8)])

    def divergence() -> float:
        with torch.no_grad():
            labels = refinery(crops).softmax(dim=1)
            return F.kl_div(student(crops).log_softmax(dim=1), labels, reduction="batchmean").item()

    before = divergence()
    for _ in range(12):
        assert baseline.run().amount == 8
    assert divergence() < 0.4 * before
