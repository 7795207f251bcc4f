"""Short messages for errors of PyTorch and its compiler."""

import torch


def reason(error: Exception) -> str:
    """Returns the first line of the message that names the cause; a compiler's first line may only name its backend."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return next((line for line in lines if not line.endswith("raised:")), type(error).__name__)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error, or one that caused it, means that PyTorch could not allocate memory on the CPU or a GPU."""
    seen: BaseException | None = error
    while seen is not None:
        # The CPU's allocator raises a plain RuntimeError.
        if isinstance(seen, torch.OutOfMemoryError) or "DefaultCPUAllocator: can't allocate memory" in str(seen):
            return True
        seen = seen.__cause__ or seen.__context__
    return False
