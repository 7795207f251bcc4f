"""Measures this project against its peers.

python -m bench --only loaders
make bench ONLY=loaders
"""

from pathlib import Path

from bench import BenchError, loaders
from bench.record import environment, table, write
from data.command import run_command
from data.decoders.ahead import default_threads
from train import TrainError
from train.device import device_named


def run(
    only: str = "loaders",
    data: str | None = None,
    resolution: int = 224,
    batch: int = 64,
    epochs: int = 5,
    threads: int | None = None,
    crops: int = 2048,
    device: str = "auto",
    contenders: str = "",
    out: str = "bench/results",
) -> None:
    """Measures, prints a table, and writes it with a chart and all figures to `out`.

    Args:
        only: the parts to measure, with commas between them; there is one so far: loaders
        data: any folder of images (default: images drawn by code)
        resolution: side of a crop in pixels
        batch: crops a batch
        epochs: timed epochs of each contender; where one is over in less than a second, several count as one
        threads: decoding threads (default: once with 2 and once with all processors)
        crops: crops an epoch, about; of more images, as many are taken, and fewer are repeated
        device: where batches are delivered: auto, cpu or cuda
        contenders: only those with one of these texts, with commas between them, in their names
        out: the folder for the results
    """
    unknown = [part for part in only.split(",") if part != "loaders"]
    if unknown:
        raise BenchError(f"only={unknown[0]}: unknown; there is loaders")
    for name, value in (("resolution", resolution), ("batch", batch), ("epochs", epochs), ("crops", crops)):
        if value < 1:
            raise BenchError(f"{name}={value}: must be at least 1")
    if threads is not None and not 1 <= threads <= default_threads():
        raise BenchError(f"threads={threads}: give 1 to {default_threads()}, the processors there are")
    place = device_named(device).type
    found = environment(place)
    record = loaders.measure(
        data=data,
        resolution=resolution,
        batch=batch,
        epochs=epochs,
        threads=threads,
        crops=crops,
        device=place,
        contenders=contenders,
    )
    print(table(record, found))
    print("written:", *write(record, found, Path(out)))


if __name__ == "__main__":
    run_command(run, prog="python -m bench", errors=(BenchError, TrainError))
