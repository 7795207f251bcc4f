"""The image files that IMAGES selects for a prediction: one, a folder, a pattern, a list, or several of these."""

import glob
import os
import shlex
from pathlib import Path

from data import DataError
from data.folders import Found
from data.pixels import EXTENSIONS
from data.sources import image_files


def files_named(named: str) -> Found:
    """The files that IMAGES names, in its order.

    named: an image file; a folder, for all image files in it and below; a pattern such as `photos/*.jpg` or
    `photos/**/*.png`; `@list.txt` or `list.txt`, a file of one path per line; or several of these, divided as in a
    shell. A file or folder that has exactly this name is used, whatever characters the name holds. Paths in a list are
    relative to the working folder or, if they do not exist there, to the list's folder. Folders and patterns give files
    with known extensions; a file that is named itself may have any. Raises DataError if something does not exist, and
    if there are no files.
    """
    found = _found(named, listed=True)
    if found is None:
        try:
            words = shlex.split(named)
        except ValueError:  # an apostrophe
            words = []
        if len(words) < 2:
            raise DataError(f"IMAGES={named}: no such file or folder{_no_match(named)}")
        files: list[str] = []
        notes: tuple[str, ...] = ()
        for word in words:
            of_word = _found(word, listed=False)
            if of_word is None:
                raise DataError(f"IMAGES={named}: {word}: no such file or folder{_no_match(word)}")
            files += of_word.files
            notes += of_word.notes
        found = Found(files, notes)
    if not found.files:
        raise DataError(f"IMAGES={named}: no images in it")
    return found


def _found(word: str, *, listed: bool) -> Found | None:
    """The files of one word; None if nothing has this name. listed: whether a .txt is read as a list."""
    if os.path.isdir(word):
        return image_files(word)
    if os.path.lexists(word):
        is_list = Path(word).suffix.lower() == ".txt"
        if is_list and not listed:
            raise DataError(f"IMAGES: {word}: is not an image; if it is a list of files, give it as @{word}")
        return Found(_of_list(Path(word)) if is_list else [word], ())
    if word.startswith("@"):
        return Found(_of_list(Path(word[1:])), ())
    # A match may be a folder, whose files ** has given already.
    matches = sorted(glob.glob(word, recursive=True)) if glob.has_magic(word) else []
    images = [file for file in matches if Path(file).suffix.lower() in EXTENSIONS and not os.path.isdir(file)]
    if matches and not images:
        raise DataError(f"IMAGES: {word}: matches {matches[0]} and no image; known are {', '.join(sorted(EXTENSIONS))}")
    return Found(images, ()) if images else None


def _of_list(path: Path) -> list[str]:
    """The paths in a file, one per line; empty lines are skipped."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(
            f"IMAGES=@{path}: cannot be read ({error.strerror}); give a file of one path per line"
        ) from None
    if b"\0" in content:
        raise DataError(f"IMAGES=@{path}: is not text; give a file of one path per line")
    lines = [line.rstrip("\r") for line in os.fsdecode(content.removeprefix(b"\xef\xbb\xbf")).split("\n")]
    return [_place(line, path.parent) for line in lines if line.strip()]


def _place(line: str, folder: Path) -> str:
    beside = folder / line
    return line if os.path.lexists(line) or not os.path.lexists(beside) else str(beside)


def _no_match(word: str) -> str:
    return ", and no file matches it" if glob.has_magic(word) else ""
