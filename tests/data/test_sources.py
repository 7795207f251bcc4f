"""Image folders: layouts, the held-out split, and refused inputs."""

import os
import pickle

import numpy as np
import pytest

from data import DataError
from data.plan import CropRule
from data.sets import open_unsplit
from data.sources import crops_for, open_source
from tests.pictures import photograph, write_class_folders


def test_train_and_val_folders(image_folder):
    source = open_source(str(image_folder))
    assert source.class_names == ("class0", "class1", "class2")
    assert len(source.train.items) == 48
    assert source.val.labels.tolist() == [0] * 5 + [1] * 5 + [2] * 5
    assert source.train.read(source.train.items[0]).size[0] > 0
    assert not source.notes


def test_a_flat_folder_is_split_the_same_way_every_time(tmp_path):
    write_class_folders(tmp_path / "flat", 2, 20)
    first, second = open_source(str(tmp_path / "flat")), open_source(str(tmp_path / "flat"))
    assert (len(first.train.items), len(first.val.items)) == (36, 4)
    assert first.val.items == second.val.items
    assert not set(first.train.items) & set(first.val.items)
    assert np.bincount(first.val.labels).tolist() == [2, 2]
    assert "4 of its 40 images" in first.notes[0]
    # A further image moves no other image to the other split as long as the share stays the same.
    photograph(5, 60, 60).save(tmp_path / "flat" / "class0" / "zz.jpg")
    assert set(open_source(str(tmp_path / "flat")).val.items) & set(first.val.items)


def test_the_fingerprint_follows_the_images(tmp_path):
    root = write_class_folders(tmp_path / "set", 2, 3)
    before = open_source(str(root)).fingerprint
    assert open_source(str(root)).fingerprint == before
    photograph(99, 50, 50).save(root / "class0" / "000.jpg")
    assert open_source(str(root)).fingerprint != before


def test_hidden_files_and_other_files_are_ignored(tmp_path):
    root = write_class_folders(tmp_path / "set", 2, 3)
    (root / "class0" / ".hidden.jpg").write_bytes(b"")
    (root / "class0" / "notes.txt").write_text("")
    (root / ".cache").mkdir()
    (root / "class0" / ".thumbnails").mkdir()
    photograph(0, 40, 40).save(root / "class0" / ".thumbnails" / "000.jpg")
    (root / "empty").mkdir()
    source = open_source(str(root))
    assert source.class_names == ("class0", "class1")
    assert len(source.train.items) + len(source.val.items) == 6


def test_names_that_are_not_utf8(tmp_path):
    root = write_class_folders(tmp_path / "set", 2, 3)
    odd = os.fsencode(root / "class0") + b"/caf\xe9.jpg"
    os.rename(root / "class0" / "000.jpg", odd)
    source = open_source(str(root))
    assert os.fsdecode(odd) in [*source.train.items, *source.val.items]


def refusal(path) -> str:
    with pytest.raises(DataError) as refused:
        open_source(str(path))
    assert "\n" not in str(refused.value)
    return str(refused.value)


def test_bad_inputs_are_refused(tmp_path):
    assert "no such folder or archive" in refusal(tmp_path / "absent")
    assert "scenes" in refusal("sceens")
    (tmp_path / "empty").mkdir()
    assert "no images in class folders" in refusal(tmp_path / "empty")
    write_class_folders(tmp_path / "one", 1, 4)
    assert "only one class (class0)" in refusal(tmp_path / "one")
    write_class_folders(tmp_path / "more" / "train", 2, 2)
    assert "no such folder" in refusal(tmp_path / "more")
    write_class_folders(tmp_path / "more" / "val", 3, 1)
    assert "1 classes that" in refusal(tmp_path / "more")
    assert "class2" in refusal(tmp_path / "more")
    write_class_folders(tmp_path / "few", 2, 1)
    assert "too few images" in refusal(tmp_path / "few")


