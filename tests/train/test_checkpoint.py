"""Checkpoints: whole or not at all."""

import resource
import signal

import pytest
import torch

from train import TrainError
from train.runs import checkpoint


def test_round_trip(tmp_path):
    checkpoint.save(tmp_path / "last.pt", {"model": {"w": torch.arange(3)}, "progress": {"epoch": 2, "step": 0}})
    state = checkpoint.load(tmp_path / "last.pt")
    assert torch.equal(state["model"]["w"], torch.arange(3))
    assert state["progress"] == {"epoch": 2, "step": 0}
    assert [file.name for file in tmp_path.iterdir()] == ["last.pt"]


def test_a_full_disk_keeps_the_checkpoint_before(tmp_path):
    """The limit on the size of a file stands for the disk: the write fails in the same place."""
    path = tmp_path / "last.pt"
    checkpoint.save(path, {"model": {}})
    before = path.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
    try:
        with pytest.raises(TrainError, match=r"last.pt: the checkpoint could not be written \(.*\); the one before"):
            checkpoint.save(path, {"model": {"w": torch.zeros(100_000)}})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["last.pt"]


def test_another_file_is_refused(tmp_path):
    torch.save({"model": {}}, tmp_path / "bare.pt")
    with pytest.raises(TrainError, match="bare.pt: not a readable checkpoint"):
        checkpoint.load(tmp_path / "bare.pt")
