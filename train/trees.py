"""Label maps in ReLabel's published layout: a tree with one file for each training image.

    python -m train.maps import --tree relabel_imagenet --data imagenet --out maps/relabel
    python -m train.maps export --labels maps/resnet50 --data images/ --out tree
    make maps ARGS="import --tree relabel_imagenet --data imagenet --out maps/relabel"

The map of the image CLASS/NAME.jpg is the file CLASS/NAME.pt, a tensor [2, K, S, S] saved by torch.save: for S x S
cells the logits of the K most likely classes, followed by the ids of these classes, also as floating-point numbers;
rows of the image come before columns. (The published training code passes a crop's top to RoIAlign as x, as if columns
came first; here a row is a row.) The logits of classes that a cell lacks count as 0.
"""

import hashlib
import io
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from command import printable, typed_command
from data import DataError
from data.convert import ensure_converted
from data.durable import in_units
from data.folders import files_below
from data.progress import images_bar
from data.sets import ConvertedSet, Unconverted, find_set
from train import TrainError
from train.interrupt import Interrupted, Stop, stop_on_signal
from train.labels.description import Description, data_part
from train.labels.maps import check_classes, existing_maps, open_maps
from train.labels.rows import CellRows
from train.labels.store import Store, create_store, open_store

_ENDING = ".pt"


def import_maps(tree: str, data: str, out: str, refinery: str = "relabel") -> Store:
    """Imports label maps from a tree of files, as ReLabel published them, for training with --labels.stored.

    Maps without a training image are skipped. Returns the finished maps; unfinished ones if another process makes them.
    Raises DataError or TrainError for bad input, as far as possible before all maps are read, and Interrupted after
    Ctrl-C or SIGTERM; the same call then starts over.

    Args:
        tree: the folder of class folders, which hold a file NAME.pt for each training image NAME.jpg. Logits are kept
            unchanged, in float16; those of classes that a cell lacks count as 0
        data: the images: a folder or an archive, or a converted set of one
        out: the folder to write the maps to
        refinery: a name for the network that made the maps, shown in reports
    """
    if not re.fullmatch(r"[\w.:/+-]{1,100}", refinery):
        raise TrainError(f"refinery={refinery}: give a name of letters, digits and any of . : / + - _")
    before = existing_maps(Path(out))
    if before and before.epochs:
        raise TrainError(f"OUT={out}: holds finished maps already; give another folder, or remove it to import again")
    root = Path(tree)
    files = _files_below(root)
    converted = _converted(data)
    classes = len(converted.class_names)
    check_classes(converted)
    wanted = _files_of(converted)
    others = _check_files(root, files, wanted, converted)
    _, kept, side, _ = read_map(root / wanted[0], classes).shape
    format = CellRows(classes, kept, side)
    weights = before.description.refinery["weights"] if before else None
    description = Description(
        data=data_part(converted, len(wanted)),
        refinery={"network": refinery, "weights": weights, "generation": 0, "bn": None, "resolution": None},
        plan=None,
        resolution=None,
        precision=None,
        batch=None,
        order=None,
        format="map",
        k=kept,
        dtype="float16",
        bytes_per_crop=format.width,
        cells=side,
    )
    store = create_store(Path(out), description)
    store.check_room(1)
    print(f"maps    {description.kind}, of {converted.folder} by {refinery}, from {root}")
    if others:
        print(f"maps    {len(others)} of no training image are left out (first {printable(others[0])})")
    print("logits  as they are; classes that a cell leaves out count as 0")
    print(f"rows    {format.width} bytes per image, {in_units(description.bytes_per_epoch)} in all; {out}", flush=True)
    with stop_on_signal() as stop, store.writing(0) as rows:
        if rows is not None:
            digest = _fill(rows, _read_maps(root, wanted, classes), format, stop)
            if weights not in (None, digest):
                raise TrainError(f"OUT={out}: is of other maps than those of {root}; give another folder")
            # Known only now; written together with the mark that the maps are finished.
            store.description = replace(store.description, refinery=description.refinery | {"weights": digest})
    if store.epochs:
        print(f"finished; to train from them:\n  make train LABELS={out} ...", flush=True)
    else:
        print(f"{out}: another process is importing them", flush=True)
    return open_store(out)


