"""python -m tests.kills --only conversion --kills 300"""

import os

# Before anything that would start threads, which do not survive a fork.
os.environ["OMP_NUM_THREADS"] = "1"

import importlib
import shutil
import tempfile
import time
from pathlib import Path

from command import UserError, run_command
from tests.kills.tries import Unlike

_CASES = ("conversion", "training", "validation", "labels", "maps", "make")


def run(only: str = "", kills: int = 30, seed: int = 0) -> None:
    """Kills commands, starts them again, and compares their files with those of commands that were never killed.

    Args:
        only: the cases, with commas between them: conversion, training, validation, labels, maps, make (default: all)
        kills: number of kills per case
        seed: of the random moments and calls
    """
    cases = [case.strip() for case in only.split(",")] if only else list(_CASES)
    unknown = [case for case in cases if case not in _CASES]
    if unknown:
        raise UserError(f"only={unknown[0]}: unknown; there are {', '.join(_CASES)}")
    for case in cases:
        began = time.monotonic()
        folder = Path(tempfile.mkdtemp(prefix="kills-"))
        try:
            counts = importlib.import_module(f"tests.kills.{case}").kill(folder, kills, seed)
        except Unlike as error:
            raise UserError(f"{case}: {error}; all files are kept in {folder}") from None
        shutil.rmtree(folder)
        kinds = ", ".join(f"{count} {kind}" for kind, count in counts.most_common())
        print(f"{case}: the same files in the end; kills: {kinds}; {time.monotonic() - began:.0f} s", flush=True)


if __name__ == "__main__":
    run_command(run, prog="python -m tests.kills")
