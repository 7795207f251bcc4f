"""What a table's runs were made with, for its text and for the JSON beside it."""

from collections.abc import Sequence
from typing import Any

from train.runs import Run, json_lines
from train.runs.code import files_of, training_code
from train.runs.environment import machine_line

# Of a start: what it ran on and with.
_OWN = ("decoder", "compiled", "threads", "devices")
_SHARED = ("commit", "dirty", "device", "cpu", "memory_bytes", "system", "compiler", "versions", "code")


def machines_of(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """What the starts of the runs ran on and with, each once; those of earlier versions say little."""
    found: list[dict[str, Any]] = []
    for run in runs:
        for start in json_lines(run.folder / "starts.jsonl"):
            made = start.get("environment", {})
            machine = {name: start.get(name) for name in _OWN} | {name: made.get(name) for name in _SHARED}
            if machine not in found:
                found.append(machine)
    return found


def made_with(runs: Sequence[Run]) -> list[str]:
    """The same in words, a line each."""
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
    """The digests of the files that the runs depend on; None where some were made by other code than the present."""
    if {machine["code"] for machine in machines_of(runs)} != {training_code()}:
        return None
    return files_of(__package__)
