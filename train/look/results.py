"""Sections about a trained network: learning curves, classes, confusion, mistakes and calibration."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from train.look import charts, matrix
from train.look.answers import Answers, calibration, confusion
from train.look.page import Section, cards, figure, folded, paragraph, table, text
from train.look.sections import Pictured, answer_card, count, doubted, percent

MISTAKES = 24
_WORST_CLASSES = 15
_WORST_SHOWN, _OF_A_CLASS = 6, 4
_PAIRS = 25


def learning(metrics: Sequence[dict[str, Any]], *, same_loss: bool) -> Section:
    """metrics: lines of a run's metrics.jsonl. same_loss: whether training and validation use the same loss."""
    if not metrics:
        return Section("learning", "Learning curves", paragraph("No epoch is finished yet."))
    validated = any("val_loss" in line for line in metrics)
    last = metrics[-1]
    words = (
        f"After each of {count(len(metrics), 'epoch', 'epochs')}. Training values are means over the epoch, while the "
        "network still learned, on random crops; validation is on central crops, which are easier: the lines of the "
        "two may cross without anything being wrong."
    )
    if validated and not same_loss:
        words += (
            " The training loss is the distance to the labels of crops (0 where they are equal), the validation loss "
            "the cross entropy with the images' own labels; so they stand apart."
        )
    if not validated:
        words += " The run recorded no validation loss."
    alt = f"Last epoch: loss {last['loss']:.3f}, validation top-1 {last['top1']:.1f} %, top-5 {last['top5']:.1f} %."
    return Section(
        "learning", "Learning curves", figure(charts.learning_curves(metrics, same_loss=same_loss), alt, words)
    )


def worst_classes(images: Pictured, answers: Answers) -> Section:
    """The classes with the lowest validation accuracy, and some of their images."""
    counts, accuracy = answers.of_classes()
    taken: dict[int, list[tuple[int, int]]] = {}
    for label, predicted, times in answers.confused():
        taken.setdefault(label, []).append((predicted, times))
    known = np.flatnonzero(counts)
    order = known[np.argsort(accuracy[known], kind="stable")][:_WORST_CLASSES].tolist()
    rows = [
        [
            images.names[each],
            f"{counts[each]:,}",
            percent(accuracy[each] / 100),
            ", ".join(f"{images.names[other]} ({times})" for other, times in taken.get(each, [])[:2]) or "–",
        ]
        for each in order
    ]
    top1, top5 = (100 * float(hits.mean()) for hits in (answers.right, answers.within5))
    body = paragraph(
        f"{answers.whose}: top-1 {top1:.2f} %, top-5 {top5:.2f} % of {len(answers.labels):,} validation images "
        f"(central crops). The {count(len(rows), 'class', 'classes')} with the lowest accuracy; with few images a "
        "class may stand here by chance."
    )
    body += table(["class", "images", "top-1", "taken most often for"], rows, numbers=("images", "top-1"))
    shown = []
    doubts = answers.most_doubted(len(answers.labels))
    for each in order[:_WORST_SHOWN]:
        shown += [
            answer_card(images, "val", answers, row) for row in doubts[answers.labels[doubts] == each][:_OF_A_CLASS]
        ]
    if shown:
        body += paragraph(f"Mistakes in the first {min(_WORST_SHOWN, len(order))} of them, the surest first:")
    return Section("worst-classes", "Worst classes", body + (cards(shown) if shown else ""))


def confusion_matrix(images: Pictured, answers: Answers) -> Section:
    counts, _ = answers.of_classes()
    rows = [
        [
            images.names[label],
            images.names[predicted],
            f"{times:,}",
            percent(times / int(counts[label])),
        ]
        for label, predicted, times in answers.confused()[:_PAIRS]
    ]
    listing = paragraph("No validation image is taken for another class.")
    if rows:
        listing = table(["label", "taken for", "images", "of the class"], rows, numbers=("images", "of the class"))
    if answers.classes > matrix.MOST_CLASSES:
        body = paragraph(f"{answers.classes:,} classes are too many for a picture. The pairs confused most often:")
        return Section("confusion", "Confusion", body + listing)
    shares = confusion(answers)
    order = matrix.by_similarity(shares)
    names = [images.names[each] for each in order]
    png, together = matrix.picture(shares[np.ix_(order, order)], names)
    caption = (
        "A row is a class by the set, a column by the network, a cell the share of the row's images (numbers in %). "
        "Classes that are confused with each other stand side by side: squares along the diagonal are groups of "
        "classes that look alike to the network. The scale favours small shares."
    )
    if together > 1:
        caption += f" A point is {together} x {together} classes and shows the highest of their shares."
    alt = "; ".join(f"{row[0]} taken for {row[1]}: {row[3]}" for row in rows[:5]) or "Only the diagonal is filled."
    body = figure(png, alt, caption)
    if answers.classes > matrix.NAMED:
        listed = f"<ol>{''.join(f'<li>{text(name)}</li>' for name in names)}</ol>"
        body += folded("Classes by their numbers in the picture", listed)
    return Section("confusion", "Confusion", body + paragraph("Confused most often:") + listing)


def mistakes(images: Pictured, answers: Answers) -> Section:
    wrong = int((~answers.right).sum())
    body = paragraph(
        f"{count(wrong, 'validation image is', 'validation images are')} taken for another class. Those to whose label "
        "the network gives least; in some it may be the label that is wrong:"
    )
    return Section("mistakes", "Worst mistakes", body + doubted(images, "val", answers, MISTAKES))


def calibrated(answers: Answers) -> Section:
    found = calibration(answers)
    mean, top1 = float(answers.confidence.mean()), float(answers.right.mean())
    judged = "more" if mean > top1 else "less"
    body = figure(
        charts.calibration_curve(found),
        "; ".join(
            f"confidence {percent(each)}: accuracy {percent(right)}"
            for each, right in zip(found.confidence.tolist(), found.accuracy.tolist(), strict=True)
        ),
        f"Validation images in 15 bins by confidence, and how many of each are right, with 95 % intervals; below, how "
        f"many there are. The network is {percent(mean)} confident and {percent(top1)} right on average, {judged} "
        f"confident than right; expected calibration error {100 * found.error:.1f} points. Students of soft labels are "
        "often less confident than right.",
    )
    return Section("calibration", "Calibration", body)
