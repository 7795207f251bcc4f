"""The states of runs and their differences, read from their folders without PyTorch."""

import contextlib
import fcntl
import json
import os
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import yaml

from train.runs import Run, progress_of

CHECKPOINTS = ("last.pt", "last.before.pt", "best.pt")

# Options with their own columns in the table, or determined by these.
_SHOWN = ("data.name", "model", "generation", "resolution", "epochs", "seed", "refinery.network", "refinery.weights")


def config_of(run: Run) -> dict[str, Any]:
    """The options of a run, from config.yaml; empty if that is missing or damaged."""
    with contextlib.suppress(OSError, yaml.YAMLError, ValueError, RecursionError):
        config = yaml.safe_load((run.folder / "config.yaml").read_text())
        if isinstance(config, dict):
            return config
    return {}


def has_checkpoint(folder: Path) -> bool:
    return any((folder / name).is_file() for name in CHECKPOINTS)


def has_begun(folder: Path) -> bool:
    """Whether a run has a checkpoint, metrics of an epoch, or a result."""
    files = [folder / name for name in ("metrics.jsonl", "result.json")]
    return has_checkpoint(folder) or any(file.is_file() and file.stat().st_size > 0 for file in files)


def in_use(folder: Path) -> bool:
    """Whether a process trains in a run's folder."""
    try:
        opened = os.open(folder / ".lock", os.O_RDWR)
    except OSError:
        return False
    try:
        fcntl.flock(opened, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return True
    except OSError:
        return False  # a file system without locks
    finally:
        os.close(opened)
    return False


def is_failed_start(run: Run) -> bool:
    """Whether it ended before its first checkpoint."""
    return not has_begun(run.folder) and not in_use(run.folder)


def state_of(run: Run) -> str:
    """finished; training or stopped, with the epochs done; failed start."""
    if run.result:
        return "finished"
    if in_use(run.folder):
        return f"training, {progress_of(run)}"
    return f"stopped, {progress_of(run)}" if has_begun(run.folder) else "failed start"


def last_written(run: Run) -> str:
    """Local date and time at which its result, or else its last checkpoint or its start, was written."""
    for name in ("result.json", *CHECKPOINTS, "identity.json"):
        with contextlib.suppress(OSError):
            written = (run.folder / name).stat().st_mtime
            return datetime.fromtimestamp(written).strftime("%Y-%m-%d %H:%M")
    return ""


def differences(runs: Sequence[Run], recipes: Sequence[str]) -> list[str]:
    """For each run the options, with its values, in which it differs from others with its data, network and recipe.

    Options in the table's columns are omitted. recipes: of each run.
    """
    groups: dict[tuple[str, ...], list[int]] = defaultdict(list)
    for number, (run, recipe) in enumerate(zip(runs, recipes, strict=True)):
        refinery = run.identity["refinery"] or {}
        key = run.identity["data"]["name"], run.identity["model"], refinery.get("network", ""), recipe
        groups[key].append(number)
    found = [""] * len(runs)
    for numbers in groups.values():
        values = {number: dict(_options(runs[number].identity)) for number in numbers}
        options = {option: None for each in values.values() for option in each}
        differ = [option for option in options if len({each.get(option) for each in values.values()}) > 1]
        for number in numbers:
            own = values[number]
            found[number] = ", ".join(f"{option}={own[option]}" for option in differ if option in own)
    return found


def _options(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """An identity as options by dotted names, with values as they are typed; digests are cut short."""
    for key, value in values.items():
        option = f"{prefix}{key}"
        if isinstance(value, Mapping):
            yield from _options(value, f"{option}.")
        elif option not in _SHOWN or (option == "refinery.weights" and value):
            text = value if isinstance(value, str) else json.dumps(value)
            yield option, text[:8] if option in ("data.fingerprint", "refinery.weights", "pretrained") else text
