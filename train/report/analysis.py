"""The numbers of a report: trained networks' accuracy on each class, and their labels of single crops."""

import contextlib
import io
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from command import printable
from data import blocks, decoders, plan
from data.beton import Beton
from data.decoders import Request, View, build_decoder
from data.loader import CropBatch, open_loader
from data.pixels import open_image
from data.plan import CropRule
from data.sets import ConvertedSet
from kernels.normalise import Normalise
from models.classes import are_imagenet, by_id
from models.trained import Trained
from train import TrainError
from train.device import autocast_type, computing_in, on_device
from train.labels.refinery import Refinery
from train.runs import Run, key_of
from train.score import score, validation_loader

# The most likely classes of a crop, first to last, with their probabilities.
Labels = list[tuple[str, float]]

_LABELS_SHOWN = 3
# Twenty points are readable. Up to this many classes have a point each; of more, a bin has at least three.
_MOST_BINS, _LEAST_OF_A_BIN = 20, 3


@dataclass(frozen=True)
class Compute:
    """How crops are decoded and networks run. batch: crops at a time."""

    device: torch.device
    decoder: str
    threads: int
    batch: int


@dataclass(frozen=True)
class Subject:
    """A finished run in a report.

    name: in figures. trained: the weights of its last epoch. resolution (pixels per side), rule: of its
    crops. precision: what its network computes in.
    """

    run: Run
    name: str
    trained: Trained
    resolution: int
    rule: CropRule
    precision: str


@dataclass(frozen=True)
class Accuracy:
    """In percent. per_class: for each class, its images and its top-1 (None if it has no images)."""

    top1: float
    top5: float
    per_class: list[tuple[int, float | None]]


@dataclass(frozen=True)
class Accuracies:
    """Of one network. train, val_crops: on one random crop of each training and validation image, by one rule.

    val: on the central crops of the validation images, which are easier.
    """

    train: Accuracy
    val_crops: Accuracy
    val: Accuracy

    @property
    def gap(self) -> float:
        """Training less validation top-1, on crops of the same kind, in points."""
        return self.train.top1 - self.val_crops.top1


def readable(class_names: Sequence[str]) -> tuple[str, ...]:
    """Class names for readers: the first word for WordNet ids of ImageNet's classes, else the given names.

    If two classes have the same word (a crane may be a bird or a machine), the id follows it. Names are escaped for
    terminals and pages.
    """
    if not are_imagenet(class_names):
        return tuple(map(printable, class_names))
    # Importing timm takes seconds.
    from timm.data import ImageNetInfo

    known = ImageNetInfo()
    words = dict(zip(known.label_names(), known.label_descriptions(), strict=True))
    ids = by_id(class_names)
    names = [words.get(wordnet_id, wordnet_id).partition(",")[0] for wordnet_id in ids]
    times = Counter(names)
    return tuple(
        name if times[name] == 1 else f"{name} {wordnet_id}" for name, wordnet_id in zip(names, ids, strict=True)
    )


def accuracies(subject: Subject, data: ConvertedSet, *, seed: int, compute: Compute) -> Accuracies:
    """The network's accuracy on each class, in evaluation mode, on training and validation images.

    The random crops are those of the plan for epoch 0 of `seed`, one of each image. Computed once and cached in the
    run's folder, under a name of everything that they depend on, including decoder, kind of device and precision, since
    rounding may change the class of an uncertain crop.
    Raises DataError for damaged images.
    """
    of: dict[str, Any] = {
        "weights": subject.trained.digest,
        "images": data.fingerprint,
        "resolution": subject.resolution,
        "crop": asdict(subject.rule),
        "seed": seed,
        "decoder": decoders.choose(
            compute.decoder, compute.device, Beton(data.beton("train")), threads=compute.threads
        ),
        "device": compute.device.type,
        "precision": subject.precision,
    }
    path = subject.run.folder / f"accuracies-{key_of(of)}.json"
    # A file that was truncated while it was written is computed again.
    with contextlib.suppress(FileNotFoundError, ValueError, KeyError, TypeError):
        kept = json.loads(path.read_text())
        found = Accuracies(*(_accuracy(**kept[each.name]) for each in fields(Accuracies)))
        print(f"{subject.name}: accuracy of each class from {path}", flush=True)
        return found
    resolution, rule = subject.resolution, subject.rule
    loading: dict[str, Any] = {"decoder": compute.decoder, "device": compute.device, "threads": compute.threads}
    train, val_crops = (
        open_loader(
            data.beton(split),
            resolution=resolution,
            batch_size=compute.batch,
            seed=seed,
            order="sequential",
            drop_last=False,
            crop=rule,
            **loading,
        )
        for split in ("train", "val")
    )
    val = validation_loader(data, resolution=resolution, crop=rule, batch=compute.batch, **loading)
    print(
        f"{subject.name}: accuracy of each class on {train.num_samples} training and {val.num_samples} validation "
        "images",
        flush=True,
    )
    network = on_device(subject.trained.network, compute.device)
    autocast = autocast_type(subject.precision)
    splits = []
    for loader in (train, val_crops, val):
        scores = score(network, loader, subject.trained.normalisation, device=compute.device, autocast=autocast)
        splits.append(_accuracy(scores.top1, scores.top5, scores.per_class))
    found = Accuracies(*splits)
    written = {"of": of, "class_names": data.class_names} | asdict(found)
    try:
        path.write_text(json.dumps(written, indent=1) + "\n")
    except OSError as error:
        print(f"{path}: cannot be written ({error.strerror}); the next report computes this again", flush=True)
    return found


