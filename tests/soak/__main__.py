"""python -m tests.soak --minutes 60"""

import contextlib
import itertools
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TextIO

from command import UserError, run_command
from tests.soak import verdict
from tests.soak.usage import measure
from tests.soak.verdict import Round


def soak(works: Mapping[str, Callable[[], None]], minutes: float) -> Iterator[Round]:
    """Does one work after the other, in turns, and measures after each, until the time is up and a verdict can be."""
    began, rounds = time.monotonic(), list[Round]()
    for name in itertools.cycle(works):
        works[name]()
        rounds.append(Round(name, time.monotonic() - began, measure()))
        yield rounds[-1]
        if time.monotonic() - began > 60 * minutes and verdict.enough(rounds, len(works)):
            return


def run(minutes: float = 60.0, only: str = "", out: str = "runs/soak") -> None:
    """Trains for a while in one process, changing storage and decoder, and watches memory, threads and file handles.

    Args:
        minutes: for how long, at least; in any case until each configuration has some rounds
        only: configurations, as STORAGE-DECODER with commas between them: jpeg-ffcv,blocks-ffcv (default: all)
        out: a folder for rounds.jsonl, a line for each round, verdict.json, and what the trainings print
    """
    # Here, and not in the processes that encode images, which load this file too.
    from tests.soak.training import CONFIGURATIONS, is_installed

    if not 0 <= minutes < float("inf"):
        raise UserError(f"minutes={minutes:g}: must not be below 0")
    names = [name.strip() for name in only.split(",")] if only else list(filter(is_installed, CONFIGURATIONS))
    for name in names:
        if name not in CONFIGURATIONS:
            raise UserError(f"only={name}: unknown; there are {', '.join(CONFIGURATIONS)}")
    folder = Path(out)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        log = open(folder / "trainings.log", "w")  # noqa: SIM115 (closed below)
    except OSError as error:
        raise UserError(f"out={out}: cannot be written ({error.strerror}); give another OUT") from None
    with log, tempfile.TemporaryDirectory(prefix="soak-") as inputs:
        rounds = _watched(names, Path(inputs), minutes, folder / "rounds.jsonl", log)
    found = verdict.growing(rounds)
    lines = verdict.table(rounds)
    hours = rounds[-1].seconds / 3600
    lines.append(f"{len(rounds)} rounds in {60 * hours:.1f} minutes: {'grows' if found else 'flat'}")
    print("\n".join([*lines, *found]), flush=True)
    counted = verdict.measured(rounds)
    described = {
        "rounds": len(rounds),
        "hours": hours,
        "limits": verdict.LIMITS,
        "slopes": {what: asdict(verdict.slope(counted, what)) for what in ("allocated", "resident", *verdict.LIMITS)},
        "growing": found,
        "table": lines,
    }
    (folder / "verdict.json").write_text(json.dumps(described, indent=1) + "\n")
    if found:
        sys.exit(1)


def _watched(names: Sequence[str], inputs: Path, minutes: float, lines: Path, log: TextIO) -> list[Round]:
    """All rounds, while a training stands beside them; each is printed, and written as a line of JSON."""
    from tests.soak.training import Over, Standing, works

    rounds: list[Round] = []
    under_way = soak(works(inputs, names), minutes)
    terminal = sys.stdout
    with contextlib.redirect_stdout(log), contextlib.redirect_stderr(log), open(lines, "w") as file:

        def between() -> None:
            done = next(under_way, None)
            if done is None:
                raise Over
            rounds.append(done)
            usage = done.usage
            file.write(json.dumps(asdict(done)) + "\n")
            file.flush()
            print(
                f"{len(rounds):4} {done.seconds / 60:5.1f} min  {done.configuration:18} {usage.memory:7.1f} MiB, "
                f"{usage.threads} threads, {usage.handles} handles, {usage.children} children, {usage.regions} regions",
                file=terminal,
                flush=True,
            )

        with contextlib.suppress(Over):
            Standing(inputs, between).run()
    return rounds


if __name__ == "__main__":
    run_command(run, prog="python -m tests.soak")
