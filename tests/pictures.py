"""Pictures from which tests make sets."""

from pathlib import Path

import numpy as np
from PIL import Image


def photograph(seed: int, height: int, width: int) -> Image.Image:
    """A picture with smooth colour, edges and some noise, as photographs have."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (5, 6, 3), dtype=np.uint8)
    smooth = np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC), dtype=np.int16)
    edges = np.zeros_like(smooth)
    top, left = rng.integers(0, height // 2), rng.integers(0, width // 2)
    edges[top : top + height // 3, left : left + width // 3] = rng.integers(-90, 90, 3)
    noise = rng.integers(-8, 9, smooth.shape)
    return Image.fromarray(np.clip(smooth + edges + noise, 0, 255).astype(np.uint8))


def write_class_folders(root: Path, classes: int, images: int, *, seed: int = 0, side: int = 80) -> Path:
    """Class folders `class0`, `class1`, ... below root, each with JPEGs of varying sizes."""
    for label in range(classes):
        folder = root / f"class{label}"
        folder.mkdir(parents=True)
        for number in range(images):
            index = seed + label * images + number
            size = side + index * 7 % 40, side + index * 13 % 50
            photograph(index, *size).save(folder / f"{number:03}.jpg", quality=92)
    return root