def test_crops_fit_the_size_of_the_images():
    photographs = np.full((5, 2), (375, 500), dtype=np.int32)
    assert crops_for(photographs) == (224, CropRule(scale=(0.08, 1.0), center_ratio=224 / 256))
    small = np.full((5, 2), 32, dtype=np.int32)
    assert crops_for(small) == (32, CropRule(scale=(0.25, 1.0), center_ratio=1.0))
    assert crops_for(np.full((5, 2), (160, 213), dtype=np.int32)) == (160, CropRule())


@pytest.fixture
def no_checksums(monkeypatch, tmp_path):
    """Lets torchvision read small files in the real formats instead of the published ones."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *_: True)
    monkeypatch.setattr("torchvision.datasets.svhn.check_integrity", lambda *_: True, raising=False)
    monkeypatch.setattr("torchvision.datasets.utils.check_integrity", lambda *_: True)


def test_cifar10(no_checksums, tmp_path):
    folder = tmp_path / "downloads" / "cifar10" / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(0, 256, (4, 3, 32, 32), dtype=np.uint8)
    for name in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"):
        (folder / name).write_bytes(pickle.dumps({"data": pixels.reshape(4, -1), "labels": [0, 9, 3, 1]}))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": list("abcdefghij")}))
    source = open_source("cifar10")
    assert (len(source.train.items), len(source.val.items)) == (20, 4)
    assert source.class_names == tuple("abcdefghij")
    assert source.val.labels.tolist() == [0, 9, 3, 1]
    np.testing.assert_array_equal(np.asarray(source.val.read(source.val.items[2])), pixels[2].transpose(1, 2, 0))
    assert (source.resolution, source.crop) == (32, CropRule(scale=(0.25, 1.0), center_ratio=1.0))


def test_digits_do_not_flip(no_checksums, tmp_path):
    from scipy.io import savemat

    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3, 5), dtype=np.uint8)
    (tmp_path / "downloads" / "svhn").mkdir(parents=True)
    for split in ("train", "test"):
        file = tmp_path / "downloads" / "svhn" / f"{split}_32x32.mat"
        savemat(file, {"X": pixels, "y": np.array([[1], [2], [10], [9], [5]], dtype=np.uint8)})
    source = open_source("svhn")
    assert source.train.labels.tolist() == [1, 2, 0, 9, 5]
    np.testing.assert_array_equal(np.asarray(source.train.read(source.train.items[3])), pixels[..., 3])
    assert source.crop is not None
    assert not source.crop.flip
    assert source.crop.scale == (0.5, 1.0)


def test_with_whole_all_images_are_val(tmp_path):
    root = write_class_folders(tmp_path / "set", 3, 1)
    with pytest.raises(DataError, match="too few images to hold any out"):
        open_source(str(root))
    whole = open_source(str(root), whole=True)
    assert (len(whole.train.items), whole.val.labels.tolist()) == (0, [0, 1, 2])
    assert whole.class_names == ("class0", "class1", "class2")
    assert whole.notes == ()
    write_class_folders(tmp_path / "both" / "train", 2, 1)
    write_class_folders(tmp_path / "both" / "val", 2, 1)
    for data in (str(tmp_path / "both"), "scenes"):
        with pytest.raises(DataError, match=f"{data}: has images for training and others for validation; leave"):
            open_source(data, whole=True)
    assert open_source(str(tmp_path / "both"), whole=None).train.labels.tolist() == [0, 1]
    unsplit = open_source(str(root), whole=None)
    assert (unsplit.val.items, unsplit.fingerprint) == (whole.val.items, whole.fingerprint)


def test_whole_applies_only_to_images_without_splits(converted, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    root = write_class_folders(tmp_path / "plain", 2, 3)
    unsplit = open_unsplit("plain")
    assert unsplit
    assert len(unsplit.val.items) == 6
    # A folder with a set's name is not used for that name.
    root.rename("scenes")
    for part in ("train", "test"):
        write_class_folders(tmp_path / "both" / part, 2, 2)
    (tmp_path / "betons").mkdir()
    for part in ("train", "val"):
        (tmp_path / "betons" / f"{part}.beton").symlink_to(converted.beton(part))
    for data in ("scenes", "both", "betons", str(converted.folder), "cifar10", "absent"):
        assert open_unsplit(data) is None, data
    assert open_unsplit("./scenes") is not None
