"""Which files IMAGES names."""

import os

import pytest

from data import DataError
from data.named import files_named


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in (
        "a.jpg",
        "b.png",
        "my photo.jpg",
        "don't.jpg",
        "x[1].jpg",
        "x1.jpg",
        "photo",
        "notes.md",
        "p/q/r.webp",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "p" / "s.JPG").touch()
    (tmp_path / "p" / "t.txt").touch()
    (tmp_path / "empty").mkdir()
    return tmp_path


@pytest.mark.parametrize(
    ("named", "files"),
    [
        ("a.jpg", ["a.jpg"]),
        ("photo", ["photo"]),  # a file that is named itself may be called anything
        ("my photo.jpg", ["my photo.jpg"]),
        ("don't.jpg", ["don't.jpg"]),
        ("x[1].jpg", ["x[1].jpg"]),  # not a pattern if a file has exactly that name
        ("x[12].jpg", ["x1.jpg"]),
        ("*.png", ["b.png"]),
        ("[ab].*", ["a.jpg", "b.png"]),
        ("*", ["a.jpg", "b.png", "don't.jpg", "my photo.jpg", "x1.jpg", "x[1].jpg"]),
        ("p", ["p/q/r.webp", "p/s.JPG"]),
        ("p/**", ["p/q/r.webp", "p/s.JPG"]),
        ("b.png a.jpg", ["b.png", "a.jpg"]),  # in the order in which they are named
        ("'my photo.jpg' p *.png", ["my photo.jpg", "p/q/r.webp", "p/s.JPG", "b.png"]),
        ("a.jpg a.jpg", ["a.jpg", "a.jpg"]),
    ],
)
def test_files_folders_patterns_and_several(named, files, place):
    assert files_named(named).files == files


def test_a_link_to_nothing_is_there_to_be_named_as_unreadable(place):
    os.symlink("nowhere", "link.jpg")
    assert files_named("link.jpg").files == ["link.jpg"]
    assert "1 files or folders cannot be read" in files_named(".").notes[0]


@pytest.mark.parametrize("named", ["@p/list.txt", "p/list.txt"])
def test_a_list(named, place):
    (place / "p" / "list.txt").write_bytes(b"\xef\xbb\xbfa.jpg\r\n\r\nmy photo.jpg\r\ns.JPG\ngone.jpg\n  \n\xff.jpg")
    # Relative to the working folder, or else to the list's own.
    files = ["a.jpg", "my photo.jpg", "p/s.JPG", "gone.jpg", os.fsdecode(b"\xff.jpg")]
    assert files_named(named).files == files
    assert files_named("b.png @p/list.txt").files == ["b.png", *files]


@pytest.mark.parametrize(
    ("named", "says"),
    [
        ("absent.jpg", "IMAGES=absent.jpg: no such file or folder$"),
        ("absent*.jpg", r"IMAGES=absent\*.jpg: no such file or folder, and no file matches it$"),
        ("a.jpg absent.jpg", "IMAGES=a.jpg absent.jpg: absent.jpg: no such file or folder$"),
        ("absent's.jpg", "IMAGES=absent's.jpg: no such file or folder$"),
        ("*.md", r"\*.md: matches notes.md and no image; known are .avif"),
        ("empty", "IMAGES=empty: no images in it$"),
        ("p/t.txt", "IMAGES=p/t.txt: no images in it$"),
        ("a.jpg p/t.txt", "p/t.txt: is not an image; if it is a list of files, give it as @p/t.txt$"),
        ("@absent.txt", "IMAGES=@absent.txt: cannot be read .No such file or directory.; give a file of one path per"),
        ("@empty", "IMAGES=@empty: cannot be read .Is a directory.; give"),
        ("@binary", "IMAGES=@binary: is not text"),
    ],
)
def test_names_of_no_files_are_refused(named, says, place):
    (place / "binary").write_bytes(b"\x89PNG\0\0")
    with pytest.raises(DataError, match=says):
        files_named(named)
