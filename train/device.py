"""Where networks run, and in which precision."""

import ctypes
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from torch import nn

from data.processors import processors
from train import TrainError
from train.distributed import group

_Module = TypeVar("_Module", bound=nn.Module)

# A precision as requested, or, without auto, as used by a device.
Precision = Literal["auto", "bf16", "fp16", "tf32", "fp32"]

# From glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4

# Where NVIDIA's driver lists its devices and its version.
_DEVICES, _DRIVER = Path("/dev"), Path("/proc/driver/nvidia/version")

_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


def device_named(name: str) -> torch.device:
    """Returns the device named `auto` (a CUDA device if there is one, else the CPU), `cpu`, `cuda` or `cuda:N`.

    Raises TrainError for other names, a device that does not exist, and, with `auto` or `cuda`, for an NVIDIA GPU that
    PyTorch cannot use.
    """
    if name in ("auto", "cuda") and torch.cuda.is_available():
        # With several processes, each has been assigned a device.
        return torch.device("cuda", torch.cuda.current_device()) if group().world > 1 else torch.device("cuda")
    if name in ("auto", "cuda") and (why := _why_no_gpu()):
        raise TrainError(f"device={name}: {why}, or use device=cpu")
    if name == "auto":
        return torch.device("cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise TrainError(f"device={name}: unknown; use auto, cpu, cuda or cuda:N") from None
    if device.type not in ("cpu", "cuda"):
        raise TrainError(f"device={name}: not supported; use cpu or cuda")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise TrainError(f"device={name}: this machine has {torch.cuda.device_count()} CUDA devices; use device=cpu")
    return device


def _why_no_gpu() -> str:
    """Returns why PyTorch cannot use this machine's NVIDIA GPU, and what to do; "" if there is none or it is hidden."""
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES", "0").strip() in ("", "-1")
    if hidden or not any(_DEVICES.glob("nvidia[0-9]*")):
        return ""
    try:
        found = re.search(r"\d+\.\d+[\d.]*", _DRIVER.read_text())
    except OSError:
        found = None
    driver = f"driver {found[0]}" if found else "driver of unknown version"
    if torch.version.cuda is None:
        return (
            f"this machine has an NVIDIA GPU ({driver}), and PyTorch {torch.__version__} comes without CUDA; "
            "install one with it"
        )
    return (
        f"this machine has an NVIDIA GPU, which PyTorch {torch.__version__} (CUDA {torch.version.cuda}) cannot use "
        f"with its {driver}; update the driver"
    )


def precision_on(device: torch.device, asked: Precision = "auto") -> Precision:
    """Returns the precision to compute in on a device: the requested one if it has units for it, else another.

    For auto and bf16 that is bf16, else fp16 (CUDA devices with tensor cores), else fp32; for fp16 and tf32 it is fp32.
    Devices without units for a narrow type emulate it, which is slower than float32.
    """
    if asked in ("auto", "bf16"):
        if _has_bf16(device):
            return "bf16"
        return "fp16" if _tensor_cores(device) else "fp32"
    if asked == "fp16":
        return "fp16" if _tensor_cores(device) else "fp32"
    if asked == "tf32":
        return "tf32" if device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0) else "fp32"
    return asked


def autocast_type(precision: str) -> torch.dtype | None:
    """Returns the dtype for autocast; None for float32 throughout."""
    return _AUTOCAST.get(precision)


def computing_in(dtype: torch.dtype | None, device: torch.device) -> torch.autocast:
    """Returns an autocast context for bfloat16 or float16; with None, networks compute in float32 throughout."""
    return torch.autocast(device.type, dtype=dtype, enabled=dtype is not None)


def on_device(module: _Module, device: torch.device) -> _Module:
    """Moves a module to the device, with weights in channels-last layout like crops, and returns it."""
    return module.to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def set_tf32_and_allocator(device: torch.device, precision: str, *, deterministic: bool = False) -> None:
    """Sets PyTorch's algorithms and allocator for the whole process; to be called before any network runs.

    device: on a GPU, cuDNN times its algorithms for each new shape and keeps the fastest, which may be another one in
    the next process; on a CPU, the memory that a step frees is kept for the next one. precision: TF32 is allowed if
    this is "tf32". deterministic: on a GPU, algorithms are not selected by timing, and only those that give the same
    bits each time are used; an operator that has none raises RuntimeError (see `without_deterministic`). It has no
    effect on a CPU.
    """
    # TF32 rounds factors to 10 bits of mantissa. PyTorch's default is to use it for convolutions but not for matrices.
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = precision == "tf32"
    if device.type == "cpu":
        _keep_freed_memory()
        return
    torch.backends.cudnn.benchmark = not deterministic
    torch.backends.cudnn.deterministic = deterministic
    torch.use_deterministic_algorithms(deterministic)
    # PyTorch would fill new memory with NaN, which costs time and is not needed for determinism.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    if deterministic:
        # cuBLAS reads this when it is first used.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    from torch._inductor import config as inductor  # slow to import, and only needed on GPUs

    # Inductor also selects kernels by timing them. Older supported versions of PyTorch lack the option.
    if hasattr(inductor, "deterministic"):
        inductor.deterministic = deterministic


def without_deterministic(error: BaseException) -> str:
    """Returns the name of the operator if the error says that it has no deterministic algorithm; else ""."""
    found = re.search(r"(\S+) does not have a deterministic implementation", str(error))
    return found[1] if found else ""


def set_threads(asked: int | None = None) -> None:
    """Sets how many threads compute on the CPU, for the whole process; the last bits of weights depend on it.

    asked: the number of threads. With None, OMP_NUM_THREADS applies if it is set; otherwise PyTorch's default, which is
    one per core, but at most this process's share of the available processors (data.processors), which the processes
    of a run on one machine divide among themselves. Raises TrainError for numbers below 1.
    """
    if asked is not None and asked < 1:
        raise TrainError(f"threads={asked}: must be at least 1")
    if asked is None and "OMP_NUM_THREADS" in os.environ:
        return
    torch.set_num_threads(asked or min(torch.get_num_threads(), max(processors() // group().beside, 1)))


def _keep_freed_memory() -> None:
    """Makes glibc keep freed memory for the next step instead of returning it to the system.

    Otherwise every page of every activation is zeroed and mapped again in each step, which on a virtual machine took as
    long as the arithmetic. It has no effect without glibc.
    """
    if os.name == "posix" and hasattr(library := ctypes.CDLL(None), "mallopt"):
        library.mallopt(_M_MMAP_MAX, 0)
        library.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def _has_bf16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    read: Callable[[], dict[str, Any]] = getattr(torch.cpu, "get_capabilities", dict)  # older versions lack it
    capabilities = read()
    return bool(capabilities.get("amx_bf16") or capabilities.get("avx512_bf16") or capabilities.get("bf16"))


def _tensor_cores(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (7, 0)
