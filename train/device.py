"""Where networks run, and in which precision."""

from collections.abc import Callable
from typing import Any, Literal

import torch

from train import TrainError

Precision = Literal["auto", "bf16", "fp32"]


def device_named(name: str) -> torch.device:
    """`auto` (a CUDA device where there is one), `cpu`, `cuda` or `cuda:N`. Raises TrainError for any other."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise TrainError(f"device={name}: unknown; use auto, cpu, cuda or cuda:N") from None
    if device.type not in ("cpu", "cuda"):
        raise TrainError(f"device={name}: not supported; use cpu or cuda")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise TrainError(f"device={name}: this machine has {torch.cuda.device_count()} CUDA devices; use device=cpu")
    return device


def precision_on(device: torch.device, asked: Precision = "auto") -> Precision:
    """`bf16` or `fp32`: what was asked for, or under `auto` bf16 where the device has units for it."""
    if asked != "auto":
        return asked
    return "bf16" if _computes_bf16(device) else "fp32"


def autocast_type(precision: str) -> torch.dtype | None:
    """What the networks are autocast to; None for float32 throughout."""
    return torch.bfloat16 if precision == "bf16" else None


def _computes_bf16(device: torch.device) -> bool:
    # Where it is only emulated, bfloat16 is slower than float32.
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    read: Callable[[], dict[str, Any]] = getattr(torch.cpu, "get_capabilities", dict)  # not in every PyTorch we take
    capabilities = read()
    return bool(capabilities.get("amx_bf16") or capabilities.get("avx512_bf16") or capabilities.get("bf16"))
