"""Kills a command at random moments and at chosen calls, begins it again, and compares what it leaves in the end."""

import hashlib
import importlib
import random
import shutil
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

from tests.kills.tries import Aim, Command, Fork, Try, Unlike, Whole, await_end_of

# Kills in a row before the command is left to end, at most.
_IN_A_ROW = 4


def survive(
    words: Sequence[str],
    folder: Path,
    *,
    compare: Sequence[str],
    kills: int,
    seed: int,
    start: Path | None = None,
    content: Callable[[Path], bytes] = Path.read_bytes,
    name: Callable[[str], str] = str,
    ignore: Sequence[str] = (),
    during: str | None = None,
) -> Counter[str]:
    """Kills a command so many times in all, in rounds of a few kills, after which it may end. Returns kills by kind.

    words: a module and its options, as behind `python -m`, or make and its words; the same command must go on, or begin
    again, after a kill, and do nothing when all is done. folder: where it runs, empty at the start of a round, or a
    copy of `start`.
    compare: patterns of the files below the folder that must in the end have the bytes of a command that was never
    killed; of all others, the names must be the same, except for the files of the patterns `ignore`.
    content: what of a file is compared. name: of a file, as it is
    compared. during: MODULE:FUNCTION, in which all kills are to come.
    Half of the kills come at a moment, drawn evenly from the duration of a whole command. Half come at one of the calls
    that open for writing, move, link, remove or sync files in the folder: at each point, which is a call and a file,
    in turn, at one of the times that a whole command gets there. Of make, whose calls are not seen, half come at a
    moment after it has changed the folder, and half end its whole group, half the program alone. The next try follows
    at once.
    Raises Unlike for other files in the end, for a command that fails, and for processes that outlive it.
    """
    draw = random.Random(seed)
    counts: Counter[str] = Counter()
    begin = Command if words[0] == "make" else Fork
    whole = _once(begin, words, _fresh(folder, start), during)
    files = _files(folder, compare, content, name, ignore)
    if not any(files.values()):
        raise Unlike(f"{' '.join(words)}: makes no file like {', '.join(compare)}")
    if during and not whole.parts:
        raise Unlike(f"{' '.join(words)}: does not come to {during}")
    reached: set[str] = set()
    deck: list[str] = []
    done = 0
    while done < kills:
        _fresh(folder, start)
        tries: list[Try] = []
        for _ in range(min(draw.randint(1, _IN_A_ROW), kills - done)):
            aim = Aim(during)
            if whole.points and done % 2:
                deck = deck or draw.sample(sorted(whole.points), len(whole.points))
                aim.point = deck.pop()
                aim.time = draw.randint(1, whole.points[aim.point])
            else:
                aim.late, aim.group = draw.random() < 0.5, draw.random() < 0.5
                aim.part = draw.randrange(len(whole.parts)) if during else 0
                aim.share = draw.random()
            tries.append(begin(words, folder, aim))
            kind = tries[-1].killed(whole)
            counts[kind or "ended before"] += 1
            if not kind:
                if aim.point and len(tries) == 1:
                    # A whole command got there so often; others, whose saves come at other times, may not.
                    whole.points[aim.point] = aim.time - 1
                    if aim.time == 1:
                        print(f"  not reached again: {aim.point}", flush=True)
                        del whole.points[aim.point]
                if aim.point in whole.points:
                    deck.insert(0, aim.point)
                elif not aim.point and len(tries) == 1:
                    # The first one took longer, as what runs on a machine that does other things too may.
                    whole.hasten(tries[0].seconds)
                break
            done += 1
            reached |= {aim.point} - {""}
        else:
            tries.append(begin(words, folder, Aim(during)))
            tries[-1].end()
        for each in tries:
            await_end_of(each.session)
        found = _files(folder, compare, content, name, ignore)
        if found != files:
            names = sorted(each for each in {*found, *files} if found.get(each, 0) != files.get(each, 0))
            raise Unlike(f"{' '.join(words)}: after {done} kills (seed {seed}) these differ: {', '.join(names)}")
    points = f", at {len(reached)} of {len(whole.points)} points where files change" if whole.points else ""
    print(f"  {done} kills{points}: {' '.join(words)}", flush=True)
    return counts


def once(words: Sequence[str], folder: Path) -> None:
    """Runs a command in a folder to its end, in a fork. Raises Unlike if it fails."""
    folder.mkdir(parents=True, exist_ok=True)
    _once(Fork, words, folder, None)


def _once(begin: type[Try], words: Sequence[str], folder: Path, during: str | None) -> Whole:
    if begin is Fork:
        importlib.import_module(words[0])
    began = time.monotonic()
    only = begin(words, folder, Aim(during))
    whole = only.end()
    whole.seconds = time.monotonic() - began
    await_end_of(only.session)
    return whole


def _fresh(folder: Path, start: Path | None) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    if start:
        shutil.copytree(start, folder)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _files(
    folder: Path,
    compare: Sequence[str],
    content: Callable[[Path], bytes],
    name: Callable[[str], str],
    ignore: Sequence[str],
) -> dict[str, str]:
    """All names below the folder except for those to be ignored, with a digest of the files that are to be compared."""
    compared, ignored = ({path for pattern in each for path in folder.glob(pattern)} for each in (compare, ignore))
    found: dict[str, str] = {}
    for path in sorted(set(folder.rglob("*")) - ignored):
        named = name(str(path.relative_to(folder)))
        while named in found:
            named += " again"
        found[named] = hashlib.sha256(content(path)).hexdigest() if path in compared else ""
    return found
