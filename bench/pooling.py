"""Measures soft labels of crops from label maps (ReLabel): the sparse sum against RoIAlign on the dense map."""

from functools import partial

import torch

from bench.record import BATCH_TIME, DEVICE_MEMORY, MEMORY, Column, Record, Row, optional, rate_columns
from bench.settings import Settings
from bench.turns import Contender, Runner, Work, in_turns
from kernels.pool_labels import pool_labels, reference

# The paper's sizes: five of ImageNet's classes in each of 15 x 15 cells, batches of 256.
_BATCH, _SIDE, _KEPT, _CLASSES = 256, 15, 5, 1000
_SPARSE, _DENSE = "straight from the sparse map", "dense map, roi_align, softmax"


class Pooling(Runner):
    """Pools labels for one batch after the other."""

    def __init__(self, settings: Settings, dense: bool):
        self.device = settings.device
        generator = torch.Generator().manual_seed(0)
        cells = (_BATCH, _SIDE, _SIDE)
        logits = 5 + 3 * torch.randn(*cells, _KEPT, generator=generator)
        ids = torch.randint(_CLASSES // _KEPT, (*cells, _KEPT), generator=generator)
        ids += torch.arange(_KEPT) * (_CLASSES // _KEPT)  # distinct in a cell
        corners = torch.rand(2, _BATCH, 2, generator=generator)
        boxes = torch.cat([corners.amin(dim=0), corners.amax(dim=0)], dim=1)
        self._map = logits.half().to(self.device), ids.to(self.device), boxes.to(self.device)
        self._pool = reference if dense else pool_labels
        self._at_once = 1 if dense else 20

    def run(self) -> Work:
        for _ in range(self._at_once):
            self._pool(*self._map, _CLASSES)
        return Work(self._at_once * _BATCH)


def measure(settings: Settings) -> Record:
    """Measures both methods on random maps and boxes."""
    row: Row = {"group": "", "unit": "crops/s", "batch": _BATCH}
    contenders = [
        Contender(partial(Pooling, settings, dense), row | {"name": name})
        for name, dense in ((_DENSE, True), (_SPARSE, False))
    ]
    rows = in_turns(contenders, **settings.pace, title="pooling")
    if not any("not_run" in row for row in rows):
        rows[1]["gain"] = rows[1]["rate"]["median"] / rows[0]["rate"]["median"]
    return Record(
        part="pooling",
        settings={"batch": _BATCH, "turns": settings.turns, "device": settings.device},
        notes=[
            f"Soft labels of batches of {_BATCH} crops, of {_CLASSES} classes, from maps of {_SIDE} x {_SIDE} cells "
            f"with {_KEPT} logits each, eager. crops/s of one device: median, lowest and highest of {settings.turns} "
            f"turns of {settings.seconds:g} s or more, taken alternately, after one untimed turn. gain: the ratio to "
            "the dense map's rate. memory: of the process, of which libraries take about 400 MB.",
        ],
        rows=rows,
        identity=(Column("what", lambda row: row["name"]),),
        figures=(
            *rate_columns("crops/s"),
            BATCH_TIME,
            optional("gain", "gain", lambda gain: f"{gain:.1f}"),
            DEVICE_MEMORY if settings.device == "cuda" else MEMORY,
        ),
    )
