"""How long a training will take, from a few timed steps, and how much it writes."""

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

# A training of fewer pixels is over about as soon as it is measured.
_FEW_PIXELS = 1 << 22
# Steps are timed with more and more crops, until one takes so long, in seconds, or is as large as the run's.
_LONG_ENOUGH = 0.4
# last.pt, last.before.pt and best.pt.
_CHECKPOINTS = 3


def is_short(job: Job) -> bool:
    """Whether a run sees so few pixels that timing it beforehand would be felt."""
    return steps_left(job) * job.batch * job.resolution**2 < _FEW_PIXELS


def measured(jobs: Sequence[Job]) -> Cost:
    """What a training of these jobs, which train together, costs: from a few steps of it, whose results are dropped.

    The steps run uncompiled, and on as many crops as take some tenths of a second, from which those of a whole step
    follow in proportion. Takes a second or two; random generators stay as they are. Raises as train.loop.Trainer.
    """
    devices = [job.device for job in jobs[:1] if job.device.type == "cuda"]
    with torch.random.fork_rng(devices), contextlib.redirect_stdout(io.StringIO()):
        cost = _measured([_quick_to_open(job) for job in jobs])
    gc.collect()
    if devices:
        torch.cuda.empty_cache()
    return cost


def _quick_to_open(job: Job) -> Job:
    """The same with other labels where those take a pass over all images to make; a step of both costs the same."""
    if isinstance(job.labels, CategoryLabels):
        return replace(job, labels=GroundTruthLabels(len(job.data.class_names), 0.0))
    return job


def _measured(jobs: Sequence[Job]) -> Cost:
    trainer = Trainer(jobs)
    trainer.step.use_eager()
    job, batch, decoding = jobs[0], *_batch(trainer)
    parts = job.replicas // job.group.world
    whole, crops = len(batch.labels), min(2 * parts, len(batch.labels))
    trainer.train_on(batch.first(crops), 0, 0)
    while True:
        step = _timed(trainer, batch.first(crops), training=True)
        if crops == whole or step >= _LONG_ENOUGH:
            break
        crops = min(4 * crops if step < _LONG_ENOUGH / 8 else 2 * crops, whole)
        trainer.train_on(batch.first(crops), 0, 0)
    forward = _timed(trainer, batch.first(crops), training=False) / crops
    images = -(-job.data.num_images("val") // job.group.world)
    on_cpu = job.device.type == "cpu"

    def both(computing: float, decoded: float) -> float:
        # On a GPU the processors decode beside it.
        return computing + decoded if on_cpu else max(computing, decoded)

    return Cost(both(step * whole / crops, decoding), both(images * forward, images * decoding / whole))


def _batch(trainer: Trainer) -> tuple[CropBatch, float]:
    """A batch of the run, and the seconds in which the processors make one."""
    for _ in range(2):  # the first one pays for what is made once
        started = time.perf_counter()
        batches = trainer.loader.epoch(trainer.job.plan_epoch(0))
        batch = next(batches)
        seconds = time.perf_counter() - started
        batches.close()  # type: ignore[attr-defined]
    return batch, seconds


def _timed(trainer: Trainer, batch: CropBatch, *, training: bool) -> float:
    """Seconds of a step, or of scoring as many crops; the same in all processes."""
    job = trainer.job
    started = time.perf_counter()
    if training:
        trainer.step(batch)
    else:
        with torch.inference_mode(), computing_in(job.autocast, job.device):
            for student in trainer.students:
                student.scored.eval()
                student.scored(Normalise(student.normalisation).to(job.device)(batch.crops))
    if job.device.type == "cuda":
        torch.cuda.synchronize(job.device)
    return job.group.largest([time.perf_counter() - started])[0]


def checkpoint_bytes(config: Config, num_classes: int) -> int:
    """About how large a checkpoint of a run is: weights, their average, and what the optimizer keeps of each."""
    with torch.device("meta"):
        network = models.build(config.model, num_classes)
    weights = sum(weight.numel() for weight in network.parameters())
    buffers = sum(buffer.numel() for buffer in network.buffers())
    kept = bool(config.optimizer.momentum) if config.optimizer.kind == "sgd" else 2
    return 4 * ((1 + bool(config.ema)) * (weights + buffers) + kept * weights)


def written_bytes(config: Config, num_classes: int) -> int:
    """About how much a run writes to its folder, at most."""
    return _CHECKPOINTS * checkpoint_bytes(config, num_classes)
