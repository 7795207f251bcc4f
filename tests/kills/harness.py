"""Kills a command at random moments and at chosen calls, starts it again, and compares its final files."""

import hashlib
import importlib
import random
import shutil
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

from tests.kills.tries import Aim, Command, Fork, Try, Unlike, Whole, await_end_of

# The most kills in a row before the command may end.
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
    """Kills a command `kills` times, in rounds of a few kills after which it may end. Returns the kills by kind.

    words: a module and its options, as after `python -m`, or make and its arguments. After a kill, the same command
    must continue or start again, and do nothing when everything is done. folder: where it runs; at the start of a round
    it is empty, or a copy of `start`.
    compare: patterns of the files below the folder that must finally have the bytes of a command that was never killed;
    of all other files, only names are compared, without those of the patterns `ignore`. content: returns the part of a
    file that is compared. name: returns the name under which a file is compared. during: MODULE:FUNCTION, to which all
    kills are limited.
    Half of the kills are at a moment, uniform in the duration of a complete command. Half are at calls that open for
    writing, move, link, remove or sync files in the folder: at each point (a call and a file) in turn, at one of the
    times that a complete command reaches it. The calls of make are not traced: half of its kills are at a moment after
    it has changed the folder, and half of them end its whole process group, half only the program. The next try starts
    immediately.
    Raises Unlike for different files, for a command that fails, and for processes that outlive it.
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
                    # The complete command reached this point so often; others, which save at other times, may not.
                    whole.points[aim.point] = aim.time - 1
                    if aim.time == 1:
                        print(f"  not reached again: {aim.point}", flush=True)
                        del whole.points[aim.point]
                if aim.point in whole.points:
                    deck.insert(0, aim.point)
                elif not aim.point and len(tries) == 1:
                    # The first one took longer, for example because the machine was busy.
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
    """All names below the folder except ignored ones, with a digest of each file that is compared."""
    compared, ignored = ({path for pattern in each for path in folder.glob(pattern)} for each in (compare, ignore))
    found: dict[str, str] = {}
    for path in sorted(set(folder.rglob("*")) - ignored):
        named = name(str(path.relative_to(folder)))
        while named in found:
            named += " again"
        found[named] = hashlib.sha256(content(path)).hexdigest() if path in compared else ""
    return found
