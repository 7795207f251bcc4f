"""Scores a trained network on a validation set: top-1, top-5 and the accuracy of each class, ReaL and multi-label.

python -m train.evaluate --checkpoint runs/scenes/... --which best
python -m train.evaluate --checkpoint torchvision:resnet50:pretrained --data imagenet/val --split all --real real.json
make evaluate CHECKPOINT=runs/images/... DATA=test/ PREDICTIONS=predictions.csv
"""

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, cast, get_args

import torch

from command import printable, run_command
from data.beton import Beton
from data.convert import ensure_converted
from data.loader import Loader
from data.originals import Originals
from data.plan import CropRule
from data.sets import ConvertedSet, names_file
from data.sources import Source
from models.classes import are_imagenet, by_id, class_columns, lacking
from models.trained import Trained, Which, digest_of, load_trained
from train import TrainError
from train.device import autocast_type, device_named, on_device, precision_on, set_tf32_and_allocator, set_threads
from train.runs import Run, key_of
from train.score import Said, Scores, score, validation_loader
from train.score.images import Asked, Images, find_images, is_given, is_whole, on_own_data, run_named
from train.score.multilabel import Accuracy, Answers
from train.score.predictions import BEGINS, Rows, check_choice, format_named
from train.score.result_file import result_file

# How result files begin.
BEGINNING = '{\n "checkpoint": '

# For images whose set has no crop rule, if the network has none either.
_USUAL_RESOLUTION = 224


