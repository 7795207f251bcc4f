"""What a picture file may hold, and one way to see all of it: upright, RGB, 8 bits per channel."""

import functools
import os
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

# By name only; what a file really holds is read from its contents. Those this Pillow cannot read are rejected by name.
EXTENSIONS = frozenset(
    (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".avif", ".bmp", ".ppm", ".gif", ".tif", ".tiff")
)
# Pillow opens many more kinds, PostScript among them, which it hands to an interpreter.
_FORMATS = ("JPEG", "PNG", "WEBP", "AVIF", "BMP", "PPM", "GIF", "TIFF")

# A JPEG takes at least one bit for each block of 8x8 pixels: 512 pixels a byte, if gray. White ones were seen to hold
# 256. (Arithmetic coding, which next to nobody writes, might need less for pictures that show nothing.)
JPEG_PIXELS_PER_BYTE = 1000


def open_image(file: str | BinaryIO) -> Image.Image:
    """Opens an image file of a kind that EXTENSIONS names, whatever its own name is; its pixels are not read yet.

    Raises ValueError if it is no such image, OSError where it cannot be read, and either of them or Pillow's
    DecompressionBombError where its headers claim more pixels than it can hold or a computer should.
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
    """The picture as a viewer shows it: EXIF orientation applied, mode RGB, 8 bits per channel.

    Any mode that Pillow opens is taken. Transparent pixels are laid on white: that is what a browser shows on an empty
    page, and the colours hidden below alpha 0 are whatever the editor left there. Of 16 bits per channel the full range
    becomes 0..255. Of an animation this is the frame that the image stands at, the first one after opening. Colour
    profiles are left alone: wide-gamut pictures look a little pale.

    Raises OSError if the file is cut off or broken, and ValueError for pixels whose range is not known
    (floating point, 32 bits).
    """
    image = ImageOps.exif_transpose(image)
    if image.mode == "RGB" and not image.has_transparency_data:
        return image
    if image.mode == "F":
        raise ValueError("floating-point pixels, whose range is not known; save it with 8 or 16 bits a channel")
    if image.mode.startswith("I"):
        image = _gray_of_16_bits(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _gray_of_16_bits(image: Image.Image) -> Image.Image:
    """Pillow itself would clip at 255, which leaves a white picture. Modes I;16, I;16B and I: 16 bits in 32."""
    values = np.asarray(image).astype(np.int64)
    if values.min() < 0 or values.max() > 65535:
        raise ValueError("32-bit pixels, whose range is not known; save it with 8 or 16 bits a channel")
    gray = Image.fromarray(((values * 255 + 32767) // 65535).astype(np.uint8))
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):  # the one value that a 16-bit PNG declares transparent
        gray.putalpha(Image.fromarray(np.where(values == transparent, 0, 255).astype(np.uint8)))
    return gray
