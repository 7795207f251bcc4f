"""What the parts of the bench are asked to do."""

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
    """What was asked for, with what fits the device in place of what was left out.

    data: any folder of images or a converted set; None: images drawn by code. threads: of loaders, each count in turn.
    turns: timed ones of each contender, of so many seconds at least. crops: an epoch of a loader. steps: an epoch of
    the training loop. contenders: names of loaders, or parts of them. pairs: (refinery, student), names of networks.
    refinery: a trained one. device: cpu or cuda. gpus: devices, or on a CPU processes, that train together.
    compiled: networks run compiled. quick: all in small. deadline: of time.monotonic(), when measuring is to end.
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
        """What bench.turns.in_turns is to be called with."""
        return {"turns": self.turns, "seconds": self.seconds, "on_gpu": self.on_gpu, "deadline": self.deadline}

    @property
    def arrangement(self) -> dict[str, bool]:
        """The same for parts of several large contenders: on a GPU one at a time, or quickly all of them at once."""
        return {"apart": self.on_gpu and not self.quick, "hurried": self.on_gpu and self.quick}

    @property
    def autocast(self) -> torch.dtype | None:
        return autocast_type(self.precision)

    @property
    def source(self) -> str | None:
        """The name of `data`, which a record holds: where it lies is another machine's matter."""
        return Path(self.data).resolve().name if self.data else None

    @property
    def of_networks(self) -> dict[str, Any]:
        """What the record says of the settings of parts that run networks."""
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
        """How networks run, in words."""
        return f"{self.precision}, {'compiled' if self.compiled else 'eager'}"


# What is measured unless asked otherwise: on a GPU, on a CPU, and of each where it is to be over in a few minutes.
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
    """The settings that these options mean; of `asked`, what is None was left out. Raises BenchError and others."""
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
        raise BenchError(f"threads={words}: give 1 to {most}, the processors there are, or several with commas")
    return {int(count) for count in counts}


def _devices(asked: int | None, kind: str) -> int:
    """As many as were asked for; of GPUs all, and one CPU, where nothing was asked."""
    most = torch.cuda.device_count() if kind == "cuda" else default_threads()
    if asked is not None and asked < 1:
        raise BenchError(f"gpus={asked}: give the number of devices, at least 1")
    if asked is not None and asked > most:
        what = "CUDA devices" if kind == "cuda" else "processors for a process each"
        raise BenchError(f"gpus={asked}: this machine has {most} {what}")
    return asked or (most if kind == "cuda" else 1)


def _pair(words: str) -> tuple[str, str]:
    # timm:NAME and torchvision:NAME have a colon of their own.
    hub = next((f"{hub}:" for hub in models.HUBS if words.startswith(f"{hub}:")), "")
    refinery, _, student = words.removeprefix(hub).partition(":")
    names = f"{hub}{refinery}" if refinery else "", student
    if not all(names):
        raise BenchError(f"pairs={words}: give REFINERY:STUDENT, two names of networks, as in resnet50:mobilenet")
    for name in names:
        models.normalisation(name)  # refuses an unknown name
    return names
