import torch
from torchvision.transforms.v2 import functional as F

from kernels.normalise import Normalise

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def test_equals_torchvision():
    crops = torch.randint(0, 256, (4, 3, 7, 7), dtype=torch.uint8).contiguous(memory_format=torch.channels_last)
    ours = Normalise(IMAGENET)(crops)
    theirs = F.normalize(F.to_dtype(crops, torch.float32, scale=True), list(IMAGENET[0]), list(IMAGENET[1]))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    assert ours.dtype == torch.float32
    assert ours.is_contiguous(memory_format=torch.channels_last)


def test_has_no_entries_in_the_state_dict():
    assert not Normalise(IMAGENET).state_dict()
