"""Scores a trained network on a validation set: top-1, top-5 and the accuracy of each class, ReaL and multi-label.

python -m train.evaluate --checkpoint runs/scenes/... --data images/
python -m train.evaluate --checkpoint torchvision:resnet50:pretrained --data imagenet/val --split all --real real.json
make evaluate CHECKPOINT=runs/scenes/... DATA=images/
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Literal

import torch

from command import printable, run_command
from data.convert import ensure_converted
from data.loader import Loader
from data.originals import Originals
from data.plan import CropRule
from data.sets import ConvertedSet, Unconverted, find_set, is_converted
from data.sources import Source, open_source
from models.classes import are_imagenet, by_id, class_columns, lacking
from models.trained import Trained, load_trained
from train import TrainError
from train.device import autocast_type, device_named, on_device, precision_on, set_tf32_and_allocator, set_threads
from train.score import Scores, score, validation_loader
from train.score.multilabel import (
    Accuracy,
    Answers,
    Labels,
    multi_label_accuracy,
    read_multi_label,
    read_real,
    real_accuracy,
)

# For images whose set has no crop rule, where the network doesn't say either.
_USUAL_RESOLUTION = 224

# Labels of images that may have several, and how they are counted, by what they are called.
_Asked = dict[str, tuple[Labels, Callable[[Labels, Answers], Accuracy]]]


def evaluate(
    checkpoint: str,
    data: str = "scenes",
    out: str | None = None,
    resolution: int | None = None,
    batch: int = 256,
    decoder: str = "auto",
    device: str = "auto",
    threads: int | None = None,
    split: Literal["val", "all"] = "val",
    real: str | None = None,
    multi_label: str | None = None,
) -> None:
    """Scores a checkpoint on the validation images of a set, and writes the scores with the accuracy of each class.

    Where the set has only some of the network's classes, the network chooses among these. A network of some of
    ImageNet's classes is scored on the images of these. Folders numbered 0 to 999, as ImageNetV2's are, are ImageNet's
    classes in their order.

    For ReaL and multi-label accuracy (train/score/multilabel.py), labels outside the classes that are scored are
    dropped, and images left without labels are not scored.

    Args:
        checkpoint: a run folder, a checkpoint file, NAME:FILE for a bare file of weights, or for published ones
            timm:NAME:pretrained or torchvision:NAME:pretrained
        data: a folder of images, a converted set, or scenes, cifar10, svhn, imagenette
        out: the JSON file to write (default: beside the checkpoint; for published weights, here)
        resolution: pixels a side of the crops (default: what the network was trained at)
        batch: crops at a time
        decoder: auto, ffcv, dali or torchvision
        device: auto, cpu, cuda or cuda:N
        threads: that decode, and as many that compute on the CPU (default: one per processor)
        split: all scores every image of class folders without train/ and val/, not the tenth of them that training
            holds out: for sets made for evaluation. Like real and multi_label it reads the image files as they are
        real: real.json, for ReaL accuracy too: of the images with labels there (ILSVRC2012_val_00000001 and so on), the
            share whose likeliest class is one of them
        multi_label: human_accuracy_v3.0.0.json, for multi-label accuracy too: the share of a class's images whose
            likeliest class experts judged right or unclear, without problematic images; the mean over the classes
    """
    where = device_named(device)
    set_threads(threads)
    found, asked = find_images(data, split, real, multi_label)
    trained = load_trained(checkpoint, class_names=found.class_names)
    columns = scored_columns(trained, found.class_names, data)
    loader: Loader | Originals
    if isinstance(found, Source):
        side, crop = crops_for(trained, found.resolution or _USUAL_RESOLUTION, found.crop or CropRule(), resolution)
        loader = Originals(
            found.val,
            found.class_names,
            resolution=side,
            batch_size=batch,
            center_ratio=crop.center_ratio,
            device=where,
            threads=threads,
        )
        _check_names(loader.files, asked, data)
        scores = _scored(trained, loader, columns, where)
        several = _by_labels(asked, found, loader.files, columns, scores)
    else:
        ready = ensure_converted(found)
        side, crop = crops_for(trained, ready.resolution, ready.crop, resolution)
        loader = validation_loader(
            ready, resolution=side, crop=crop, batch=batch, decoder=decoder, device=where, threads=threads
        )
        scores, several = _scored(trained, loader, columns, where), {}
    _print(scores, several, side, known=sum(column >= 0 for column in columns))
    written = {
        "checkpoint": trained.origin,
        "network": trained.name,
        "data": data,
        "resolution": side,
        "top1": scores.top1,
        "top5": scores.top5,
        "images": scores.images,
        **{kind.lower().replace("-", "_"): asdict(accuracy) for kind, accuracy in several.items()},
        "per_class": {
            name: {"images": images, "top1": top1}
            for name, (images, top1) in zip(found.class_names, scores.per_class, strict=True)
        },
    }
    _write(written, Path(out) if out else _beside(trained, data))


def find_images(
    data: str, split: str, real: str | None, multi_label: str | None
) -> tuple[Source | ConvertedSet | Unconverted, _Asked]:
    """What is to be scored, from image files or as a converted set, and the labels that were asked for; see evaluate.

    Raises DataError and TrainError for what cannot be.
    """
    asked: _Asked = {}
    if real:
        asked["ReaL"] = read_real(Path(real)), real_accuracy
    if multi_label:
        asked["multi-label"] = read_multi_label(Path(multi_label)), multi_label_accuracy
    from_files = split == "all" or bool(asked)
    return _image_files(data, split, labelled=bool(asked)) if from_files else find_set(data), asked


def _print(scores: Scores, several: Mapping[str, Accuracy], side: int, *, known: int) -> None:
    """known: classes that network and set have in common."""
    print(f"top-1 {scores.top1:.2f} %, top-5 {scores.top5:.2f} % on {scores.images} images at {side} px")
    for kind, accuracy in several.items():
        percent = "unknown" if accuracy.percent is None else f"{accuracy.percent:.2f} %"
        print(
            f"{kind} {percent} on {accuracy.images} images; {accuracy.left_out} more have no label among the {known} "
            "classes"
        )


def _check_names(files: Sequence[str], asked: _Asked, data: str) -> None:
    for kind, (labels, _) in asked.items():
        if not any(Path(file).stem in labels for file in files):
            raise TrainError(f"DATA={data}: none of its files is named as one that has {kind} labels")


def _by_labels(
    asked: _Asked, source: Source, files: Sequence[str], columns: Sequence[int], scores: Scores
) -> dict[str, Accuracy]:
    """The accuracies by the labels that were asked for."""
    ids = by_id(source.class_names)
    answers = Answers(
        files=files,
        folders=[ids[label] for label in source.val.labels],
        likeliest=[ids[index] if index >= 0 else None for index in scores.predicted.tolist()],
        choices=frozenset(name for name, column in zip(ids, columns, strict=True) if column >= 0),
    )
    return {kind: accuracy(labels, answers) for kind, (labels, accuracy) in asked.items()}


def _image_files(data: str, split: str, *, labelled: bool) -> Source:
    """The image files of a set, whose val split is to be scored."""
    if is_converted(data):
        raise TrainError(
            f"DATA={data}: is a converted set, and this is scored on the files as they are; give the folder or archive "
            "that it was made from"
        )
    source = open_source(data, whole=split == "all")
    if labelled and not are_imagenet(source.class_names):
        raise TrainError(f"DATA={data}: is of other classes than ImageNet's, for which real and multi_label are")
    for note in source.notes:
        print(printable(note), flush=True)
    return source


def scored_columns(trained: Trained, class_names: Sequence[str], data: str) -> list[int]:
    """For each of the set's classes the network's output for it, or -1; says so where they are not the same.

    Raises TrainError when the network lacks classes of the set, unless it is one of ImageNet's that has some of them.
    """
    columns = class_columns(trained.class_names, class_names)
    theirs, ours, common = len(trained.class_names), len(columns), sum(column >= 0 for column in columns)
    if common < ours:
        imagenet = are_imagenet(trained.class_names) and are_imagenet(class_names)
        if not (imagenet and common > 1):
            raise TrainError(
                f"{trained.origin}: {trained.name} was trained on {theirs} classes, and {data} has {ours}, of which it "
                f"lacks {lacking(columns, class_names)}"
            )
        print(f"of the data's {ours} classes, the {common} that {trained.name} knows are scored", flush=True)
    if common < theirs:
        print(f"of the {theirs} classes of {trained.name}, the {common} of the data are used", flush=True)
    return columns


def crops_for(trained: Trained, usual: int, rule: CropRule, asked: int | None) -> tuple[int, CropRule]:
    """Pixels a side and the validation crop: those asked for, else the network's own, else the set's.

    Raises ModelError for a size that the network does not take.
    """
    side = (trained.resolution or usual) if asked is None else asked
    trained.check_resolution(side)
    return side, replace(rule, center_ratio=trained.center_ratio or rule.center_ratio)


def _scored(trained: Trained, loader: Loader | Originals, columns: Sequence[int], device: torch.device) -> Scores:
    network = on_device(trained.network, device)
    precision = precision_on(device)
    set_tf32_and_allocator(device, precision)
    autocast = autocast_type(precision)
    return score(network, loader, trained.normalisation, device=device, autocast=autocast, columns=columns)


def _beside(trained: Trained, data: str) -> Path:
    """Where scores are written unless the user says so: beside the checkpoint; for published weights, here."""
    folder, stem = (trained.file.parent, trained.file.stem) if trained.file else (Path(), trained.name)
    return folder / f"evaluation-{stem.replace(':', '-')}-{Path(data).resolve().name}.json"


def _write(written: dict, target: Path) -> None:
    try:
        target.write_text(json.dumps(written, indent=1) + "\n")
    except OSError as error:
        raise TrainError(f"{target}: cannot be written ({error.strerror}); name another file with OUT") from None
    print(f"written to {target}")


if __name__ == "__main__":
    run_command(evaluate, prog="python -m train.evaluate")
