"""Short messages for errors of PyTorch and its compiler."""

import torch


def reason(error: Exception) -> str:
    """The first line that names the cause; a compiler's first line may only name the part of it that failed."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return next((line for line in lines if not line.endswith("raised:")), type(error).__name__)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether PyTorch, on any device, could not get the memory that it asked for."""
    seen: BaseException | None = error
    while seen is not None:
        # The CPU's allocator has no exception of its own.
        if isinstance(seen, torch.OutOfMemoryError) or "DefaultCPUAllocator: can't allocate memory" in str(seen):
            return True
        seen = seen.__cause__ or seen.__context__
    return False
