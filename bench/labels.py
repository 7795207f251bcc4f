"""What kinds of labels say of the same crops, how fast one trains from them, and what they take."""

import itertools
import math
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bench import BenchError
from bench.loop import Looping
from bench.record import Column, Record, Row, figure, optional, rate_columns
from bench.turns import Contender, Runner, Work, in_turns
from data import scenes
from data.sources import scenes_fingerprint
from train.config import Config, configure
from train.device import computing_in, on_device, set_tf32_and_allocator
from train.interrupt import Stop
from train.job import Job, check, needs_refinery, resolve
from train.label import Labeller, LabelOptions
from train.labels.description import differences
from train.labels.store import Store, create_store, open_store
from train.step import COMPILER_OPTIONS

_GROUND_TRUTH, _REFINERY = "ground truth", "refinery"
# Classes of confidence over which the calibration error is taken.
_BINS = 15
# A turn lasts at least as long: several epochs, where they are short.
_SECONDS = 2.0


def measure(folders: Sequence[str], refinery: str, options: dict[str, Any], *, crops: int, turns: int) -> Record:
    """Compares stored labels with the refinery that made them and with the ground truth.

    options: of the runs that train from them (train.config.Config): data, model, device and so on. crops: how many are
    compared, about, and at most an epoch's. turns: timed ones of each.
    Raises BenchError, DataError, ModelError or TrainError for what cannot be compared.
    """
    stores = _opened(folders)
    configs = _configs(stores, refinery, options)
    found, kinds = check(configs)
    jobs = [resolve(config, found, its) for config, its in zip(configs, kinds, strict=True)]
    made = stores[0].description
    names = [_GROUND_TRUTH, _REFINERY, *(store.folder.name for store in stores)]
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        rows = _measured(names, configs, Path(folder), turns)
    plan = jobs[-1].labels.plan
    assert plan
    set_tf32_and_allocator(jobs[0].device, jobs[0].config.precision)
    said = [_said(job, plan.seed, crops) for job in jobs]
    for row, what, store in zip(rows, said, [None, None, *stores], strict=False):
        row |= _differences(what, said[1]) | (_costs(store) if store else {})
    return Record(
        part="compare-labels",
        settings={
            "data": found.name,
            "model": options["model"],
            "refinery": made.refinery["network"],
            "resolution": made.resolution,
            "batch": made.batch,
            "precision": jobs[0].config.precision,
            "compiled": jobs[0].compiled,
            "turns": turns,
        },
        notes=_notes(jobs[1], options["model"], turns, len(said[0].distribution)),
        rows=rows,
        identity=(Column("part", lambda row: row["group"]), Column("what", lambda row: row["name"])),
        figures=(
            *rate_columns("images/s"),
            optional("of the first", "ratio", _interval),
            optional("bytes a crop", "bytes_per_crop", str),
            optional("s an epoch", "seconds_an_epoch", figure),
            optional("agrees", "agreement", lambda share: f"{100 * share:.2f} %"),
            optional("KL", "divergence", lambda nats: f"{nats:.3g}"),
            optional("ECE", "calibration_error", lambda share: f"{100 * share:.1f} %"),
            optional("correct", "correct", lambda share: f"{100 * share:.1f} %"),
        ),
    )


def _opened(folders: Sequence[str]) -> list[Store]:
    """Raises BenchError unless the stores are of the same crops and refinery."""
    if not folders:
        raise BenchError("labels is empty: name folders of stored labels, with spaces between them")
    first, *others = stores = [open_store(folder) for folder in folders]
    if len({store.folder.name for store in stores}) < len(stores):
        raise BenchError(f"labels={' '.join(folders)}: rows are called by their folders; give these other names")
    own = {name: getattr(first.description, name) for name in ("format", "k", "dtype", "bytes_per_crop")}
    maps = [store.folder for store in stores if not store.description.plan]
    if maps:
        raise BenchError(f"labels={maps[0]}: maps have no plan of crops, and are not compared yet; leave it out")
    for store in others:
        found = differences(first.description, replace(store.description, **own))
        if found:
            raise BenchError(f"labels={store.folder}: cannot be compared with {first.folder} ({'; '.join(found)})")
    return stores


