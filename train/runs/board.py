"""TensorBoard's curves of a run, and a picture of its first crops."""

import io
import os
import socket
import time
from pathlib import Path
from typing import Any

from PIL.Image import Image
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter

from data.durable import reason

# The metrics of an epoch (metrics.jsonl) by their names in TensorBoard, which groups them by what precedes the slash.
_TAGS = {
    "train/loss": "loss",
    "train/top1": "train_top1",
    "train/top5": "train_top5",
    "train/lr": "lr",
    "validation/loss": "val_loss",
    "validation/top1": "top1",
    "validation/top5": "top5",
    "speed/images_per_second_per_device": "images_per_second_per_device",
    "speed/waiting": "waiting",
}


class Board:
    """Writes a point of each metric for each epoch into a folder, with a separate file for each start.

    Points are grouped as train/..., validation/... and speed/... .
    epoch: the first one (1, 2, ...) of this start; existing points of it and of later ones are dropped. If writing
    fails, only these plots are lost: a warning is printed once, and the run continues.
    """

    def __init__(self, folder: Path, *, epoch: int):
        # TensorBoard's own writer has a thread, in which a full disk ends with a traceback.
        seconds, fraction = f"{time.time():.6f}".split(".")
        # Named as by TensorBoard's writer: W&B's sync accepts no other names.
        name = f"events.out.tfevents.{seconds}.{socket.gethostname()}.{os.getpid()}.{fraction}"
        self._file = folder / name
        self._works = True
        self._write(
            Event(step=epoch, file_version="brain.Event:2"),
            Event(step=epoch, session_log=SessionLog(status=SessionLog.START)),
        )

    def add(self, metrics: dict[str, Any]) -> None:
        """Adds the points of an epoch."""
        points = {tag: metrics[name] for tag, name in _TAGS.items() if metrics[name] is not None}
        values = [Summary.Value(tag=tag, simple_value=value) for tag, value in points.items()]
        self._write(Event(step=metrics["epoch"], summary=Summary(value=values)))

    def add_crops(self, picture: Image) -> None:
        """Adds a picture of labelled crops, at the start of the run."""
        encoded = io.BytesIO()
        picture.save(encoded, "png")
        image = Summary.Image(
            height=picture.height, width=picture.width, colorspace=3, encoded_image_string=encoded.getvalue()
        )
        self._write(Event(step=0, summary=Summary(value=[Summary.Value(tag="train/crops", image=image)])))

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
                f"warning: {self._file.parent}: {reason(error, self._file)}; the run continues without TensorBoard",
                flush=True,
            )
