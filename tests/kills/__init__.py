"""Commands that are killed again and again, and must end with the files of one that never was.

    python -m tests.kills --only conversion --kills 300
    make kills ONLY=conversion KILLS=300

A case is a module of this folder with a function `kill(folder, kills, seed) -> Counter`, which calls harness.survive,
and a line in `__main__.py`.
"""
