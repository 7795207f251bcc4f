"""What a measurement was made on, and its record: JSON, a table in Markdown, and a bar chart."""

import contextlib
import importlib.metadata
import json
import os
import platform
import re
import subprocess
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from PIL import features

_ROOT = Path(__file__).parents[1]
_PACKAGES = ("torch", "torchvision", "nvidia-dali-cuda130", "ffcv", "numba", "numpy", "Pillow")
# The units that decoding and resizing have been written for.
_SIMD = ("sse4_1", "avx2", "avx512f", "avx512bw", "avx512_vbmi", "avx512_vnni", "avx512_bf16", "amx_bf16", "asimd")


@dataclass(frozen=True)
class Record:
    """The result of one part of the bench.

    settings: what was asked for. notes: sentences that say how to read the table.
    rows: one a measurement, with `contender`, `threads`, and either the figures or `not_run`, the reason.
    """

    part: str
    settings: dict[str, Any]
    notes: list[str]
    rows: list[dict[str, Any]]


def environment(device: str) -> dict[str, Any]:
    """The machine and the versions that figures depend on, before anything is measured.

    device: cpu or cuda. memory_bytes: of the machine. load_average: of the last minute, what else it was busy with.
    """
    cpu = _cpu()
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": _git("rev-parse", "HEAD") or None,
        # A result written earlier is no change of the code.
        "dirty": bool(_git("status", "--porcelain", "--", ".", ":!bench/results")),
        "device": torch.cuda.get_device_name() if device == "cuda" else cpu["model"],
        "cpu": cpu,
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "load_average": os.getloadavg()[0],
        "system": platform.platform(),
        "versions": _versions(),
    }


def write(record: Record, found: dict[str, Any], folder: Path) -> list[Path]:
    """Writes DATE-PART-DEVICE.json, .md and .png into the folder and returns their paths; `found`: environment()."""
    folder.mkdir(parents=True, exist_ok=True)
    device = re.sub(r"[^a-z0-9.]+", "-", re.sub(r"\((r|tm)\)", "", found["device"].lower())).strip("-")
    stem = folder / f"{found['date'][:10]}-{record.part}-{device}-{found['cpu']['cores']}-cores"
    paths = [stem.with_name(f"{stem.name}.{suffix}") for suffix in ("json", "md", "png")]
    described = {
        "part": record.part,
        "environment": found,
        "settings": record.settings,
        "notes": record.notes,
        "rows": record.rows,
    }
    paths[0].write_text(json.dumps(described, indent=1) + "\n")
    paths[1].write_text(f"# {record.part}\n\n{table(record, found)}")
    _chart(record, found, paths[2])
    return paths


def table(record: Record, found: dict[str, Any]) -> str:
    """The record in Markdown: the notes, the machine, and a table that reads well as plain text too."""
    head = ("loader", "reads", "threads", "images/s", "min–max", "× ffcv", "cores", "memory MB", "kB")
    rows = [head]
    missing = []
    for row in record.rows:
        first = (row["contender"], row["reads"], str(row["threads"]))
        if "not_run" in row:
            rows.append((*first, "not run", *[""] * 5))
            missing.append(f"- {row['contender']}, threads={row['threads']}: not run: {row['not_run']}\n")
            continue
        rate, memory = row["images_per_second"], row["peak_memory_bytes"]
        rows.append(
            (
                *first,
                f"{rate['median']:.0f}",
                f"{rate['min']:.0f}–{rate['max']:.0f}",
                f"{row['times_ffcv']:.2f}" if "times_ffcv" in row else "–",
                f"{row['cores']:.2f}",
                f"{memory / 1e6:.0f}" if memory else "–",
                f"{row['bytes_per_crop'] / 1e3:.1f}",
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
    lines = [
        "| "
        + " | ".join(_pad(cell, width, column) for column, (cell, width) in enumerate(zip(row, widths, strict=True)))
        + " |"
        for row in rows
    ]
    rule = "|" + "|".join("-" * (width + 1) + ("-" if column < 2 else ":") for column, width in enumerate(widths)) + "|"
    text = "\n".join([*record.notes, "", _machine(found), "", lines[0], rule, *lines[1:]]) + "\n"
    return text + ("\n" + "".join(missing) if missing else "")


def _pad(cell: str, width: int, column: int) -> str:
    return cell.ljust(width) if column < 2 else cell.rjust(width)


def _machine(found: dict[str, Any]) -> str:
    cpu = found["cpu"]
    simd = ", ".join(cpu["simd"])
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items() if version)
    commit = (
        f"commit {found['commit'][:10]}{' with changes' if found['dirty'] else ''}" if found["commit"] else "no commit"
    )
    gpu = f"{found['device']}; " if found["device"] != cpu["model"] else ""
    return (
        f"{gpu}{cpu['model']}, {cpu['cores']} cores ({simd}), {found['memory_bytes'] / 2**30:.0f} GiB, "
        f"load before {found['load_average']:.1f}; "
        f"{found['date'][:10]}, {commit}; {versions}."
    )


def _chart(record: Record, found: dict[str, Any], path: Path) -> None:
    """Horizontal bars, a group for each contender: the median, with whiskers from the lowest to the highest."""
    from matplotlib.figure import Figure

    rows = [row for row in record.rows if "not_run" not in row]
    names = list(dict.fromkeys(row["contender"] for row in rows))
    counts = sorted({row["threads"] for row in rows})
    height = 0.8 / max(len(counts), 1)
    figure = Figure(figsize=(9, 1.6 + 0.32 * len(names) * max(len(counts), 1)), layout="constrained")
    axes = figure.subplots()
    for place, count in enumerate(counts):
        group = [row for row in rows if row["threads"] == count]
        rates = [row["images_per_second"] for row in group]
        medians = [rate["median"] for rate in rates]
        whiskers = [[rate["median"] - rate["min"] for rate in rates], [rate["max"] - rate["median"] for rate in rates]]
        ys = [names.index(row["contender"]) + (place - (len(counts) - 1) / 2) * height for row in group]
        axes.barh(ys, medians, height, xerr=whiskers, capsize=2.5, label=f"{count} threads", ecolor="0.25")
        for y, rate in zip(ys, rates, strict=True):
            axes.annotate(f"{rate['median']:.0f}", (rate["max"], y), (5, 0), textcoords="offset points", va="center")
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.set_xlabel(
        f"crops of {record.settings['resolution']} px a second (median; whiskers: lowest and highest epoch)"
    )
    axes.set_title(
        f"{record.part}: {found['device']}, {found['cpu']['cores']} cores, {found['date'][:10]}", fontsize=10
    )
    axes.spines[["top", "right"]].set_visible(False)
    if len(counts) > 1:
        axes.legend(frameon=False)
    figure.savefig(path, dpi=120)


def _cpu() -> dict[str, Any]:
    """model, cores (that this process may use, and all), simd: the flags of _SIMD that it has."""
    text = ""
    with contextlib.suppress(OSError):
        text = Path("/proc/cpuinfo").read_text()
    model = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    flags = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", text, re.MULTILINE)
    has = set(flags[1].split()) if flags else set()
    return {
        "model": model[1] if model else platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "cores_of_machine": os.cpu_count(),
        "simd": [name for name in _SIMD if name in has],
    }


def _versions() -> dict[str, str | None]:
    versions: dict[str, str | None] = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    # Pillow's; torchvision, FFCV and DALI carry one of their own, which they don't tell.
    versions["libjpeg-turbo"] = features.version_feature("libjpeg_turbo")
    return versions


def _git(*words: str) -> str:
    done = subprocess.run(["git", "-C", str(_ROOT), *words], capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else ""
