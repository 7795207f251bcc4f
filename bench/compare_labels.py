"""Compares kinds of labels on the same crops: what they say, how fast one trains from them, what they take.

Labels of crops and maps of images, side by side; also by the size of the crops.

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

    Prints a table, and writes it with a chart and all figures to `out`. In turns, a student is trained from each kind
    of labels, and the refinery labels an epoch's crops, by itself and into files.

    Args:
        labels: folders of stored labels (python -m train.label) of one refinery and plan, and of its label maps (python
            -m train.maps), with spaces between them; maps are compared on the crops of the stored labels, or where
            there are none, on those of a student of the refinery, with its running statistics
        refinery: the one that made them: a run folder, or NAME:FILE
        data: what they are labels of: a folder of images, a converted set, or scenes, cifar10, svhn, imagenette
        model: the student
        crops: how many crops are compared, about; at most an epoch's
        epochs: timed turns of each, epochs of the data
        resolution: pixels a side of the crops, for maps alone; stored labels say theirs (default: what fits the data)
        batch: crops in a step, for maps alone (default: 64)
        device: auto, cpu, cuda or cuda:N
        compile: auto, always or never: networks run compiled
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
