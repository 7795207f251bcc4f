"""Collects what PyTorch's compiler could not do, from its counters and log."""

import logging
from typing import Any


class CompilerNotes:
    """Collects graph breaks, skipped CUDA graphs and warnings of PyTorch's compiler from its construction on."""

    def __init__(self):
        self._said: list[str] = []
        # Skipped layouts are logged at DEBUG level only.
        handler = _Listener(self._said)
        logging.getLogger("torch._inductor").addHandler(handler)
        graph = logging.getLogger("torch._inductor.graph")
        graph.setLevel(logging.DEBUG)
        graph.addHandler(handler)

    def found(self) -> dict[str, Any]:
        """Returns graph_breaks and cudagraph_skips, counts, and said, the distinct first lines of log messages."""
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
    said = f"; its messages: {'; '.join(found['said'])}" if found["said"] else ""
    return (
        f"the compiler reported {found['graph_breaks']} breaks in the step's graph and skipped CUDA graphs "
        f"{found['cudagraph_skips']} times{said}."
    )
