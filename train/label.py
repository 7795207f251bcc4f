"""Labels training crops with a refinery, epoch by epoch, and stores the labels: label once, train many times.

python -m train.label --refinery resnet50 --data images/ --epochs 20 --out labels/resnet50
make label REFINERY=resnet50 DATA=images/ EPOCHS=20 OUT=labels/resnet50
make train MODEL=mobilenet LABELS=labels/resnet50 DATA=images/
"""

import sys
from collections import deque
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from command import exit_on_user_error, typed_command
from data.durable import in_units
from data.loader import CropBatch
from train import TrainError
from train.ahead import look_ahead, parts_of, with_costs
from train.announce import announce_plan
from train.config import Config, configure, parse_both
from train.device import computing_in, on_device, set_tf32_and_allocator, set_threads
from train.distributed import ALONE, Group, group, joined
from train.failures import is_out_of_memory, reason
from train.interrupt import Stop, stop_on_signal
from train.job import Job
from train.labels.description import Description, data_part, refinery_part
from train.labels.refinery import Refinery, RefineryLabels
from train.labels.rows import Exact, Packed, Rows
from train.labels.store import Store, check_asked, create_store, existing_store
from train.launch import on_devices
from train.rounds import in_rounds, own_blocks
from train.step import COMPILER_OPTIONS, forget_compiled_steps
from train.train import with_refinery

# Batches whose rows may still be in transfer from a GPU while the next ones are labelled.
_ON_THEIR_WAY = 2
_USUAL_K = 10


@dataclass(frozen=True)
class LabelOptions:
    """Options of stored labels.

    Args:
        format: packed keeps the k most likely classes of each crop, each one's probability relative to the first
            (within 10 %), and the total of all others; exact keeps all logits, so that training equals that from the
            refinery itself
        k: how many classes packed labels keep (default: 10, or all if there are fewer)
    """

    format: Literal["exact", "packed"] = "packed"
    k: int | None = None


def main() -> None:
    about = (
        "Writes a refinery's labels of every training crop of the first --epochs epochs to the folder --out, for "
        "training with --labels.stored. Finished epochs are not repeated; if the command is started twice, the "
        "processes share the epochs, and with --gpus N, N devices share the batches of each. A refinery given by the "
        "name of its network is trained first if it has no finished run. Options for how crops are made (--seed, "
        "--crop, --copies, --resolution) and how the refinery labels them (--batch, --order, --precision, --labels.bn, "
        "--labels.resolution) apply here; students read the former from the labels. --model is the student, for which "
        "the recipe may have its own values (its batch, for example)."
    )

    def parse(words: list[str]) -> tuple[Config, LabelOptions]:
        return parse_both(
            words, LabelOptions, prog="python -m train.label", about=about, out="the folder of the labels"
        )

    def work(asked: tuple[Config, LabelOptions]) -> None:
        with joined(asked[0].device):
            label(*asked)

    on_devices(f"{__package__}.label", sys.argv[1:], parse, work, kept="finished epochs are kept")


def label(config: Config, options: LabelOptions = LabelOptions()) -> Store:
    """Labels the crops of the first `config.epochs` epochs of a student of `config.refinery`, into `config.out`.

    With several processes (train.distributed), each labels some batches of every epoch; batches and labels are the same
    for any number of processes.
    Raises DataError, ModelError or TrainError for bad input, as far as possible before anything slow begins, and
    Interrupted after Ctrl-C or SIGTERM.
    """
    _check(config, options)
    together = group()
    folder, epochs = Path(str(config.out)), config.epochs
    # If the refinery has to be trained first, the recipe determines for how long.
    given = {name: value for name, value in config.given.items() if name not in ("epochs", "out")}
    # Batches are those of a single process.
    ahead = look_ahead([configure(given)], ALONE, trained=False)
    parts = with_costs([part for part in parts_of(ahead) if part.is_refinery])
    announce_plan(parts)
    (job,) = with_refinery(ahead, parts)
    set_tf32_and_allocator(job.device, job.config.precision, deterministic=job.config.deterministic)
    set_threads(job.config.threads)
    labeller = Labeller(job, options, together)
    together.check_same(asdict(labeller.description) | {"epochs": epochs})
    store = together.in_turn(lambda: create_store(folder, labeller.description))
    store.check_room(epochs)
    made = store.description
    print(f"labels  {job.labels.describe()}, in batches of {made.batch}, {made.precision}")
    print(
        f"crops   {labeller.loader.num_samples} images of {job.data.folder}, {made.copies} crops each, {epochs} epochs"
    )
    print(
        f"rows    {made.kind}, {made.bytes_per_crop} bytes per crop, {in_units(made.bytes_per_epoch)} per epoch, "
        f"{in_units(epochs * made.bytes_per_epoch)} in all; {store.folder}",
        flush=True,
    )
    with stop_on_signal() as stop:
        for epoch in range(epochs):
            with store.writing(epoch, together) as rows:
                if rows is not None:
                    labeller.label_epoch(epoch, rows, stop, f"labels of epoch {epoch + 1}/{epochs}")
    _report(store, epochs)
    return store


