"""A folder of stored labels: complete epochs, and damage that is reported by name."""

import errno
import fcntl
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

from data.durable import in_units
from tests.damage import bytes_of, documents
from tests.paths import python_path
from train import TrainError
from train.labels.description import Description, differences, short
from train.labels.rows import CellRows
from train.labels.store import Store, check_folder, create_store, open_store
from train.runs import key_of

ROOT = Path(__file__).parents[2]
IMAGES, COPIES = 50, 2

DESCRIPTION = Description(
    data={"name": "drawn", "fingerprint": "ab" * 32, "images": IMAGES, "classes": 1000},
    refinery={"network": "resnet18", "weights": "cd" * 32, "generation": 0, "bn": "batch", "resolution": None},
    plan={"seed": 2**63 + 1, "crop": {"scale": (0.08, 1.0), "ratio": (0.75, 1.25), "flip": True}, "copies": COPIES},
    resolution=64,
    precision="fp32",
    batch=16,
    order="random",
    format="packed",
    k=10,
    dtype=None,
    bytes_per_crop=20,
)


@pytest.fixture
def store(tmp_path) -> Store:
    return create_store(tmp_path / "labels", DESCRIPTION)


def filled(store: Store, epoch: int) -> np.ndarray:
    """Writes an epoch of random rows and returns them."""
    wanted = np.random.default_rng(epoch).integers(256, size=(IMAGES * COPIES, 20), dtype=np.uint8)
    with store.writing(epoch) as rows:
        rows[:] = wanted
    return wanted


def test_written_rows_are_read_back(store):
    wanted = [filled(store, epoch) for epoch in range(2)]
    again = open_store(store.folder)
    assert again.description.crop.scale == (0.08, 1.0)
    assert again.description.seed == 2**63 + 1
    assert again.description.key == store.description.key
    assert again.epochs == 2
    for epoch, rows in enumerate(wanted):
        assert np.array_equal(again.rows(epoch), rows)
    said = json.loads((store.folder / "labels.json").read_text())
    assert said["bytes_per_crop"] == 20
    assert sorted(said["epochs"]) == ["0", "1"]
    assert sorted(os.listdir(store.folder)) == ["epoch-0000.labels", "epoch-0001.labels", "labels.json"]


def test_epochs_count_up_to_a_gap(store):
    for epoch, epochs in ((1, 0), (3, 0), (0, 2), (2, 4)):
        filled(store, epoch)
        assert store.epochs == epochs
    store.folder.joinpath("epoch-0001.labels").unlink()
    assert store.epochs == 1


def test_an_epoch_exists_completely_or_not_at_all(store):

    def fails() -> None:
        with store.writing(0) as rows:
            rows[:3] = 7
            raise KeyError

    with pytest.raises(KeyError):
        fails()
    assert store.epochs == 0
    assert os.listdir(store.folder) == ["labels.json"]
    filled(store, 0)
    with store.writing(0) as rows:
        assert rows is None  # it is finished


def test_two_processes_do_not_write_the_same_epoch(store):
    other = open_store(store.folder)
    with store.writing(0) as rows:
        with other.writing(0) as theirs:
            assert theirs is None
        filled(other, 1)
        rows[:] = 1
    assert store.epochs == other.epochs == 2
    assert (other.rows(0) == 1).all()


