"""Estimates how long a training will take, from a few timed steps, and how much it writes."""

import contextlib
import gc
import io
import time
from collections.abc import Sequence
from dataclasses import replace

import torch

import models
from data.loader import CropBatch
from kernels.normalise import Normalise
from train.config import Config
from train.device import computing_in
from train.job import Job
from train.labels.category import CategoryLabels
from train.labels.ground_truth import GroundTruthLabels
from train.length import Cost, steps_left
from train.loop import Trainer

# A training with fewer pixels takes hardly longer than measuring it.
_FEW_PIXELS = 1 << 22
# Steps are timed with more and more crops, starting with this many per part of a step, until one takes this many
# seconds or is as large as the run's.
_FIRST_CROPS = 4
_LONG_ENOUGH = 0.4
# last.pt, last.before.pt and best.pt.
_CHECKPOINTS = 3


def is_short(job: Job) -> bool:
    """Whether a run sees so few pixels that timing it beforehand would take a noticeable share of it."""
    return steps_left(job) * job.batch * job.resolution**2 < _FEW_PIXELS


def measured(jobs: Sequence[Job]) -> Cost:
    """The cost of a training of these jobs, which train together: from a few steps, whose results are discarded.

    The steps run uncompiled, on as many crops as take a few tenths of a second, and a whole step is computed in
    proportion. Takes a second or two; random generators are left unchanged. Raises as train.loop.Trainer does.
    """
    devices = [job.device for job in jobs[:1] if job.device.type == "cuda"]
    with torch.random.fork_rng(devices), contextlib.redirect_stdout(io.StringIO()):
        cost = _measured([_quick_to_open(job) for job in jobs])
    gc.collect()
    if devices:
        torch.cuda.empty_cache()
    return cost


def _quick_to_open(job: Job) -> Job:
    """The same without what takes a pass over all images: labels by category, a set in the device's memory.

    A step costs about the same.
    """
    job = replace(job, config=job.config.replace({"resident": 0.0}))
    if isinstance(job.labels, CategoryLabels):
        return replace(job, labels=GroundTruthLabels(len(job.data.class_names), 0.0))
    return job


def _measured(jobs: Sequence[Job]) -> Cost:
    trainer = Trainer(jobs)
    trainer.step.use_eager()
    job, batch, decoding = jobs[0], *_batch(trainer)
    whole = len(batch.labels)
    crops = min(_FIRST_CROPS * job.replicas // job.group.world, whole)
    taken: list[tuple[int, float]] = []
    while True:
        smaller = batch.first(crops)
        trainer.train_on(smaller, 0, 0)
        seconds = _timed(trainer, smaller, training=True)
        taken.append((crops, seconds))
        if crops == whole or (len(taken) > 1 and seconds >= _LONG_ENOUGH):
            break
        crops = min((4 if seconds < _LONG_ENOUGH / 4 else 2) * crops, whole)
    # From their difference: the part of a step that does not depend on its crops, such as the weight update, is in
    # both.
    (fewer, before), (crops, seconds) = taken[-2:] if len(taken) > 1 else [(0, 0.0), *taken]
    step = seconds + max(seconds - before, 0.0) / (crops - fewer) * (whole - crops)
    forward = _timed(trainer, smaller, training=False) / crops
    images = -(-job.data.num_images("val") // job.group.world)
    on_cpu = job.device.type == "cpu"

    def both(computing: float, decoded: float) -> float:
        # With a GPU, the processors decode at the same time.
        return computing + decoded if on_cpu else max(computing, decoded)

    return Cost(both(step, decoding), both(images * forward, images * decoding / whole))


def _batch(trainer: Trainer) -> tuple[CropBatch, float]:
    """A batch of the run, and the seconds that the processors take to make one."""
    tries = []
    for _ in range(3):
        started = time.perf_counter()
        batches = trainer.loader.epoch(trainer.job.plan_epoch(0))
        batch = next(batches)
        tries.append(time.perf_counter() - started)
        batches.close()  # type: ignore[attr-defined]
    # The first one includes one-time costs.
    return batch, min(tries[1:])


def _timed(trainer: Trainer, batch: CropBatch, *, training: bool) -> float:
    """Seconds of a step, or of scoring as many crops: the shorter of two measurements, the same in all processes."""
    job = trainer.job
    tries = []
    for _ in range(2):
        started = time.perf_counter()
        if training:
            trainer.train_on(batch, 0, 0)
        else:
            with torch.inference_mode(), computing_in(job.autocast, job.device):
                for student in trainer.students:
                    student.scored.eval()
                    student.scored(Normalise(student.normalisation).to(job.device)(batch.crops))
        if job.device.type == "cuda":
            torch.cuda.synchronize(job.device)
        tries.append(time.perf_counter() - started)
    return job.group.largest([min(tries)])[0]


def checkpoint_bytes(config: Config, num_classes: int) -> int:
    """The approximate size of a run's checkpoint: weights, their average, and the optimizer's state."""
    with torch.device("meta"):
        network = models.build(config.model, num_classes)
    weights = sum(weight.numel() for weight in network.parameters())
    buffers = sum(buffer.numel() for buffer in network.buffers())
    kept = bool(config.optimizer.momentum) if config.optimizer.kind == "sgd" else 2
    return 4 * ((1 + bool(config.ema)) * (weights + buffers) + kept * weights)


def written_bytes(config: Config, num_classes: int) -> int:
    """An upper estimate of how much a run writes to its folder."""
    return _CHECKPOINTS * checkpoint_bytes(config, num_classes)
