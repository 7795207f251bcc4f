"""The description in an exported folder: config.json, and the model card with example code."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from command import printable
from models.standalone import Standalone
from models.trained import Trained
from train.runs import Run

# The mark of an exported folder in its config.json.
FORMAT = "label-refinery-export"

_CROP = """\
image = ImageOps.exif_transpose(Image.open("photo.jpg")).convert("RGB")
side = round({ratio!r} * min(image.size))
left, top = (image.width - side) // 2, (image.height - side) // 2
crop = image.crop((left, top, left + side, top + side))
crop = crop.resize(({resolution}, {resolution}), Image.Resampling.BILINEAR)
"""

_ONNX = """\
import json

import numpy as np
import onnxruntime
from PIL import Image, ImageOps

session = onnxruntime.InferenceSession("model.onnx", providers=["CPUExecutionProvider"])
class_names = json.loads(session.get_modelmeta().custom_metadata_map["class_names"])

{crop}
images = np.asarray(crop).transpose(2, 0, 1)[None]  # uint8 [N, 3, {resolution}, {resolution}], RGB
(probabilities,) = session.run(["probabilities"], {{"images": images}})
likeliest = probabilities[0].argmax()
print(class_names[likeliest], float(probabilities[0, likeliest]))
"""

_SAFETENSORS = """\
import json

import numpy as np
{imports}

with open("config.json") as file:
    config = json.load(file)
{build}
network.eval()

{crop}
images = torch.from_numpy(np.array(crop)).permute(2, 0, 1)[None] / 255  # [N, 3, {resolution}, {resolution}], RGB
mean, std = (torch.tensor(config[name]).view(1, 3, 1, 1) for name in ("mean", "std"))
with torch.inference_mode():
    probabilities = network((images - mean) / std).softmax(dim=1)
likeliest = int(probabilities[0].argmax())
print(config["class_names"][likeliest], float(probabilities[0, likeliest]))
"""


def described(trained: Trained, run: Run | None, *, resolution: int, center_ratio: float) -> dict[str, Any]:
    """The contents of config.json: the network and its training; `accuracy` and `files` are added when known."""
    mean, std = trained.normalisation
    identity = run.identity if run else None
    return {
        "format": FORMAT,
        "network": trained.name,
        "class_names": list(trained.class_names),
        "resolution": resolution,
        "crop": {"kind": "the square in the image's centre", "share_of_the_shorter_side": center_ratio},
        "resize": {"filter": "bilinear", "antialias": True},
        "channels": "RGB",
        "mean": list(mean),
        "std": list(std),
        "weights_sha256": trained.digest,
        "generation": trained.generation,
        "trained_on": identity["data"] | {"classes": len(trained.class_names)} if identity else None,
        "labelled_by": identity["labels"] | {"refinery": identity["refinery"]} if identity else None,
        "trained": _training(identity) if identity else None,
    }


def _training(identity: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in identity.items() if name not in ("data", "model", "refinery", "labels")}


def onnx_lines(*, resolution: int, center_ratio: float) -> str:
    """Python code that classifies photo.jpg, in the folder of a model.onnx."""
    crop = _CROP.format(ratio=center_ratio, resolution=resolution)
    return _ONNX.format(crop=crop, resolution=resolution)


def safetensors_lines(code: Standalone, *, from_timm: bool, resolution: int, center_ratio: float) -> str:
    """Python code that classifies photo.jpg, in the folder of a model.safetensors."""
    crop = _CROP.format(ratio=center_ratio, resolution=resolution)
    if from_timm:
        imports = ["import timm", "import torch", "from PIL import Image, ImageOps"]
        build = 'network = timm.create_model("local-dir:.", pretrained=True)'
    else:
        theirs = ["import torch", "from PIL import Image, ImageOps", "from safetensors.torch import load_file"]
        imports = [*theirs, "", code.imports] if code.source else [*theirs, code.imports]
        build = f'network = {code.expression}\nnetwork.load_state_dict(load_file("model.safetensors"))'
    return _SAFETENSORS.format(imports="\n".join(imports), build=build, crop=crop, resolution=resolution)


def readme(config: Mapping[str, Any], lines: str, table: str) -> str:
    """The model card. config: the contents of config.json. table: latency and size of each file, in Markdown."""
    accuracy, names = config["accuracy"], config["class_names"]
    ratio = config["crop"]["share_of_the_shorter_side"]
    shown = printable(", ".join(names[:10])) + (
        f", ... ({len(names)} in all, in config.json)" if len(names) > 10 else ""
    )
    return f"""\
---
pipeline_tag: image-classification
tags:
- image-classification
- label-refinery
---

# {config["network"]}, {len(names)} classes

Top-1 {accuracy["top1"]:.2f} %, top-5 {accuracy["top5"]:.2f} % on {accuracy["images"]} validation images of \
{accuracy["data"]}, at {config["resolution"]} px, in float32.

Classes: {shown}.

## How it was trained

{_history(config)}

## What it takes

RGB images, the square in the centre whose side is {ratio:g} of the shorter side, resized to {config["resolution"]} × \
{config["resolution"]} (bilinear, antialiased). Mean {_numbers(config["mean"])} and standard deviation \
{_numbers(config["std"])} of red, green and blue in 0 to 1 \
{"are inside the file" if "model.onnx" in config["files"] else "are config.json's"}.

## How to use it

{_needs(config, lines)}

```python
{lines.rstrip()}
```

## Files

{table}
"""


def _needs(config: Mapping[str, Any], lines: str) -> str:
    packages = ["numpy", "pillow"]
    packages += [name for name in ("onnxruntime", "torch", "torchvision", "timm", "safetensors") if name in lines]
    where = "In this folder, with a photo.jpg"
    if "model-int8.onnx" in config["files"]:
        where += " (model-int8.onnx in place of model.onnx is used in the same way)"
    return f"{where}, and `pip install {' '.join(packages)}`:"


def _history(config: Mapping[str, Any]) -> str:
    training, labels = config["trained"], config["labelled_by"]
    if not training:
        return "The checkpoint does not say; its weights' SHA-256 is in config.json."
    refinery = labels["refinery"]
    if refinery:
        weights = f", SHA-256 of its weights {refinery['weights']}" if refinery.get("weights") else ""
        by = f"by a refinery, {refinery['network']}{weights}"
    else:
        by = f"by {'the ground truth' if labels.get('kind') == 'ground_truth' else labels.get('kind')}"
    return (
        f"{training['epochs']} epochs at {training['resolution']} px, seed {training['seed']}, on "
        f"{config['trained_on']['name']} (fingerprint {config['trained_on']['fingerprint'][:16]}), labelled {by}. "
        f"Generation {config['generation']}. All settings are in config.json."
    )


def _numbers(values: Sequence[float]) -> str:
    return ", ".join(f"{value:g}" for value in values)


def as_json(config: Mapping[str, Any]) -> str:
    return json.dumps(config, indent=1) + "\n"
