"""The compared content of files that training and label writing leave: everything except times."""

import io
import json
import re
from pathlib import Path
from typing import Any

import torch

# Points of each start, in a file named by its time and process.
IGNORED = ["**/tensorboard/*"]

# Omitted everywhere: times, and values computed from files with times: the digest of a refinery's
# checkpoint, and the checksum that labels.json has of itself.
_TIMES = {"seconds", "train_seconds", "waited_seconds", "images_per_second_per_device", "waiting"}
_LEFT_OUT = {*_TIMES, "weights", "checksum"}


def name(path: str) -> str:
    """A path without the keys of run folders, which depend on the digest of a refinery's checkpoint."""
    return re.sub("-[0-9a-f]{8}(?=/|$)", "", path)


def content(path: Path) -> bytes:
    """All values of a checkpoint (tensors bit by bit) or of JSON; otherwise the bytes of the file."""
    written = io.BytesIO()
    if path.suffix == ".pt":
        _write(torch.load(path, map_location="cpu", weights_only=True), written)
    elif path.suffix in (".json", ".jsonl"):
        lines = path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()]
        _write([json.loads(line) for line in lines], written)
    else:
        written.write(path.read_bytes())
    return written.getvalue()


def _write(value: Any, to: io.BytesIO) -> None:
    if isinstance(value, dict):
        to.write(f"{{{len(value)}".encode())
        for name, each in value.items():
            if name not in _LEFT_OUT:
                to.write(repr(name).encode())
                _write(each, to)
    elif isinstance(value, list | tuple):
        to.write(f"[{len(value)}".encode())
        for each in value:
            _write(each, to)
    elif isinstance(value, torch.Tensor):
        to.write(f"{value.dtype}{list(value.shape)}".encode())
        to.write(value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    else:
        to.write(repr(value).encode())
