"""What a measurement is made on: the machine and the versions that figures depend on."""

import contextlib
import importlib.metadata
import os
import platform
import re
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from PIL import features

from train import nvidia

_ROOT = Path(__file__).parents[1]
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
    "numpy",
    "Pillow",
)
# The units that decoding, resizing and networks have been written for.
_SIMD = ("sse4_1", "avx2", "avx512f", "avx512bw", "avx512_vbmi", "avx512_vnni", "avx512_bf16", "amx_bf16", "asimd")


def environment(device: str) -> dict[str, Any]:
    """The machine and the versions that figures depend on, before anything is measured.

    device: cpu or cuda. memory_bytes: of the machine. load_average: of the last minute, what else it was busy with.
    gpus: on a GPU, what bench.nvidia knows of each that may be used.
    """
    cpu = _cpu()
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": _git("rev-parse", "HEAD") or None,
        # A result written earlier is no change of the code.
        "dirty": bool(_git("status", "--porcelain", "--", ".", ":!bench/results")),
        "device": torch.cuda.get_device_name() if device == "cuda" else cpu["model"],
        "gpus": nvidia.gpus() if device == "cuda" else [],
        "cpu": cpu,
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "load_average": os.getloadavg()[0],
        "system": platform.platform(),
        "versions": _versions(),
    }


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
    # What PyTorch was built for, and the library that it loads where there is a GPU.
    versions["cuda"] = torch.version.cuda
    versions["cudnn"] = _cudnn()
    return versions


def _cudnn() -> str | None:
    if not torch.cuda.is_available():
        return None
    found = torch.backends.cudnn.version()
    return found and f"{found // 10000}.{found // 100 % 100}.{found % 100}"


def _git(*words: str) -> str:
    # Installed, it may lie in an environment within someone else's repository.
    if not (_ROOT / ".git").exists():
        return ""
    done = subprocess.run(["git", "-C", str(_ROOT), *words], capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else ""
