"""Compares kinds of labels on the same crops: how they differ, the speed of training from them, and their size.

Takes stored labels of crops and label maps of images; also compares them by the size of crops.

python -m bench.compare_labels --refinery runs/images/resnet50-... --labels "labels/exact labels/top10" --data images/
make compare-labels REFINERY=runs/images/resnet50-... LABELS="labels/exact labels/top10" DATA=images/
"""

from pathlib import Path
from typing import Any

from bench import BenchError
from bench.labels import measure
from bench.record import table, write, writing
from command import run_command
from train.device import device_named
from train.runs.environment import environment


def run(
    labels: str,
    refinery: str,
    data: str = "scenes",
    model: str = "mobilenet0.25",
    crops: int = 4096,
    epochs: int = 5,
    resolution: int | None = None,
    batch: int | None = None,
    device: str = "auto",
    compile: str = "auto",
    out: str = "bench/results",
) -> None:
    """Compares stored labels and label maps with their refinery and with the ground truth, on the same crops.

    Prints a table, and writes it to `out` with a chart and all figures. A student is trained from each kind of labels,
    and the refinery labels an epoch's crops, alone and into files; all are measured in turns.

    Args:
        labels: folders of stored labels (python -m train.label) of one refinery and plan, and of its label maps (python
            -m train.maps), separated by spaces; maps are compared on the crops of the stored labels, or without stored
            labels on those of a student of the refinery, with its running statistics
        refinery: the refinery that made the labels: a run folder, or NAME:FILE
        data: the labelled images: a folder of images, a converted set, or scenes, cifar10, svhn, imagenette
        model: the student
        crops: approximate number of crops that are compared; at most an epoch's
        epochs: timed turns of each, in epochs of the data
        resolution: side of a crop in pixels, for maps alone; stored labels set their own (default: what fits the data)
        batch: crops per step, for maps alone (default: 64)
        device: auto, cpu, cuda or cuda:N
        compile: whether networks run compiled: auto, always or never
        out: the folder for the results
    """
    for name, value in {"crops": crops, "epochs": epochs}.items():
        if value < 1:
            raise BenchError(f"{name}={value}: must be at least 1")
    options: dict[str, Any] = {"data": data, "model": model, "device": device, "compile": compile}
    options |= {name: value for name, value in (("resolution", resolution), ("batch", batch)) if value is not None}
    with writing(Path(out)):
        found = environment(device_named(device).type)
    record = measure(labels.split(), refinery, options, crops=crops, turns=epochs)
    print(f"\n{table(record, found)}")
    print("written:", *write(record, found, Path(out)), flush=True)


if __name__ == "__main__":
    run_command(run, prog="python -m bench.compare_labels")
