"""The progress bar of all long operations, in images and images/s."""

import sys

from tqdm import tqdm

_silent = False


def silence() -> None:
    """Shows no bars from now on: only one of several processes prints."""
    global _silent
    _silent = True


def images_bar(total: int, name: str, *, done: int = 0, leave: bool = True, shown: bool = True) -> tqdm:
    """A bar over `total` images, `done` of them before it began; in a log file it prints a line every 30 s."""
    return tqdm(
        total=total,
        initial=done,
        desc=name,
        unit=" images",
        leave=leave,
        mininterval=0.5 if sys.stderr.isatty() else 30.0,
        dynamic_ncols=True,
        disable=_silent or not shown,
    )