def test_leftovers_of_a_killed_process_are_overwritten(store):
    program = (
        "import os, signal, sys; from train.labels.store import open_store\n"
        f"with open_store({str(store.folder)!r}).writing(0) as rows:\n"
        "    rows[:] = 9\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    environment = os.environ | {"PYTHONPATH": python_path()}
    assert subprocess.run([sys.executable, "-c", program], env=environment, timeout=120).returncode == -signal.SIGKILL
    assert sorted(os.listdir(store.folder)) == [".epoch-0000.partial", "labels.json"]
    assert store.epochs == 0
    wanted = filled(store, 0)
    assert np.array_equal(store.rows(0), wanted)
    assert len(os.listdir(store.folder)) == 2


def test_a_full_disk_keeps_what_is_finished(store):
    wanted = filled(store, 0)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(TrainError, match=r"partial: cannot be written .*; 1 finished epochs are kept"):
            filled(store, 1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)
    assert store.epochs == 1
    assert np.array_equal(store.rows(0), wanted)
    assert len(os.listdir(store.folder)) == 2


def test_disk_space_for_epochs_is_checked_first(tmp_path, monkeypatch):
    images = 10**12
    huge = create_store(tmp_path / "huge", replace(DESCRIPTION, data=DESCRIPTION.data | {"images": images}))
    with pytest.raises(TrainError, match=r"OUT=.*huge: 3 epochs of labels take 120 TB, and .* are free; take another"):
        huge.check_room(3)
    huge.check_room(0)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(0, 0, 3999))
    store = create_store(tmp_path / "labels", DESCRIPTION)
    with pytest.raises(TrainError, match="2 epochs of labels take 4 kB"):
        store.check_room(2)
    filled(store, 1)
    store.check_room(2)
    with store.writing(0):
        store.check_room(3)  # the space of epoch 0 is allocated already


@pytest.mark.parametrize(
    ("harm", "says"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), "has 1999 bytes and should have 2000"),
        (lambda path: path.write_bytes(path.read_bytes() + b"!"), "has 2001 bytes"),
        (lambda path: path.write_bytes(path.read_bytes()[:999] + b"!" + path.read_bytes()[1000:]), "is damaged"),
        (lambda path: path.unlink(), "cannot be read"),
    ],
)
def test_damaged_rows_are_refused_by_name_and_written_again(store, harm, says):
    wanted = filled(store, 0)
    path = store.folder / "epoch-0000.labels"
    harm(path)
    with pytest.raises(TrainError, match=rf"epoch-0000.labels: {says}.*label again with the same command"):
        store.rows(0)
    if says == "is damaged":
        path.unlink()  # as the message says
    assert store.epochs == 0
    filled(store, 0)
    assert np.array_equal(store.rows(0), wanted)


def test_the_size_of_every_epoch_is_checked_at_once(store):
    for epoch in range(3):
        filled(store, epoch)
    store.check_sizes()
    path = store.folder / "epoch-0002.labels"
    path.write_bytes(path.read_bytes()[:10])
    with pytest.raises(TrainError, match="epoch-0002.labels: has 10 bytes"):
        store.check_sizes()
    assert store.epochs == 2


@pytest.mark.parametrize(
    ("harm", "says"),
    [
        (lambda text: text.replace('"version": 1', '"version": 2'), "written by another version"),
        (lambda text: text[:-20], "is damaged"),
        (lambda text: "[]", "is damaged"),
        (lambda text: "{}", "is damaged"),
        (lambda text: text.replace("9223372036854775809", "9223372036854775808"), "is damaged"),  # another seed
        (lambda text: text.replace("0.08", "0.18"), "is damaged"),
        (lambda text: text.replace('"precision": "fp32",', ""), "is damaged"),
        (lambda text: text.replace('"crc32": ', '"crc32": 1'), "is damaged"),
        (None, "cannot be read .*; is .* a folder of stored labels"),
    ],
)
def test_a_damaged_description_is_refused(store, harm, says):
    filled(store, 0)
    path = store.folder / "labels.json"
    if harm:
        before = path.read_text()
        path.write_text(harm(before))
        assert path.read_text() != before
    else:
        path.unlink()
    with pytest.raises(TrainError, match=rf"labels.json: {says}"):
        open_store(store.folder)


def test_a_folder_with_interrupted_writes_is_accepted(tmp_path):
    folder = tmp_path / "labels"
    folder.mkdir()
    (folder / ".labels.json.partial").write_text('{"ver')
    assert create_store(folder, DESCRIPTION).epochs == 0
    assert os.listdir(folder) == ["labels.json"]


