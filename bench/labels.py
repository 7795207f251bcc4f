"""Compares kinds of labels on the same crops: how they differ, the speed of training from them, and their size."""

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
from train.labels.description import Description, differences
from train.labels.store import Store, create_store, open_store
from train.step import COMPILER_OPTIONS

_GROUND_TRUTH, _REFINERY = "ground truth", "refinery"
# Bins of confidence for the calibration error.
_BINS = 15
# Crops by their share of the image's area.
_QUARTERS = ("up to 25 %", "25 to 50 %", "50 to 75 %", "over 75 %")
# Minimum length of a turn, which runs several epochs if they are short.
_SECONDS = 2.0


def measure(folders: Sequence[str], refinery: str, options: dict[str, Any], *, crops: int, turns: int) -> Record:
    """Compares stored labels and label maps with the refinery that made them and with the ground truth.

    options: options of the runs that train from them (train.config.Config): data, model, device and so on; resolution
    and batch only if maps alone are compared. crops: approximate number of crops compared, at most an epoch's. turns:
    number of timed turns of each contender.
    Raises BenchError, DataError, ModelError or TrainError for folders that cannot be compared.
    """
    stores = _opened(folders)
    configs = _configs(stores, refinery, options)
    found, kinds = check(configs)
    jobs = [resolve(config, found, its) for config, its in zip(configs, kinds, strict=True)]
    names = [_GROUND_TRUTH, _REFINERY, *(store.folder.name for store in stores)]
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        rows = _measured(names, configs, Path(folder), turns)
    set_tf32_and_allocator(jobs[0].device, jobs[0].config.precision)
    seed = _seed(stores, jobs[1])
    labels = [_crop_labels(job, seed, crops) for job in jobs]
    for row, its, store in zip(rows, labels, [None, None, *stores], strict=False):
        row |= _differences(its, labels[1]) | (_costs(store) if store else {})
    rows += _by_size(names, labels)
    return Record(
        part="compare-labels",
        settings={
            "data": found.name,
            "model": options["model"],
            "refinery": stores[0].network["network"],
            "resolution": jobs[0].resolution,
            "batch": jobs[0].batch,
            "precision": jobs[0].config.precision,
            "compiled": jobs[0].compiled,
            "turns": turns,
        },
        notes=_notes(jobs[1], stores, options["model"], turns, len(labels[0].distribution)),
        rows=rows,
        identity=(Column("part", lambda row: row["group"]), Column("what", lambda row: row["name"])),
        figures=(
            *rate_columns("images/s"),
            optional("of the first", "ratio", _interval),
            optional("bytes", "bytes_per_row", str),
            optional("s to make", "seconds_to_make", figure),
            Column("crops", lambda row: str(row["crops"]) if "crops" in row else "–"),
            optional("agrees", "agreement", lambda share: f"{100 * share:.2f} %"),
            optional("KL", "divergence", lambda nats: f"{nats:.3g}"),
            optional("ECE", "calibration_error", lambda share: f"{100 * share:.1f} %"),
            optional("correct", "correct", lambda share: f"{100 * share:.1f} %"),
        ),
    )


def _opened(folders: Sequence[str]) -> list[Store]:
    """Returns the opened stores: stored labels first, then maps.

    Raises BenchError unless all were made by one refinery, and all stored labels for the same crops.
    """
    if not folders:
        raise BenchError("labels is empty: name folders of stored labels or maps, separated by spaces")
    # The sort is stable: within a kind, the order of the folders is kept.
    first, *others = stores = sorted(map(open_store, folders), key=lambda store: store.description.plan is None)
    if len({store.folder.name for store in stores}) < len(stores):
        raise BenchError(
            f"labels={' '.join(folders)}: two folders have the same name, which names their rows; rename one"
        )
    for store in others:
        found = differences(first.description, _as_compared(store, first))
        if found:
            raise BenchError(f"labels={store.folder}: cannot be compared with {first.folder} ({'; '.join(found)})")
    return stores


def _as_compared(store: Store, first: Store) -> Description:
    """Returns the store's description, with the fields that may differ replaced by those of the first store."""
    made, others = store.description, first.description
    if made.plan is None:
        return replace(others, data=made.data, refinery=others.refinery | store.network)
    return replace(made, **{name: getattr(others, name) for name in ("format", "k", "dtype", "bytes_per_crop")})


