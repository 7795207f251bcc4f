"""Lists the records behind the figures of the README and docs/, and which of them were made by code that has changed.

python -m bench.records
make records

Ends with status 2 if a figure has no record (bench.claims describes how a text names one). A record whose code has
changed is not an error: it is listed with the command that measures it again.
"""

import json
import re
from collections import defaultdict
from pathlib import Path
from typing import Any

from bench import BenchError
from bench.claims import claims, lines_in, unrecorded
from command import run_command
from train.runs.code import ROOT, digest

# The number of differing files that are named.
_NAMED = 4


def run(root: str | None = None) -> None:
    """Prints the records behind the figures of the README and docs/, beginning with those whose code has changed.

    Args:
        root: the root of a checkout (default: the one that contains this command)
    """
    checkout = Path(root or ROOT)
    folder = checkout / "bench" / "results"
    if not (checkout / "README.md").is_file():
        raise BenchError(f"root={root}: is not a checkout of this project; give the root of one")
    places, missing = used(checkout)
    states = {name: state(folder / f"{name}.json", checkout) for name in places}
    for name in sorted(places, key=lambda name: (states[name] == "holds", name)):
        print(f"{name}: {states[name]}")
        print(f"  {', '.join(places[name])}")
        if states[name] != "holds":
            print(f"  {command_of(folder, name)}")
    stale = sum(text.startswith("changed") for text in states.values())
    unknown = sum(text.startswith("unknown") for text in states.values())
    print(f"{len(states)} records: {len(states) - stale - unknown} hold, {stale} changed since, {unknown} unknown")
    others = sorted({path.stem for path in folder.glob("*.md")} - set(places))
    if others:
        print(f"not used by any figure: {', '.join(others)}")
    if missing:
        print(*missing, sep="\n")
        raise BenchError(
            f"{len(missing)} figures have no record: name one in a comment after the text, measure them, or remove "
            "them (bench/claims.py describes the comments)"
        )


def used(root: Path) -> tuple[dict[str, list[str]], list[str]]:
    """Returns the places (FILE:LINE) that name each record, by its name; and a line per figure without a record."""
    places: dict[str, list[str]] = defaultdict(list)
    missing = []
    lines_of = lines_in(root / "bench" / "results")
    for path in [root / "README.md", *sorted((root / "docs").glob("*.md"))]:
        shown = path.relative_to(root).as_posix()
        for claim in claims(path.read_text()):
            for reference in claim.named("record", "record by cell"):
                place = f"{shown}:{claim.first}"
                if lines_of(reference.record) is not None and place not in places[reference.record]:
                    places[reference.record].append(place)
            missing += [f"{shown}:{line}: {why}" for line, why in unrecorded(claim, lines_of)]
    return {name: found for name, found in places.items() if found}, missing


def state(path: Path, root: Path) -> str:
    """Returns "holds", "changed since: FILES", or "unknown, REASON" for the record whose JSON is at `path`."""
    made = _read(path)
    files = made.get("files")
    if not files:
        why = "its runs were made by different versions of the code" if "files" in made else "it has no digests"
        return f"unknown, {why}"
    differing = [name for name, found in files.items() if not (root / name).is_file() or digest(root / name) != found]
    if not differing:
        return "holds"
    more = f" and {len(differing) - _NAMED} more" if len(differing) > _NAMED else ""
    return f"changed since: {', '.join(differing[:_NAMED])}{more}"


def command_of(folder: Path, name: str) -> str:
    """Returns the command that measures a record again."""
    made = _read(folder / f"{name}.json")
    typed = made.get("environment", {}).get("command")
    noted = re.search(r"^Made by `([^`]+)`", (folder / f"{name}.md").read_text(), re.MULTILINE)
    return typed or made.get("again") or (noted[1] if noted else "its command was not recorded")


def _read(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise BenchError(f"{path}: cannot be read ({error}); restore it from git, or measure the part again") from None


if __name__ == "__main__":
    run_command(run, prog="python -m bench.records")
