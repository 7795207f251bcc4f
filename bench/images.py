"""The images that loaders are measured on: found in a folder or drawn by code, and stored in each loader's format."""

import io
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from scipy import fft

from bench import BenchError
from data import pixels
from data.beton import Beton, Encoded, write_beton
from data.convert import Storage, encode
from data.decoders.prefetch import default_threads
from data.sets import is_converted, open_set
from data.sources import image_files

# Files for stock FFCV have the same sizes and quality.
JPEG = Storage("jpeg", max_resolution=512, quality=90)
RAW = Storage("raw", max_resolution=256)
BLOCKS = Storage("blocks", max_resolution=512)

_DRAWN = 300
# Height and width in pixels, distributed as in ImageNet: mostly 500 on the longer side, some larger.
_SIZES = [(375, 500)] * 8 + [(333, 500)] * 4 + [(500, 375)] * 3 + [(500, 333), (400, 500), (480, 640), (600, 800)]


def find(data: str | None, folder: Path, *, most: int) -> list[str]:
    """Returns the paths of image files: those below the folder `data`, or drawn ones if `data` is None.

    Images of a converted set and drawn images are written into `folder`, at most `most` of them.
    Raises BenchError if there are none.
    """
    if data is None:
        with ThreadPoolExecutor(default_threads()) as pool:
            return list(pool.map(lambda index: _write_drawn(index, folder), range(min(_DRAWN, most))))
    if not Path(data).is_dir():
        raise BenchError(f"DATA={data}: no such folder; give a folder of images, or leave DATA out")
    if is_converted(data):
        return _extracted(open_set(data).beton("train"), folder, most)
    files = image_files(data).files
    if not files:
        raise BenchError(f"DATA={data}: no images in this folder or below it; give a folder of images")
    return files


def described(data: str | None, count: int) -> str:
    """Returns a description of `count` images of the source that find() used."""
    if data is None:
        return f"{count} drawn images of photographs' size and detail"
    return f"{count} images of {Path(data).resolve().name}"


def _extracted(path: Path, folder: Path, most: int) -> list[str]:
    beton = Beton(path)
    if beton.raw.any() or beton.in_blocks:
        raise BenchError(f"DATA={path.parent}: stores pixels or blocks, not image files; give a folder of images")
    files = []
    for place in range(min(beton.num_samples, most)):
        index = place * beton.num_samples // min(beton.num_samples, most)
        files.append(str(folder / f"{index:08}.jpg"))
        Path(files[-1]).write_bytes(beton.encoded(index).tobytes())
    return files


