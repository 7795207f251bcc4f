"""Kills commands repeatedly; they must end with the files of a command that was never killed.

    python -m tests.kills --only training,labels --kills 300
    make kills ONLY=training,labels KILLS=300

A case is a module of this folder with a function `kill(folder, kills, seed) -> Counter`, which calls harness.survive,
and a name in `__main__.py`. Where its files are on a memory disk (TMPDIR=/dev/shm), a try takes less long.
"""
