"""Accuracy for images with several right classes: ReaL and multi-label, of ImageNet's validation images.

Both come as a JSON file of labels by image file. If a network or a set has only some of ImageNet's classes, labels
outside their common classes are dropped, and an image that loses all of its labels counts as one without labels.
"""

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from models.imagenet import class_ids
from train import TrainError

# Right classes (WordNet ids) by the name of the image's file, without its ending.
Labels = Mapping[str, frozenset[str]]


@dataclass(frozen=True)
class Answers:
    """A network's answers for the images of a set; classes are WordNet ids.

    files: the names of the images' files. folders: their classes by folder. likeliest: the class that the network
    found likeliest, None for an image that could not be read. choices: the classes that it chose among.
    """

    files: Sequence[str]
    folders: Sequence[str]
    likeliest: Sequence[str | None]
    choices: frozenset[str]


@dataclass(frozen=True)
class Accuracy:
    """percent: None if no image was scored. images: scored. left_out: those without labels."""

    percent: float | None
    images: int
    left_out: int


def read_real(path: Path) -> Labels:
    """The labels of Beyer et al. 2020 ("Are we done with ImageNet?", arXiv 2006.07159), from their real.json.

    The file is a list with one list of class numbers for each validation image, in the order of their file names. An
    empty list means that the raters found no class of ImageNet in the image.
    Raises TrainError for any other file.
    """
    images = _read(path, "--real")
    ids = class_ids() or ()
    try:
        return {
            f"ILSVRC2012_val_{number:08}": frozenset(ids[label] for label in labels)
            for number, labels in enumerate(images, 1)
        }
    except (TypeError, IndexError):
        raise TrainError(f"--real {path}: is not a list of lists of class numbers, 0 to 999; give real.json") from None


def read_multi_label(path: Path) -> Labels:
    """The labels of Shankar et al. 2020 ("Evaluating machine accuracy on ImageNet", ICML), from their file.

    It is published as human_accuracy_v3.0.0.json: in "initial_annots", for each of some 20,000 images of ImageNet's
    validation set and as many of ImageNetV2, the classes that experts judged "correct", "unclear" or "wrong". As its
    authors recommend, the unclear ones are right too, and what is in "problematic_images" (wrongly labelled at first,
    drawn, edited) is no image of it.
    Raises TrainError for any other file.
    """
    content = _read(path, "--multi-label")
    try:
        judgements, problematic = content["initial_annots"], content["problematic_images"]
        return {
            Path(image).stem: frozenset([*judged.get("correct", ()), *judged.get("unclear", ())])
            for image, judged in judgements.items()
            if image not in problematic
        }
    except (TypeError, KeyError, AttributeError):
        raise TrainError(
            f"--multi-label {path}: has no initial_annots and problematic_images; give human_accuracy_v3.0.0.json"
        ) from None


def real_accuracy(labels: Labels, answers: Answers) -> Accuracy:
    """ReaL accuracy (Beyer et al.): of the images with labels, the share whose most likely class is one of them.

    Files that are not in the labels belong to another set and are ignored.
    """
    right, left_out = _judged(labels, answers)
    return Accuracy(_percent(list(right.values())), len(right), left_out)


def multi_label_accuracy(labels: Labels, answers: Answers) -> Accuracy:
    """Multi-label accuracy (Shankar et al.): as real_accuracy, but of each class's images, then its mean over classes.

    Its authors recommend the mean because the images that are not problematic are not spread evenly over the classes.
    """
    right, left_out = _judged(labels, answers)
    of_class = defaultdict(list)
    for index, is_right in right.items():
        of_class[answers.folders[index]].append(is_right)
    shares = [sum(several) / len(several) for several in of_class.values()]
    return Accuracy(_percent(shares), len(right), left_out)


def _judged(labels: Labels, answers: Answers) -> tuple[dict[int, bool], int]:
    """Whether the answer is right, for each image with labels, by its index; and how many have none."""
    right, left_out = {}, 0
    for index, (file, likeliest) in enumerate(zip(answers.files, answers.likeliest, strict=True)):
        valid = labels.get(Path(file).stem)
        if valid is None or likeliest is None:
            continue
        if valid & answers.choices:
            right[index] = likeliest in valid
        else:
            left_out += 1
    return right, left_out


def _percent(shares: Sequence[float]) -> float | None:
    return 100 * sum(shares) / len(shares) if shares else None


def _read(path: Path, option: str) -> Any:
    try:
        return json.loads(path.read_text())
    except OSError as error:
        raise TrainError(f"{option} {path}: cannot be read ({error.strerror})") from None
    except ValueError:
        raise TrainError(f"{option} {path}: is not JSON") from None
