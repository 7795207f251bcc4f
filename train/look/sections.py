"""Sections about a set: its classes, crops, duplicates and suspects."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from command import printable
from data.beton import Beton
from data.sets import ConvertedSet
from train.job import Job
from train.look import charts
from train.look.answers import Answers
from train.look.crops import Crop, FirstCrops
from train.look.duplicates import Duplicates
from train.look.page import Section, card, cards, figure, folded, paragraph, table
from train.look.thumbnails import Thumbnails
from train.report.analysis import Labels, picture

# How many cards each section shows; all their pictures together are fewer than thumbnails.MOST.
CROPS = 30
_GROUPS, _OF_A_GROUP = 8, 3
SUSPECTS = 24
_SUSPECTS_OF_VAL = 12
# If there are more classes, this many of the largest and of the smallest are listed.
_LISTED = 500
_OPEN = 25
# A network that gives the label less than the first, and another class more than the second, is confident of that one.
_UNLIKELY, _SURE = 0.01, 0.9

SPLIT_NAMES = {"train": "train", "val": "validation"}


@dataclass(frozen=True)
class Pictured:
    """The images of a set, for drawing.

    names: of the classes, for readers. betons, files: of each split; files: names of the image files, None if the
    set has none.
    """

    data: ConvertedSet
    names: Sequence[str]
    betons: dict[str, Beton]
    files: dict[str, list[str] | None]
    thumbnails: Thumbnails = field(default_factory=Thumbnails)

    def counts(self, split: str) -> NDArray[np.int64]:
        """Images of each class, int64 [C]."""
        return np.bincount(self.betons[split].labels, minlength=len(self.names))

    def place(self, split: str, index: int) -> str:
        """The name of an image, for readers."""
        files = self.files[split]
        return f"{split}/{files[index]}" if files else f"{SPLIT_NAMES[split]} image {index}"

    def thumbnail(self, split: str, index: int) -> str:
        return self.thumbnails.address(picture(self.betons[split], index))

    def label(self, split: str, index: int) -> str:
        return self.names[int(self.betons[split].labels[index])]


def percent(share: float) -> str:
    """0 to 1 as "61 %", on one line; values below 1 % or above 99 % have one more digit."""
    value = 100 * share
    return f"{value:.{int(0 < value < 1 or 99 < value < 100)}f}\N{NO-BREAK SPACE}%"


def count(number: int, one: str, many: str) -> str:
    return f"{number:,} {one if number == 1 else many}"


# ---- classes


def classes(images: Pictured, first: FirstCrops, accuracy: NDArray[np.float64] | None) -> Section:
    """accuracy: of each class in percent, float64 [C], NaN without images; None without a checkpoint."""
    train, val = images.counts("train"), images.counts("val")
    order = np.argsort(-train, kind="stable")
    listed = [*order] if len(order) <= 2 * _LISTED else [*order[:_LISTED], *order[-_LISTED:]]
    folders = [printable(name) for name in images.data.class_names]
    rows = [
        [
            images.names[each],
            "" if images.names[each] == folders[each] else folders[each],
            f"{train[each]:,}",
            percent(train[each] / max(train.sum(), 1)),
            f"{val[each]:,}",
            *([] if accuracy is None else ["–" if np.isnan(accuracy[each]) else percent(accuracy[each] / 100)]),
        ]
        for each in listed
    ]
    heads = ["class", "folder", "train", "share", "validation"] + ([] if accuracy is None else ["top-1"])
    numbers = ("train", "share", "validation", "top-1")
    if not any(row[1] for row in rows):
        heads, rows = [heads[0], *heads[2:]], [[row[0], *row[2:]] for row in rows]
    listing = table(heads, rows, numbers=numbers)
    summary = (
        f"All {len(rows):,} classes"
        if len(listed) == len(order)
        else f"The {_LISTED} largest and {_LISTED} smallest of {len(order):,} classes"
    )
    shorter = np.concatenate([beton.sizes.min(axis=1) for beton in images.betons.values()]).astype(float)
    low, middle, high = (int(each) for each in np.percentile(shorter, (0, 50, 100)))
    body = figure(
        charts.class_counts(images.names, train, val),
        f"{len(train):,} classes with {train.min():,} to {train.max():,} training images and {val.min():,} to "
        f"{val.max():,} validation images each.",
        f"Images of each class: {train.sum():,} to train on, {val.sum():,} for validation.",
    )
    body += listing if len(rows) <= _OPEN else folded(summary, listing)
    body += figure(
        charts.sizes(shorter, first.sides, first.resolution),
        f"Shorter sides of images: {low} to {high} px, median {middle}. Crops: median {np.median(first.sides):.0f} px.",
        f"Left: the shorter sides of all images as they are stored ({low} to {high} px, median {middle}; conversion "
        f"may have reduced them). Right: the sides (square root of the area) of {first.count:,} training crops; those "
        f"left of the dashed line, {percent(first.enlarged / first.count)}, are enlarged to the {first.resolution} px "
        "that the network sees.",
    )
    return Section("classes", "Classes and sizes", body)


# ---- crops


def crops(images: Pictured, first: FirstCrops, job: Job, by_refinery: Answers | None) -> Section:
    indices = [] if by_refinery is None else by_refinery.indices.tolist()
    known = {index: place for place, index in enumerate(indices)}
    shown = []
    for each in first.crops:
        place = known.get(each.index)
        whole = None
        if by_refinery is not None and place is not None:
            whole = images.names[by_refinery.predicted[place]], float(by_refinery.confidence[place])
        shown.append(_crop_card(images, each, whole))
    augmented = job.augment is not None and job.config.augment.describe()
    body = paragraph(
        f"The first {count(len(first.crops), 'crop', 'crops')} of the first training step, chosen to show all "
        f"classes in turn, as the network gets them: {first.resolution} px"
        + (f", with {augmented}" if augmented else "")
        + ". Left the image with the box of the crop, thin the boxes of the next epochs; right the crop, which may be "
        "mirrored. Labels: the image's label in the set, the crop's label in training"
        + (", the refinery's label of the whole image" if by_refinery is not None else "")
        + "; marked where it is another class than the image's."
    )
    body += paragraph(f"Labels of crops: {job.labels.describe()}.")
    if first.given < 1:
        body += paragraph(
            f"Of the {first.count:,} crops of this step, {percent(first.agree / first.count)} have a label whose most "
            f"likely class is the image's; on average the label gives {percent(first.given)} to the image's."
        )
    return Section("crops", "Crops and their labels", body + cards(shown, double=True))


def _crop_card(images: Pictured, crop: Crop, whole: tuple[str, float] | None) -> str:
    name = images.names[crop.label]
    lines = [("image", name, False)]
    if whole:
        lines.append(("refinery, image", f"{whole[0]} {percent(whole[1])}", whole[0] != name))
    lines.append(("crop's label", _likely(crop.said), crop.said[0][0] != name))
    if crop.truth:
        lines.append(("crop shows", crop.truth, crop.truth != name))
    if crop.by_network:
        lines.append(("checkpoint, crop", _likely(crop.by_network[:1]), crop.by_network[0][0] != name))
    pictures = [
        (images.thumbnails.address(crop.image, boxes=crop.boxes), f"the image with the box of its crop: {name}"),
        (images.thumbnails.address(crop.pixels), "the crop"),
    ]
    return card(pictures, lines, images.place("train", crop.index))


def _likely(labels: Labels) -> str:
    kept = [(name, chance) for place, (name, chance) in enumerate(labels) if not place or chance >= 0.01]
    return ", ".join(f"{name} {percent(chance)}" for name, chance in kept)


# ---- duplicates


def duplicates(images: Pictured, found: Sequence[Duplicates]) -> Section:
    if not found:
        return Section("duplicates", "Duplicates", paragraph("No two images are the same, byte for byte."))
    contradictory, across = (sum(getattr(each, kind) for each in found) for kind in ("contradictory", "across"))
    body = paragraph(
        f"{count(len(found), 'image is', 'images are')} there more than once, byte for byte: "
        f"{contradictory:,} with different labels, {across:,} both in train and in validation. Copies that were "
        "resized or saved again are not found."
    )
    shown = []
    for each in found[:_GROUPS]:
        # One for each label and each split, as far as there is space.
        kinds = {(split, int(images.betons[split].labels[index])): (split, index) for split, index in each.members}
        some = list(dict.fromkeys([*kinds.values(), *each.members]))[:_OF_A_GROUP]
        lines = [(SPLIT_NAMES[split], images.label(split, index), each.contradictory) for split, index in some]
        lines.append(("copies", f"{len(each.members):,}", False))
        shown.append(card([(images.thumbnail(*some[0]), "the image")], lines, *(images.place(*each) for each in some)))
    body += cards(shown)
    if len(found) > len(shown):
        rows = [
            [", ".join(images.names[label] for label in each.labels), *(images.place(*each.members[n]) for n in (0, 1))]
            for each in found[len(shown) : _LISTED]
        ]
        body += folded(f"{len(rows):,} more", table(["class", "first", "second"], rows))
    return Section("duplicates", "Duplicates", body)


# ---- suspects


def suspicious(answers: Answers) -> int:
    """For how many images the network nearly excludes the label and is confident of another class."""
    return int(((answers.of_label < _UNLIKELY) & (answers.confidence > _SURE)).sum())


def suspects(images: Pictured, train: Answers, val: Answers | None) -> Section:
    """val: None if the same images are shown as mistakes."""
    of = images.betons["train"].num_samples
    asked = (
        count(of, "training image", "training images")
        if len(train.indices) == of
        else (f"{len(train.indices):,} of {of:,} training images")
    )
    body = paragraph(
        f"The images on which {train.whose} disagrees most with their label, by its loss on the central crop. Some are "
        f"mislabelled, some show several things, some are only hard; on what a network was trained on itself it has "
        f"learned some wrong labels by heart. Of {asked}, {suspicious(train):,} get less than {percent(_UNLIKELY)} for "
        f"their label and more than {percent(_SURE)} for another class."
    )
    body += doubted(images, "train", train, SUSPECTS)
    if val is not None:
        body += paragraph(f"The same among the {len(val.indices):,} validation images:")
        body += doubted(images, "val", val, _SUSPECTS_OF_VAL)
    return Section("suspects", "Suspects", body)


def doubted(images: Pictured, split: str, answers: Answers, most: int) -> str:
    """Cards of the images on which a network disagrees most with the set."""
    shown = [answer_card(images, split, answers, row) for row in answers.most_doubted(most).tolist()]
    return cards(shown) if shown else paragraph("None: the network agrees with the set on all of them.")


def answer_card(images: Pictured, split: str, answers: Answers, row: int) -> str:
    """An image with its label and a network's answer. row: its index among the answers."""
    index = int(answers.indices[row])
    label, said = (images.names[each[row]] for each in (answers.labels, answers.predicted))
    lines = [
        ("label", f"{label} {percent(float(answers.of_label[row]))}", False),
        ("network", f"{said} {percent(float(answers.confidence[row]))}", said != label),
    ]
    return card([(images.thumbnail(split, index), label)], lines, images.place(split, index))
