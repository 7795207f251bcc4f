"""The page of a report as one HTML file: its figures, their descriptions, and the table of its runs."""

import base64
import html
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np

from data.beton import Beton
from data.decoders import Request
from data.sets import ConvertedSet
from train.labels import origin_of
from train.report import analysis, figures
from train.report.analysis import Accuracies, Compute, Labelling, Subject

HEADS = ("run", "model", "labels from", "top-1", "top-5", "train crops", "val crops", "gap", "folder")
_CROPS_OF_ONE = 6

# Colours follow the reader's theme through system colours; figures are dark on white in both.
_STYLE = """
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 56rem; margin: 0 auto; padding: 1rem;
  background: Canvas; color: CanvasText; }
h1 { font-size: 1.5rem; line-height: 1.25; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: 0.9rem; font-variant-numeric: tabular-nums; }
th, td { padding: 0.3rem 0.6rem; text-align: left; border-bottom: 1px solid #8886; white-space: nowrap; }
.number { text-align: right; }
td.name { white-space: normal; overflow-wrap: anywhere; min-width: 11rem; }
figure { margin: 2.5rem 0; }
img { display: block; width: 100%; height: auto; box-sizing: border-box; padding: 0.5rem; border-radius: 0.5rem;
  background: white; }
figcaption { margin-top: 0.5rem; font-size: 0.9rem; overflow-wrap: anywhere; }
"""


@dataclass(frozen=True)
class ReportData:
    """The contents of a report.

    accuracies: of each subject. class_names: of `data`, for readers. same_images: whether the runs were trained on
    exactly the images of `data`. train, val: these images. seed: of the random crops.
    """

    subjects: Sequence[Subject]
    accuracies: Sequence[Accuracies]
    data: ConvertedSet
    class_names: Sequence[str]
    same_images: bool
    train: Beton
    val: Beton
    labelling: Labelling
    seed: int
    compute: Compute

    @property
    def names(self) -> list[str]:
        return [subject.name for subject in self.subjects]


@dataclass(frozen=True)
class Figure:
    """A figure on disk, its caption, and its alternative text."""

    path: Path
    caption: str
    alt: str


def write(report: ReportData, seen: Sequence[int], unseen: Sequence[int], folder: Path) -> Path:
    """Draws the figures into the folder and writes report.html, which holds them too; returns its path.

    seen, unseen: indices of the training and validation images that are shown.
    """
    # A class may be named "$1 and $2", which is not a formula.
    with matplotlib.rc_context({"text.parse_math": False}):
        drawn = [
            _runs(report, folder / "figure-1.png"),
            *_refined(report, seen[:2], folder),
            _bins(report, folder / "figure-4.png"),
            _distribution(report, "train", folder / "figure-5.png"),
            _distribution(report, "val", folder / "figure-6.png"),
            _training_crops(report, seen, folder / "figure-7.png"),
            _validation_images(report, unseen, folder / "figure-8.png"),
        ]
    path = folder / "report.html"
    path.write_text(_html(report, drawn), encoding="utf-8", errors="backslashreplace")
    return path


def rows(report: ReportData) -> list[list[str]]:
    """The table of the runs, below HEADS. Accuracies in percent, gap in points."""
    return [
        [
            str(number),
            subject.run.identity["model"],
            origin_of(subject.run.identity),
            *(f"{x:.2f}" for x in (found.val.top1, found.val.top5, found.train.top1, found.val_crops.top1, found.gap)),
            subject.run.folder.name,
        ]
        for number, (subject, found) in enumerate(zip(report.subjects, report.accuracies, strict=True), 1)
    ]


# ---- figures of accuracies


def _runs(report: ReportData, path: Path) -> Figure:
    values = {
        "training crops": [each.train.top1 for each in report.accuracies],
        "validation crops": [each.val_crops.top1 for each in report.accuracies],
        "validation images": [each.val.top1 for each in report.accuracies],
    }
    figures.by_run(report.names, values, path)
    return Figure(
        path,
        "Top-1 accuracy, run by run. The crops of training and of validation are drawn alike, and the difference "
        "shows what a run has learned by heart; the central crop of a validation image is easier than either. "
        f"{_counted(report, 'train', 'val_crops', 'val')}",
        "; ".join(
            f"{name}: {', '.join(f'{of_runs[place]:.1f} % on {kind}' for kind, of_runs in values.items())}"
            for place, name in enumerate(report.names)
        ),
    )


