"""Says what is on images: the five likeliest classes of each.

python -m train.predict --checkpoint runs/scenes/... --images photo.jpg
make predict CHECKPOINT=runs/scenes/... IMAGES=folder/
"""

import sys
from pathlib import Path

import torch

from command import printable, run_command
from data.folders import Found
from data.originals import UNREADABLE, central_crop
from data.pixels import open_image, upright_rgb
from data.sources import image_files
from kernels.normalise import Normalise
from models.trained import load_trained
from train import TrainError
from train.device import device_named, on_device, set_threads


@torch.inference_mode()
def predict(checkpoint: str, images: str, resolution: int | None = None, device: str = "auto") -> None:
    """Prints the five likeliest classes of an image, or of every image in a folder and below.

    Args:
        checkpoint: a run folder, a checkpoint file of ours, or a network of ImageNet's classes as NAME:FILE,
            timm:NAME:pretrained or torchvision:NAME:pretrained
        images: an image file or a folder
        resolution: pixels a side of the crop (default: what the network was trained at)
        device: auto, cpu, cuda or cuda:N
    """
    where = device_named(device)
    set_threads()
    path = Path(images)
    files, notes = image_files(path) if path.is_dir() else Found([str(path)] if path.is_file() else [], ())
    for note in notes:
        print(printable(note), file=sys.stderr)
    if not files:
        raise TrainError(f"IMAGES={images}: {'no images in it' if path.is_dir() else 'no such file or folder'}")
    trained = load_trained(checkpoint)
    side = (trained.resolution or 224) if resolution is None else resolution
    trained.check_resolution(side)
    network = on_device(trained.network, where).eval()
    normalise = Normalise(trained.normalisation).to(where)
    unreadable = 0
    for file in files:
        try:
            image = upright_rgb(open_image(file))
        except UNREADABLE as error:
            print(printable(f"{file}: left out, cannot be read ({error})"), file=sys.stderr)
            unreadable += 1
            continue
        crop = central_crop(image, resolution=side, center_ratio=trained.center_ratio or 224 / 256)
        pixels = torch.from_numpy(crop).permute(2, 0, 1)[None].to(where)
        chances = network(normalise(pixels)).float().softmax(dim=1)[0]
        likeliest = chances.topk(min(5, len(chances)))
        print(printable(file))
        for chance, index in zip(likeliest.values.tolist(), likeliest.indices.tolist(), strict=True):
            print(f"  {100 * chance:5.1f} %  {printable(trained.class_names[index])}")
    if unreadable == len(files):
        raise TrainError(f"IMAGES={images}: none of the {len(files)} files could be read")


if __name__ == "__main__":
    run_command(predict, prog="python -m train.predict")
