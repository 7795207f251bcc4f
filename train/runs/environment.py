"""How a result was made: the machine, the versions, the code and the command, for runs, tables and the bench.

found = environment("cpu")      # before anything is measured
print(machine_line(found))
"""

import contextlib
import importlib.metadata
import os
import platform
import re
import subprocess
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

import torch
from PIL import features

from command import typed_command
from train import nvidia
from train.runs.code import ROOT

_PACKAGES = (
    "torch",
    "torchvision",
    "torchcodec",
    "spdl-io",
    "triton",
    "nvidia-dali-cuda130",
    "nvidia-nvimgcodec-cu13",
    "ffcv",
    "numba",
    "llvmlite",
    "numpy",
    "Pillow",
)
# An absolute path, up to its last name.
_PLACE = re.compile(r"(?<![^\s='\"])/(?:[^\s'\"/]+/)+(?=[^\s'\"/])")
# The instruction sets that decoding, resizing and networks make use of.
_SIMD = ("sse4_1", "avx2", "avx512f", "avx512bw", "avx512_vbmi", "avx512_vnni", "avx512_bf16", "amx_bf16", "asimd")


def environment(device: str) -> dict[str, Any]:
    """The machine and the versions that figures depend on, before anything is measured, and the command typed.

    device: cpu or cuda. memory_bytes: of the machine. load_average: of the last minute, from other work. threads: that
    PyTorch uses, unless a part or a run sets their number. gpus: on a GPU, properties of each usable one from
    train.nvidia.
    compiler: that of C++, which PyTorch compiles networks with on a CPU; FFCV's and our decoders are compiled by
    llvmlite, kernels by triton. command: with file names without their folders, which differ between machines.
    """
    cpu = _cpu()
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": _git("rev-parse", "HEAD") or None,
        # Only changes of code: results are often written into the checkout.
        "dirty": bool(_git("status", "--porcelain", "--", "*.py", "*.yaml")),
        "command": _PLACE.sub("", typed_command()),
        "device": torch.cuda.get_device_name() if device == "cuda" else cpu["model"],
        "gpus": nvidia.gpus() if device == "cuda" else [],
        "cpu": cpu,
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "load_average": os.getloadavg()[0],
        "system": platform.platform(),
        "compiler": _compiler(),
        "threads": torch.get_num_threads(),
        "versions": _versions(),
    }


def machine_line(found: dict[str, Any], *, load: bool = True) -> str:
    """The environment in one line. load: also threads, the load before the measurement, and the date."""
    cpu = found["cpu"]
    simd = ", ".join(cpu["simd"])
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items() if version)
    commit = (
        f"commit {found['commit'][:10]}{' with changes' if found['dirty'] else ''}" if found["commit"] else "no commit"
    )
    gpu = f"{found['device']}{nvidia.described(found.get('gpus', []))}; " if found["device"] != cpu["model"] else ""
    busy = (
        f", {found['threads']} threads, load before {found['load_average']:.1f}; {found['date'][:10]}" if load else ""
    )
    return (
        f"{gpu}{cpu['model']}, {cpu['cores']} cores ({simd}), {found['memory_bytes'] / 2**30:.0f} GiB{busy}; {commit}; "
        f"{versions}, {found['compiler'] or 'no C++ compiler'}."
    )


def _cpu() -> dict[str, Any]:
    """model, cores (usable by this process, and all), simd: the flags of _SIMD that it has."""
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


@cache
def _compiler() -> str | None:
    """The version line of the C++ compiler, or None if there is none."""
    with contextlib.suppress(OSError):
        command = [os.environ.get("CXX", "c++"), "--version"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        return next(iter(done.stdout.splitlines()), None)
    return None


@cache
def _versions() -> dict[str, str | None]:
    versions: dict[str, str | None] = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    # Pillow's; torchvision, FFCV and DALI bundle their own, whose version is not available.
    versions["libjpeg-turbo"] = features.version_feature("libjpeg_turbo")
    # The CUDA version that PyTorch was built for, and the cuDNN version that it loads if there is a GPU.
    versions["cuda"] = torch.version.cuda
    versions["cudnn"] = _cudnn()
    return versions


def _cudnn() -> str | None:
    if not torch.cuda.is_available():
        return None
    found = torch.backends.cudnn.version()
    return found and f"{found // 10000}.{found // 100 % 100}.{found % 100}"


def _git(*words: str) -> str:
    # When installed, it may be in an environment within another repository.
    if not (ROOT / ".git").exists():
        return ""
    done = subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else ""