def _check(config: Config, options: LabelOptions) -> None:
    check_asked(config.refinery, config.out, "labels")
    if config.labels.stored:
        raise TrainError("labels.stored are for training; they are labels already")
    if config.labels.per != "crop":
        raise TrainError(f"labels.per={config.labels.per}: only labels of crops are stored; leave it out")
    before = existing_store(Path(str(config.out)))
    if options.k is not None and options.k < 1:
        raise TrainError(f"k={options.k}: must be at least 1")
    if options.k is not None and options.format == "exact":
        raise TrainError(f"k={options.k}: is for packed labels; exact ones keep all classes")
    if before:
        made = before.description
        k = None if options.format == "exact" else min(options.k or _USUAL_K, made.data["classes"])
        if (made.format, made.k) != (options.format, k):
            asked = options.format if k is None else f"top {k}"
            raise TrainError(f"OUT={config.out}: holds {made.kind} labels and not {asked}; give another folder")


def _report(store: Store, epochs: int) -> None:
    done = store.finished
    others = [epoch + 1 for epoch in range(epochs) if epoch not in done]
    if others:
        print(f"{store.folder}: another process is writing epoch {', '.join(map(str, others))}")
    crops = store.description.shape[0]
    seconds = sum(done[epoch]["seconds"] for epoch in range(epochs) if epoch in done)
    rate = crops * (epochs - len(others)) / seconds if seconds else 0.0
    print(
        f"finished: {epochs - len(others)} epochs of {crops} labels, {rate:.0f} images/s; to train from them:\n"
        f"  make train LABELS={store.folder} ...",
        flush=True,
    )