def _bins(report: ReportData, path: Path) -> Figure:
    bins = [analysis.binned(each) for each in report.accuracies]
    figures.by_training_accuracy(report.names, bins, path)
    sizes = np.concatenate([each.sizes for each in bins]).tolist()
    ends = (
        f"{name}: {each.val[0]:.0f} % where training has {each.train[0]:.0f} %, to {each.val[-1]:.0f} % where it has "
        f"{each.train[-1]:.0f} %"
        for name, each in zip(report.names, bins, strict=True)
    )
    drawn = (
        f"Accuracy on validation crops over that on training crops, which are drawn alike: a point is one of the "
        f"{_classes(report)}"
        if max(sizes) == 1
        else "Accuracy on validation crops of classes that are about as accurate on training crops, which are drawn "
        f"alike. The {_classes(report)} are sorted by each run's own accuracy on training crops and put into bins of "
        f"{_span(sizes, 'class', 'classes')}. A point is the mean over a bin, its bar reaches from the lowest to the "
        "highest class in it"
    )
    return Figure(
        path,
        f"{drawn}; on the dashed line both accuracies are equal. {_counted(report, 'train', 'val_crops')}",
        "A line for each run, validation accuracy over training accuracy. " + "; ".join(ends),
    )


def _distribution(report: ReportData, split: str, path: Path) -> Figure:
    said = "accuracy on training crops" if split == "train" else "validation accuracy"
    scores = [getattr(each, split) for each in report.accuracies]
    values = [accuracy[np.isfinite(accuracy)] for accuracy in map(analysis.of_classes, scores)]
    figures.distributions(report.names, values, f"{said} of a class, %", path)
    images = [count for count, _ in scores[0].per_class if count]
    quartiles = (
        f"{name}: lowest {each.min():.0f} %, median {np.median(each):.0f} %, highest {each.max():.0f} %"
        for name, each in zip(report.names, values, strict=True)
    )
    return Figure(
        path,
        f"How {said} is distributed over the {len(values[0]):,} classes: a dot is a class (of "
        f"{_span(images, 'image', 'images')}), a box the middle half with the median in it, a line "
        f"reaches from the lowest to the highest, and a diamond is the mean. {_counted(report, split)}",
        "Dots and a box for each run. " + "; ".join(quartiles),
    )


def _counted(report: ReportData, *splits: str) -> str:
    """Which crops the accuracies of these splits were counted on, and with which weights."""
    crops = {
        "train": f"one random crop of each of {report.train.num_samples:,} training images (seed {report.seed}, "
        "epoch 0)",
        "val_crops": f"one random crop of each of {report.val.num_samples:,} validation images",
        "val": f"the central crop of each of {report.val.num_samples:,} validation images",
    }
    return f"{report.data.name}: {', '.join(crops[split] for split in splits)}. {_WEIGHTS}"


_WEIGHTS = "Weights of each run's last epoch (last.pt), networks in evaluation mode."


def _classes(report: ReportData) -> str:
    scores = report.accuracies[0]
    both = zip(scores.train.per_class, scores.val.per_class, strict=True)
    known, every = sum(bool(train[0] and val[0]) for train, val in both), len(report.data.class_names)
    return f"{known:,} classes" + (f" (of {every:,}) that have images of both kinds" if known < every else "")


def _span(counts: Sequence[int], one: str, many: str) -> str:
    """Counts as "3 images" or "3 to 5 images"."""
    low, high = min(counts), max(counts)
    return f"{low:,} {one if low == 1 else many}" if low == high else f"{low:,} to {high:,} {many}"


# ---- figures of crops


def _refined(report: ReportData, indices: Sequence[int], folder: Path) -> list[Figure]:
    """Figures 2 and 3, one image each."""
    crops, labels = analysis.refinery_labels(
        report.labelling,
        report.train,
        indices,
        seed=report.seed,
        copies=_CROPS_OF_ONE,
        names=report.class_names,
        compute=report.compute,
    )
    drawn = []
    for place, index in enumerate(indices):
        image, truth = analysis.picture(report.train, index), _class_of(report, report.train, index)
        boxes, flips = crops.boxes[place], crops.flips[place]
        cuts = [analysis.cut_out(image, box, flip) for box, flip in zip(boxes, flips, strict=True)]
        title = f"training image {index}: {truth}"
        path = folder / f"figure-{2 + place}.png"
        figures.crops_of_image(image, boxes, cuts, labels[place], title, path)
        statistics = (
            f"of the batch, {report.labelling.batch} training crops, as in training"
            if report.labelling.bn == "batch"
            else "as they were when it was trained"
        )
        likeliest = (f"crop {number}: {label[0][0]}" for number, label in enumerate(labels[place], 1))
        drawn.append(
            Figure(
                path,
                f"Labels of a refinery for {len(cuts)} random crops of one image: the three most likely classes by "
                f"{report.labelling.whose}; its batch normalisation by statistics {statistics}. "
                f"{report.data.name}, training image {index}, which the set labels {truth}; crops of seed "
                f"{report.seed}, epoch 0{', some mirrored' if flips.any() else ''}.",
                f"Training image {index}, {truth}, with {len(cuts)} numbered boxes, and below it what they show. "
                + "; ".join(likeliest),
            )
        )
    return drawn