def _fill(rows: NDArray[np.uint8], maps: Iterable[Tensor], format: CellRows, stop: Stop) -> str:
    """Fills the rows, [images, bytes of a map], with these maps, [2, K, S, S]; returns the rows' SHA-256 in hex.

    Raises Interrupted if a stop is asked for.
    """
    digest = hashlib.sha256()
    with images_bar(len(rows), "import maps") as bar:
        for row, (logits, ids) in zip(rows, maps, strict=True):
            if stop.requested:
                raise Interrupted(f"stopped; maps are imported in one go, so type again:\n  {typed_command()}")
            row[:] = format.pack_kept(*(part.movedim(0, -1)[None] for part in (logits, ids)))[0].numpy()
            digest.update(row)
            bar.update()
    return digest.hexdigest()


def export_maps(labels: str, data: str, out: str) -> None:
    """Exports label maps as a tree of files in the layout that ReLabel published, in float32, as its reader expects.

    Raises DataError or TrainError for bad input, and Interrupted after Ctrl-C or SIGTERM. The tree appears only when it
    is complete.

    Args:
        labels: the folder of the maps
        data: the images that they were made from
        out: the folder to write the tree to; new or empty
    """
    store = open_maps(labels)
    _check_target(out)
    converted = _converted(data)
    store.check_data(converted)
    names, rows, made = _files_of(converted), store.rows(0), store.description
    assert made.k
    assert made.cells
    format = CellRows(made.data["classes"], made.k, made.cells)

    def contents(number: int) -> bytes:
        logits, ids = format.unpack(torch.from_numpy(rows[[number]]))
        return map_file(logits[0], ids[0])

    size = len(names) * len(contents(0))
    print(f"maps    {made.kind}, of {converted.folder} by {made.refinery['network']}")
    if made.shift:
        print("logits  shifted, so that those left out are 0 on average; for readers that count them as 0")
    print(f"tree    {len(names)} files, {in_units(size)} in all; {out}", flush=True)
    target = Path(out).absolute()
    partial = target.with_name(f".{target.name}.partial-{os.getpid()}")
    try:
        partial.mkdir(parents=True)
        free = shutil.disk_usage(partial).free
        if size > free:
            raise TrainError(f"OUT={out}: the tree takes {in_units(size)}, and {in_units(free)} are free")
        for folder in {os.path.dirname(name) for name in names}:
            (partial / folder).mkdir(parents=True, exist_ok=True)
        with stop_on_signal() as stop, images_bar(len(names), "export maps") as bar:
            for number, name in enumerate(names):
                if stop.requested:
                    raise Interrupted(f"stopped; a tree is exported in one go, so type again:\n  {typed_command()}")
                (partial / name).write_bytes(contents(number))
                bar.update()
        partial.rename(target)
    except OSError as error:
        raise TrainError(f"OUT={out}: cannot be written ({error.strerror}); nothing was left half-done") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    print("finished", flush=True)


def read_map(path: Path, classes: int) -> Tensor:
    """The map in a file, float64 [2, K, S, S]: logits, and ids of `classes` classes, distinct in each cell.

    Raises TrainError, which names the file, if it is not such a map or its logits exceed float16.
    """
    try:
        found = torch.load(io.BytesIO(path.read_bytes()), map_location="cpu", weights_only=True)
    except OSError as error:
        raise TrainError(f"{path}: cannot be read ({error.strerror})") from None
    except Exception:  # damaged files raise many kinds of errors
        raise TrainError(f"{path}: is damaged, or no file of torch.save; unpack or make it again") from None
    if not isinstance(found, Tensor) or found.layout != torch.strided or not found.is_floating_point():
        what = f"a tensor of {found.dtype} ({found.layout})" if isinstance(found, Tensor) else type(found).__name__
        raise TrainError(f"{path}: holds {what}; a map is a tensor of floating-point numbers, [2, K, S, S]")
    if found.ndim != 4 or found.shape[0] != 2 or found.shape[2] != found.shape[3] or not found.numel():
        raise TrainError(
            f"{path}: has shape {list(found.shape)}; a map is [2, K, S, S], logits and ids of K classes in S x S cells"
        )
    values = found.detach().double()
    fault = _fault(values[0], values[1], classes, largest_id=2 / torch.finfo(found.dtype).eps)
    if fault:
        raise TrainError(f"{path}: {fault}")
    return values


