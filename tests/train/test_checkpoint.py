"""Checkpoints exist completely or not at all."""

import resource
import signal
from pathlib import Path

import pytest
import torch

from models.weights import CHECKPOINT_FORMAT
from train import TrainError
from train.runs import checkpoint


def test_round_trip(tmp_path):
    checkpoint.save(tmp_path / "last.pt", {"model": {"w": torch.arange(3)}, "progress": {"epoch": 2, "step": 0}})
    state = checkpoint.load(tmp_path / "last.pt")
    assert torch.equal(state["model"]["w"], torch.arange(3))
    assert state["progress"] == {"epoch": 2, "step": 0}
    assert [file.name for file in tmp_path.iterdir()] == ["last.pt"]


def test_a_full_disk_keeps_the_checkpoint_before(tmp_path):
    """A limit on file size simulates a full disk: the write fails in the same place."""
    path = tmp_path / "last.pt"
    checkpoint.save(path, {"model": {}})
    before = path.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
    try:
        with pytest.raises(
            TrainError, match=r"last.pt: the checkpoint could not be written \(.*\); the previous checkpoint"
        ):
            checkpoint.save(path, {"model": {"w": torch.zeros(100_000)}})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["last.pt"]


def test_a_failed_first_write_does_not_mention_an_earlier_checkpoint(tmp_path):
    with pytest.raises(TrainError) as ended:
        checkpoint.save(tmp_path / "absent" / "last.pt", {"model": {}})
    assert str(ended.value).startswith(f"{tmp_path / 'absent' / 'last.pt'}: the checkpoint could not be written (")
    assert "kept" not in str(ended.value)


def test_another_file_is_refused(tmp_path):
    def refusal(state: object) -> str:
        torch.save(state, tmp_path / "bare.pt")
        with pytest.raises(TrainError, match="bare.pt: not a readable checkpoint") as ended:
            checkpoint.load(tmp_path / "bare.pt")
        return str(ended.value)

    ours = {"format": CHECKPOINT_FORMAT}
    for state in (
        {"model": {}},
        [1, 2],
        {"progress": {"epoch": 1, "step": 0}},
        ours,
        ours | {"progress": [1, 0]},
        ours | {"progress": {"epoch": 1}},
        ours | {"progress": {"epoch": 1.5, "step": 0}},
    ):
        assert "(it is no checkpoint of a run)" in refusal(state), state
    (tmp_path / "bare.pt").write_bytes(b"no checkpoint")
    with pytest.raises(TrainError, match="it is damaged or cut short"):
        checkpoint.load(tmp_path / "bare.pt")
    with pytest.raises(TrainError, match="No such file"):
        checkpoint.load(tmp_path / "absent.pt")


def write(folder: Path, **steps: tuple[int, int] | None) -> None:
    """Checkpoints of these names, each at its (epoch, step); None: a damaged one."""
    for name, at in steps.items():
        path = folder / getattr(checkpoint, name.upper())
        if at is None:
            path.write_bytes(b"damaged")
        else:
            state = {"progress": dict(zip(("epoch", "step"), at, strict=True)), "together": [name]}
            checkpoint.save(path, state)


def test_a_run_continues_from_its_last_or_most_advanced_undamaged_checkpoint(tmp_path):
    assert checkpoint.latest(tmp_path) is None
    assert checkpoint.position(tmp_path) == (0, 0)
    assert checkpoint.standing(tmp_path) == ((0, 0), None)
    # The last one, even if the others are more advanced: the user may have restored it.
    write(tmp_path, last=(1, 2), before=(3, 0), best=(2, 0))
    assert checkpoint.latest(tmp_path)[0].name == "last.pt"
    assert checkpoint.standing(tmp_path) == ((1, 2), ["last"])
    write(tmp_path, last=None)
    assert checkpoint.standing(tmp_path) == ((3, 0), ["before"])
    write(tmp_path, before=(3, 0), best=(3, 1))
    assert checkpoint.standing(tmp_path) == ((3, 1), ["best"])
    write(tmp_path, before=None)
    assert checkpoint.position(tmp_path) == (3, 1)
    write(tmp_path, best=None)
    for ask in (checkpoint.latest, checkpoint.position, checkpoint.standing):
        with pytest.raises(TrainError, match=r"last.pt: not a readable checkpoint"):
            ask(tmp_path)


def test_go_back_restores_the_previous_checkpoint(tmp_path):
    names = [checkpoint.LAST, checkpoint.BEFORE, checkpoint.BEST]

    def left() -> list[str]:
        return [name for name in names if (tmp_path / name).is_file()]

    write(tmp_path, last=(2, 0), before=(1, 2), best=(1, 0))
    assert not checkpoint.go_back(tmp_path, (1, 1))
    assert not checkpoint.go_back(tmp_path, (0, 0))
    assert left() == names
    assert checkpoint.go_back(tmp_path, (1, 2))
    assert left() == [checkpoint.LAST, checkpoint.BEST]
    assert checkpoint.position(tmp_path) == (1, 2)
    # Only the start is left to go back to.
    assert not checkpoint.go_back(tmp_path, (1, 0))
    assert left() == [checkpoint.LAST, checkpoint.BEST]
    assert checkpoint.go_back(tmp_path, (0, 0))
    assert left() == []
    write(tmp_path, last=(2, 0), before=None)
    assert not checkpoint.go_back(tmp_path, (1, 2))
    assert left() == [checkpoint.LAST, checkpoint.BEFORE]


def test_restored_generators_continue_their_sequence():
    states = checkpoint.generator_states(torch.device("cpu"))
    assert set(states) == {"cpu"}
    drawn = torch.rand(3)
    torch.manual_seed(1)
    checkpoint.restore_generators(states, torch.device("cpu"))
    assert torch.equal(torch.rand(3), drawn)
