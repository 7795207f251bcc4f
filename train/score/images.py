"""What a network is scored on: which images of DATA, and with which labels."""

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

from command import printable
from data import DataError
from data.sets import ConvertedSet, Unconverted, find_set, is_converted, open_unsplit
from data.sources import Source, open_source, quick_identity
from models.classes import are_imagenet
from models.trained import parse_spec
from train import TrainError
from train.runs import Run, read_run, run_of
from train.score.multilabel import (
    Accuracy,
    Answers,
    Labels,
    multi_label_accuracy,
    read_multi_label,
    read_real,
    real_accuracy,
)

_Found = TypeVar("_Found")

# What is scored: original image files, or a converted set, which may still have to be made.
Images = Source | ConvertedSet | Unconverted

# Kinds of multiple labels by name: the labels, and the function that scores answers with them.
Asked = dict[str, tuple[Labels, Callable[[Labels, Answers], Accuracy]]]


def find_images(
    data: str, split: str | None, real: str | None, multi_label: str | None, *, run: Run | None = None
) -> tuple[Images, Asked]:
    """What is to be scored, image files or a converted set, and the requested labels; see evaluate.

    run: the network's; of its own images, those that it was trained on are not scored. Raises DataError and TrainError
    for images that cannot be scored.
    """
    asked: Asked = {}
    if real:
        asked["ReaL"] = read_real(Path(real)), real_accuracy
    if multi_label:
        asked["multi-label"] = read_multi_label(Path(multi_label)), multi_label_accuracy
    if split == "all" or asked:
        return _image_files(data, split, run, labelled=bool(asked)), asked
    source = None if split == "val" or is_given(data, run) else open_unsplit(data)
    if source is None or _are_of(data, run):
        return find_set(data), asked
    _print_notes(source, data)
    return source, asked


def on_own_data(origin: str, run: Run | None, find: Callable[[str], _Found]) -> tuple[str, _Found]:
    """A run's DATA, and what `find` finds there. Raises TrainError if it is not known or does not exist.

    origin: of the network, for messages.
    """
    data = run.data if run else None
    if data is None:
        raise TrainError(f"{origin}: does not say what it was trained on; name validation images with DATA")
    try:
        return data, find(data)
    except DataError as error:
        raise TrainError(f"{origin}: was trained on {data}; give it, or other images, as DATA ({error})") from None


def run_named(checkpoint: str, *, needed: bool) -> Run | None:
    """The run of a checkpoint as the user names it. A damaged run counts as none unless it is needed."""
    _, file = parse_spec(checkpoint)
    if not file:
        return None
    try:
        return read_run(Path(file)) if Path(file).is_dir() else run_of(Path(file))
    except TrainError:
        if needed:
            raise
        return None


def is_given(data: str, run: Run | None) -> bool:
    """Whether this is the run's DATA."""
    own = run.data if run else None
    return own is not None and (data == own or Path(data).resolve() == Path(own).resolve())


def _are_of(data: str, run: Run | None) -> bool:
    """Whether the images there, which have no splits, are the run's DATA under another path."""
    with suppress(DataError):
        if run and run.data is not None:
            own = find_set(run.data).source_fingerprint
            identity = quick_identity(Path(data))
            return own == (identity[1] if identity else open_source(data).fingerprint)
    return False


def is_whole(images: Images) -> bool:
    """Whether these are all images of a set without splits."""
    return isinstance(images, Source) and not len(images.train.items)


def _image_files(data: str, split: str | None, run: Run | None, *, labelled: bool) -> Source:
    """The image files of a set whose val split is to be scored."""
    if is_converted(data):
        raise TrainError(
            f"DATA={data}: is a converted set, and this is scored on the files as they are; give the folder or archive "
            "that it was made from"
        )
    if split is None:
        source = open_source(data, whole=False if is_given(data, run) else None)
        if is_whole(source) and _are_of(data, run):
            source = open_source(data)
    else:
        source = open_source(data, whole=split == "all")
    if labelled and not are_imagenet(source.class_names):
        raise TrainError(f"DATA={data}: is of other classes than ImageNet's, for which real and multi_label are")
    _print_notes(source, data)
    return source


def _print_notes(source: Source, data: str) -> None:
    for note in source.notes:
        print(printable(note), flush=True)
    if is_whole(source):
        count = len(source.val.items)
        print(printable(f"{data} has no split for validation: all of its {count} images are scored"), flush=True)