def _configs(stores: Sequence[Store], refinery: str, options: dict[str, Any]) -> list[Config]:
    """What trains from the ground truth, from the refinery and from each store, all on crops as in the stores."""
    made = stores[0].description
    common = options | {
        "recipe": "quick",
        # So many that none is the last.
        "epochs": 1_000_000,
        "batch": made.batch,
        "order": made.order,
        "copies": made.copies,
        "precision": made.precision,
        "resolution": made.resolution,
    }
    assert made.plan
    common |= {f"crop.{name}": value for name, value in made.plan["crop"].items()}
    online = {"refinery": refinery, "labels.bn": made.refinery["bn"], "labels.resolution": made.refinery["resolution"]}
    configs = [configure(common), configure(common | online)]
    if needs_refinery(configs[1]):
        raise BenchError(f"refinery={refinery}: name the run folder, or NETWORK:FILE, of the one that made the labels")
    # Named beside the labels too, so that another one than theirs is refused.
    stored = common | {"refinery": refinery, "labels.cycle": 1}
    return configs + [configure(stored | {"labels.stored": str(store.folder)}) for store in stores]


def _costs(store: Store) -> dict[str, Any]:
    seconds = [made["seconds"] for made in store.finished.values()]
    return {"bytes_per_crop": store.description.bytes_per_crop, "seconds_an_epoch": statistics.mean(seconds)}


# ---- what the labels say


@dataclass(frozen=True)
class Said:
    """What labels say of some crops.

    distribution: float32 [N, C]. likeliest: int64 [N]. images: the class of each crop's image, int64 [N]. shown: on
    `scenes` the class of what the crop shows, -1 for nothing; elsewhere None.
    """

    distribution: torch.Tensor
    likeliest: torch.Tensor
    images: torch.Tensor
    shown: torch.Tensor | None


