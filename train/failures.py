"""What PyTorch and its compiler say when something fails, in a few words."""

import torch


def reason(error: Exception) -> str:
    """The first line that says what went wrong; a compiler's first one may only say which part of it failed."""
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
