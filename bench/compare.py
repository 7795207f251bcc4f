"""Compares two results of the same part, row by row.

python -m bench.compare before.json after.json
make bench-compare A=before.json B=after.json
"""

import json
import sys
from pathlib import Path
from typing import Any

from bench import BenchError
from bench.record import aligned, figure
from command import exit_on_user_error

# Properties of the machine that may explain a difference instead of the code.
_MACHINE = ("device", "gpus", "cpu", "versions")


def compare(first: Path, second: Path) -> str:
    """Returns a table of the ratios of medians, second to first, below a list of differing machines and settings.

    A difference is marked "within noise" if the ranges of the two rows' turns overlap.
    Raises BenchError for files that are not results, and for results of different parts.
    """
    one, other = _read(first), _read(second)
    if one["part"] != other["part"]:
        raise BenchError(
            f"{first} is of part {one['part']} and {second} of {other['part']}; compare results of one part"
        )
    lines = [
        *(_differing(f"DIFFERENT {name.upper()}", one["environment"], other["environment"], name) for name in _MACHINE),
        *(
            _differing(f"different setting, {name}", one["settings"], other["settings"], name)
            for name in sorted(one["settings"] | other["settings"])
        ),
    ]
    rows = {_key(row): row for row in one["rows"]}
    others = {_key(row): row for row in other["rows"]}
    cells = [[*key, *_compared(rows.get(key), others.get(key))] for key in rows | others]
    heads = ["group", "name", "unit", "A", "B", "B / A", ""]
    if not any(cell[0] for cell in cells):
        heads, cells = heads[1:], [cell[1:] for cell in cells]
    top = [f"A: {first}", f"B: {second}", *(line for line in lines if line), ""]
    return "\n".join([*top, aligned(heads, cells, left=len(heads) - 4)]) + "\n"


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
        # Rows without a rate, such as differences between labels, are left out.
        found["rows"] = [row for row in found["rows"] if "unit" in row or "not_run" in row]
        for row in found["rows"]:
            if "not_run" not in row:
                row["rate"]["median"], row["group"], row["name"], row["unit"]
        found["environment"], found["settings"], found["part"]
    except OSError as error:
        raise BenchError(f"{path}: cannot be read ({error.strerror}); give a result's .json") from None
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError):
        raise BenchError(f"{path}: is not a result of this version of the bench; measure it again") from None
    return found


def _key(row: dict[str, Any]) -> tuple[str, str]:
    return row["group"], row["name"]


def _differing(title: str, one: dict[str, Any], other: dict[str, Any], name: str) -> str:
    """Returns a line that lists the differences between two entries, or ""."""
    # An empty list of GPUs equals a missing one, as in older records.
    mine, theirs = one.get(name) or None, other.get(name) or None
    if mine == theirs:
        return ""
    if isinstance(mine, dict) and isinstance(theirs, dict):
        keys = [key for key in mine | theirs if mine.get(key) != theirs.get(key)]
        return f"{title}: " + ", ".join(f"{key} {mine.get(key)} / {theirs.get(key)}" for key in keys)
    return f"{title}: {mine} / {theirs}"


def _compared(one: dict[str, Any] | None, other: dict[str, Any] | None) -> list[str]:
    """Returns the cells of a row: unit, both medians, their ratio, and whether the difference is within noise."""
    ran = [row if row and "not_run" not in row else None for row in (one, other)]
    unit = next((row["unit"] for row in ran if row), "")
    medians = [figure(row["rate"]["median"]) if row else "–" for row in ran]
    mine, theirs = ran
    if mine is None or theirs is None:
        return [unit, *medians, "–", "not run" if one and other else "in one only"]
    a, b = mine["rate"], theirs["rate"]
    within_noise = a["min"] <= b["max"] and b["min"] <= a["max"]
    return [unit, *medians, f"{b['median'] / a['median']:.3f}", "within noise" if within_noise else ""]


def main() -> None:
    files = sys.argv[1:]
    if len(files) != 2:
        raise BenchError("give two results: python -m bench.compare A.json B.json, make bench-compare A=... B=...")
    print(compare(*map(Path, files)), end="")


if __name__ == "__main__":
    exit_on_user_error(main)