def _training_crops(report: ReportData, indices: Sequence[int], path: Path) -> Figure:
    crops = analysis.training_crops(report.train, indices, report.subjects[0].rule, seed=report.seed)
    what = f"{_span([len(indices)], 'training image', 'training images')}, a random crop of each (seed {report.seed}, "
    return _predicted(report, report.train, crops, f"{what}epoch 0)", "training image", path)


def _validation_images(report: ReportData, indices: Sequence[int], path: Path) -> Figure:
    crops = analysis.central_crops(report.val, indices, report.subjects[0].rule)
    what = f"{_span([len(indices)], 'validation image', 'validation images')}, the central crop of each"
    return _predicted(report, report.val, crops, what, "validation image", path)


def _predicted(report: ReportData, beton: Beton, crops: Request, what: str, kind: str, path: Path) -> Figure:
    said = [
        analysis.predictions(subject, beton, crops, names=report.class_names, compute=report.compute)
        for subject in report.subjects
    ]
    examples = []
    for place, index in enumerate(crops.indices.tolist()):
        truth = _class_of(report, beton, index)
        crop = analysis.cut_out(analysis.picture(beton, index), crops.boxes[place, 0], crops.flips[place, 0])
        examples.append(figures.Example(crop, f"{kind} {index}: {truth}", truth, [labels[place] for labels in said]))
    figures.predictions(report.names, examples, path)
    likeliest = (
        f"{example.title}: "
        + ", ".join(f"{name} says {labels[0][0]}" for name, labels in zip(report.names, example.said, strict=True))
        for example in examples
    )
    return Figure(
        path,
        f"The three most likely classes by each run, with their probabilities; the image's own label is bold. "
        f"{report.data.name}: {what}. {_WEIGHTS}",
        "; ".join(likeliest),
    )


def _class_of(report: ReportData, beton: Beton, index: int) -> str:
    return report.class_names[int(beton.labels[index])]


# ---- HTML


def _html(report: ReportData, drawn: Sequence[Figure]) -> str:
    name = html.escape(report.data.name)
    figures_of_page = "\n".join(map(_figure, drawn))
    note = "" if report.same_images else "<p>The runs were trained on other images of these classes.</p>\n"
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Report: {name}</title>
<style>{_STYLE}</style>
</head>
<body>
<main>
<h1>{_span([len(report.subjects)], "run", "runs")} on {name}</h1>
<p>The analysis of Label Refinery (Bagherinezhad et al. 2018, section 4.1), with the paper's numbers of figures. A crop
counts as right if the most likely class is its image's.</p>
{note}<div class="wide">
{_table(HEADS, rows(report))}
</div>
<p>Accuracies in percent. top-1, top-5: on the central crop of each of {report.val.num_samples:,} validation images.
train crops, val crops: top-1 on one random crop of each of {report.train.num_samples:,} training and
{report.val.num_samples:,} validation images (seed {report.seed}, epoch 0: crops that no run was trained on), which are
harder than central ones; the network in evaluation mode. gap: train crops less val crops, both random.
{_rule(report)}.</p>
{figures_of_page}
</main>
</body>
</html>
"""


def _rule(report: ReportData) -> str:
    rules = {(subject.resolution, subject.rule) for subject in report.subjects}
    if len(rules) > 1:
        return "Each run sees crops by its own rule; Figures 7 and 8 show them by that of the first"
    ((resolution, rule),) = rules
    low, high = (f"{100 * share:g}" for share in rule.scale)
    return (
        f"Validation crops are the central {100 * rule.center_ratio:.3g} %, training crops {low} to {high} % of the "
        f"area, aspect {rule.ratio[0]:.2f} to {rule.ratio[1]:.2f}{', half of them mirrored' if rule.flip else ''}; all "
        f"at {resolution} px"
    )


def _table(heads: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    numbers = ("top-1", "top-5", "train crops", "val crops", "gap")
    kinds = [' class="number"' if head in numbers else ' class="name"' if head == "folder" else "" for head in heads]

    def line(tag: str, cells: Sequence[str]) -> str:
        marked = (f"<{tag}{kind}>{html.escape(cell)}</{tag}>" for cell, kind in zip(cells, kinds, strict=True))
        return f"<tr>{''.join(marked)}</tr>"

    below = "\n".join(line("td", cells) for cells in body)
    return f"<table>\n<thead>{line('th', heads)}</thead>\n<tbody>\n{below}\n</tbody>\n</table>"


def _figure(figure: Figure) -> str:
    number = figure.path.stem.removeprefix("figure-")
    image = base64.b64encode(figure.path.read_bytes()).decode()
    return (
        f'<figure id="{figure.path.stem}">\n'
        f'<img alt="{html.escape(figure.alt)}" src="data:image/png;base64,{image}">\n'
        f"<figcaption><b>Figure {number}.</b> {html.escape(figure.caption)}</figcaption>\n"
        "</figure>"
    )