def _configs(stores: Sequence[Store], refinery: str, options: dict[str, Any]) -> list[Config]:
    """Returns configurations that train from the ground truth, the refinery and each store, on the same crops."""
    made = stores[0].description
    common = options | {
        "recipe": "quick",
        # More than are ever run.
        "epochs": 1_000_000,
        "precision": made.precision,
    }
    if made.plan:
        for name in ("resolution", "batch"):
            if name in options:
                raise BenchError(
                    f"{name}={options[name]}: is for maps alone; {stores[0].folder} has {getattr(made, name)}; leave "
                    "it out"
                )
        common |= {"batch": made.batch, "order": made.order, "copies": made.copies, "resolution": made.resolution}
        common |= {f"crop.{name}": value for name, value in made.plan["crop"].items()}
    # As in the stored labels. The resolution of maps is that of whole images, so it is not used.
    as_made = {"labels.bn": made.refinery["bn"], "labels.resolution": made.plan and made.refinery["resolution"]}
    configs = [configure(common), configure(common | {"refinery": refinery} | as_made)]
    if needs_refinery(configs[1]):
        raise BenchError(
            f"refinery={refinery}: name the run folder, or NETWORK:FILE, of the refinery that made the labels"
        )
    for store in stores:
        # With the refinery given too, labels of another refinery are refused.
        stored = common | {"refinery": refinery, "labels.stored": str(store.folder)}
        configs.append(configure(stored | ({"labels.cycle": 1} if store.description.plan else {})))
    return configs


def _seed(stores: Sequence[Store], online: Job) -> int:
    """Returns the seed of the compared crops: that of the stored labels, or with maps alone that of a training run."""
    made = stores[0].description
    return made.seed if made.plan else online.crop_seed


def _costs(store: Store) -> dict[str, Any]:
    seconds = [made["seconds"] for made in store.finished.values()]
    return {"bytes_per_row": store.description.bytes_per_crop, "seconds_to_make": statistics.mean(seconds)}


# ---- differences between labels


@dataclass(frozen=True)
class CropLabels:
    """The labels of N crops, of C classes.

    distribution: float32 [N, C]. likeliest: the most likely class, int64 [N]. images: the class of each crop's image,
    int64 [N]. areas: the crop's share of its image's area, above 0 and up to 1, float64 [N]. shown: for `scenes` the
    class that the crop itself shows, or -1 if it shows none, int64 [N]; None for other data.
    """

    distribution: torch.Tensor
    likeliest: torch.Tensor
    images: torch.Tensor
    areas: torch.Tensor
    shown: torch.Tensor | None

    def of(self, crops: torch.Tensor) -> "CropLabels":
        """Returns the labels of the selected crops. crops: bool [N]."""
        shown = None if self.shown is None else self.shown[crops]
        return CropLabels(self.distribution[crops], self.likeliest[crops], self.images[crops], self.areas[crops], shown)