@torch.no_grad()
def _said(job: Job, seed: int, crops: int) -> Said:
    """What the job's labels say of the first crops of an epoch of this seed."""
    source = on_device(job.labels.open(job), job.device)
    loader = replace(job, crop_seed=seed).open_crops(source)
    parts = []
    for batch in itertools.islice(loader.epoch(0), -(-crops // job.batch)):
        with computing_in(job.autocast, job.device):
            targets = source(batch)
        indices, boxes = batch.indices.cpu(), batch.boxes.cpu()
        truth = torch.from_numpy(scenes.crop_truth("train", indices.numpy(), boxes.numpy())) if _drawn(job) else indices
        parts.append((targets.distribution(loader.num_classes), targets.classes(), batch.labels, truth))
    columns = zip(*parts, strict=True)
    distribution, likeliest, images, shown = (torch.cat([part.cpu() for part in column]) for column in columns)
    return Said(distribution, likeliest, images, shown if _drawn(job) else None)


def _drawn(job: Job) -> bool:
    """Whether the data are `scenes`, where the truth about every crop is known."""
    return job.data.source_fingerprint == scenes_fingerprint()


def _differences(said: Said, refinery: Said) -> dict[str, Any]:
    """agreement: how often the likeliest class is the refinery's. divergence: KL(refinery || said), mean in nats, None
    where it is infinite. calibration_error: of the likeliest class's probability, against the image's class (Guo et al.
    2017, expected calibration error). correct: how often the likeliest class is what the crop shows, of crops that show
    something; None except on `scenes`.
    """
    q = said.distribution.double()
    p = refinery.distribution.double()
    divergence = torch.where(p > 0, p * (p / q).log(), 0.0).sum(dim=1).mean().item()
    correct = None
    if said.shown is not None:
        correct = (said.likeliest == said.shown)[said.shown >= 0].double().mean().item()
    return {
        "agreement": (said.likeliest == refinery.likeliest).double().mean().item(),
        "divergence": divergence if math.isfinite(divergence) else None,
        "calibration_error": calibration_error(q.amax(dim=1), said.likeliest == said.images),
        "correct": correct,
    }


def calibration_error(confidence: torch.Tensor, correct: torch.Tensor) -> float:
    """The expected calibration error over 15 bins of equal width. confidence: 0 to 1, [N]. correct: bool [N]."""
    bins = (confidence * _BINS).long().clamp(max=_BINS - 1)
    gaps = torch.zeros(_BINS, dtype=torch.float64).index_add(0, bins, confidence.double() - correct.double())
    return gaps.abs().sum().item() / len(confidence)


# ---- how fast


def _measured(names: Sequence[str], configs: Sequence[Config], folder: Path, turns: int) -> list[Row]:
    """Rows of training from each configuration's labels, and of labelling by that of the refinery."""
    batch = configs[0].batch
    training = [
        Contender(partial(Looping, config.replace({"runs": str(folder)})), _row("training", name, batch))
        for name, config in zip(names, configs, strict=True)
    ]
    labelling = [
        Contender(partial(Forward, configs[1]), _row("labelling", "the refinery's forward alone", batch)),
        Contender(partial(Storing, configs[1], folder), _row("labelling", "crops labelled into files", batch)),
    ]
    rows: list[Row] = []
    for members in (training, labelling):
        found = in_turns(members, turns=turns, seconds=_SECONDS, title=f"compare-labels, {members[0].row['group']}")
        if "not_run" not in found[0]:
            for row in found[1:]:
                if "not_run" not in row:
                    row["ratio"] = _paired_ratio(row, found[0])
        rows += found
    return rows


def _row(group: str, name: str, batch: int) -> Row:
    return {"name": name, "group": group, "unit": "images/s", "batch": batch}


def _paired_ratio(row: Row, first: Row) -> dict[str, float]:
    """Of the rates, turn by turn: median, lowest and highest."""
    rates = [[turn["amount"] / turn["seconds"] for turn in each["turns"]] for each in (row, first)]
    ratios = [ours / theirs for ours, theirs in zip(*rates, strict=True)]
    return {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)}


def _interval(ratio: dict[str, float]) -> str:
    return f"{ratio['median']:.3f} ({ratio['min']:.3f}–{ratio['max']:.3f})"


class Forward(Runner):
    """A refinery that labels a batch which lies ready, as often as an epoch has batches."""

    def __init__(self, config: Config):
        self._labeller = _labeller(config)
        job = self._labeller.job
        self.device = job.device.type
        logits = self._labeller.logits
        self._forward = (
            torch.compile(logits, fullgraph=True, dynamic=False, options=COMPILER_OPTIONS) if job.compiled else logits
        )
        (self._batch,) = itertools.islice(self._labeller.loader.epoch(0), 1)

    def run(self) -> Work:
        steps = self._labeller.loader.steps
        with torch.no_grad():
            for _ in range(steps):
                self._forward(self._batch)
        return Work(steps * len(self._batch.labels))


class Storing(Runner):
    """Epochs of packed labels, from images to files."""

    def __init__(self, config: Config, folder: Path):
        self._labeller = _labeller(config)
        self.device = self._labeller.job.device.type
        self._store = create_store(folder / "labels", self._labeller.description)
        self._epoch = 0

    def run(self) -> Work:
        with self._store.writing(self._epoch) as rows:
            assert rows is not None
            self._labeller.label_epoch(self._epoch, rows, Stop(), "labels")
        self._epoch += 1
        return Work(len(rows))


def _labeller(config: Config) -> Labeller:
    data, (labels,) = check([config])
    job = resolve(config, data, labels)
    set_tf32_and_allocator(job.device, job.config.precision)
    return Labeller(job, LabelOptions())


def _notes(job: Job, model: str, turns: int, crops: int) -> list[str]:
    made = job.config
    return [
        f"{crops} training crops of {job.data.name} at {job.resolution} px, in batches of {job.batch}, {made.precision}"
        f"{', compiled' if job.compiled else ''}. images/s of one device: median, lowest and highest of {turns} "
        "turns of whole epochs, after an untimed one each. of the first: the ratio to the first row of the part, turn "
        "by turn.",
        f"training: epochs of {model} on each kind of labels. labelling: the refinery by itself on a batch that lies "
        "ready, and train.label from images to files of packed labels. s an epoch: what labelling took then.",
        "agrees: how often the likeliest class is the refinery's. KL: KL(refinery || labels), mean in nats; – where it "
        "is infinite. ECE: expected calibration error against the image's class, 15 bins. correct: how often the "
        "likeliest class is what the crop shows, where that is known.",
    ]
