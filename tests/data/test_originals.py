"""Images read from their own files, for evaluation."""

import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

from data import DataError
from data.loader import open_loader
from data.originals import Originals, central_crop
from data.sources import open_source
from tests.pictures import photograph, write_class_folders


def all_batches(loader):
    return list(loader.epoch(0))


def test_crops_are_the_central_crops_of_the_files(image_folder):
    source = open_source(str(image_folder))
    loader = Originals(source.val, source.class_names, resolution=32, batch_size=4, threads=2)
    batches = all_batches(loader)
    assert [len(batch.labels) for batch in batches] == [4, 4, 4, 3]
    crops = torch.cat([batch.crops for batch in batches])
    assert (crops.dtype, crops.shape) == (torch.uint8, (15, 3, 32, 32))
    assert torch.cat([batch.indices for batch in batches]).tolist() == list(range(15))
    assert torch.cat([batch.labels for batch in batches]).tolist() == [0] * 5 + [1] * 5 + [2] * 5
    assert loader.files == tuple(f"{number:03}.jpg" for _ in range(3) for number in range(5))
    for crop, path in zip(crops, source.val.items, strict=True):
        with Image.open(path) as image:
            side = round(min(image.size) * 0.875)
            left, top = (image.width - side) // 2, (image.height - side) // 2
            expected = image.crop((left, top, left + side, top + side)).resize((32, 32), Image.Resampling.BILINEAR)
        assert np.array_equal(crop.permute(1, 2, 0).numpy(), np.asarray(expected))
    sizes = torch.cat([batch.sizes for batch in batches])
    boxes = torch.cat([batch.boxes for batch in batches])
    assert torch.equal(boxes[:, 2], (sizes.min(dim=1).values * 0.875).round().int())


def test_converted_crops_differ_only_by_the_second_jpeg(image_folder, converted):
    source = open_source(str(image_folder))
    (ours,) = Originals(source.val, source.class_names, resolution=32, batch_size=15).epoch()
    loader = open_loader(converted.beton("val"), resolution=32, batch_size=15, train=False, decoder="torchvision")
    (theirs,) = loader.epoch(0)
    assert torch.equal(ours.labels, theirs.labels)
    assert (ours.crops.int() - theirs.crops.int()).abs().float().mean() < 2


def test_unreadable_images_are_skipped_and_listed(tmp_path, capsys):
    root = write_class_folders(tmp_path / "set", 2, 4)
    (root / "class0" / "001.jpg").write_bytes(b"no image")
    whole = (root / "class1" / "000.jpg").read_bytes()
    (root / "class1" / "000.jpg").write_bytes(whole[: len(whole) // 2])
    for number in (2, 3):
        (root / "class1" / f"00{number}.jpg").write_bytes(b"")
    source = open_source(str(root), whole=True)
    batches = all_batches(Originals(source.val, source.class_names, resolution=32, batch_size=2))
    assert [batch.indices.tolist() for batch in batches] == [[0], [2, 3], [5]]
    assert [batch.labels.tolist() for batch in batches] == [[0], [0, 0], [1]]
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(": ")[1].rpartition("/")[2] for line in lines] == ["001.jpg", "000.jpg", "002.jpg", "003.jpg"]


def test_images_of_any_kind_and_from_an_archive(tmp_path):
    root = write_class_folders(tmp_path / "set", 2, 1)
    photograph(7, 90, 120).convert("L").save(root / "class0" / "gray.png")
    photograph(8, 90, 120).convert("CMYK").save(root / "class1" / "print.jpg")
    with zipfile.ZipFile(tmp_path / "set.zip", "w") as archive:
        for file in sorted(root.rglob("*.*")):
            archive.write(file, file.relative_to(root))
    both = []
    for path in (root, tmp_path / "set.zip"):
        source = open_source(str(path), whole=True)
        loader = Originals(source.val, source.class_names, resolution=24, batch_size=8)
        assert loader.files == ("000.jpg", "gray.png", "000.jpg", "print.jpg")
        both += all_batches(loader)
    assert torch.equal(both[0].crops, both[1].crops)


def test_a_crop_of_the_whole_width():
    crop = central_crop(photograph(1, 60, 90), resolution=20, center_ratio=1.0)
    expected = photograph(1, 60, 90).crop((15, 0, 75, 60)).resize((20, 20), Image.Resampling.BILINEAR)
    assert np.array_equal(crop, np.asarray(expected))


@pytest.mark.parametrize("bad", [{"resolution": 0}, {"batch_size": 0}, {"threads": 0}])
def test_invalid_numbers_are_refused(bad, image_folder):
    source = open_source(str(image_folder))
    with pytest.raises(DataError, match=f"{next(iter(bad))}=0: must be at least 1"):
        Originals(source.val, source.class_names, **{"resolution": 32, "batch_size": 4} | bad)
