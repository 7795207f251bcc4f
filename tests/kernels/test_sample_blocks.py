"""Crops from blocks: the reference compared with Pillow, and invalid arguments."""

import numpy as np
import pytest
import torch
from PIL import Image

from kernels.sample_blocks import planes, reference, sample_blocks
from tests.kernels.cases import block_images, read_blocks


def flat(red: int, blue: int, height: int, width: int) -> torch.Tensor:
    """Returns the blocks of an image of one colour: Y = 128, Cr = red, Cb = blue."""
    whole, half = ((height + 3) // 4) * ((width + 3) // 4), ((height + 7) // 8) * ((width + 7) // 8)
    return torch.tensor([128] * whole + [blue] * half + [red] * half)


def test_codes_are_those_of_bc4():
    """With endpoints 254 and 2: codes 0 and 1 are the endpoints, 2 to 7 are equidistant between them."""
    codes = sum((place % 8) << (16 + 3 * place) for place in range(16))
    word = 254 | 2 << 8 | codes
    word = word - 2**64 if word >= 2**63 else word
    (luma, *_) = planes(torch.tensor([word, 0, 0]), (0, 1, 2), 4, 4)
    assert luma.flatten().tolist() == [254, 2, 218, 182, 146, 110, 74, 38] * 2


@pytest.mark.parametrize("resolution", [7, 20, 100])
def test_crops_are_resized_as_by_pillow(resolution):
    """With gray images, whose result is Pillow's resize of the luma plane."""
    blocks, offsets, sizes, boxes, flips = block_images()
    for number, (height, width) in enumerate(sizes.tolist()):
        luma = planes(blocks, offsets[number].tolist(), height, width)[0].byte().numpy()
        top, left, tall, wide = boxes[number].tolist()
        box = np.ascontiguousarray(luma[top : top + tall, left : left + wide])
        wanted = np.asarray(Image.fromarray(box).resize((resolution, resolution), Image.Resampling.BILINEAR)).astype(
            int
        )
        gray = blocks.clone()
        gray[offsets[number, 1] :] = 128  # endpoint 0 of chroma, and all its codes are 0
        place = (part[number : number + 1] for part in (offsets, sizes, boxes, flips))
        crop = sample_blocks(gray, *place, resolution)
        assert (crop[0] == crop[0, :1]).all()
        wanted = wanted[:, ::-1] if flips[number] else wanted
        assert np.abs(crop[0, 0].numpy().astype(int) - wanted).max() <= 1


def test_colours_are_converted_as_in_jfif():
    for red, blue in ((200, 90), (20, 240), (128, 128)):
        blocks = flat(red, blue, 9, 11)
        box = torch.tensor([[2, 3, 5, 6]], dtype=torch.int32)
        size = torch.tensor([[9, 11]], dtype=torch.int32)
        crop = sample_blocks(blocks, torch.tensor([[0, 9, 13]]), size, box, torch.tensor([False]), 4)
        wanted = Image.new("YCbCr", (1, 1), (128, blue, red)).convert("RGB").getpixel((0, 0))
        assert (crop[0].permute(1, 2, 0).int() - torch.tensor(wanted)).abs().max() <= 1


def test_chroma_is_upsampled_as_by_libjpeg():
    """Cr with 4 columns upsampled to 7: 3/4 of the nearer sample and 1/4 of the farther; the edges are repeated."""
    codes = sum(code << 16 + 3 * (4 * row + x) for row in range(4) for x, code in enumerate((0, 0, 1, 1)))
    blocks = torch.tensor([128] * 5 + [240 | 20 << 8 | codes])
    place = torch.tensor([[7, 7]], dtype=torch.int32), torch.tensor([[0, 0, 7, 7]], dtype=torch.int32)
    # Without a change of size, the filter is the identity.
    crop = reference(blocks, torch.tensor([[0, 4, 5]]), *place, torch.tensor([False]), 7)
    samples = torch.tensor([240.0, 240, 240, 185, 75, 20, 20])
    wanted = (128 + 1.402 * (samples - 128)).round().clamp(0, 255)
    assert torch.equal(crop[0, 0], wanted.byte().expand(7, 7))


def test_only_the_rows_that_are_read_are_needed():
    blocks, *places = block_images()
    there = read_blocks(blocks, *places)
    assert not there[2:].all()
    assert torch.equal(sample_blocks(torch.where(there, blocks, -1), *places, 20), sample_blocks(blocks, *places, 20))


def test_invalid_arguments():
    images = block_images()
    with pytest.raises(ValueError, match=r"boxes must be \[6, 4\], not \[6, 2\]"):
        sample_blocks(*images[:3], images[2], images[4], 8)
    with pytest.raises(ValueError, match="blocks must be int64"):
        sample_blocks(images[0].float(), *images[1:], 8)
    torch.library.opcheck(torch.ops.label_refinery.sample_blocks, (*images, 8))
