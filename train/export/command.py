"""Writes a trained network as a folder, after checking the files on the validation set."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
import safetensors.torch
import torch
import yaml
from numpy.typing import NDArray
from torch import nn

from data.convert import ensure_converted
from data.loader import Loader, open_loader
from data.plan import CropRule
from data.sets import ConvertedSet, find_set
from models.standalone import standalone
from models.trained import Trained, load_trained, names_network_alone
from models.weights import load_weights
from models.xnor import XnorResNet50
from train import TrainError
from train.device import device_named, on_device, set_tf32_and_allocator, set_threads
from train.evaluate import crops_for, scored_columns
from train.export import card
from train.export.check import Marks, check_equal, check_loss, crops_of, in_pytorch, marks_of, milliseconds
from train.export.folder import check_place, placed
from train.export.onnx_file import Probabilities, Session, check_packages, quantise, write_onnx
from train.runs import Run, run_of, table_text
from train.score import validation_loader
from train.score.images import on_own_data

FLAGS = ("--int8", "--accept_loss", "--accept-loss")

# The most crops that int8 is calibrated on.
_CALIBRATION = 512
_CALIBRATION_BATCH = 32


@dataclass(frozen=True)
class _Row:
    """A row of the table: a program that runs the network, or its file.

    size: bytes of the file; None for no file. latency: milliseconds per crop, one by one; None if it was not measured.
    """

    name: str
    marks: Marks
    size: int | None
    latency: float | None


def export(
    checkpoint: str,
    format: Literal["onnx", "safetensors"],
    int8: bool = False,
    data: str | None = None,
    out: str | None = None,
    accept_loss: bool = False,
    resolution: int | None = None,
    batch: int = 64,
    decoder: str = "auto",
    device: str = "auto",
    threads: int | None = None,
) -> None:
    """Writes a checkpoint as a folder: the weights, config.json, and a model card with example code.

    The files are read again and compared with the network in PyTorch, on the validation images; if one differs, nothing
    is written.

    Args:
        checkpoint: a run folder, a checkpoint file, NAME:FILE for a bare file of weights, or for published ones
            timm:NAME:pretrained or torchvision:NAME:pretrained
        format: onnx (uint8 crops in, probabilities out) or safetensors (the weights; of timm's networks in its layout)
        int8: with onnx, also a quantised file, refused if it loses more than 1 point of top-1 or two standard errors
        data: the set whose validation images it is checked on (default: the run's own)
        out: the folder to write; an earlier export there is replaced (default: export-FORMAT beside the checkpoint,
            for best.pt export-best-FORMAT, for published weights in the current folder)
        accept_loss: write the quantised file regardless of its loss
        resolution: pixels per side of the crops (default: what the network was trained at)
        batch: crops at a time
        decoder: auto, ffcv, dali or torchvision
        device: where PyTorch runs: auto, cpu, cuda or cuda:N; onnxruntime runs on the CPU
        threads: number that decode, and number that compute on the CPU (default: one per processor)
    """
    if int8 and format != "onnx":
        raise TrainError(f"INT8=1 is for FORMAT=onnx, not {format}; leave one of them out")
    if accept_loss and not int8:
        raise TrainError("accept_loss is for INT8=1; leave it out")
    if batch < 1:
        raise TrainError(f"BATCH={batch}: must be at least 1")
    if names_network_alone(checkpoint):
        raise TrainError(f"CHECKPOINT={checkpoint}: names a network without weights; give a run folder or a file")
    where = device_named(device)
    set_threads(threads)
    if out:
        check_place(Path(out))
    if format == "onnx":
        check_packages()
    given = find_set(data) if data else None
    trained = load_trained(checkpoint, class_names=given.class_names if given else None)
    run = run_of(trained.file)
    place = Path(out) if out else _beside(trained, format)
    check_place(place)
    data, found = (data, given) if data and given else on_own_data(trained.origin, run, find_set)
    columns = scored_columns(trained, found.class_names, str(data))
    unknown = sum(column < 0 for column in columns)
    if unknown:
        raise TrainError(f"DATA={data}: has {unknown} classes that {trained.origin} does not know; give another set")
    with placed(place) as folder:
        ready = ensure_converted(found)
        side, crop = crops_for(trained, ready.resolution, ready.crop, resolution)
        loader = validation_loader(
            ready, resolution=side, crop=crop, batch=batch, decoder=decoder, device=where, threads=threads
        )
        set_tf32_and_allocator(where, "fp32")
        work = _Export(trained, run, folder, loader, columns, side, crop.center_ratio, where)
        if format == "onnx":
            rows = work.onnx()
            if int8:
                rows.append(work.int8(rows[-1], _calibration(ready, run, side, decoder, threads), accepted=accept_loss))
        else:
            rows = work.safetensors()
        text = work.describe(rows, ready.name)
    print(text)
    print(f"written to {place}")


class _Export:
    """One export, into an empty folder. side: px of crops. ratio: of the validation crop."""

    def __init__(
        self,
        trained: Trained,
        run: Run | None,
        folder: Path,
        loader: Loader,
        columns: Sequence[int],
        side: int,
        ratio: float,
        device: torch.device,
    ):
        self._trained, self._folder, self._loader, self._columns = trained, folder, loader, columns
        self._side, self._ratio, self._device = side, ratio, device
        self._module = Probabilities(trained.network, trained.normalisation).eval()
        self._config = card.described(trained, run, resolution=side, center_ratio=ratio)
        self._lines = card.onnx_lines(resolution=side, center_ratio=ratio)
        self._crop = np.random.default_rng(0).integers(0, 256, (1, 3, side, side), dtype=np.uint8)

    def onnx(self) -> list[_Row]:
        """Writes model.onnx; raises TrainError if its output differs from PyTorch's."""
        path = self._folder / "model.onnx"
        print("writing model.onnx", flush=True)
        write_onnx(path, self._module, resolution=self._side, metadata=self._metadata)
        session = self._session(path)
        with _on(self._module, self._device):
            (expected, marks), difference = marks_of(
                [in_pytorch(self._module, self._device), session], self._loader, self._columns, text="check"
            )
        binary = isinstance(self._trained.network, XnorResNet50)
        said = check_equal(difference, expected, marks, binary=binary)
        print(f"model.onnx against PyTorch, on the same {len(marks.first)} crops: {said}", flush=True)
        return [
            _Row("PyTorch", expected, None, milliseconds(in_pytorch(self._module, torch.device("cpu")), self._crop)),
            _Row(path.name, marks, self._size(path), milliseconds(session, self._crop)),
        ]

    def int8(self, before: _Row, crops: Iterator[NDArray[np.uint8]], *, accepted: bool) -> _Row:
        """Writes model-int8.onnx from model.onnx; raises TrainError if it loses too much accuracy."""
        path = self._folder / "model-int8.onnx"
        print("writing model-int8.onnx", flush=True)
        quantise(self._folder / "model.onnx", path, crops, metadata=self._metadata)
        session = self._session(path)
        (marks,), _ = marks_of([session], self._loader, self._columns, text="check int8")
        row = _Row(path.name, marks, self._size(path), milliseconds(session, self._crop))
        # Print both first, then check whether it is accepted.
        print(f"int8: latency {before.latency:.2f} ms before, {row.latency:.2f} ms after", flush=True)
        print(f"int8: {check_loss(before.marks, marks, accepted=accepted)}", flush=True)
        return row

    def safetensors(self) -> list[_Row]:
        """Writes model.safetensors and the code of its network; raises TrainError if reading gives other weights."""
        path = self._folder / "model.safetensors"
        print("writing model.safetensors", flush=True)
        network, name = self._trained.network, self._trained.name
        code = standalone(name, len(self._trained.class_names))
        from_timm = name.startswith("timm:")
        if from_timm:
            self._config = timm_layout(network, self._folder, self._config)
        else:
            safetensors.torch.save_file(_tensors(network), path)
        if code.source:
            (self._folder / "network.py").write_text(code.source)
        self._check_weights(path)
        self._lines = card.safetensors_lines(code, from_timm=from_timm, resolution=self._side, center_ratio=self._ratio)
        with _on(self._module, self._device):
            answer = in_pytorch(self._module, self._device)
            (marks,), _ = marks_of([answer], self._loader, self._columns, text="score")
        answer = in_pytorch(self._module, torch.device("cpu"))
        return [_Row(path.name, marks, self._size(path), milliseconds(answer, self._crop))]

    def describe(self, rows: Sequence[_Row], data: str) -> str:
        """Writes config.json and README.md; returns the table of formats."""
        first = rows[0].marks
        accuracy = {"top1": first.top1, "top5": first.top5, "images": len(first.first), "data": data}
        files = {
            row.name: {"bytes": row.size, "milliseconds": row.latency, "top1": row.marks.top1, "top5": row.marks.top5}
            for row in rows
            if row.size is not None
        }
        config = self._config | {"accuracy": accuracy, "files": files}
        cells = [("", "MB", "ms", "top-1", "top-5"), *map(_cells, rows)]
        note = (
            f"ms: of one crop at a time, median, on this machine's CPU with {torch.get_num_threads()} threads; "
            "float32, except for int8; without decoding."
        )
        (self._folder / "config.json").write_text(card.as_json(config))
        markdown = "\n".join(f"| {' | '.join(row)} |" for row in [cells[0], ("---",) * 5, *cells[1:]])
        text = card.readme(config, self._lines, f"{markdown}\n\n{note}")
        (self._folder / "README.md").write_text(text, errors="backslashreplace")
        return f"\n{table_text(cells)}{note}\n"

    @property
    def _metadata(self) -> dict[str, Any]:
        names = ("class_names", "network", "resolution", "crop", "resize", "weights_sha256")
        return {name: self._config[name] for name in names}

    def _session(self, path: Path) -> Session:
        return Session(path, threads=torch.get_num_threads())

    def _size(self, path: Path) -> int:
        beside = path.with_name(f"{path.name}.data")
        return path.stat().st_size + (beside.stat().st_size if beside.is_file() else 0)

    def _check_weights(self, path: Path) -> None:
        own, read = self._trained.network.state_dict(), load_weights(path).state
        if own.keys() != read.keys() or not all(torch.equal(own[name], read[name]) for name in own):
            raise TrainError(f"{path.name}: does not read as it was written; see that the disk is in order")


@contextmanager
def _on(module: nn.Module, device: torch.device) -> Iterator[None]:
    """Moves a module to the device, and back to the CPU at the end."""
    on_device(module, device)
    yield
    module.cpu()


def timm_layout(network: nn.Module, folder: Path, config: dict[str, Any]) -> dict[str, Any]:
    """Writes the weights of a timm network as timm does; returns the config.json that create_model("local-dir:") reads,
    including ours.
    """
    from timm.models import save_for_hf

    save_for_hf(network, str(folder), safe_serialization=True)
    path = folder / "config.json"
    theirs = yaml.safe_load(path.read_text())
    side = config["resolution"]
    theirs["num_classes"] = len(config["class_names"])
    theirs["label_names"] = config["class_names"]
    theirs["pretrained_cfg"] |= {
        "num_classes": len(config["class_names"]),
        "input_size": [3, side, side],
        "crop_pct": config["crop"]["share_of_the_shorter_side"],
        "crop_mode": "center",
        "interpolation": "bilinear",
        "mean": config["mean"],
        "std": config["std"],
    }
    # Fields about the published weights: how they are tested, and, if these weights are others, their origin.
    dropped = ["test_input_size", "test_crop_pct", "pool_size", "label_names", "label_descriptions"]
    if config["trained"] and not config["trained"]["pretrained"]:
        dropped += ["tag", "license", "origin_url", "paper_ids", "paper_name"]
    for name in dropped:
        theirs["pretrained_cfg"].pop(name, None)
    return theirs | config


def _tensors(network: nn.Module) -> dict[str, torch.Tensor]:
    # Copies, because a file of this format cannot hold a tensor twice.
    return {name: value.detach().cpu().contiguous().clone() for name, value in network.state_dict().items()}


def _calibration(
    ready: ConvertedSet, run: Run | None, side: int, decoder: str, threads: int | None
) -> Iterator[NDArray[np.uint8]]:
    """Training crops of the plan, those of the run's first epoch, in batches uint8 [N, 3, R, R]."""
    crop, seed = ready.crop, 0
    if run:
        rule = run.identity["crop"]
        crop = CropRule(**rule | {name: tuple(rule[name]) for name in ("scale", "ratio")})
        seed = run.crop_seed
    loader = open_loader(
        ready.beton("train"),
        resolution=side,
        batch_size=_CALIBRATION_BATCH,
        seed=seed,
        crop=crop,
        decoder=decoder,
        threads=threads,
        drop_last=False,
    )
    return (crops_of(batch) for batch in islice(loader.epoch(0), _CALIBRATION // _CALIBRATION_BATCH))


def _beside(trained: Trained, format: str) -> Path:
    """The default folder of an export."""
    if not trained.file:
        return Path(f"export-{trained.name.replace(':', '-').replace('/', '-')}-{format}")
    stem = "" if trained.file.name == "last.pt" else f"{trained.file.stem}-"
    return trained.file.parent / f"export-{stem}{format}"


def _cells(row: _Row) -> tuple[str, ...]:
    size = "" if row.size is None else f"{row.size / 1e6:.2f}"
    latency = "" if row.latency is None else f"{row.latency:.2f}"
    return row.name, size, latency, f"{row.marks.top1:.2f}", f"{row.marks.top5:.2f}"