def test_finished_labels_need_not_be_writable(store):
    """As on a read-only disk; os.access is replaced, since root may write anyway."""
    filled(store, 0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "access", lambda path, mode: False)
        assert create_store(store.folder, DESCRIPTION).epochs == 1
        with pytest.raises(TrainError, match="OUT=.*new: labels cannot be written there .*is not a folder that can be"):
            check_folder(store.folder.parent / "new")


def test_a_file_that_its_writer_has_just_removed_is_not_written_to(store, monkeypatch):
    """Between opening and locking it, another process has given up or finished."""
    original, calls = fcntl.flock, []

    def flock(file, how):
        # The description's lock is taken by the number of its file.
        if how & fcntl.LOCK_NB and not isinstance(file, int):
            calls.append(file)
            if len(calls) == 1:
                (store.folder / ".epoch-0000.partial").unlink()
        original(file, how)

    monkeypatch.setattr(fcntl, "flock", flock)
    wanted = filled(store, 0)
    assert len(calls) == 2
    assert np.array_equal(store.rows(0), wanted)
    # Finished in the meantime: its file was moved.
    calls.clear()
    other = open_store(store.folder)

    def finishes(file, how):
        if how & fcntl.LOCK_NB and not isinstance(file, int) and not calls:
            calls.append(file)
            monkeypatch.setattr(fcntl, "flock", original)
            (store.folder / ".epoch-0001.partial").unlink()
            filled(other, 1)
        original(file, how)

    monkeypatch.setattr(fcntl, "flock", finishes)
    with store.writing(1) as rows:
        assert rows is None
    assert len(os.listdir(store.folder)) == 3


def test_a_full_disk_is_detected_before_rows_are_written(store, monkeypatch):
    """Writing to a mapped page of a full disk would end the process."""

    def full(file, start, size):
        assert size == 2000
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(TrainError, match="cannot be written .No space left on device"):
        filled(store, 0)
    assert os.listdir(store.folder) == ["labels.json"]


def test_epochs_written_at_the_same_time_are_all_described(store):
    stores = [open_store(store.folder) for _ in range(8)]
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda number: filled(stores[number], number), range(8)))
    assert store.epochs == 8


def test_other_labels_in_the_folder_are_refused(store, tmp_path):
    filled(store, 0)
    assert create_store(store.folder, DESCRIPTION).epochs == 1
    other = replace(DESCRIPTION, refinery=DESCRIPTION.refinery | {"weights": "ef" * 32}, batch=32)
    says = f"refinery.weights is {'cd' * 8} there and {'ef' * 8} here; batch is 16 there and 32 here"
    with pytest.raises(TrainError, match=rf"OUT=.*: holds other labels \({says}\); give another folder"):
        create_store(store.folder, other)
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "photo.jpg").touch()
    with pytest.raises(TrainError, match="OUT=.*images: holds other files"):
        create_store(tmp_path / "images", DESCRIPTION)
    with pytest.raises(TrainError, match="OUT=.*labels cannot be written there"):
        create_store(tmp_path / "images" / "photo.jpg", DESCRIPTION)
    with pytest.raises(TrainError, match="OUT=.*labels cannot be written there .File name too long"):
        check_folder(tmp_path / ("a" * 300))


def test_sizes_in_readable_units():
    assert [in_units(size) for size in (0, 999, 1000, 999_999, 25_600_000, 3 * 10**15)] == [
        *("0 bytes", "999 bytes", "1 kB", "1 MB", "25.6 MB", "3 PB")
    ]


