"""TensorBoard's curves of a run."""

import os
import socket
import time
from pathlib import Path
from typing import Any

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter

from data.durable import reason


class Board:
    """Writes a point of each metric for each epoch into a folder, in a file of this start's own.

    epoch: the first one (1, 2, ...) of this start; points of it and later ones that are there already are dropped.
    What cannot be written costs these plots alone: a warning is printed once, and the run goes on.
    """

    def __init__(self, folder: Path, *, epoch: int):
        # TensorBoard's own writer has a thread, in which a full disk ends with a traceback.
        self._file = folder / f"events.out.tfevents.{time.time():.6f}.{socket.gethostname()}.{os.getpid()}"
        self._works = True
        self._write(
            Event(step=epoch, file_version="brain.Event:2"),
            Event(step=epoch, session_log=SessionLog(status=SessionLog.START)),
        )

    def add(self, metrics: dict[str, Any]) -> None:
        """Adds the points of an epoch."""
        values = [Summary.Value(tag=name, simple_value=value) for name, value in metrics.items()]
        self._write(Event(step=metrics["epoch"], summary=Summary(value=values)))

    def _write(self, *events: Event) -> None:
        if not self._works:
            return
        try:
            self._file.parent.mkdir(exist_ok=True)
            with open(self._file, "ab") as file:
                for event in events:
                    event.wall_time = time.time()
                    RecordWriter(file).write(event.SerializeToString())
        except OSError as error:
            self._works = False
            print(
                f"warning: {self._file.parent}: {reason(error, self._file)}; the run goes on without TensorBoard",
                flush=True,
            )