class Labeller:
    """Labels the crops of a run, `job`, with its refinery, an epoch at a time, divided among `together`'s processes.

    loader: of the crops of all images, including those that training drops because they do not fill a batch; they come
    last. description: of the labels that it makes. Raises TrainError for errors that only occur when the refinery is
    opened, and for too few images.
    """

    def __init__(self, job: Job, options: LabelOptions, together: Group = ALONE):
        assert isinstance(job.labels, RefineryLabels)
        self.job, self._together, config = job, together, job.config
        if job.compiled:
            forget_compiled_steps(1)
        self._source = on_device(job.labels.open(job), job.device)
        assert isinstance(self._source, Refinery)
        self.loader = job.open_crops(drop_last=False)
        if self.loader.num_samples < config.batch:
            raise TrainError(
                f"batch={config.batch}: {job.data.folder} has {self.loader.num_samples} images; take a smaller batch"
            )
        classes = len(job.data.class_names)
        exact = options.format == "exact"
        rows = Exact(classes, self._output_type()) if exact else Packed(classes, options.k or _USUAL_K)
        self._rows: Rows = on_device(rows, job.device)
        self._compute = self._finite_rows
        if job.compiled:
            self._compute = torch.compile(self._finite_rows, fullgraph=True, dynamic=False, options=COMPILER_OPTIONS)
        trained, crop = job.labels.trained, asdict(job.crop)
        self.description = Description(
            data=data_part(job.data, self.loader.num_samples),
            refinery=refinery_part(trained, bn=job.labels.given.bn, resolution=self._source.resolution),
            plan={
                "seed": job.crop_seed,
                "crop": {name: crop[name] for name in ("scale", "ratio", "flip")},
                "copies": config.copies,
            },
            resolution=job.resolution,
            precision=config.precision,
            batch=config.batch,
            order=config.order,
            format=self._rows.format,
            k=self._rows.k,
            dtype=self._rows.dtype,
            bytes_per_crop=self._rows.width,
        )

    def label_epoch(self, epoch: int, rows: NDArray[np.uint8], stop: Stop, name: str) -> None:
        """Fills this process's rows of an epoch's, [crops, bytes_per_crop]; `name` is the progress bar's.

        Raises TrainError for logits that are not finite and for too little memory, Interrupted if a stop is requested.
        """
        finite = torch.ones((), dtype=torch.bool, device=self.job.device)
        on_their_way: deque[tuple[torch.Tensor, torch.Tensor, torch.cuda.Event | None]] = deque()

        def arrived() -> None:
            places, labels, event = on_their_way.popleft()
            if event:
                event.synchronize()
            rows[places.numpy()] = labels.numpy()

        stopped = (
            f"stopped in epoch {epoch + 1}; the epochs before it are kept; to continue, type again:\n"
            f"  {typed_command()}"
        )
        batches = self._batches(epoch)
        for batch in in_rounds(batches, self.loader, self._together, stop, name=name, stopped=stopped):
            labels, all_finite = self._labelled(batch)
            finite &= all_finite
            places = batch.indices * self.description.copies + batch.copies
            # Nothing here waits for the device: labels are fetched while the next batches are labelled.
            on_their_way.append((_fetched(places), _fetched(labels[: len(places)]), self._event()))
            if len(on_their_way) > _ON_THEIR_WAY:
                arrived()
        while on_their_way:
            arrived()
        (spoilt,) = self._together.largest([not finite])
        if spoilt:
            raise TrainError(
                f"REFINERY={self.job.config.refinery}: its logits for some crops of epoch {epoch + 1} are not finite; "
                "try --precision fp32, or another refinery"
            )

    def _event(self) -> torch.cuda.Event | None:
        """An event at the current point of the device's work; None on a CPU, where there is nothing to wait for."""
        if self.job.device.type != "cuda":
            return None
        event = torch.cuda.Event()
        # With the device's name: otherwise it would be the stream of the first device.
        event.record(torch.cuda.current_stream(self.job.device))
        return event

    def _batches(self, epoch: int) -> Iterator[CropBatch]:
        """This process's batches of an epoch, all filled to full size.

        The refinery sees as many crops at a time as in training, since it may use their statistics; the last batch of
        an epoch is filled up with the crops of the first images, whose labels are not stored again.
        """
        size, first = self.job.config.batch, []
        own, missing = own_blocks(self.loader, self._together), -self.loader.num_samples % size
        # The process with the last block also needs the first one, which another may label.
        borrowed = missing > 0 and self.loader.blocks - 1 in own and 0 not in own
        for number, batch in enumerate(self.loader.epoch(epoch, blocks=[0, *own] if borrowed else own)):
            copy = number % self.description.copies
            if number == copy:
                # Copied, since the loader may reuse the memory.
                first.append(batch.crops[:missing].clone())
                if borrowed:
                    continue
            if len(batch.labels) < size:
                crops = torch.cat([batch.crops, first[copy]])
                batch = replace(batch, crops=crops.contiguous(memory_format=torch.channels_last))
            yield batch

    def _labelled(self, batch: CropBatch) -> tuple[torch.Tensor, torch.Tensor]:
        try:
            with torch.no_grad():
                return self._compute(batch)
        except Exception as error:  # compilers raise many kinds of errors
            if is_out_of_memory(error):
                raise TrainError(
                    f"batch={len(batch.crops)}: is too large for this device; take a smaller one"
                ) from None
            if self._compute == self._finite_rows:
                raise
            if self.job.config.compile == "always":
                raise TrainError(f"compile=always: the refinery cannot be compiled ({reason(error)})") from None
            print(f"the refinery cannot be compiled and runs uncompiled ({reason(error)})", flush=True)
        self._compute = self._finite_rows
        return self._labelled(batch)

    def _finite_rows(self, batch: CropBatch) -> tuple[torch.Tensor, torch.Tensor]:
        """The rows of a batch's crops, uint8 [B, bytes_per_crop], and whether all logits were finite."""
        logits = self.logits(batch)
        return self._rows.pack(logits), logits.isfinite().all()

    def logits(self, batch: CropBatch) -> torch.Tensor:
        """The refinery's logits for a batch's crops, [B, C]."""
        with computing_in(self.job.autocast, self.job.device):
            logits = self._source(batch).logits
        assert logits is not None
        return logits

    @torch.no_grad()
    def _output_type(self) -> torch.dtype:
        """The dtype of the refinery's output, which for some networks is not that of the autocast."""
        return self.logits(next(self.loader.epoch(0)).first(2)).dtype


def _fetched(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor on the host, once the device has reached this point."""
    return tensor.to("cpu", non_blocking=True)


if __name__ == "__main__":
    exit_on_user_error(main)
