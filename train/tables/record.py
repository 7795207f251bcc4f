"""How a table's runs were made, for its text and for the JSON beside it."""

from collections.abc import Sequence
from typing import Any

from train.runs import Run, json_lines
from train.runs.code import files_of, training_code
from train.runs.environment import machine_line

# The fields of a start that describe its machine and settings.
_OWN = ("decoder", "compiled", "threads", "devices")
_SHARED = ("commit", "dirty", "device", "cpu", "memory_bytes", "system", "compiler", "versions", "code")


def machines_of(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Machines and settings of the runs' starts, each once; those of earlier versions have few fields."""
    found: list[dict[str, Any]] = []
    for run in runs:
        for start in json_lines(run.folder / "starts.jsonl"):
            made = start.get("environment", {})
            machine = {name: start.get(name) for name in _OWN} | {name: made.get(name) for name in _SHARED}
            if machine not in found:
                found.append(machine)
    return found


def made_with(runs: Sequence[Run]) -> list[str]:
    """The same as text, one line each."""
    return list(dict.fromkeys(map(_line, machines_of(runs))))


def _line(machine: dict[str, Any]) -> str:
    own = (
        f"Decoder {machine['decoder']}, devices: {machine['devices']}, threads of each: {machine['threads']}, "
        f"{'compiled' if machine['compiled'] else 'eager'}; "
    )
    if not machine["cpu"]:
        return own + "a run of an earlier version, which did not record its machine."
    return own + machine_line(machine, load=False)


def files_behind(runs: Sequence[Run]) -> dict[str, str] | None:
    """The digests of the files that the runs depend on; None if some were made by other code than the current one."""
    if {machine["code"] for machine in machines_of(runs)} != {training_code()}:
        return None
    return files_of(__package__)
