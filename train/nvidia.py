"""Information about the GPUs from NVIDIA's driver, through nvidia-smi, which comes with it."""

import contextlib
import subprocess
from collections.abc import Mapping
from typing import Any

import torch

_SECONDS = 10
# The fields of each GPU: our name, nvidia-smi's name, and type.
_FIXED = {
    "driver": ("driver_version", str),
    "name": ("name", str),
    "memory_mib": ("memory.total", float),
    "power_limit_watts": ("power.limit", float),
    "max_clock_mhz": ("clocks.max.sm", float),
    "max_memory_clock_mhz": ("clocks.max.memory", float),
}
_NOW = {"clock_mhz": ("clocks.sm", float), "watts": ("power.draw", float)}


def gpus() -> list[dict[str, Any]]:
    """Constant properties of each GPU that this process may use: driver, name, memory, power limit, highest clocks."""
    return _asked(_FIXED)


def described(found: list[dict[str, Any]]) -> str:
    """The result of gpus() as text in brackets, to follow the name of a GPU; "" if there is none."""
    if not found:
        return ""
    said = [
        f"{len(found)} of them" if len(found) > 1 else None,
        *(
            text.format(found[0][name])
            for name, text in (
                ("driver", "driver {}"),
                ("memory_mib", "{:.0f} MiB"),
                ("max_clock_mhz", "up to {:.0f} MHz"),
                ("max_memory_clock_mhz", "memory {:.0f} MHz"),
                ("power_limit_watts", "{:.0f} W"),
            )
            if found[0][name] is not None
        ),
    ]
    return f" ({', '.join(text for text in said if text)})"


def now() -> dict[str, float]:
    """Current clock and power, clock_mhz and watts, as means over the GPUs; unknown values are omitted."""
    found = _asked(_NOW)
    known = {name: [gpu[name] for gpu in found if gpu[name] is not None] for name in _NOW}
    return {name: sum(values) / len(values) for name, values in known.items() if values}


def _asked(fields: Mapping[str, tuple[str, type]]) -> list[dict[str, Any]]:
    """Returns the fields of each GPU, None for those that the driver does not know; [] if nvidia-smi fails."""
    command = ["nvidia-smi", f"--query-gpu={','.join(name for name, _ in fields.values())}"]
    kinds = [(name, kind) for name, (_, kind) in fields.items()]
    # If it does not know these ids, all GPUs are queried.
    for ids in (_ids(), []):
        try:
            done = subprocess.run(
                [*command, *ids, "--format=csv,noheader,nounits"],
                capture_output=True,
                text=True,
                check=True,
                timeout=_SECONDS,
            )
        except (OSError, subprocess.SubprocessError):
            continue
        lines = [[cell.strip() for cell in line.split(",")] for line in done.stdout.splitlines()]
        return [
            {name: _read(cell, kind) for (name, kind), cell in zip(kinds, cells, strict=True)}
            for cells in lines
            if len(cells) == len(kinds)
        ]
    return []


def _ids() -> list[str]:
    """Returns the option that excludes GPUs that are hidden from this process; [] if PyTorch does not know the ids."""
    count = torch.cuda.device_count()
    ids = [str(getattr(torch.cuda.get_device_properties(number), "uuid", "")) for number in range(count)]
    names = [f"GPU-{each.removeprefix('GPU-')}" for each in ids if each]
    return [f"--id={','.join(names)}"] if names and len(names) == count else []


def _read(cell: str, kind: type) -> Any:
    # "[N/A]", "[Not Supported]" and the like.
    with contextlib.suppress(ValueError):
        return None if cell.startswith("[") else kind(cell)
    return None
