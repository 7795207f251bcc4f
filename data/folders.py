"""The files in a folder and below it, through links, each real folder once."""

import os
from collections import deque
from collections.abc import Container
from pathlib import Path
from typing import NamedTuple

from data import DataError


class Found(NamedTuple):
    """files: paths, sorted. notes: lines about what was skipped, if anything was."""

    files: list[str]
    notes: tuple[str, ...]


def files_below(folder: str | Path, endings: Container[str]) -> Found:
    """The files with these endings (in lower case, such as `.jpg`) in a folder and below, except hidden files and those
    added by macOS (__MACOSX).

    Links are followed, each real folder once: a folder that is also reached by its own name is read there, and links
    may form cycles. Broken links, folders that cannot be read and anything but regular files are skipped.
    Raises DataError if the folder itself cannot be read.
    """
    files: list[str] = []
    again: list[str] = []
    skipped: list[str] = []
    known: set[tuple[int, int]] = set()
    links = deque([str(folder)])
    while links:
        folders = deque([links.popleft()])
        linked = bool(known)
        while folders:
            place = folders.popleft()
            try:
                status = os.stat(place)
                entries = sorted(os.scandir(place), key=lambda entry: entry.name)
            except OSError as error:
                if not known:
                    raise DataError(f"{folder}: cannot be read ({error.strerror})") from None
                skipped.append(f"{place}: {error.strerror}")
                continue
            identity = (status.st_dev, status.st_ino)
            if linked and identity in known:
                again.append(place)
                continue
            known.add(identity)
            for entry in entries:
                if entry.name.startswith(".") or entry.name == "__MACOSX":
                    continue
                wanted = os.path.splitext(entry.name)[1].lower() in endings
                if entry.is_dir(follow_symlinks=False):
                    folders.append(entry.path)
                elif entry.is_symlink() and os.path.isdir(entry.path):
                    links.append(entry.path)
                elif entry.is_symlink() and not os.path.exists(entry.path):
                    skipped.append(f"{entry.path}: a link to nothing")
                elif wanted and not os.path.isfile(entry.path):
                    skipped.append(f"{entry.path}: not a regular file")
                elif wanted:
                    files.append(entry.path)
    notes = []
    if again:
        notes.append(f"{folder}: {len(again)} links lead to folders that are read already and are skipped ({again[0]})")
    if skipped:
        notes.append(f"{folder}: {len(skipped)} files or folders cannot be read and are skipped ({skipped[0]})")
    return Found(sorted(files), tuple(notes))
