"""Makes label maps: a refinery's labels of every part of each image, once for all crops (ReLabel: Yun et al. 2021).

python -m train.maps --refinery resnet50 --data images/ --out maps/resnet50
make maps REFINERY=resnet50 DATA=images/ OUT=maps/resnet50
make train MODEL=mobilenet LABELS=maps/resnet50 DATA=images/
"""

import sys
from collections.abc import Callable
from copy import deepcopy
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from command import exit_on_user_error, run_command, typed_command
from data.durable import in_units
from data.loader import Pairing, open_loader
from kernels.normalise import Normalise
from models.cells import CellLogits
from models.trained import Trained
from train import TrainError
from train.ahead import look_ahead, parts_of, with_costs
from train.announce import announce_plan
from train.config import Config, configure, parse_both
from train.device import computing_in, on_device, set_tf32_and_allocator, set_threads
from train.distributed import ALONE, Group, group, joined
from train.failures import is_out_of_memory
from train.interrupt import Stop, stop_on_signal
from train.job import Job
from train.labels.description import Description, data_part, refinery_part
from train.labels.maps import check_classes, existing_maps
from train.labels.refinery import RefineryLabels
from train.labels.rows import CellRows
from train.labels.store import Store, check_asked, create_store
from train.launch import on_devices
from train.report.maps import show
from train.rounds import in_rounds, own_blocks
from train.train import with_refinery
from train.trees import export_maps, import_maps

# Classes kept per cell, as published.
_KEPT = 5
# Published networks get larger images than they were trained on, for maps of 15 x 15 cells (ReLabel, section 3.1).
_PUBLISHED_SIDE = 480
# The loader's own crops are not used, so they are as small as possible.
_UNUSED_SIDE = 8


@dataclass(frozen=True)
class MapsOptions:
    """Options of label maps.

    Args:
        map_resolution: pixels per side to which whole images are squashed for the refinery (default: the scale of its
            own validation crops; 480 for published weights)
    """

    map_resolution: int | None = None


# Further commands; each is called with its own options.
_COMMANDS: dict[str, Callable[..., Any]] = {"import": import_maps, "export": export_maps, "show": show}


def main() -> None:
    command, *words = sys.argv[1:] or [""]
    if command in _COMMANDS:
        run_command(_COMMANDS[command], prog=f"python -m train.maps {command}", words=words)
        return
    about = (
        "Writes the label map of every training image to the folder --out, for training with --labels.stored: the "
        "refinery's classifier at each cell of its last feature map, the 5 most likely classes of each. A refinery "
        "given by the name of its network is trained first if it has no finished run. The commands `import` and "
        "`export` (python -m train.maps import --help) read and write maps in the files that ReLabel published, and "
        "`show` draws some. With --gpus N, N devices divide the images among them."
    )

    def parse(words: list[str]) -> tuple[Config, MapsOptions]:
        return parse_both(words, MapsOptions, prog="python -m train.maps", about=about, out="the folder of the maps")

    def work(asked: tuple[Config, MapsOptions]) -> None:
        with joined(asked[0].device):
            make_maps(*asked)

    on_devices(
        f"{__package__}.maps", sys.argv[1:], parse, work, kept="maps are made in one go, so type the command again"
    )


def make_maps(config: Config, options: MapsOptions = MapsOptions()) -> Store:
    """Makes the label maps of the training images with `config.refinery`, in `config.out`.

    With several processes (train.distributed), each makes the maps of some batches of images; batches and maps are the
    same for any number of processes.
    Raises DataError, ModelError or TrainError for bad input, as far as possible before anything slow begins, and
    Interrupted after Ctrl-C or SIGTERM.
    """
    _check(config, options)
    together = group()
    # Whole images are not in a batch of crops whose statistics could be used.
    given = {name: value for name, value in config.given.items() if name != "out"} | {"labels.bn": "running"}
    # Batches are those of a single process.
    ahead = look_ahead([configure(given)], ALONE, trained=False)
    parts = with_costs([part for part in parts_of(ahead) if part.is_refinery])
    announce_plan(parts)
    (job,) = with_refinery(ahead, parts)
    set_tf32_and_allocator(job.device, job.config.precision, deterministic=job.config.deterministic)
    set_threads(job.config.threads)
    mapper = Mapper(job, options, together)
    together.check_same(asdict(mapper.description))
    store = together.in_turn(lambda: create_store(Path(str(config.out)), mapper.description))
    store.check_room(1)
    made = store.description
    print(f"maps    {made.kind}, of {job.data.folder} by {made.refinery['network']} at {made.resolution} px")
    shifted = "; logits shifted, so that those left out are 0 on average" if made.shift else ""
    print(f"head    {mapper.network.head}{shifted}")
    if made.cells == 1:
        print("maps    of one cell give all crops of an image the same label; a larger --map_resolution has more")
    print(
        f"rows    {made.bytes_per_crop} bytes per image, {in_units(made.bytes_per_epoch)} in all; {store.folder}",
        flush=True,
    )
    with stop_on_signal() as stop, store.writing(0, together) as rows:
        if rows is not None:
            mapper.fill(rows, stop)
    if store.epochs:
        print(f"finished; to train from them:\n  make train LABELS={store.folder} ...", flush=True)
    else:
        print(f"{store.folder}: another process is making them", flush=True)
    return store


