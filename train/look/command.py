"""Shows images, crops and labels before a training, and a network's results on them after.

python -m train.look --data images/ --refinery timm:resnet50.a1_in1k:pretrained
make look DATA=images/ CHECKPOINT=runs/images/...
"""

import os
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import matplotlib
import yaml

from data import DataError
from data.beton import Beton
from data.decoders.prefetch import default_threads
from data.durable import make_folder, reason, replacing
from data.sets import ConvertedSet, find_set
from models.trained import Trained, load_trained, names_network_alone, parse_spec
from train import TrainError
from train.config import Config, parse_both
from train.device import set_tf32_and_allocator
from train.evaluate import crops_for, scored_columns
from train.job import Job, check, needs_refinery, resolve
from train.labels.refinery import RefineryLabels
from train.look import page, results, sections
from train.look.answers import Answers, Judge, chosen
from train.look.crops import FirstCrops, first_crops
from train.look.duplicates import Duplicates, find_duplicates
from train.report.analysis import Compute, readable
from train.runs import Run, finished_refinery, read_run


@dataclass(frozen=True)
class LookOptions:
    """Options of the page.

    Args:
        checkpoint: a trained network to examine: a run folder, a checkpoint file, NAME:FILE, or published weights as
            timm:NAME:pretrained or torchvision:NAME:pretrained. For a run, the crops are those that it was trained on
        images: the most images of each split that networks classify; of more, some are chosen by the seed
    """

    checkpoint: str | None = None
    images: int = 50_000

    def __post_init__(self):
        if self.images < 1:
            raise TrainError(f"images={self.images}: must be at least 1")


@dataclass(frozen=True)
class _Network:
    """The checkpoint. run: its run, if any. metrics: of the run's epochs. columns: its outputs for the classes."""

    trained: Trained
    run: Run | None
    metrics: list[dict[str, Any]]
    columns: list[int]


def main() -> None:
    about = (
        "Writes one HTML page, --out, of the images in --data: classes and sizes, the first crops that a training with "
        "these options will see, with the labels of image, crop and --refinery (or --labels.stored) side by side, "
        "duplicates, and images that are probably mislabelled; of --checkpoint also learning curves, confusion, worst "
        "classes and mistakes, and calibration. Options of training matter only if they change crops or labels."
    )
    out = "the page, a file in .html (default: look.html in the run's folder of --checkpoint, or else in runs/DATA)"
    prog = "python -m train.look"
    look(*parse_both(sys.argv[1:], LookOptions, prog=prog, about=about, out=out, several_devices=False))


def look(config: Config, options: LookOptions = LookOptions()) -> Path:
    """Writes the page and returns its path.

    Raises DataError, ModelError or TrainError for bad input, before anything slow begins.
    """
    if options.checkpoint and names_network_alone(options.checkpoint):
        raise TrainError(
            f"CHECKPOINT={options.checkpoint}: names a network without weights; give a run folder or a file"
        )
    run = _run_at(options.checkpoint)
    if run:
        config = _as_trained(config, run)
    if config.labels.stored and "epochs" not in config.given:
        # Only the first one is needed, and there may be no others.
        config = config.replace({"epochs": 1})
    out = _place(config, run) if config.out or run else None
    found = find_set(config.data)
    # A set that is not converted yet has the name of its source.
    out = out or _place(config, None, found.name if isinstance(found, ConvertedSet) else found.source.name)
    network = _network(options.checkpoint, run, found.class_names, config.data) if options.checkpoint else None
    # For training, `out` is a folder.
    job = _job(config.replace({"out": None}))
    if run:
        job = replace(job, crop_seed=run.crop_seed, seed=run.crop_seed)
    set_tf32_and_allocator(job.device, job.config.precision)
    made = _page(job, network, options.images)
    size = len(made)
    if size > page.MOST_BYTES:
        raise TrainError(f"{out}: the page would take {size / 1e6:.1f} MB, more than 8; please report this")
    try:
        with replacing(out) as file:
            file.write(made)
    except OSError as error:
        raise TrainError(f"{out}: cannot be written ({reason(error, out)}); name another file with OUT") from None
    print(f"written to {out} ({size / 1e6:.1f} MB); open it in a browser", flush=True)
    return out


# ---- options


