"""Stands in for CUDA graphs where there is no GPU: operators are recorded with the very tensors that they touch."""

from collections.abc import Callable

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map


class Operators(TorchDispatchMode):
    """Notes each operator, what it was given and what it made. A read by the host raises, as while CUDA captures."""

    def __init__(self):
        super().__init__()
        self.calls: list[tuple] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.is_nonzero.default):
            raise RuntimeError("operation not permitted when stream is capturing")
        made = function(*args, **kwargs)
        if function.namespace != "profiler":
            # The lists of tensors may be changed later; the tensors themselves are what is recorded.
            self.calls.append((function, tree_map(lambda x: x, args), tree_map(lambda x: x, kwargs), made))
        return made


def capture(function: Callable[[], None]) -> Callable[[], None]:
    """As train.recorded.cuda_graphs: numbers of the host, and where tensors lie, are then what they were."""
    with Operators() as operators:
        function()

    @torch.no_grad()
    def replay() -> None:
        for function, args, kwargs, made in operators.calls:
            for before, now in zip(tree_leaves(made), tree_leaves(function(*args, **kwargs)), strict=True):
                if isinstance(before, torch.Tensor) and before.data_ptr() != now.data_ptr():
                    before.copy_(now)

    return replay
