"""Label maps in figures: an image, its map, and the labels of crops from it."""

from pathlib import Path

import matplotlib
import numpy as np
import torch
from numpy.typing import NDArray

from data.beton import Beton
from data.convert import ensure_converted
from data.plan import seed_of_generation
from data.sets import find_set
from kernels.pool_labels import pool_labels
from train import TrainError
from train.labels.rows import CellRows
from train.labels.store import Description, open_store
from train.report import figures
from train.report.analysis import choose_images, cut_out, likeliest, named_images, picture, readable

_CROPS = 5
# How many images are shown by default.
_EXAMPLES = 4


def show(labels: str, data: str = "scenes", images: str | None = None, seed: int = 0, out: str | None = None) -> None:
    """Draws images with their label maps, and with the labels of five crops of each, as PNG files.

    Args:
        labels: a folder of label maps (python -m train.maps)
        data: the images of the maps: a folder of images, a converted set, or scenes, cifar10, svhn, imagenette
        images: training images by index, e.g. "5 17" (default: four of different classes, chosen by the seed)
        seed: the crops are those that a run of this seed on the maps trains on in its first five epochs
        out: the folder to write (default: the name of the maps' folder with -shown appended)

    Raises DataError or TrainError for indices that the set lacks, stored labels of crops, maps of other data, damaged
    maps, and a folder that cannot be written.
    """
    store = open_store(labels)
    made = store.description
    if made.format != "map":
        raise TrainError(f"LABELS={labels}: holds {made.kind} labels of crops and no maps; name a folder of maps")
    data_set = ensure_converted(find_set(data))
    store.check_data(data_set)
    beton = Beton(data_set.beton("train"))
    shown = named_images("images", images, beton) or choose_images(beton, _EXAMPLES, seed=seed)
    rows = store.rows(0)
    place = store.folder.absolute()
    folder = Path(out) if out else place.with_name(f"{place.name}-shown")
    names = readable(data_set.class_names)
    run_seed = seed_of_generation(seed, made.refinery["generation"] + 1)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for index in shown:
            image, size = picture(beton, index), beton.sizes[[index]]
            crops = [data_set.crop.training([index], size, seed=run_seed, epoch=epoch) for epoch in range(_CROPS)]
            boxes, flips = (np.concatenate(parts) for parts in zip(*crops, strict=True))
            cells, distribution = _cells_and_labels(made, rows[index], boxes, size[0])
            path = folder / f"map-{index}.png"
            # A class may be named "$1 and $2", which is not a formula.
            with matplotlib.rc_context({"text.parse_math": False}):
                figures.map_of_image(
                    image,
                    names,
                    cells,
                    boxes,
                    [cut_out(image, box, flip) for box, flip in zip(boxes, flips, strict=True)],
                    likeliest(torch.from_numpy(distribution), names),
                    f"training image {index}: {names[beton.labels[index]]}",
                    path,
                )
            print(path, flush=True)
    except OSError as error:
        raise TrainError(f"{folder}: cannot be written ({error.strerror}); name another folder with OUT") from None


def _cells_and_labels(
    made: Description, row: NDArray[np.uint8], boxes: NDArray[np.int32], size: NDArray[np.int32]
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """A map's probabilities of all classes: in each cell, [S, S, C], and for each crop, [crops, C].

    row: the stored map, uint8 [bytes]. boxes: int32 [crops, 4] (top, left, height, width) in pixels of the image. size:
    its height and width.
    """
    assert made.k
    assert made.cells
    classes = made.data["classes"]
    logits, ids = CellRows(classes, made.k, made.cells).unpack(torch.from_numpy(row[None].copy()))
    shape = (*logits.shape[:3], classes)
    cells = torch.zeros(shape).scatter(3, ids, logits.float()).softmax(dim=3)[0]
    corners = np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], axis=1)
    shares = torch.from_numpy((corners / np.tile(size, 2)).astype(np.float32))
    every = (len(boxes), -1, -1, -1)
    return cells.numpy(), pool_labels(logits.expand(every), ids.expand(every), shares, classes).numpy()