def refusal(folder: Path, **changes) -> str:
    """The error of opening the folder with these changes to its description and a valid checksum."""
    path = folder / "labels.json"
    said = json.loads(path.read_text()) | changes
    said.pop("checksum")
    path.write_text(json.dumps(said | {"checksum": key_of(said)}))
    with pytest.raises(TrainError) as refused:
        open_store(folder)
    message = str(refused.value)
    assert str(path) in message
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("data", None),
        ("data", DESCRIPTION.data | {"classes": 2**40}),
        ("refinery", DESCRIPTION.refinery | {"network": ["resnet18"]}),
        ("refinery", DESCRIPTION.refinery | {"generation": "1"}),
        ("plan", None),
        ("plan", DESCRIPTION.plan | {"copies": 0}),
        ("plan", DESCRIPTION.plan | {"crop": {"scale": [0.08, 1], "ratio": [0.75, 1.25]}}),
        ("plan", DESCRIPTION.plan | {"crop": DESCRIPTION.plan["crop"] | {"sides": 3}}),
        ("resolution", 10**9),
        ("order", "sequential"),
        ("format", "../packed"),
        ("k", 1001),
        ("k", None),
        ("bytes_per_crop", 21),
        ("cells", 3),
        ("more", 3),
        ("epochs", []),
        ("epochs", {"-1": {"crc32": 1, "seconds": 1}}),
        ("epochs", {"01": {"crc32": 1, "seconds": 1}}),
        ("epochs", {"0": {"crc32": "1", "seconds": 1}}),
        ("epochs", {"0": {"crc32": 1}}),
    ],
)
def test_each_field_of_a_description_is_checked(store, field, value):
    assert "labels.json: is damaged (" in refusal(store.folder, **{field: value})


def as_written(description: Description) -> dict:
    said = {"version": 1} | json.loads(json.dumps(asdict(description)))
    return said | {"epochs": {"0": {"crc32": 7, "seconds": 1.5}}}


MAPS = replace(
    DESCRIPTION,
    plan=None,
    order="sequential",
    format="map",
    k=5,
    dtype="float16",
    bytes_per_crop=80,
    cells=2,
    shift=True,
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
@pytest.mark.parametrize("description", [DESCRIPTION, MAPS], ids=["crops", "maps"])
def test_fuzz_labels_json(tmp_path, description, data):
    """With a valid checksum, as others could write it: refused, or usable."""
    damaged = data.draw(documents(as_written(description)) | bytes_of(json.dumps(as_written(description)).encode()))
    if isinstance(damaged, dict):
        damaged = json.dumps(damaged | {"checksum": key_of(damaged)}).encode()
    (tmp_path / "labels.json").write_bytes(damaged if isinstance(damaged, bytes) else json.dumps(damaged).encode())
    try:
        store = open_store(tmp_path)
        store.check_sizes()
    except TrainError as error:
        assert "labels.json" in str(error)
        assert "\n" not in str(error)
        event("refused")
        return
    event("loaded")
    made = store.description
    assert store.epochs == 0  # there is no file of rows
    assert made.shape[0] * made.shape[1] == made.bytes_per_epoch > 0
    assert (tmp_path / made.file_name(0)).parent == tmp_path
    assert set(store.network) == {"network", "weights"}
    assert made.kind
    assert made.key
    assert not differences(made, made)
    rows = torch.zeros(2, made.bytes_per_crop, dtype=torch.uint8) + 255
    if made.plan:
        assert made.crop.training([0], [(30, 40)], seed=made.seed, epoch=0)[0].shape == (1, 4)
        targets = made.build_rows().targets(rows)
        assert targets.sparse is None or targets.sparse[0].max() < made.data["classes"]
    else:
        _, ids = CellRows(made.data["classes"], made.k, made.cells).unpack(rows)
        assert ids.max() < made.data["classes"]


def test_only_digests_are_cut_short():
    digest = "0123456789abcdef" * 4
    assert short(digest) == "0123456789abcdef"
    for value in (digest[1:], digest + "0", "runs/images/resnet50-0123abcd", 0.25, None):
        assert short(value) == str(value)
