"""What PyTorch's compiler left undone, by its own counters and log."""

import logging
from typing import Any


class CompilerNotes:
    """Graph breaks, skipped CUDA graphs and log lines of PyTorch's compiler, from now on."""

    def __init__(self):
        self._said: list[str] = []
        # Skipped layouts are logged at DEBUG level only.
        handler = _Listener(self._said)
        logging.getLogger("torch._inductor").addHandler(handler)
        graph = logging.getLogger("torch._inductor.graph")
        graph.setLevel(logging.DEBUG)
        graph.addHandler(handler)

    def found(self) -> dict[str, Any]:
        """graph_breaks, cudagraph_skips: how many. said: lines, each once."""
        from torch._dynamo.utils import counters

        return {
            "graph_breaks": sum(counters["graph_break"].values()),
            "cudagraph_skips": counters["inductor"]["cudagraph_skips"],
            "said": list(dict.fromkeys(self._said)),
        }


class _Listener(logging.Handler):
    def __init__(self, said: list[str]):
        super().__init__()
        self._said = said

    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage()
        if record.levelno >= logging.WARNING or message.lower().startswith("skip"):
            self._said.append(message.splitlines()[0])


def compiler_note(found: dict[str, Any]) -> str:
    said = f"; it said: {'; '.join(found['said'])}" if found["said"] else ""
    return (
        f"the compiler left {found['graph_breaks']} breaks in the step's graph and skipped CUDA graphs "
        f"{found['cudagraph_skips']} times{said}."
    )