def spread(files: list[str], count: int) -> list[str]:
    """Returns `count` of the files, evenly spaced; if there are fewer, each is repeated, copies next to each other."""
    return [files[i * len(files) // count] for i in range(count)]


def _write_drawn(index: int, folder: Path) -> str:
    path = folder / f"{index:04}.jpg"
    draw(index).save(path, quality=95, subsampling="4:2:0" if index % 4 == 0 else "4:4:4")
    return str(path)


def draw(index: int) -> Image.Image:
    """Returns an image with a photograph's spectrum, edges and noise; deterministic for an index.

    Over all indices, the JPEG bytes per pixel, which determine decoding time, are distributed as those of ImageNet's
    photographs (mean 0.33 at 512 px, quality 90).
    """
    rng = np.random.default_rng(index)
    height, width = _SIZES[index % len(_SIZES)]
    detail = rng.lognormal(0.0, 0.85)
    texture = _field(rng, height, width, 1.0) * 8 * detail
    grain = rng.standard_normal((height, width), dtype=np.float32) * 0.8 * detail
    light = _field(rng, height, width, 1.6) * 35 + _edges(rng, height, width) + texture + grain
    planes = [Image.fromarray(np.clip(light + 125, 0, 255).astype(np.uint8))]
    for _ in range(2):  # colour changes slowly
        colour = np.clip(_field(rng, height // 4, width // 4, 1.3) * 18 + 128, 0, 255)
        planes.append(Image.fromarray(colour.astype(np.uint8)).resize((width, height), Image.Resampling.BICUBIC))
    return Image.merge("YCbCr", planes).convert("RGB")


def _field(rng: np.random.Generator, height: int, width: int, falloff: float) -> np.ndarray:
    """Returns noise with amplitude 1 / frequency^falloff: float32 [height, width], mean 0, standard deviation 1."""
    frequency = np.hypot(fft.fftfreq(height)[:, None], fft.rfftfreq(width)[None]).astype(np.float32)
    frequency[0, 0] = np.inf
    noise = rng.standard_normal((*frequency.shape, 2), dtype=np.float32).view(np.complex64)[..., 0]
    field = fft.irfft2(noise * frequency**-falloff, s=(height, width))
    return field / field.std()


def _edges(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    canvas = Image.new("F", (width, height))
    brush = ImageDraw.Draw(canvas)
    for _ in range(8):
        centre = rng.uniform(0, 1, 2) * (width, height)
        angles = np.sort(rng.uniform(0, 2 * np.pi, 6))
        corners = centre + rng.uniform(0.05, 0.4) * width * np.stack([np.cos(angles), np.sin(angles)], axis=1)
        brush.polygon([(x, y) for x, y in corners.tolist()], fill=float(rng.normal(0, 35)))
    return np.asarray(canvas)


def write_plain(path: Path, files: list[str]) -> None:
    """Writes a `.beton` of baseline 4:2:0 JPEGs, 512 px on the longer side, quality 90, for stock FFCV."""

    def plain(image: Image.Image) -> Encoded:
        image = pixels.upright_rgb(image)
        image.thumbnail((JPEG.max_resolution, JPEG.max_resolution), Image.Resampling.BICUBIC)
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=JPEG.quality, subsampling="4:2:0", comment=b"")
        return Encoded(buffer.getvalue(), image.height, image.width, 0)

    write_beton(path, _encoded(files, plain), at_most=len(files))


def write_converted(path: Path, files: list[str], storage: Storage = JPEG) -> None:
    """Writes a `.beton` as data.convert stores images."""
    in_blocks = storage.kind == "blocks"
    write_beton(path, _encoded(files, lambda image: encode(image, storage)), at_most=len(files), in_blocks=in_blocks)


def write_raw(path: Path, files: list[str]) -> None:
    """Writes a `.beton` of raw pixels, 256 px on the longer side, with FFCV's writer."""
    from ffcv.fields import RGBImageField
    from ffcv.writer import DatasetWriter

    for file in dict.fromkeys(files):
        open_image(file)  # raises for a damaged file, on which FFCV's writer would hang
    # With several workers, the order of pages would be random.
    writer = DatasetWriter(str(path), {"image": RGBImageField("raw", max_resolution=RAW.max_resolution)}, num_workers=1)
    writer.from_indexed_dataset(_Pixels(files))


class _Pixels:
    """A dataset for FFCV's writer: samples of one field, uint8 [H, W, 3]. Consecutive repeats are read once."""

    def __init__(self, files: list[str]):
        self._files = files
        self._last: tuple[str, np.ndarray] | None = None

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> tuple[np.ndarray]:
        file = self._files[index]
        if self._last is None or self._last[0] != file:
            self._last = file, np.array(pixels.upright_rgb(open_image(file)))
        return (self._last[1],)


def _encoded(files: list[str], encode: Callable[[Image.Image], Encoded]) -> Iterator[Encoded]:
    """Yields each file's encoded image, in order; consecutive repeats are encoded once."""
    runs = [(file, len(list(repeats))) for file, repeats in groupby(files)]
    with ThreadPoolExecutor(default_threads()) as pool:
        encoded = pool.map(lambda run: encode(open_image(run[0])), runs)
        for image, (_, repeats) in zip(encoded, runs, strict=True):
            yield from [image] * repeats


def open_image(file: str) -> Image.Image:
    """Returns the file's decoded image. Raises BenchError if it cannot be read."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image = pixels.open_image(file)
            image.load()
        return image
    except Exception as error:  # the types that Pillow's readers raise depend on the format
        raise BenchError(f"{file}: cannot be read ({error}); take it out of DATA") from None
