"""Files below a folder: through links, each real folder once."""

import os
from pathlib import Path

import pytest

from data import DataError
from data.folders import files_below
from data.sources import open_source
from tests.pictures import write_class_folders

JPEG = {".jpg"}


def touched(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"")
    return root


def found(root: Path) -> tuple[list[str], tuple[str, ...]]:
    files, notes = files_below(root, JPEG)
    return [os.path.relpath(file, root) for file in files], notes


def test_files_by_ending_and_none_that_is_hidden(tmp_path):
    root = touched(tmp_path, "a/2.jpg", "a/1.JPG", "a/b/3.jpg", "a/x.png", ".c/4.jpg", "a/.5.jpg", "6.jpg")
    assert found(root) == (["6.jpg", "a/1.JPG", "a/2.jpg", "a/b/3.jpg"], ())


def test_a_linked_folder_and_a_linked_file_are_read(tmp_path):
    touched(tmp_path / "elsewhere", "1.jpg", "deep/2.jpg")
    root = touched(tmp_path / "root", "a/0.jpg")
    (root / "b").symlink_to("../elsewhere")
    (root / "a" / "9.jpg").symlink_to("../../elsewhere/1.jpg")
    assert found(root) == (["a/0.jpg", "a/9.jpg", "b/1.jpg", "b/deep/2.jpg"], ())


@pytest.mark.timeout(20)
def test_link_cycles_are_followed_once(tmp_path):
    """A link to its parent gave 12,060 images for 60, and two such links never ended."""
    root = touched(tmp_path / "root", "a/1.jpg", "b/2.jpg")
    for number in range(3):
        (root / "a" / f"up{number}").symlink_to("..")
        (root / "b" / f"across{number}").symlink_to(root / "a")
    files, (note,) = found(root)
    assert files == ["a/1.jpg", "b/2.jpg"]
    assert note == f"{root}: 6 links lead to folders that are read already and are skipped ({root}/a/up0)"


def test_a_folder_is_read_by_its_own_name_rather_than_by_a_link(tmp_path):
    root = touched(tmp_path / "root", "z/1.jpg", "m/2.jpg")
    (root / "a").symlink_to("z")
    (root / "m" / "more").symlink_to("../z")
    assert found(root)[0] == ["m/2.jpg", "z/1.jpg"]


def test_a_link_to_a_parent_adds_its_other_files(tmp_path):
    root = touched(tmp_path / "above" / "root", "a/1.jpg")
    touched(tmp_path / "above", "beside/2.jpg")
    (root / "a" / "up").symlink_to(tmp_path / "above")
    assert found(root)[0] == ["a/1.jpg", "a/up/beside/2.jpg"]


def test_unreadable_files_are_skipped_with_a_note(tmp_path):
    root = touched(tmp_path / "root", "a/1.jpg")
    (root / "a" / "0.jpg").symlink_to("gone.jpg")
    (root / "b").symlink_to("gone")
    (root / "c").symlink_to("c")
    os.mkfifo(root / "a" / "2.jpg")
    files, (note,) = found(root)
    assert files == ["a/1.jpg"]
    assert note.startswith(f"{root}: 4 files or folders cannot be read and are skipped ({root}/")
    with pytest.raises(DataError, match="nowhere: cannot be read"):
        files_below(tmp_path / "nowhere", JPEG)


def test_an_image_folder_with_links_says_so(tmp_path):
    root = write_class_folders(tmp_path / "set", 2, 3, side=20)
    (root / "class0" / "up").symlink_to("..")
    (root / "class1" / "gone.jpg").symlink_to("nothing.jpg")
    source = open_source(str(root))
    assert len(source.train.items) + len(source.val.items) == 6
    assert [note.split(": ")[1].split(" (")[0] for note in source.notes[:2]] == [
        "1 links lead to folders that are read already and are skipped",
        "1 files or folders cannot be read and are skipped",
    ]