@torch.no_grad()
def _crop_labels(job: Job, seed: int, crops: int) -> CropLabels:
    """Returns the job's labels of the first `crops` crops, in whole batches, of epoch 0 with this seed."""
    source = on_device(job.labels.open(job), job.device)
    loader = replace(job, crop_seed=seed).open_crops(source)
    parts = []
    for batch in itertools.islice(loader.epoch(0), -(-crops // job.batch)):
        with computing_in(job.autocast, job.device):
            targets = source(batch)
        indices, boxes = batch.indices.cpu(), batch.boxes.cpu()
        truth = torch.from_numpy(scenes.crop_truth("train", indices.numpy(), boxes.numpy())) if _drawn(job) else indices
        areas = boxes[:, 2:].prod(dim=1) / batch.sizes.cpu().prod(dim=1).double()
        parts.append((targets.distribution(loader.num_classes), targets.classes(), batch.labels, areas, truth))
    columns = zip(*parts, strict=True)
    distribution, likeliest, images, areas, shown = (torch.cat([part.cpu() for part in column]) for column in columns)
    return CropLabels(distribution, likeliest, images, areas, shown if _drawn(job) else None)


def _drawn(job: Job) -> bool:
    """Whether the data are `scenes`, for which the class that each crop shows is known."""
    return job.data.source_fingerprint == scenes_fingerprint()


def _differences(labels: CropLabels, refinery: CropLabels) -> dict[str, Any]:
    """Returns how labels differ from those of the refinery on the same crops.

    crops: number of crops. agreement: the share of crops with the same most likely class. divergence: KL(refinery ||
    labels), mean in nats, None if it is infinite. calibration_error: expected calibration error (Guo et al. 2017) of
    the most likely class against the image's class. correct: the share of crops whose most likely class is the class
    that the crop shows, among crops that show one; None if there are none, and for other data than `scenes`.
    """
    q = labels.distribution.double()
    p = refinery.distribution.double()
    divergence = torch.where(p > 0, p * (p / q).log(), 0.0).sum(dim=1).mean().item()
    correct = None
    if labels.shown is not None and (labels.shown >= 0).any():
        correct = (labels.likeliest == labels.shown)[labels.shown >= 0].double().mean().item()
    return {
        "crops": len(q),
        "agreement": (labels.likeliest == refinery.likeliest).double().mean().item(),
        "divergence": divergence if math.isfinite(divergence) else None,
        "calibration_error": calibration_error(q.amax(dim=1), labels.likeliest == labels.images),
        "correct": correct,
    }


def _by_size(names: Sequence[str], labels: Sequence[CropLabels]) -> list[Row]:
    """Returns rows of differences by the crops' share of the image's area, in quarters; they have no rate.

    labels: of the same crops, with the refinery's at index 1.
    """
    quarters = (4 * labels[0].areas).ceil().long() - 1
    return [
        {"name": name, "group": f"crops of {_QUARTERS[quarter]}"}
        | _differences(each.of(quarters == quarter), labels[1].of(quarters == quarter))
        for quarter in quarters.unique().tolist()
        for name, each in zip(names, labels, strict=True)
    ]


def calibration_error(confidence: torch.Tensor, correct: torch.Tensor) -> float:
    """Returns the expected calibration error, 0 to 1, over 15 bins of equal width.

    confidence: probability of the most likely class, 0 to 1, [N]. correct: bool [N].
    """
    bins = (confidence * _BINS).long().clamp(max=_BINS - 1)
    gaps = torch.zeros(_BINS, dtype=torch.float64).index_add(0, bins, confidence.double() - correct.double())
    return gaps.abs().sum().item() / len(confidence)


# ---- speed


def _measured(names: Sequence[str], configs: Sequence[Config], folder: Path, turns: int) -> list[Row]:
    """Returns rows for training from each configuration's labels, and for labelling with the refinery."""
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
    """Returns median, min and max of the ratios of two rows' rates, turn by turn."""
    rates = [[turn["amount"] / turn["seconds"] for turn in each["turns"]] for each in (row, first)]
    ratios = [ours / theirs for ours, theirs in zip(*rates, strict=True)]
    return {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)}


def _interval(ratio: dict[str, float]) -> str:
    return f"{ratio['median']:.3f} ({ratio['min']:.3f}–{ratio['max']:.3f})"


class Forward(Runner):
    """Labels a prepared batch with the refinery as often as an epoch has batches."""

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
    """Labels an epoch per turn, from images to files of packed labels."""

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


def _notes(job: Job, stores: Sequence[Store], model: str, turns: int, crops: int) -> list[str]:
    """Returns notes on how to read the record. job: that of the refinery."""
    made, smallest, largest = job.config, *(f"{100 * share:g}" for share in job.crop.scale)
    return [
        f"{crops} training crops of {job.data.name} at {job.resolution} px, {smallest} to {largest} % of the image's "
        f"area, in batches of {job.batch}, {made.precision}{', compiled' if job.compiled else ''}. images/s of one "
        f"device: median, lowest and highest of {turns} turns of whole epochs, after one untimed turn. of the first: "
        "the ratio to the first row of the part, turn by turn.",
        f"training: epochs of {model} on each kind of labels. labelling: the refinery alone on a prepared batch, and "
        "train.label from images to files of packed labels. bytes: the size of a crop's label in one epoch, or of an "
        "image's map for all epochs. s to make: the seconds it took to label an epoch, or to make all maps.",
        *_statistics(made.labels.bn, stores),
        "agrees: how often the most likely class is the refinery's. KL: KL(refinery || labels), mean in nats; – if it "
        "is infinite. ECE: expected calibration error against the image's class, 15 bins. correct: how often the most "
        "likely class is the class that the crop shows, if that is known. crops of ...: the same for crops with that "
        "share of the image's area.",
    ]


def _statistics(bn: str, stores: Sequence[Store]) -> list[str]:
    """Returns a note on the batch statistics the refinery labels with, which limit how closely maps can agree with it.

    Returns [] without maps.
    """
    maps = [store.description for store in stores if store.description.plan is None]
    if not maps:
        return []
    kinds = ", ".join(f"{made.cells}x{made.cells} cells at {made.resolution} px" for made in maps)
    if len(maps) == len(stores):
        used = "running statistics, which the maps were made with (Label Refinery uses batch statistics)"
    elif bn == "running":
        used = "running statistics, as in the stored labels and in maps"
    else:
        used = f"{bn} statistics, as in the stored labels; the maps were made with running statistics"
    return [f"maps: {kinds}. The refinery labels the crops with {used}."]
