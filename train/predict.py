"""Classifies images: prints the five most likely classes of each.

python -m train.predict --checkpoint runs/scenes/... --images photo.jpg
python -m train.predict --checkpoint runs/scenes/... --images photos/*.jpg --format jsonl
make predict CHECKPOINT=runs/scenes/... IMAGES=folder/ OUT=predictions.csv
"""

import os
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast, get_args

import numpy as np
from PIL import Image
from tqdm import tqdm

from command import first_line, printable, run_command
from data.durable import is_full
from data.named import files_named
from data.originals import Originals
from data.pixels import open_image
from data.progress import images_bar
from data.sources import Split
from models.trained import Which, load_trained
from train import TrainError
from train.device import autocast_type, device_named, on_device, precision_on, set_tf32_and_allocator, set_threads
from train.evaluate import taken
from train.score import answering, likeliest_five
from train.score.predictions import BEGINS, Format, Rows, check_choice, format_named
from train.score.result_file import Write, result_file

# For networks that do not specify it.
_USUAL_RESOLUTION, _USUAL_CENTER = 224, 224 / 256


def predict(
    checkpoint: str,
    images: str,
    out: str | None = None,
    format: str | None = None,
    resolution: int | None = None,
    batch: int = 256,
    device: str = "auto",
    threads: int | None = None,
    which: str | None = None,
) -> None:
    """Lists the five most likely classes of images, ImageNet's also in words.

    Prints them, or writes them to a file, which appears when it is complete. Images that cannot be read are skipped and
    listed. Notices and progress go to standard error.

    Args:
        checkpoint: a run folder, a checkpoint file of ours, or a network of ImageNet's classes as NAME:FILE,
            timm:NAME:pretrained or torchvision:NAME:pretrained
        images: an image file, a folder (and those below), a pattern such as 'photos/*.jpg', @list.txt with one path per
            line, or several of these
        out: the file to write: .csv, .json or .jsonl (JSON lines); default: print them
        format: text, csv, json or jsonl (default: by the extension of out; text if they are printed)
        resolution: pixels per side of the crop (default: what the network was trained at)
        batch: crops at a time
        device: auto, cpu, cuda or cuda:N
        threads: number that decode, and number that compute on the CPU (default: one per processor)
        which: for a run folder, the checkpoint of its last or of its best epoch (default: last)
    """
    where = device_named(device)
    for name, value in {"BATCH": batch, "threads": threads}.items():
        if value is not None and value < 1:
            raise TrainError(f"{name}={value}: must be at least 1")
    set_threads(threads)
    check_choice("FORMAT", format, get_args(Format))
    check_choice("WHICH", which, get_args(Which))
    kind = cast(Format, format) if format else (format_named(out) if out else "text")
    files, notes = files_named(images)
    for note in notes:
        _notice(note)
    with result_file(Path(out), begins=BEGINS[kind]) if out else _standard_output() as write:
        trained = load_trained(checkpoint, which=cast(Which | None, which))
        side = (trained.resolution or _USUAL_RESOLUTION) if resolution is None else resolution
        trained.check_resolution(side)
        if said := taken(trained, checkpoint):
            _notice(said)
        network = on_device(trained.network, where)
        precision = precision_on(where)
        set_tf32_and_allocator(where, precision)
        answer = answering(network, trained.normalisation, device=where, autocast=autocast_type(precision))
        loader = Originals(
            Split(files, np.zeros(len(files), dtype=np.int64), _opened),
            trained.class_names,
            resolution=side,
            batch_size=batch,
            center_ratio=trained.center_ratio or _USUAL_CENTER,
            device=where,
            threads=threads,
            left_out=_left_out,
        )
        names = trained.class_names
        rows = Rows(write, kind, names, most=min(5, len(names)), labelled=False)
        started, read = time.perf_counter(), 0
        # A progress bar would mix with output on the same terminal.
        shown = len(files) > batch and (bool(out) or not sys.stdout.isatty())
        with images_bar(len(files), "predict", leave=False, shown=shown) as bar:
            for crops in loader.epoch():
                likeliest, probabilities = likeliest_five(answer(crops.crops))
                rows.add(
                    [files[index] for index in crops.indices.tolist()], likeliest, probabilities.gather(1, likeliest)
                )
                read += len(crops.indices)
                bar.update(int(crops.indices[-1]) + 1 - bar.n)
        if not read:
            raise TrainError(f"IMAGES={images}: none of the {len(files)} files could be read")
        rows.close()
    rate = read / (time.perf_counter() - started)
    if read < len(files):
        _notice(f"{len(files) - read} of {len(files)} files could not be read and are left out")
    if out:
        print(printable(f"{read} images at {rate:.0f} images/s; written to {out}"))


def _opened(file: str) -> Image.Image:
    if not os.path.lexists(file):
        raise ValueError("no such file")
    # Opening a pipe would block.
    if not os.path.isfile(file):
        raise ValueError("a folder" if os.path.isdir(file) else "a link to nothing, or no regular file")
    return open_image(file)


def _left_out(file: Any, reason: str) -> None:
    _notice(f"{file}: left out, cannot be read ({reason})")


def _notice(text: str) -> None:
    tqdm.write(printable(text), file=sys.stderr)


@contextmanager
def _standard_output() -> Iterator[Write]:
    """Yields a function that prints text immediately. Ends the program if its reader is gone (`| head`).

    Raises TrainError if the text cannot be written.
    """

    def write(text: str) -> None:
        try:
            sys.stdout.write(text)
            sys.stdout.flush()
        except BrokenPipeError:
            # Python would try again at exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            sys.exit(1)
        except OSError as error:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            why = "the disk is full" if is_full(error) else first_line(error)
            raise TrainError(f"standard output: cannot be written ({why})") from None

    yield write


def words_of(typed: Sequence[str]) -> list[str]:
    """A command line with several words after --images joined into one, as from an unquoted pattern in a shell."""
    words = list(typed)
    if "--images" in words:
        first = words.index("--images") + 1
        last = next((place for place in range(first, len(words)) if words[place].startswith("--")), len(words))
        if last - first > 1:
            words[first:last] = [shlex.join(words[first:last])]
    return words


if __name__ == "__main__":
    run_command(predict, prog="python -m train.predict", words=words_of(sys.argv[1:]))