def _accuracy(top1: float, top5: float, per_class: Iterable[Sequence[Any]]) -> Accuracy:
    # JSON turns tuples into lists.
    return Accuracy(top1, top5, [(images, of_class) for images, of_class in per_class])


def of_classes(accuracy: Accuracy) -> NDArray[np.float64]:
    """Accuracy of each class in percent, float64 [C]; NaN for a class without images."""
    return np.array([np.nan if top1 is None else top1 for _, top1 in accuracy.per_class])


@dataclass(frozen=True)
class Bins:
    """Classes sorted by training accuracy and binned, each float64 [bins], in percent (Figure 4 of the paper).

    train: mean training accuracy of the bin's classes. val: mean of their validation accuracies, on the same kind of
    crops; low, high: the lowest and the highest of these. sizes: int, how many classes they are.
    """

    train: NDArray[np.float64]
    val: NDArray[np.float64]
    low: NDArray[np.float64]
    high: NDArray[np.float64]
    sizes: NDArray[np.int64]


def binned(found: Accuracies) -> Bins:
    """A bin for each class, up to twenty classes; of more, bins of equal size (within one), at least three each.

    Classes without training or validation images are omitted.
    """
    train, val = of_classes(found.train), of_classes(found.val_crops)
    known = np.flatnonzero(np.isfinite(train) & np.isfinite(val))
    ordered = known[np.argsort(train[known], kind="stable")]
    few = len(ordered) <= _MOST_BINS
    members = np.array_split(ordered, len(ordered) if few else min(_MOST_BINS, len(ordered) // _LEAST_OF_A_BIN))
    return Bins(
        train=np.array([train[ids].mean() for ids in members]),
        val=np.array([val[ids].mean() for ids in members]),
        low=np.array([val[ids].min() for ids in members]),
        high=np.array([val[ids].max() for ids in members]),
        sizes=np.array([len(ids) for ids in members]),
    )


def choose_images(beton: Beton, count: int, *, seed: int) -> list[int]:
    """At most `count` images of different classes: the first of each in the plan's random order of epoch 0."""
    order = plan.epoch_order(beton.num_samples, seed=seed, epoch=0)
    _, firsts = np.unique(beton.labels[order], return_index=True)
    return order[np.sort(firsts)[:count]].tolist()


def named_images(option: str, words: str | None, beton: Beton) -> list[int]:
    """The images that the value of an option names by their indices; none if it was left out.

    Raises TrainError unless they are indices of the set's images.
    """
    if words is None:
        return []
    try:
        found = [int(word) for word in words.replace(",", " ").split()]
    except ValueError:
        found = []
    if not found or not all(0 <= index < beton.num_samples for index in found) or len(set(found)) < len(found):
        raise TrainError(
            f"{option}={words}: give numbers from 0 to {beton.num_samples - 1}, each once, with spaces between them"
        )
    return found


def training_crops(beton: Beton, indices: Sequence[int], rule: CropRule, *, seed: int, copies: int = 1) -> Request:
    """`copies` random crops of each image; the first is the one that `accuracies` counts."""
    images = np.asarray(indices, dtype=np.int64)
    drawn = [rule.training(images, beton.sizes[images], seed=seed, epoch=0, copy=copy) for copy in range(copies)]
    boxes, flips = (np.ascontiguousarray(np.stack(parts, axis=1)) for parts in zip(*drawn, strict=True))
    return Request(images, boxes, flips)


def central_crops(beton: Beton, indices: Sequence[int], rule: CropRule) -> Request:
    """The validation crop of each image."""
    images = np.asarray(indices, dtype=np.int64)
    boxes, flips = rule.validation(beton.sizes[images])
    return Request(images, boxes[:, None], flips[:, None])


@torch.no_grad()
def predictions(
    subject: Subject, beton: Beton, crops: Request, *, names: Sequence[str], compute: Compute
) -> list[Labels]:
    """The three most likely classes of each image's one crop, by the network in evaluation mode.

    names: of the classes.
    """
    network = on_device(subject.trained.network, compute.device).eval()
    normalise = Normalise(subject.trained.normalisation).to(compute.device)
    pixels = _pixels(beton, crops, subject.resolution, compute)
    with computing_in(autocast_type(subject.precision), compute.device):
        logits = network(normalise(pixels))
    return likeliest(logits.float().softmax(dim=1), names)


@dataclass(frozen=True)
class Labelling:
    """How a refinery labels the crops of a student in training.

    whose: a phrase that names the network. bn, resolution: see Refinery.
    """

    refinery: Trained
    whose: str
    student: Subject
    bn: str
    resolution: int | None

    @property
    def batch(self) -> int:
        """Crops at a time; at least two, since a single one has no batch statistics."""
        return max(2, self.student.run.identity["batch"])


@torch.no_grad()
def refinery_labels(
    labelling: Labelling,
    beton: Beton,
    indices: Sequence[int],
    *,
    seed: int,
    copies: int,
    names: Sequence[str],
    compute: Compute,
) -> tuple[Request, list[list[Labels]]]:
    """Random crops of training images, and the three most likely classes of each by the refinery.

    Batch statistics are those of a training batch: it is filled up with crops of other images, in the plan's order.
    names: of the classes.
    Returns the crops of these images, and labels [image][copy].
    """
    student = labelling.student
    order = plan.epoch_order(beton.num_samples, seed=seed, epoch=0)
    others = order[~np.isin(order, indices)].tolist() if labelling.bn == "batch" else []
    images = [*indices, *others][: max(labelling.batch, len(indices))]
    n = len(images)
    crops = training_crops(beton, images, student.rule, seed=seed, copies=copies)
    autocast = autocast_type(student.precision)
    refinery = Refinery(
        labelling.refinery.network,
        labelling.refinery.normalisation,
        bn=labelling.bn,
        resolution=labelling.resolution,
        columns=labelling.refinery.columns_of(student.trained.class_names),
        dtype=autocast or torch.float32,
    )
    refinery = on_device(refinery, compute.device)
    pixels = _pixels(beton, crops, student.resolution, compute)
    labels = []
    for copy in range(copies):
        batch = CropBatch(
            crops=pixels[copy * n : (copy + 1) * n],
            labels=torch.from_numpy(beton.labels[images]),
            indices=torch.from_numpy(crops.indices),
            copies=torch.full((n,), copy),
            epoch=0,
            boxes=torch.from_numpy(crops.boxes[:, copy]),
            sizes=torch.from_numpy(beton.sizes[images]),
            flips=torch.from_numpy(crops.flips[:, copy]),
        )
        with computing_in(autocast, compute.device):
            logits = refinery(batch).logits
        labels.append(likeliest(logits[: len(indices)].float().softmax(dim=1), names))
    shown = len(indices)
    return Request(crops.indices[:shown], crops.boxes[:shown], crops.flips[:shown]), [
        list(of_image) for of_image in zip(*labels, strict=True)
    ]


def picture(beton: Beton, index: int) -> NDArray[np.uint8]:
    """A stored image, whole: uint8 [height, width, 3]."""
    data = beton.encoded(index)
    if beton.raw[index]:
        return data.reshape(*beton.sizes[index], 3)
    if beton.in_blocks:
        return blocks.decode(data, *map(int, beton.sizes[index]))
    return np.asarray(open_image(io.BytesIO(data.tobytes())).convert("RGB"))


def cut_out(image: NDArray[np.uint8], box: NDArray[np.int32], flip: bool) -> NDArray[np.uint8]:
    """The crop of an image [height, width, 3], at the image's own resolution."""
    top, left, height, width = map(int, box)
    crop = image[top : top + height, left : left + width]
    return crop[:, ::-1] if flip else crop


def _pixels(beton: Beton, crops: Request, resolution: int, compute: Compute) -> torch.Tensor:
    """uint8 [copies * n, 3, R, R] on the device, all images' first crops first."""
    n, copies = crops.flips.shape
    decoder = build_decoder(
        compute.decoder,
        beton,
        views=(View(copies, resolution),),
        device=compute.device,
        threads=compute.threads,
        max_batch=n,
    )
    ((pixels,),) = decoder.decode([crops])
    return pixels


def likeliest(distribution: torch.Tensor, names: Sequence[str]) -> list[Labels]:
    """The three most likely classes of each crop, with their probabilities.

    distribution: each crop's probabilities of all classes, float32 [B, C]. names: of the classes.
    """
    found = distribution.topk(min(_LABELS_SHOWN, len(names)), dim=1)
    return [
        [(names[place], chance) for place, chance in zip(places, chances, strict=True)]
        for places, chances in zip(found.indices.tolist(), found.values.tolist(), strict=True)
    ]