def evaluate(
    checkpoint: str,
    data: str | None = None,
    out: str | None = None,
    resolution: int | None = None,
    batch: int = 256,
    decoder: str = "auto",
    device: str = "auto",
    threads: int | None = None,
    split: str | None = None,
    real: str | None = None,
    multi_label: str | None = None,
    which: str | None = None,
    predictions: str | None = None,
) -> None:
    """Scores a checkpoint on the validation images of a set, and writes the scores with the accuracy of each class.

    Images without a validation split (only class folders) are all scored, from their original files; of images that
    the run was trained on, only the held-out tenth is scored.

    If the set has only some of the network's classes, the network chooses among these. A network with some of
    ImageNet's classes is scored on the images of these. Folders numbered 0 to 999, as in ImageNetV2, are ImageNet's
    classes in order.

    For ReaL and multi-label accuracy (train/score/multilabel.py), labels outside the scored classes are dropped, and
    images without remaining labels are not scored.

    Args:
        checkpoint: a run folder, a checkpoint file, NAME:FILE for a bare file of weights, or for published ones
            timm:NAME:pretrained or torchvision:NAME:pretrained
        data: a folder of images, a converted set, or scenes, cifar10, svhn, imagenette (default: the run's own)
        out: the JSON file to write (default: beside the checkpoint, one file per set and way of scoring; for published
            weights, in the current folder)
        resolution: pixels per side of the crops (default: what the network was trained at)
        batch: crops at a time
        decoder: auto, ffcv, dali or torchvision
        device: auto, cpu, cuda or cuda:N
        threads: number that decode, and number that compute on the CPU (default: one per processor)
        split: for images without a validation split: val scores the tenth that training holds out, all scores every one
            (default: all, but val for the run's own data). all, real and multi_label read the original image files
        real: real.json, for ReaL accuracy: among the images with labels there (ILSVRC2012_val_00000001 and so on), the
            share whose most likely class is one of them
        multi_label: human_accuracy_v3.0.0.json, for multi-label accuracy: the share of a class's images whose most
            likely class experts judged right or unclear, without problematic images; the mean over the classes
        which: for a run folder, the checkpoint of its last or of its best epoch (default: last)
        predictions: a file to write with each image's label and most likely classes: .csv, .json or .jsonl
    """
    where = device_named(device)
    set_threads(threads)
    kind = format_named(predictions, "PREDICTIONS") if predictions else "csv"
    if batch < 1:
        raise TrainError(f"BATCH={batch}: must be at least 1")
    check_choice("split", split, ("val", "all"))
    check_choice("WHICH", which, get_args(Which))
    chosen = cast(Which | None, which)
    if out and predictions and Path(out).resolve() == Path(predictions).resolve():
        raise TrainError(f"PREDICTIONS={predictions}: is OUT too; give two files")
    with ExitStack() as files:
        # Checked first: hours of scoring must not be lost because a file cannot be written.
        write = files.enter_context(result_file(Path(out), begins=BEGINNING)) if out else None
        write_rows = (
            files.enter_context(result_file(Path(predictions), begins=BEGINS[kind], option="PREDICTIONS"))
            if predictions
            else None
        )
        run = run_named(checkpoint, needed=data is None)
        if data is None:
            trained = load_trained(checkpoint, which=chosen)
            data, (found, asked) = on_own_data(
                trained.origin, run, lambda own: find_images(own, split, real, multi_label, run=run)
            )
            print(printable(f"data {data}, the run's own"), flush=True)
        else:
            found, asked = find_images(data, split, real, multi_label, run=run)
            trained = load_trained(checkpoint, class_names=found.class_names, which=chosen)
        if said := taken(trained, checkpoint):
            print(printable(said), flush=True)
        columns = scored_columns(trained, found.class_names, data)
        if not write:
            labels = [digest_of(Path(file)) for file in (real, multi_label) if file]
            out = str(_beside(trained, data, key_of([_identity(found, data), labels, resolution])))
            write = files.enter_context(result_file(Path(out), begins=BEGINNING))
        loading = {"batch": batch, "decoder": decoder, "device": where, "threads": threads}
        side, loader, images = _opened(found, trained, resolution, loading)
        if run and is_given(data, run) and isinstance(images, ConvertedSet):
            _print_change(images, run)
        names = _files_of(images) if asked or predictions else []
        _check_names(names, asked, data)
        known = sum(column >= 0 for column in columns)
        rows = Rows(write_rows, kind, found.class_names, most=min(5, known), labelled=True) if write_rows else None

        def add(said: Said) -> None:
            if rows:
                scored = [names[index] for index in said.indices.tolist()]
                rows.add(scored, said.likeliest, said.probabilities, (said.labels, said.of_label))

        scores = _scored(trained, loader, columns, where, add)
        several = _by_labels(asked, found, names, columns, scores) if isinstance(found, Source) else {}
        _print(scores, several, side, known=known)
        result = {
            "checkpoint": trained.origin,
            "network": trained.name,
            "data": data,
            "split": "all" if is_whole(found) else "val",
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
        write(json.dumps(result, indent=1) + "\n")
        if rows:
            rows.close()
    print(f"written to {out}{f' and {predictions}' if predictions else ''}")


def taken(trained: Trained, checkpoint: str) -> str | None:
    """Which file of a run was used for the given checkpoint; None for weights that are not a run's."""
    if trained.file is None or trained.epoch is None:
        return None
    other = "best" if trained.file.stem == "last" else "last"
    is_choice = Path(checkpoint).is_dir() and trained.file.with_name(f"{other}.pt").is_file()
    rest = f" (--which {other} takes {other}.pt)" if is_choice else ""
    return f"checkpoint {trained.file}, after epoch {trained.epoch}{rest}"


def _identity(images: Images, data: str) -> list[Any]:
    fingerprint = images.fingerprint if isinstance(images, Source) else images.source_fingerprint
    return [str(Path(data).resolve()), fingerprint, is_whole(images)]


def _opened(
    found: Images, trained: Trained, resolution: int | None, loading: Mapping[str, Any]
) -> tuple[int, Loader | Originals, Source | ConvertedSet]:
    """Pixels per side of the crops, their loader, and what it reads. loading: batch, decoder, device and threads."""
    if isinstance(found, Source):
        side, crop = crops_for(trained, found.resolution or _USUAL_RESOLUTION, found.crop or CropRule(), resolution)
        originals = Originals(
            found.val,
            found.class_names,
            resolution=side,
            batch_size=loading["batch"],
            center_ratio=crop.center_ratio,
            device=loading["device"],
            threads=loading["threads"],
        )
        return side, originals, found
    ready = ensure_converted(found)
    side, crop = crops_for(trained, ready.resolution, ready.crop, resolution)
    return side, validation_loader(ready, resolution=side, crop=crop, **loading), ready


def _print_change(images: ConvertedSet, run: Run) -> None:
    """Prints a notice if the run's DATA has changed."""
    if images.fingerprint != run.identity["data"]["fingerprint"]:
        print(
            printable(f"{run.data}: holds other images than when the run was trained, or stores them otherwise"),
            flush=True,
        )


def _files_of(images: Source | ConvertedSet) -> list[str]:
    """The file of each image: its path; CLASS/FILE for an archived or stored image; its number if it has none."""
    if isinstance(images, ConvertedSet):
        if names_file(images.folder, "val").is_file():
            return images.image_names("val")
        return [str(index) for index in range(Beton(images.beton("val")).num_samples)]
    items = images.val.items
    names = images.val.names or range(len(items))
    return [item if isinstance(item, str) else str(name) for item, name in zip(items, names, strict=True)]


def _print(scores: Scores, several: Mapping[str, Accuracy], side: int, *, known: int) -> None:
    """known: number of classes that network and set have in common."""
    print(f"top-1 {scores.top1:.2f} %, top-5 {scores.top5:.2f} % on {scores.images} images at {side} px")
    for kind, accuracy in several.items():
        percent = "unknown" if accuracy.percent is None else f"{accuracy.percent:.2f} %"
        print(
            f"{kind} {percent} on {accuracy.images} images; {accuracy.left_out} more have no label among the {known} "
            "classes"
        )


def _check_names(files: Sequence[str], asked: Asked, data: str) -> None:
    for kind, (labels, _) in asked.items():
        if not any(Path(file).stem in labels for file in files):
            raise TrainError(f"DATA={data}: none of its files is named as one that has {kind} labels")


def _by_labels(
    asked: Asked, source: Source, files: Sequence[str], columns: Sequence[int], scores: Scores
) -> dict[str, Accuracy]:
    """The accuracies by the requested labels."""
    ids = by_id(source.class_names)
    answers = Answers(
        files=files,
        folders=[ids[label] for label in source.val.labels],
        likeliest=[ids[index] if index >= 0 else None for index in scores.predicted.tolist()],
        choices=frozenset(name for name, column in zip(ids, columns, strict=True) if column >= 0),
    )
    return {kind: accuracy(labels, answers) for kind, (labels, accuracy) in asked.items()}


def scored_columns(trained: Trained, class_names: Sequence[str], data: str) -> list[int]:
    """The network's output for each of the set's classes, or -1; prints a notice if they differ.

    Raises TrainError if the network lacks classes of the set, unless it has some of ImageNet's classes.
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
    """Pixels per side and the validation crop: those asked for, else the network's own, else the set's.

    Raises ModelError for a size that the network does not accept.
    """
    side = (trained.resolution or usual) if asked is None else asked
    trained.check_resolution(side)
    return side, replace(rule, center_ratio=trained.center_ratio or rule.center_ratio)


def _scored(
    trained: Trained,
    loader: Loader | Originals,
    columns: Sequence[int],
    device: torch.device,
    each: Callable[[Said], None],
) -> Scores:
    network = on_device(trained.network, device)
    precision = precision_on(device)
    set_tf32_and_allocator(device, precision)
    autocast = autocast_type(precision)
    return score(network, loader, trained.normalisation, device=device, autocast=autocast, columns=columns, each=each)


def _beside(trained: Trained, data: str, key: str) -> Path:
    """The default place of scores: beside the checkpoint; for published weights, the current folder.

    key: of the set and the way in which it is scored; sets in different places may have the same name.
    """
    folder, stem = (trained.file.parent, trained.file.name) if trained.file else (Path(), trained.name)
    stem = stem.removesuffix(".pt").replace(":", "-").replace("/", "-")
    return folder / f"evaluation-{stem}-{Path(data).resolve().name}-{key}.json"


if __name__ == "__main__":
    run_command(evaluate, prog="python -m train.evaluate")