def _check(config: Config, options: MapsOptions) -> None:
    check_asked(config.refinery, config.out, "maps")
    given = [option for option in config.changed if option.startswith("labels.")]
    if given:
        raise TrainError(f"{', '.join(sorted(given))}: has no meaning for maps; leave it out")
    if options.map_resolution is not None and options.map_resolution < 1:
        raise TrainError(f"map_resolution={options.map_resolution}: must be at least 1")
    existing_maps(Path(str(config.out)))


class Mapper:
    """Makes the maps of a run's images with its refinery, divided among `together`'s processes.

    network: computes the logits of the cells. description: of the maps.

    Raises ModelError for a refinery whose head is not the mean of cells and a linear layer.
    """

    def __init__(self, job: Job, options: MapsOptions, together: Group = ALONE):
        assert isinstance(job.labels, RefineryLabels)
        self._job, self._together, trained = job, together, job.labels.trained
        side = options.map_resolution or _usual_side(trained, job)
        trained.check_resolution(side)
        self.network = on_device(CellLogits(deepcopy(trained.network), trained.name, side), job.device)
        self._normalise = Normalise(trained.normalisation).to(job.device)
        self._whole = Pairing("whole", side)
        self._loader = open_loader(
            job.data.beton("train"),
            resolution=_UNUSED_SIDE,
            batch_size=job.batch,
            train=False,
            crop=job.crop,
            paired=(self._whole,),
            **job.loading,
        )
        classes = len(job.data.class_names)
        check_classes(job.data)
        self._columns = trained.columns_of(job.data.class_names)
        first = self._cells(next(self._loader.epoch(0)).paired[self._whole])
        cells = first.shape[-1]
        if first.shape[-2] != cells:
            raise TrainError(
                f"REFINERY={job.config.refinery}: its feature map is not square, {list(first.shape[-2:])}; take another"
            )
        self._rows = CellRows(classes, _KEPT, cells)
        self.description = Description(
            data=data_part(job.data, self._loader.num_samples),
            refinery=refinery_part(trained, bn="running", resolution=side),
            plan=None,
            resolution=side,
            precision=job.config.precision,
            batch=job.batch,
            order="sequential",
            format="map",
            k=self._rows.k,
            dtype="float16",
            bytes_per_crop=self._rows.width,
            cells=cells,
            # Dropped logits count as 0. Adding a constant to a cell's logits does not change the softmax, pooled or
            # not.
            shift=self._rows.k < classes,
        )

    def fill(self, rows: NDArray[np.uint8], stop: Stop) -> None:
        """Fills this process's rows of all images', [images, bytes of a map].

        Raises TrainError for logits that are not finite, Interrupted if a stop is requested.
        """
        stopped = f"stopped; maps are made in one go, so type again:\n  {typed_command()}"
        batches = self._loader.epoch(0, blocks=own_blocks(self._loader, self._together))
        for batch in in_rounds(batches, self._loader, self._together, stop, name="label maps", stopped=stopped):
            cells = self._cells(batch.paired[self._whole])
            packed = self._rows.pack(self._shifted(cells) if self.description.shift else cells)
            # As stored: float16 has a smaller range than the network's own dtype.
            if not self._rows.unpack(packed)[0].isfinite().all():
                raise TrainError(
                    f"REFINERY={self._job.config.refinery}: its logits for some images are not finite in float16; "
                    "try --precision fp32, or another refinery"
                )
            rows[batch.indices.cpu().numpy()] = packed.cpu().numpy()

    @torch.no_grad()
    def _cells(self, pictures: torch.Tensor) -> torch.Tensor:
        """The logits of every cell and class, float32 [B, C, S, S]."""
        try:
            with computing_in(self._job.autocast, self._job.device):
                cells = self.network(self._normalise(pictures)).float()
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            raise TrainError(
                f"batch={len(pictures)}: is too large for this device at {pictures.shape[-1]} px; take a smaller one"
            ) from None
        return cells if self._columns is None else cells[:, self._columns]

    def _shifted(self, cells: torch.Tensor) -> torch.Tensor:
        kept = cells.topk(self._rows.k, dim=1).values.sum(dim=1, keepdim=True)
        return cells - (cells.sum(dim=1, keepdim=True) - kept) / (cells.shape[1] - self._rows.k)


def _usual_side(trained: Trained, job: Job) -> int:
    """Pixels per side at which a whole image has the scale of the refinery's validation crops; more if published."""
    resolution, ratio = trained.resolution or job.resolution, trained.center_ratio or job.crop.center_ratio
    scale = round(resolution / ratio)
    return max(scale, _PUBLISHED_SIDE) if trained.file is None else scale


if __name__ == "__main__":
    exit_on_user_error(main)
