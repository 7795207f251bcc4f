"""Measures images per second of the whole training loop, compared with its step alone and with the baseline.

The loop runs from images on disk to updated weights; the step alone, which is its upper limit, on one batch of the
loop; the baseline is bench.baseline.
"""

import itertools
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

import models
from bench import images
from bench.baseline import Baseline
from bench.compiler import CompilerNotes, compiler_note
from bench.device_time import busy_seconds
from bench.limit import demand_note, limit_notes, limits, with_shares
from bench.networks import gpu_notes
from bench.pair import CLASSES, Pair
from bench.process import CallFailed, Process
from bench.record import Column, Record, Row, ran, step_columns
from bench.settings import Settings
from bench.turns import Contender, Runner, Work, in_turns
from data.convert import convert_source
from data.plan import CropRule
from data.sources import Source, Split
from train.config import Config, OptimizerConfig
from train.job import check, resolve
from train.loop import Progress, Trainer

BASELINE, STEP, LOOP = "baseline", "step", "loop"


class Looping(Runner):
    """Runs an epoch of a train.loop.Trainer per turn. config: a run with more epochs than are measured.

    If several processes train together (train.distributed), each counts only the images that it has trained on itself.
    """

    def __init__(self, config: Config):
        self._compiler = CompilerNotes() if config.compile == "always" else None
        self._trainer = trainer_of(config)
        self.device = self._trainer.job.device.type

    def run(self) -> Work:
        trainer = self._trainer
        trainer.train_epoch()
        waited = trainer.progress.waited_seconds
        trainer.progress = Progress(epoch=trainer.progress.epoch + 1)
        return Work(trainer.loader.steps * trainer.job.batch // trainer.job.group.world, waited)

    def facts(self) -> dict[str, Any]:
        found = {"compiler": self._compiler.found()} if self._compiler else {}
        return found | {"decoder": self._trainer.loader.decoder} | _busy(self)


class Stepping(Runner):
    """Runs as many steps as an epoch of the loop has, all on the epoch's first batch."""

    def __init__(self, config: Config):
        self._trainer = trainer_of(config)
        self.device = self._trainer.job.device.type
        (self._batch,) = itertools.islice(self._trainer.loader.epoch(0), 1)

    def run(self) -> Work:
        for _ in range(self._trainer.loader.steps):
            self._trainer.step(self._batch)
        return Work(self._trainer.loader.steps * self._trainer.job.config.batch)

    def facts(self) -> dict[str, Any]:
        return _busy(self)


def _busy(runner: Runner) -> dict[str, Any]:
    """Returns busy_seconds, the time per image in which the GPU is busy; {} on a CPU."""
    if runner.device == "cpu":
        return {}
    done: list[Work] = []
    busy = busy_seconds(lambda: done.append(runner.run()))
    return {"busy_seconds": busy and busy / done[0].amount}


def trainer_of(config: Config) -> Trainer:
    """Returns the trainer of a configuration whose refinery, if any, exists."""
    data, (labels,) = check([config])
    return Trainer([resolve(config, data, labels)])


def config_of(pair: Pair, folder: Path, threads: int) -> Config:
    """Returns the configuration of a training on the files that write_inputs wrote into the folder."""
    settings = pair.settings
    return Config(
        model=pair.student,
        refinery=f"{pair.refinery}:{folder / 'refinery.pt'}",
        data=str(folder / "converted"),
        # More than are ever run.
        epochs=1_000_000,
        batch=settings.batch,
        device=settings.device,
        threads=threads,
        precision=settings.precision,
        compile="always" if settings.compiled else "never",
        optimizer=OptimizerConfig(lr=1e-3, lr_batch=settings.batch),
        runs=str(folder / "runs"),
    )


def _looping(pair: Pair, folder: Path, threads: int) -> Looping:
    return Looping(config_of(pair, folder, threads))


def _stepping(pair: Pair, folder: Path, threads: int) -> Stepping:
    return Stepping(config_of(pair, folder, threads))


def write_inputs(pair: Pair, files: list[str], folder: Path) -> float:
    """Writes the converted set and the refinery's random weights. Returns the seconds that conversion took."""
    torch.manual_seed(0)
    torch.save(models.build(pair.refinery, CLASSES).state_dict(), folder / "refinery.pt")
    labels = np.arange(len(files), dtype=np.int64) % CLASSES
    source = Source(
        name="bench",
        class_names=tuple(map(str, range(CLASSES))),
        train=Split(files, labels, images.open_image),
        # Not read, but each device needs at least one image.
        val=Split(files[: pair.settings.gpus], labels[: pair.settings.gpus], images.open_image),
        fingerprint="",
        resolution=pair.settings.resolution,
        crop=CropRule(),
    )
    started = time.perf_counter()
    convert_source(source, folder / "converted")
    return time.perf_counter() - started


def measure(settings: Settings) -> Record:
    """Measures the loop of the first pair. Raises BenchError for images that cannot be used."""
    pair = Pair(*settings.pairs[0], settings)
    threads = max(settings.threads)
    count = settings.steps * settings.batch
    with tempfile.TemporaryDirectory(prefix="bench-") as name:
        folder = Path(name)
        found = images.find(settings.data, folder, most=count)
        files = images.spread(found, count)
        contenders = _contenders(pair, files, folder, threads)
        found_rows = in_turns(contenders, **settings.pace, **settings.arrangement, title=f"loop, {pair}")
        rows = with_shares(found_rows)
    return Record(
        part="loop",
        settings=settings.of_networks
        | {
            "data": settings.source or f"{len(found)} drawn images",
            "images": min(len(found), count),
            "pair": [pair.refinery, pair.student],
            "threads": threads,
            "steps": settings.steps,
        },
        notes=[
            f"Training {pair.student} from {pair.refinery}, both with random weights, on random crops of "
            f"{images.described(settings.data, min(len(found), count))}, resized to {settings.resolution} px, from the "
            f"page cache, in batches of {settings.batch}. images/s of one device: median, lowest and highest of "
            f"{settings.turns} epochs of {settings.steps} steps, measured in turns, after one untimed turn.",
            f"loop: train.loop.Trainer on a converted set, {settings.computing}, {threads} decoding threads. step: its "
            "step alone, on one batch already on the device. baseline: Pillow in a DataLoader with "
            f"{threads} workers, transforms, float32, eager, NCHW, the refinery in training mode (bench/baseline.py). "
            "On a CPU, loop and step keep freed memory (train/device.py); the baseline uses PyTorch's defaults.",
            *limit_notes(settings),
            *gpu_notes(settings),
            *_findings(rows),
        ],
        rows=rows,
        identity=(Column("what", lambda row: row["name"]),),
        figures=step_columns(settings.device, Column("waiting", lambda row: f"{100 * row['waiting']:.1f} %")),
    )


def _contenders(pair: Pair, files: list[str], folder: Path, threads: int) -> list[Contender]:
    refinery, student = pair.demands()
    demand = refinery.plus(student)
    failed = ""
    if not pair.why_not():
        try:
            with Process() as process:
                seconds = process.call(write_inputs, pair, files, folder)
            print(f"converted: {len(files)} images in {seconds:.0f} s", flush=True)
        except CallFailed as error:
            failed = str(error)
    ours = [
        pair.contender(STEP, partial(_stepping, folder=folder, threads=threads), demand),
        pair.contender(LOOP, partial(_looping, folder=folder, threads=threads), demand),
    ]
    return [
        *limits(pair),
        pair.contender(BASELINE, partial(Baseline, files=files, workers=threads), demand),
        *(Contender(each.build, each.row, each.not_run or failed) for each in ours),
    ]


def _findings(rows: list[Row]) -> list[str]:
    """Returns notes that compare the loop with the step, the baseline and the limits, and the compiler's messages."""
    measured = ran(rows)
    rates = {name: row["rate"]["median"] for name, row in measured.items()}
    notes = demand_note(measured)
    if LOOP in rates and STEP in rates:
        notes.append(f"The loop reaches {100 * rates[LOOP] / rates[STEP]:.1f} % of the bare step (target: 95 %).")
    if LOOP in rates and BASELINE in rates:
        notes.append(f"The loop is {rates[LOOP] / rates[BASELINE]:.2f} times as fast as the baseline.")
    if "compiler" in measured.get(LOOP, {}):
        notes.append(compiler_note(measured[LOOP]["compiler"]).capitalize())
    return notes
