"""A picture of training crops with their labels."""

import math
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

from command import printable
from data.loader import CropBatch
from train.labels.source import Targets

_MOST = 16
# Pixels: a crop is shown this wide or in its own size, whichever is larger, up to the second; height of a text line.
_SIDE, _LARGEST_SIDE = 128, 256
_LINE = 14
_GAP = 6


def labelled_crops(
    batch: CropBatch, targets: Targets, class_names: Sequence[str], *, labelled_by: str | None
) -> Image.Image:
    """The first crops of a batch, at most 16, in rows; below each its image's class and its label's most likely class.

    targets: the labels of the batch. labelled_by: their source, the prefix of the label's line; None omits the line,
    for labels that are those of the images.
    """
    count = min(_MOST, len(batch.labels))
    side = min(max(_SIDE, batch.crops.shape[-1]), _LARGEST_SIDE)
    columns = math.ceil(math.sqrt(count))
    width, height = side + _GAP, side + _LINE * (2 if labelled_by else 1) + _GAP
    picture = Image.new("RGB", (columns * width + _GAP, math.ceil(count / columns) * height + _GAP), "white")
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(11)
    crops = batch.crops[:count].permute(0, 2, 3, 1).cpu().numpy()
    own = batch.labels[:count].tolist()
    shares, likeliest = targets.distribution(len(class_names))[:count].max(dim=1)
    for number in range(count):
        left, top = _GAP + number % columns * width, _GAP + number // columns * height
        crop = Image.fromarray(crops[number])
        picture.paste(crop.resize((side, side), Image.Resampling.BICUBIC), (left, top))
        lines = [f"image: {class_names[own[number]]}"]
        if labelled_by:
            share = f" {100 * float(shares[number]):.0f} %"
            lines.append(_fitting(f"{labelled_by}: {class_names[int(likeliest[number])]}", share, side, font))
        colours = ["black", "black" if own[number] == int(likeliest[number]) else "firebrick"]
        for line, text in enumerate(lines):
            place = left, top + side + 1 + line * _LINE
            draw.text(place, _fitting(text, "", side, font), fill=colours[line], font=font)
    return picture


def _fitting(text: str, end: str, width: int, font: "ImageFont.FreeTypeFont | ImageFont.ImageFont") -> str:
    """The text and its suffix in one line, the text shortened if both are too wide."""
    text = printable(text)
    if font.getlength(text + end) <= width:
        return text + end
    while text and font.getlength(f"{text}...{end}") > width:
        text = text[:-1]
    return f"{text}...{end}"
