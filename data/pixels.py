"""Opens image files of many kinds and converts them to one: upright, RGB, 8 bits per channel."""

import functools
import os
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

# Extensions only; the format is read from a file's contents. Files that this Pillow cannot read are rejected and
# listed.
EXTENSIONS = frozenset(
    (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".avif", ".bmp", ".ppm", ".gif", ".tif", ".tiff")
)
# Pillow opens many more formats, such as PostScript, which it passes to an interpreter.
_FORMATS = ("JPEG", "PNG", "WEBP", "AVIF", "BMP", "PPM", "GIF", "TIFF")

# A JPEG takes at least one bit for each block of 8x8 pixels: 512 pixels per byte, if gray. Measured on white images:
# 256. (Arithmetic coding, which is almost never used, might need less for blank images.)
JPEG_PIXELS_PER_BYTE = 1000


def open_image(file: str | BinaryIO) -> Image.Image:
    """Opens an image file of one of the formats of EXTENSIONS, whatever its name is; its pixels are not read yet.

    Raises ValueError if it is not such an image, OSError if it cannot be read, and either of them or Pillow's
    DecompressionBombError if its headers claim more pixels than its bytes can hold or than Pillow's limit.
    """
    try:
        image = Image.open(file, formats=_formats())
    except UnidentifiedImageError:  # its text repeats the path, or names an address in memory
        raise ValueError("cannot identify image file") from None
    if image.format in ("JPEG", "MPO"):
        assert image.fp
        place = image.fp.tell()
        size = image.fp.seek(0, os.SEEK_END)
        image.fp.seek(place)
        if image.width * image.height > size * JPEG_PIXELS_PER_BYTE:
            raise ValueError(f"its header claims {image.width}x{image.height} pixels, which {size} bytes cannot hold")
    return image


@functools.cache
def _formats() -> list[str]:
    """Those of _FORMATS that this Pillow was built with."""
    Image.init()
    return [name for name in _FORMATS if name in Image.OPEN]


def upright_rgb(image: Image.Image) -> Image.Image:
    """The image as a viewer shows it: EXIF orientation applied, mode RGB, 8 bits per channel.

    Accepts any mode that Pillow opens. Transparent pixels are composited on white, as a browser shows them on an empty
    page; the colours hidden below alpha 0 are arbitrary. The full range of 16 bits per channel is mapped to 0..255. Of
    an animation this is the current frame, which is the first one after opening. Colour profiles are ignored:
    wide-gamut images look slightly pale.

    Raises OSError if the file is cut off or broken, and ValueError for pixels whose range is not known
    (floating point, 32 bits).
    """
    image = ImageOps.exif_transpose(image)
    if image.mode == "RGB" and not image.has_transparency_data:
        return image
    if image.mode == "F":
        raise ValueError("floating-point pixels, whose range is not known; save it with 8 or 16 bits per channel")
    if image.mode.startswith("I"):
        image = _gray_of_16_bits(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _gray_of_16_bits(image: Image.Image) -> Image.Image:
    """Pillow itself would clip at 255, which gives a white image. Modes I;16, I;16B and I: 16 bits in 32."""
    values = np.asarray(image).astype(np.int64)
    if values.min() < 0 or values.max() > 65535:
        raise ValueError("32-bit pixels, whose range is not known; save it with 8 or 16 bits per channel")
    gray = Image.fromarray(((values * 255 + 32767) // 65535).astype(np.uint8))
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):  # the one value that a 16-bit PNG declares transparent
        gray.putalpha(Image.fromarray(np.where(values == transparent, 0, 255).astype(np.uint8)))
    return gray
