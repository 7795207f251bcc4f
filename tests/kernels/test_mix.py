"""Mixing, compared with a loop over pixels."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.mix import mix


@given(
    top=st.integers(0, 5),
    left=st.integers(0, 5),
    height=st.integers(0, 5),
    width=st.integers(0, 5),
    inside=st.floats(0, 1, width=32),
)
@settings(deadline=None, max_examples=50)
def test_pixels_within_the_box_are_blended(top, left, height, width, inside):
    crops = torch.randint(0, 256, (3, 3, 5, 5), dtype=torch.uint8).contiguous(memory_format=torch.channels_last)
    partners = torch.tensor([2, 1, 0])
    box = [top, left, min(top + height, 5), min(left + width, 5)]
    mixed = mix(crops, partners, torch.tensor([box] * 3), torch.full((3,), inside))
    assert mixed.is_contiguous(memory_format=torch.channels_last)
    wanted = crops.float().clone()
    for place, partner in enumerate(partners.tolist()):
        for y in range(box[0], box[2]):
            for x in range(box[1], box[3]):
                own, other = crops[place, :, y, x].float(), crops[partner, :, y, x].float()
                wanted[place, :, y, x] = inside * own + (1 - inside) * other
    torch.testing.assert_close(mixed, wanted, rtol=1e-5, atol=1e-3)


def test_each_crop_has_its_own_box_and_weight():
    crops = torch.stack([torch.full((3, 4, 4), value, dtype=torch.uint8) for value in (0, 100)])
    boxes = torch.tensor([[0, 1, 2, 4], [0, 0, 4, 4]])
    mixed = mix(crops, torch.tensor([1, 0]), boxes, torch.tensor([0.0, 0.75]))
    assert mixed[0, 0].tolist() == [[0, 100, 100, 100], [0, 100, 100, 100], [0] * 4, [0] * 4]
    assert mixed[1].unique().tolist() == [75]
