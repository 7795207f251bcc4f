"""Small real sets that many tests share."""

import importlib.util
import os
from pathlib import Path

# Tensors are small here: one thread is as fast as two, and leaves the other core to the programs under test. Before
# PyTorch is loaded, and for started programs too: threads that spin on busy cores are many times slower.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

import pytest
import torch
from hypothesis import settings

from data.convert import convert_source
from data.sources import open_source
from tests.pictures import write_class_folders

# No deadlines, since machines may be busy; the suite has its own time limit.
settings.register_profile("no deadline", deadline=None)
# For many more damaged files of each kind: make test ARGS="-k fuzz --hypothesis-profile thorough"
settings.register_profile("thorough", deadline=None, max_examples=5000)
settings.load_profile("no deadline")

torch.set_num_threads(1)


# The package that a test's `decoder` needs, if it may be missing.
_DECODERS = {"dali": "nvidia.dali", "ffcv": "ffcv"}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Without a GPU, or without a decoder's package, tests that need it are skipped."""
    missing = {name: package for name, package in _DECODERS.items() if not _installed(package)}
    for item in items:
        decoder = item.callspec.params.get("decoder") if hasattr(item, "callspec") else None
        if decoder in missing:
            item.add_marker(pytest.mark.skip(reason=f"{missing[decoder]} is not installed"))
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def _installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:  # of the package around it
        return False


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
