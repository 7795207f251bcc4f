"""Records steps once as CUDA graphs and replays them: the host launches one graph instead of hundreds of kernels.

A graph is a list of kernels with the addresses that they read and write. So all tensors that a step reads must stay at
their addresses, inputs are copied to the addresses that the graph reads, and no kernel may depend on a host value.
Not run on a GPU yet; tests record and replay the operators of a step instead of its kernels.
"""

import warnings
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from train import TrainError
from train.failures import is_out_of_memory, reason
from train.runs.checkpoint import generator_states, restore_generators

# Runs a function while recording its work on the device; returns a function that replays it.
Capture = Callable[[Callable[[], None]], Callable[[], Any]]

# Runs before a recording, for everything that happens only once: compilation, selection of algorithms, initialisation.
_WARM_UP = 3

# Replays that may be under way when the host starts another one.
_AHEAD = 2


class Recorder:
    """Records functions, once for each shape and dtype of their inputs, and replays them.

    tensors: returns all existing tensors that the functions write to. device: of these tensors. capture: how to record
    (default: CUDA graphs, which share one memory pool, since they run one at a time).
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
        """Records function(*inputs) under a name, unless it is recorded for these shapes and dtypes already.

        The function first runs a few times; the tensors and random generators that it changes are then restored. A
        replay repeats only its work on the device. Raises what the function or the recording raises; all tensors are
        then unchanged.
        """
        key = _key(name, inputs)
        if key not in self._recorded:
            # Clones keep the memory layout, which is the same in later steps.
            own = [tensor.clone() for tensor in inputs]
            self._recorded[key] = own, self._record(lambda: function(*own))

    def run(self, name: str, function: Callable[..., None], *inputs: torch.Tensor) -> None:
        """Does the work of function(*inputs) by a replay, after recording it if needed. Raises as `record` does."""
        self.record(name, function, *inputs)
        own, replay = self._recorded[_key(name, inputs)]
        if own:
            torch._foreach_copy_(own, list(inputs))
        replay()

    def _record(self, function: Callable[[], None]) -> Callable[[], Any]:
        with Undone(self._tensors(), self._device), warnings.catch_warnings():
            # AdamW warns when it runs without being recorded.
            warnings.filterwarnings("ignore", message=".*capturable.*")
            with self._beside():
                for _ in range(_WARM_UP):
                    function()
            return self._capture(function)

    def _beside(self) -> AbstractContextManager[Any]:
        """A context on a side stream, as PyTorch requires for the runs before a recording."""
        return _OwnStream(self._device) if self._device.type == "cuda" else nullcontext()


def _key(name: str, inputs: Sequence[torch.Tensor]) -> Hashable:
    return (name, *((tensor.shape, tensor.dtype) for tensor in inputs))


class Undone:
    """A context that restores these tensors and the random generators at its end."""

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
    """A context on a side stream, ordered after earlier and before later work on the current stream."""

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
    """Returns a Capture that records CUDA graphs, which share one memory pool.

    The host replays at most two graphs ahead of the device, since each batch that waits for its replay takes memory.
    Raises TrainError if a recording fails: PyTorch's allocator and random generators then remain in recording mode, so
    that steps cannot run unrecorded either.
    """
    pool = None
    replays: deque[torch.cuda.Event] = deque()

    def capture(function: Callable[[], None]) -> Callable[[], Any]:
        nonlocal pool
        pool = pool or torch.cuda.graph_pool_handle()
        graph, present = torch.cuda.CUDAGraph(), torch.cuda.current_stream(device)
        try:
            # Other threads may decode and upload at the same time.
            with torch.cuda.device(device), torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
                function()
        except Exception as error:  # CUDA and libraries raise many kinds of errors
            torch.cuda.set_stream(present)
            smaller = "use a smaller batch or " if is_out_of_memory(error) else ""
            raise TrainError(
                f"cuda_graphs: the step cannot be recorded ({reason(error)}); {smaller}leave the option out"
            ) from error

        def replay() -> None:
            if len(replays) == _AHEAD:
                replays.popleft().synchronize()
            graph.replay()
            replays.append(torch.cuda.Event())
            replays[-1].record(torch.cuda.current_stream(device))

        return replay

    return capture