def _read_maps(root: Path, files: Sequence[str], classes: int) -> Iterator[Tensor]:
    """The maps in these files below root; raises as `read_map` does, and if one differs in shape from the first."""
    first: Tensor | None = None
    for file in files:
        found = read_map(root / file, classes)
        first = found if first is None else first
        if found.shape != first.shape:
            raise TrainError(
                f"{root / file}: has shape {list(found.shape)} and {files[0]} {list(first.shape)}; all must be alike"
            )
        yield found


def map_file(logits: Tensor, ids: Tensor) -> bytes:
    """The contents of the file of a map. logits, ids: [S, S, K], rows of the image first."""
    file = io.BytesIO()
    # The published reader scatters the logits into a float32 tensor, which requires this dtype.
    torch.save(torch.stack([logits.float(), ids.float()]).movedim(-1, 1).contiguous(), file)
    return file.getvalue()


def _fault(logits: Tensor, ids: Tensor, classes: int, *, largest_id: float) -> str | None:
    """What is wrong with a map, or None. largest_id: up to which the file's dtype represents all integers."""
    if not logits.isfinite().all():
        return "some of its logits are not finite; make the map again"
    if not logits.half().isfinite().all():
        return f"its logits go up to {logits.abs().max():g}; float16, in which maps are kept, ends at 65504"
    if not (ids == ids.floor()).all():
        return "some of its class ids are not whole numbers; make the map again"
    if ids.min() < 0 or ids.max() >= classes:
        return f"its class ids are {ids.min():g} to {ids.max():g}, and those of the data 0 to {classes - 1}"
    if classes - 1 > largest_id:
        return f"its type does not tell class ids above {largest_id:g} apart; make the maps in float32"
    if (ids.sort(dim=0).values.diff(dim=0) == 0).any():
        return "some cell has a class twice; make the map again"
    return None


def _converted(data: str) -> ConvertedSet:
    """The converted set for DATA. Raises DataError, also for a set whose images are not files."""
    found = find_set(data)
    if isinstance(found, Unconverted) and found.source.train.names is None:
        raise DataError(
            f"DATA={data}: maps are found by the names of image files; give a folder or an archive of these"
        )
    return ensure_converted(found)


def _files_below(root: Path) -> set[str]:
    """The files of maps in a tree, by their paths below its root. Raises TrainError if there are none."""
    if not root.is_dir():
        raise TrainError(f"tree={root}: no such folder; an archive of maps has to be unpacked first")
    found, notes = files_below(root, {_ENDING})
    for note in notes:
        print(printable(note), flush=True)
    files = {os.path.relpath(file, root) for file in found}
    if not files:
        raise TrainError(f"tree={root}: no maps ({_ENDING}) in it or below; give the folder of class folders")
    return files


def _files_of(data: ConvertedSet) -> list[str]:
    """The file of each training image's map, below a tree's root, in the order of the stored images.

    Raises DataError for a set without file names, TrainError if two images would have the same map file.
    """
    owners: dict[str, str] = {}
    for name in data.image_names("train"):
        file = os.path.splitext(name)[0] + _ENDING
        if file in owners:
            raise TrainError(
                f"{data.folder}: {owners[file]} and {name} would have one map, {file}; rename one and convert again"
            )
        owners[file] = name
    return list(owners)


def _check_files(root: Path, files: set[str], wanted: Sequence[str], data: ConvertedSet) -> list[str]:
    """Raises TrainError unless every image has its file; returns the files without an image, sorted."""
    missing = [file for file in wanted if file not in files]
    others = sorted(files.difference(wanted))
    if missing:
        there = f", and {len(others)} of its maps are of no image (first {others[0]})" if others else ""
        raise TrainError(
            f"tree={root}: {len(missing)} of the {len(wanted)} training images of {data.folder} have no map in it "
            f"(first {missing[0]}){there}; give the folder of class folders, of the same images"
        )
    return others


def _check_target(out: str) -> None:
    """Raises TrainError unless a tree can be written there."""
    target = Path(out)
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise TrainError(f"OUT={out}: exists already; give a new folder or an empty one")
    if target.is_mount():
        raise TrainError(f"OUT={out}: is where a disk is mounted; give a new folder on it")
