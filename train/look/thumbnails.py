"""Small pictures within a page: a limited number, each of limited size."""

import base64
import io

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

MOST = 200
_SIDE = 192
# Base64 turns 3 bytes into 4: all thumbnails together stay below 4.3 MB.
_MOST_BYTES = 16_000
_QUALITIES = (82, 70, 55, 40, 25, 10)

Box = tuple[int, int, int, int]


class Thumbnails:
    """Makes up to MOST thumbnails, the limit of a page."""

    def __init__(self) -> None:
        self.made = 0

    def address(self, image: NDArray[np.uint8], *, boxes: tuple[Box, ...] = ()) -> str:
        """A picture, uint8 [height, width, 3], as the data: URL of a JPEG of at most 192 pixels per side.

        boxes: (top, left, height, width) in its pixels, drawn onto it; the first is the most visible.
        Raises RuntimeError for more than MOST: callers must count a page's pictures beforehand.
        """
        if self.made == MOST:
            raise RuntimeError(f"a page holds at most {MOST} thumbnails")
        self.made += 1
        small = Image.fromarray(np.ascontiguousarray(image))
        scale = min(1.0, _SIDE / max(small.size))
        small = small.resize([max(1, round(side * scale)) for side in small.size], Image.Resampling.BILINEAR)
        draw = ImageDraw.Draw(small)
        for number, (top, left, height, width) in reversed(list(enumerate(boxes))):
            outline = [scale * left, scale * top, scale * (left + width) - 1, scale * (top + height) - 1]
            outline[2:] = [max(outline[0], outline[2]), max(outline[1], outline[3])]
            draw.rectangle(outline, outline=(0, 0, 0), width=4 if not number else 1)
            draw.rectangle(outline, outline=(255, 196, 0) if not number else (255, 255, 255), width=2 - bool(number))
        for quality in _QUALITIES:
            file = io.BytesIO()
            small.save(file, "JPEG", quality=quality)
            if file.tell() <= _MOST_BYTES:
                break
        return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"
