"""Small real sets that many tests share."""

import os
from pathlib import Path

# Tensors are small here: one thread is as fast as two, and leaves the other core to the programs under test. Before
# PyTorch is loaded, and for the programs too: threads that wait for each other on busy cores take many times as long.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import pytest
import torch
from hypothesis import settings

from data.convert import convert_source
from data.sources import open_source
from tests.pictures import write_class_folders

# A busy machine is no failure: the suite has a time limit of its own.
settings.register_profile("no deadline", deadline=None)
# As many damaged files of each kind as one likes: make test ARGS="-k fuzz --hypothesis-profile thorough"
settings.register_profile("thorough", deadline=None, max_examples=5000)
settings.load_profile("no deadline")

torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Without a GPU, tests that need one are skipped."""
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """train/ with 3 classes of 16 images, val/ with 3 of 5."""
    root = tmp_path_factory.mktemp("images")
    write_class_folders(root / "train", 3, 16)
    write_class_folders(root / "val", 3, 5, seed=1000)
    return root


@pytest.fixture(scope="session")
def converted(image_folder: Path, tmp_path_factory: pytest.TempPathFactory):
    """The converted set of image_folder."""
    return convert_source(open_source(str(image_folder)), tmp_path_factory.mktemp("converted") / "set", processes=1)
