"""The settings of the bench's parts."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import models
from bench import BenchError
from data.decoders.prefetch import default_threads
from train.device import Precision, autocast_type, device_named, precision_on


@dataclass(frozen=True)
class Settings:
    """The options of the bench, with defaults that fit the device.

    data: a folder of images or a converted set; None for images drawn by code. threads: numbers of threads that loaders
    are measured with, ascending. turns, seconds: number of timed turns of each contender, and the minimum length of
    one. crops: per epoch of a loader. steps: per epoch of the training loop. contenders: names of loaders, or parts of
    names. pairs: (refinery, student), names of networks. refinery: a trained refinery. device: cpu or cuda. gpus:
    number of devices, or on a CPU processes, that train together. compiled: whether networks run compiled. quick:
    whether sizes are small. deadline: end of measuring, in seconds of time.monotonic().
    """

    data: str | None
    resolution: int
    batch: int
    turns: int
    seconds: float
    threads: tuple[int, ...]
    crops: int
    steps: int
    contenders: tuple[str, ...]
    pairs: tuple[tuple[str, str], ...]
    refinery: str | None
    device: str
    gpus: int
    precision: Precision
    compiled: bool
    quick: bool
    deadline: float | None = None

    @property
    def on_gpu(self) -> bool:
        return self.device == "cuda"

    @property
    def pace(self) -> dict[str, Any]:
        """Keyword arguments for bench.turns.in_turns."""
        return {"turns": self.turns, "seconds": self.seconds, "on_gpu": self.on_gpu, "deadline": self.deadline}

    @property
    def arrangement(self) -> dict[str, bool]:
        """Further ones for parts with several large contenders: on a GPU one at a time, or with quick all at once."""
        return {"apart": self.on_gpu and not self.quick, "hurried": self.on_gpu and self.quick}

    @property
    def autocast(self) -> torch.dtype | None:
        return autocast_type(self.precision)

    @property
    def source(self) -> str | None:
        """The name of `data` for a record, without the path, which depends on the machine."""
        return Path(self.data).resolve().name if self.data else None

    @property
    def of_networks(self) -> dict[str, Any]:
        """The settings in the record of a part that runs networks."""
        return {
            "resolution": self.resolution,
            "batch": self.batch,
            "turns": self.turns,
            "device": self.device,
            "precision": self.precision,
            "compiled": self.compiled,
        }

    @property
    def computing(self) -> str:
        """A description of how networks run, such as "bf16, compiled"."""
        return f"{self.precision}, {'compiled' if self.compiled else 'eager'}"


# Defaults on a GPU and on a CPU, and for each what `quick` changes.
_ON_GPU: dict[str, Any] = {
    "resolution": 224,
    "batch": 256,
    "epochs": 5,
    "crops": 2048,
    "steps": 40,
    "contenders": "",
    "pairs": "resnet50:mobilenet,resnet50:alexnet,resnet50:resnet18,resnet50:resnet50",
    "compile": "always",
}
_ON_CPU = _ON_GPU | {"batch": 64, "steps": 4, "pairs": "resnet50:mobilenet,resnet50:alexnet", "compile": "never"}
_QUICK: dict[str, Any] = {
    "resolution": 64,
    "batch": 16,
    "epochs": 2,
    "crops": 64,
    "contenders": "pillow,ours ffcv",
    "pairs": "resnet18:mobilenet0.25",
    "compile": "never",
}
_QUICK_ON_GPU: dict[str, Any] = {
    "epochs": 2,
    "steps": 20,
    "contenders": "ours ffcv,ours dali,ours blocks,dali slice,ffcv",
    "pairs": "resnet50:mobilenet,resnet50:resnet18,resnet50:resnet50",
}


def resolve(
    *, quick: bool, device: str, precision: Precision, data: str | None, refinery: str | None, **asked: Any
) -> Settings:
    """Returns the settings for these options. asked: other options, None for those that were not given.

    Raises BenchError, ModelError or TrainError for values that cannot be used.
    """
    where = device_named(device)
    fitting, small = (_ON_GPU, _QUICK_ON_GPU) if where.type == "cuda" else (_ON_CPU, _QUICK)
    values = fitting | (small if quick else {}) | {name: value for name, value in asked.items() if value is not None}
    for name in ("resolution", "batch", "epochs", "crops", "steps"):
        if values[name] < 1:
            raise BenchError(f"{name}={values[name]}: must be at least 1")
    most = default_threads()
    counts = _thread_counts(asked["threads"], most) if asked["threads"] else {most} if quick else {min(2, most), most}
    pairs = tuple(_pair(words.strip()) for words in values["pairs"].split(","))
    return Settings(
        data=data,
        resolution=values["resolution"],
        batch=values["batch"],
        turns=values["epochs"],
        seconds=0.3 if quick else 1.0,
        threads=tuple(sorted(counts)),
        crops=values["crops"],
        steps=values["steps"],
        contenders=tuple(words.strip() for words in values["contenders"].split(",")),
        pairs=pairs,
        refinery=refinery,
        device=where.type,
        gpus=_devices(asked["gpus"], where.type),
        precision=precision_on(where, precision),
        compiled=values["compile"] == "always",
        quick=quick,
    )


def _thread_counts(words: str, most: int) -> set[int]:
    counts = [word.strip() for word in words.split(",")]
    if not all(count.isdecimal() and 1 <= int(count) <= most for count in counts):
        raise BenchError(f"threads={words}: give 1 to {most}, the number of processors, or several separated by commas")
    return {int(count) for count in counts}


def _devices(asked: int | None, kind: str) -> int:
    """Returns the number of devices that was asked for; by default all GPUs, or one CPU process."""
    most = torch.cuda.device_count() if kind == "cuda" else default_threads()
    if asked is not None and asked < 1:
        raise BenchError(f"gpus={asked}: give the number of devices, at least 1")
    if asked is not None and asked > most:
        what = "CUDA devices" if kind == "cuda" else "processors, and each process needs one"
        raise BenchError(f"gpus={asked}: this machine has {most} {what}")
    return asked or (most if kind == "cuda" else 1)


def _pair(words: str) -> tuple[str, str]:
    # timm:NAME and torchvision:NAME contain a colon themselves.
    hub = next((f"{hub}:" for hub in models.HUBS if words.startswith(f"{hub}:")), "")
    refinery, _, student = words.removeprefix(hub).partition(":")
    names = f"{hub}{refinery}" if refinery else "", student
    if not all(names):
        raise BenchError(f"pairs={words}: give REFINERY:STUDENT, two names of networks, such as resnet50:mobilenet")
    for name in names:
        models.normalisation(name)  # raises for an unknown name
    return names
