"""Steps recorded once as CUDA graphs and then replayed: the host launches one thing where there were hundreds.

A graph is a list of kernels with the addresses that they read and write. So whatever a step reads lies in tensors that
stay where they are, inputs are copied to where the graph reads them, and nothing in it depends on a value of the host.
Not yet run on a GPU; tests record the operators of a step instead of its kernels, and replay those.
"""

import warnings
from collections.abc import Callable, Hashable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from train.runs.checkpoint import generator_states, restore_generators

# Runs a function while recording what it does to the device; returns what does the same again.
Capture = Callable[[Callable[[], None]], Callable[[], Any]]

# Runs before a recording, in which compilers, searches for algorithms and libraries make all they make only once.
_WARM_UP = 3


class Recorder:
    """Records functions, each once for every shape of its inputs, and replays them.

    tensors: gives all that the functions write to besides what they return. device: where these are. capture: what
    records (default: CUDA graphs, which share their memory, since one runs at a time).
    """

    def __init__(
        self,
        tensors: Callable[[], Sequence[torch.Tensor]],
        device: torch.device,
        capture: Capture | None = None,
    ):
        self._tensors, self._device = tensors, device
        self._capture = capture or cuda_graphs(device)
        self._recorded: dict[Hashable, tuple[list[torch.Tensor], Callable[[], Any]]] = {}

    def record(self, name: str, function: Callable[..., None], *inputs: torch.Tensor) -> None:
        """Records function(*inputs) unless this was done for such inputs.

        It runs a few times beforehand, of which nothing is left; what it does besides writing to tensors it does then
        alone. Raises what the function or the recording raises; nothing has then changed.
        """
        key = _key(name, inputs)
        if key not in self._recorded:
            # Laid out as these are; those of later steps are alike.
            own = [tensor.clone() for tensor in inputs]
            self._recorded[key] = own, self._record(lambda: function(*own))

    def run(self, name: str, function: Callable[..., None], *inputs: torch.Tensor) -> None:
        """As function(*inputs), by a replay; recorded where it was not yet, as `record`."""
        self.record(name, function, *inputs)
        own, replay = self._recorded[_key(name, inputs)]
        if own:
            torch._foreach_copy_(own, list(inputs))
        replay()

    def _record(self, function: Callable[[], None]) -> Callable[[], Any]:
        with Undone(self._tensors(), self._device), warnings.catch_warnings():
            # AdamW warns of running unrecorded.
            warnings.filterwarnings("ignore", message=".*capturable.*")
            with self._beside():
                for _ in range(_WARM_UP):
                    function()
            return self._capture(function)

    def _beside(self) -> AbstractContextManager[Any]:
        """On a stream of its own, as PyTorch asks of what runs before a recording."""
        return _OwnStream(self._device) if self._device.type == "cuda" else nullcontext()


def _key(name: str, inputs: Sequence[torch.Tensor]) -> Hashable:
    return (name, *((tensor.shape, tensor.dtype) for tensor in inputs))


class Undone:
    """A context at whose end these tensors and the random generators are as they were at its beginning."""

    def __init__(self, tensors: Sequence[torch.Tensor], device: torch.device):
        self._tensors, self._device = tensors, device

    def __enter__(self) -> None:
        with torch.no_grad():
            self._before = [tensor.detach().clone() for tensor in self._tensors]
        self._generators = generator_states(self._device)

    def __exit__(self, *exception: object) -> None:
        with torch.no_grad():
            for tensor, before in zip(self._tensors, self._before, strict=True):
                tensor.copy_(before)
        restore_generators(self._generators, self._device)
        del self._before


class _OwnStream:
    """A context of work on a stream of its own, between what lies before and behind it on the present one."""

    def __init__(self, device: torch.device):
        self._present = torch.cuda.current_stream(device)
        self._own = torch.cuda.Stream(device)
        self._entered = torch.cuda.stream(self._own)

    def __enter__(self) -> None:
        self._own.wait_stream(self._present)
        self._entered.__enter__()

    def __exit__(self, *exception: object) -> None:
        self._entered.__exit__(*exception)  # type: ignore[arg-type]
        self._present.wait_stream(self._own)


def cuda_graphs(device: torch.device) -> Capture:
    """Records CUDA graphs that share one pool of memory."""
    pool = None

    def capture(function: Callable[[], None]) -> Callable[[], Any]:
        nonlocal pool
        pool = pool or torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        # Other threads, which decode and upload, may go on meanwhile.
        with torch.cuda.device(device), torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            function()
        return graph.replay

    return capture