def _job(config: Config) -> Job:
    """The run given by the options, with the finished refinery that a training would use. Raises as `look` does."""
    if not needs_refinery(config):
        data, (labels,) = check([config])
        return resolve(config, data, labels)
    refinery = config.as_refinery(str(config.refinery), {"pretrained": None})
    data, (ground_truth,) = check([refinery, config])
    wanted = resolve(refinery, data, ground_truth)
    run, shorter = finished_refinery(Path(config.runs), wanted.identity, str(wanted.config.recipe))
    run = run or shorter
    if not run:
        raise TrainError(
            f"REFINERY={config.refinery}: has no finished run on {data.name} at {wanted.resolution} px; train it "
            "first, or give a run folder, NAME:FILE, or published weights as timm:NAME:pretrained"
        )
    notice = "; a training would not take it, for its recipe or length, and train one first" if run is shorter else ""
    print(f"refinery: {run.folder} is used{notice}", flush=True)
    return _job(config.replace({"refinery": str(run.folder)}))


def _run_at(checkpoint: str | None) -> Run | None:
    """The run that a checkpoint belongs to, if any."""
    if not checkpoint or (":" in checkpoint and not Path(checkpoint).exists()):
        return None
    path = Path(checkpoint)
    return read_run(path if path.is_dir() else path.parent)


def _as_trained(config: Config, run: Run) -> Config:
    """The configuration with a run's data, crops and labels, unless others were given."""
    identity, said = run.identity, _config_of(run)
    kept = ("epochs", "resolution", "batch", "copies", "order")
    known: dict[str, Any] = {name: identity[name] for name in kept if name in identity}
    known |= {f"crop.{name}": value for name, value in identity["crop"].items()}
    known |= {f"augment.{name}": value for name, value in identity.get("augment", {}).items()}
    known["data"] = said.get("data")
    if not isinstance(config.given.get("data", known["data"]), str):
        raise TrainError(f"{run.folder / 'config.yaml'}: missing or damaged; say with DATA what the run was trained on")
    if not {"refinery", "labels.stored"} & set(config.given):
        known |= _labels_of(said)
    # Only crops and labels of a recipe matter here, and they are known.
    return config.replace({name: value for name, value in known.items() if name not in config.given})


def _config_of(run: Run) -> dict[str, Any]:
    """The options of a run; empty if its file is missing or damaged."""
    try:
        said = yaml.safe_load((run.folder / "config.yaml").read_text())
    except (OSError, ValueError, yaml.YAMLError, RecursionError):
        said = None
    return said if isinstance(said, dict) else {}


def _labels_of(said: dict[str, Any]) -> dict[str, Any]:
    """The options of a run's labels; without their origin if that no longer exists, and then a notice is printed."""
    labels = said.get("labels")
    asked = {"refinery": said.get("refinery")}
    asked |= {f"labels.{name}": value for name, value in labels.items()} if isinstance(labels, dict) else {}
    refinery, stored = asked["refinery"], asked.get("labels.stored")
    file = parse_spec(str(refinery))[1] if refinery else stored
    if file is not None and file != "pretrained" and not Path(str(file)).exists():
        print(
            f"{file}: the origin of the run's labels no longer exists; the page shows the images' own labels",
            flush=True,
        )
        return {}
    return {name: value for name, value in asked.items() if value is not None}


def _place(config: Config, run: Run | None, name: str = "") -> Path:
    """The file of the page: OUT, else beside the checkpoint, else among the runs of the set. Raises TrainError."""
    out = Path(config.out) if config.out else (run.folder if run else Path(config.runs) / name) / "look.html"
    if out.suffix.lower() not in (".html", ".htm") or out.is_dir():
        raise TrainError(f"OUT={out}: name a file that ends in .html")
    try:
        make_folder(out.parent)
    except OSError as error:
        raise TrainError(f"OUT={out}: {out.parent} cannot be made ({error.strerror}); name another file") from None
    if not os.access(out.parent, os.W_OK):
        raise TrainError(f"OUT={out}: {out.parent} cannot be written to; name another file")
    return out


def _network(checkpoint: str, run: Run | None, class_names: Sequence[str], data: str) -> _Network:
    trained = load_trained(checkpoint, class_names=class_names)
    columns = scored_columns(trained, class_names, data)
    unknown = sum(column < 0 for column in columns)
    if unknown:
        raise TrainError(f"DATA={data}: has {unknown} classes that {trained.origin} does not know; give another set")
    return _Network(trained, run, run.metrics if run else [], columns)


# ---- the page


