"""The file model.onnx, from uint8 crops to probabilities; its sessions; and its int8 version."""

import importlib
import json
import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from command import first_line
from kernels.normalise import Normalisation, Normalise
from train import TrainError

INPUT, OUTPUT = "images", "probabilities"

_OPSET = 18
# Needed only for export.
_PACKAGES = ("onnx", "onnxruntime", "onnxscript")
# Operators with most of the arithmetic; and those between them, so that int8 passes from one to the next.
_HEAVY = ("Conv", "Gemm", "MatMul")
_BETWEEN = ("Add", "Relu", "Clip", "MaxPool", "AveragePool", "GlobalAveragePool", "ReduceMean", "Concat", "Flatten")


class Probabilities(nn.Module):
    """Crops uint8 [N, 3, R, R], RGB, to probabilities float32 [N, C]: a network with its pre- and postprocessing."""

    def __init__(self, network: nn.Module, normalisation: Normalisation):
        super().__init__()
        self.normalise, self.network = Normalise(normalisation), network

    def forward(self, images: Tensor) -> Tensor:
        return self.network(self.normalise(images)).float().softmax(dim=1)


def check_packages() -> None:
    """Raises TrainError unless the packages that write and read ONNX files are installed."""
    for name in _PACKAGES:
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise TrainError(
                f"FORMAT=onnx needs the package {name} ({first_line(error)}); install "
                f"it: pip install {' '.join(_PACKAGES)}"
            ) from None


def write_onnx(path: Path, module: nn.Module, *, resolution: int, metadata: Mapping[str, Any]) -> None:
    """Writes a Probabilities in evaluation mode, on the CPU. metadata: JSON values by name.

    Raises TrainError for a network that cannot be expressed in ONNX.
    """
    # Two crops: with a single one the exporter would fix the batch size.
    images = torch.zeros(2, 3, resolution, resolution, dtype=torch.uint8)
    try:
        with _quiet():
            program = torch.onnx.export(
                module,
                (images,),
                dynamo=True,
                opset_version=_OPSET,
                input_names=[INPUT],
                output_names=[OUTPUT],
                dynamic_shapes={INPUT: {0: torch.export.Dim("N")}},
                verbose=False,
            )
    except torch.onnx.OnnxExporterError as error:
        raise TrainError(
            f"FORMAT=onnx: the network has no form in ONNX ({first_line(error)}); use safetensors"
        ) from None
    assert program
    # The exporter records the Python lines of each node, with paths of this machine.
    for node in program.model.graph.all_nodes():
        node.metadata_props.clear()
        node.doc_string = None
    for value in program.model.graph.inputs:
        value.metadata_props.clear()
    program.model.metadata_props.clear()
    program.model.metadata_props.update(as_text(metadata))
    program.save(path)


def as_text(metadata: Mapping[str, Any]) -> dict[str, str]:
    """Metadata as stored in an ONNX file: JSON by name."""
    return {name: json.dumps(value) for name, value in metadata.items()}


class Session:
    """An ONNX file in onnxruntime, on the CPU. threads: number that compute."""

    def __init__(self, path: Path, *, threads: int):
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        self._session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    def __call__(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Crops uint8 [N, 3, R, R] to float32 [N, C]."""
        return self._session.run([OUTPUT], {INPUT: images})[0]


def quantise(source: Path, target: Path, crops: Iterator[NDArray[np.uint8]], *, metadata: Mapping[str, Any]) -> None:
    """Writes the int8 version of a model.onnx: static QDQ, per channel. crops: batches uint8 [N, 3, R, R] to calibrate.

    Normalisation and softmax stay in float32.
    """
    import onnx
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Crops(CalibrationDataReader):
        def get_next(self) -> dict[str, NDArray[np.uint8]] | None:
            batch = next(crops, None)
            return None if batch is None else {INPUT: batch}

    prepared = target.with_name("prepared.onnx")
    with _quiet():
        quant_pre_process(str(source), str(prepared), skip_symbolic_shape=True)
        nodes = onnx.load(prepared, load_external_data=False).graph.node
        heavy = [place for place, node in enumerate(nodes) if node.op_type in _HEAVY]
        outside = [node.name for node in [*nodes[: heavy[0]], *nodes[heavy[-1] + 1 :]]] if heavy else []
        quantize_static(
            str(prepared),
            str(target),
            Crops(),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            op_types_to_quantize=[*_HEAVY, *_BETWEEN],
            nodes_to_exclude=outside,
            activation_type=QuantType.QInt8,
            weight_type=QuantType.QInt8,
        )
    prepared.unlink()
    model = onnx.load(target)
    del model.metadata_props[:]
    onnx.helper.set_model_props(model, as_text(metadata))
    onnx.save(model, target)


@contextmanager
def _quiet() -> Iterator[None]:
    """Suppresses messages of exporter and quantiser for developers."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