def _page(job: Job, network: _Network | None, most: int) -> bytes:
    data, config = job.data, job.config
    betons = {split: Beton(data.beton(split)) for split in ("train", "val")}
    # Names may come from other people's files and have any length.
    names = tuple(map(page.shortened, readable(data.class_names)))
    images = sections.Pictured(data, names, betons, _files(data, betons))
    compute = Compute(job.device, config.decoder, config.threads or default_threads(), min(config.batch, 256))
    checkpoint = refinery = None
    if network:
        whose = f"{network.trained.name} ({network.trained.origin})"
        checkpoint = _judge(job, network.trained, network.columns, whose)
    if isinstance(job.labels, RefineryLabels):
        trained = job.labels.trained
        columns = trained.columns_of(data.class_names) or range(len(data.class_names))
        refinery = _judge(job, trained, columns, f"the refinery {trained.name} ({trained.origin})")
    judge = refinery or checkpoint
    rows = {split: chosen(beton, most, seed=config.seed) for split, beton in betons.items()}
    with matplotlib.rc_context({"text.parse_math": False}), warnings.catch_warnings():
        # Characters that the charts' font lacks are shown in the tables.
        warnings.filterwarnings("ignore", "Glyph .* missing from font")
        twice = find_duplicates(betons["train"], betons["val"])
        first = first_crops(job, betons["train"], images.names, sections.CROPS, checkpoint)
        judged: dict[str, Answers] = {}
        if judge:
            judged["train"] = judge.answers(betons["train"], rows["train"], compute, name="suspects, train")
        if judge and judge is not checkpoint:
            judged["val"] = judge.answers(betons["val"], rows["val"], compute, name="suspects, validation")
        scored = checkpoint.answers(betons["val"], rows["val"], compute, name="validation") if checkpoint else None
        accuracy = scored.of_classes()[1] if scored else None
        shown = [
            sections.classes(images, first, accuracy),
            sections.crops(images, first, job, judged["train"] if refinery else None),
            sections.duplicates(images, twice),
        ]
        if judged:
            shown.append(sections.suspects(images, judged["train"], judged.get("val")))
        if network and network.run:
            same_loss = network.run.identity["labels"]["kind"] == "ground_truth"
            shown.append(results.learning(network.metrics, same_loss=same_loss))
        if scored:
            shown += [
                results.worst_classes(images, scored),
                results.confusion_matrix(images, scored),
                results.mistakes(images, scored),
                results.calibrated(scored),
            ]
    under = (
        f"{sum(beton.num_samples for beton in betons.values()):,} images of {len(images.names):,} classes in "
        f"{data.folder}, stored as {data.made.get('storage', 'images')}"
        + (f"; network {checkpoint.whose}" if checkpoint else "")
        + (f"; {refinery.whose}" if refinery else "")
    )
    notes = _notes(images, first, twice, judged)
    return page.document(f"A look at {data.name}", under, notes, shown).encode(errors="backslashreplace")


def _judge(job: Job, trained: Trained, columns: Sequence[int], whose: str) -> Judge:
    side, rule = crops_for(trained, job.resolution, job.data.crop, None)
    return Judge(whose, trained, columns, side, rule, job.config.precision)


def _files(data: ConvertedSet, betons: dict[str, Beton]) -> dict[str, list[str] | None]:
    """The names of the image files, if the set has them."""
    files: dict[str, list[str] | None] = {}
    for split in betons:
        try:
            files[split] = data.image_names(split)
        except DataError:
            files[split] = None
    return files


def _notes(
    images: sections.Pictured, first: FirstCrops, twice: Sequence[Duplicates], judged: dict[str, Answers]
) -> list[str]:
    """Notes on what deserves attention before a training."""
    train, val = images.counts("train"), images.counts("val")
    notes = []
    for split, counts in (("training", train), ("validation", val)):
        empty = [name for name, number in zip(images.names, counts.tolist(), strict=True) if not number]
        if empty:
            some = ", ".join(empty[:3]) + (", …" if len(empty) > 3 else "")
            notes.append(f"{sections.count(len(empty), 'class has', 'classes have')} no {split} images: {some}.")
    low, high = int(train[train > 0].min()), int(train.max())
    if high >= 3 * low:
        notes.append(
            f"The largest class has {high / low:.0f} times the training images of the smallest ({high:,} and {low:,})."
        )
    for kind, words in (("contradictory", "with different labels"), ("across", "both in train and in validation")):
        number = sum(getattr(each, kind) for each in twice)
        if number:
            notes.append(f"{sections.count(number, 'image is', 'images are')} there more than once, {words}.")
    if first.enlarged > first.count / 2:
        notes.append(
            f"{sections.percent(first.enlarged / first.count)} of the training crops have fewer pixels than the "
            f"{first.resolution} px that the network sees; a lower RESOLUTION costs less and shows as much."
        )
    for split, answers in judged.items():
        number = sections.suspicious(answers)
        if number:
            words = sections.count(number, "image is", "images are")
            notes.append(
                f"In {sections.SPLIT_NAMES[split]}, {words} with confidence called something else than their label by "
                f"{answers.whose}: see Suspects."
            )
    return notes
