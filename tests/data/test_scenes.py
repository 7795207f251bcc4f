"""The embedded data set: properties of its pictures, and the truth about their crops."""

from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import pytest

from data import scenes

SOME = [("train", 0), ("train", 1234), ("val", 0), ("val", 321)]


@pytest.mark.parametrize(("split", "index"), SOME)
def test_a_picture_depends_only_on_split_and_index(split: str, index: int) -> None:
    first = scenes.draw(split, index)
    scenes.draw(split, index + 1)
    with ThreadPoolExecutor(2) as pool:
        again = list(pool.map(lambda _: scenes.draw(split, index).tobytes(), range(4)))
    assert again == [first.tobytes()] * 4


def test_pictures_differ() -> None:
    pictures = {scenes.draw(split, index).tobytes() for split in scenes.SIZES for index in range(20)}
    assert len(pictures) == 40


@pytest.mark.parametrize(("split", "index"), SOME)
def test_sizes(split: str, index: int) -> None:
    picture = scenes.draw(split, index)
    assert picture.mode == "RGB"
    short, long = sorted(picture.size)
    assert scenes.SHORT_SIDE[0] <= short <= scenes.SHORT_SIDE[1]
    assert long <= round(short * scenes.MAX_ASPECT)


def test_sizes_and_orientations_vary() -> None:
    shapes = [scenes.class_map("val", index).shape for index in range(40)]
    assert len(set(shapes)) > 30
    assert 5 < sum(height > width for height, width in shapes) < 35


@pytest.mark.parametrize("split", list(scenes.SIZES))
def test_labels_are_balanced(split: str) -> None:
    counts = np.bincount([scenes.label(split, index) for index in range(scenes.SIZES[split])])
    assert counts.tolist() == [scenes.SIZES[split] // len(scenes.CLASS_NAMES)] * len(scenes.CLASS_NAMES)


def test_the_label_is_not_its_index() -> None:
    rows = {tuple(scenes.label("train", 10 * block + at) for at in range(10)) for block in range(20)}
    assert len(rows) == 20


def test_the_label_is_what_the_picture_and_its_centre_crop_show_most_of() -> None:
    for index in range(100):
        height, width = scenes.class_map("val", index).shape
        side = round(min(height, width) * 0.875)
        centre = [(height - side) // 2, (width - side) // 2, side, side]
        truth = scenes.crop_truth("val", [index, index], [[0, 0, height, width], centre])
        assert truth.tolist() == [scenes.label("val", index)] * 2


def test_other_classes_are_beside_the_main_one() -> None:
    seen = [len(np.unique(scenes.class_map("val", index))) - 1 for index in range(40)]  # without the ground
    assert min(seen) >= 3
    assert max(seen) <= 1 + scenes.OTHERS[1]


def _plain_ground(grey: int, rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    return np.full((3, height, width), grey, np.float32)


@pytest.mark.parametrize(("split", "index"), SOME)
def test_class_map_follows_the_ground(split: str, index: int, monkeypatch: pytest.MonkeyPatch) -> None:
    picture = np.asarray(scenes.draw(split, index), int)
    classes = scenes.class_map(split, index)
    assert classes.shape == picture.shape[:2]
    assert classes.dtype == np.uint8
    # Between a black ground and a grey one, a pixel differs by how much of the ground it shows.
    shown = []
    for grey in (0, 180):
        ground = partial(_plain_ground, grey)
        monkeypatch.setattr(scenes, "_paint_ground", ground)
        shown.append(np.asarray(scenes.draw(split, index), float).mean(axis=2))
    through = shown[1] - shown[0]
    lit = np.median(through[through > 0.9 * through.max()])  # the bare ground
    assert (through[classes != scenes.GROUND] <= 0.52 * lit).all()
    assert (through[classes == scenes.GROUND] >= 0.05 * lit).all()  # several shadows may lie on it


@pytest.mark.parametrize(("split", "index"), SOME)
def test_a_class_map_is_read_only(split: str, index: int) -> None:
    with pytest.raises(ValueError, match="read-only"):
        scenes.class_map(split, index)[0, 0] = 0


def test_crop_truth_counts_pixels() -> None:
    rng = np.random.default_rng(0)
    indices = rng.integers(0, 50, 200)
    boxes = []
    for index in indices:
        height, width = scenes.class_map("train", int(index)).shape
        h, w = rng.integers(4, height + 1), rng.integers(4, width + 1)
        boxes.append((rng.integers(0, height - h + 1), rng.integers(0, width - w + 1), h, w))
    truth = scenes.crop_truth("train", indices, np.array(boxes, np.int32))
    assert truth.dtype == np.int64
    assert truth.shape == (200,)
    for index, (top, left, height, width), found in zip(indices, boxes, truth, strict=True):
        votes: dict[int, int] = {}
        for y in range(top, top + height):
            for kind in scenes.class_map("train", int(index))[y, left : left + width].tolist():
                if kind != scenes.GROUND:
                    votes[kind] = votes.get(kind, 0) + 1
        if sum(votes.values()) < scenes.MIN_SHARE * height * width:
            assert found == -1
        else:
            assert votes[int(found)] == max(votes.values())


def test_crop_truth_of_empty_crops() -> None:
    classes = scenes.class_map("val", 0)
    top, left = np.argwhere(classes == scenes.GROUND)[0]
    assert scenes.crop_truth("val", [0], [[top, left, 1, 1]]).tolist() == [-1]
    top, left = np.argwhere(classes != scenes.GROUND)[0]
    assert scenes.crop_truth("val", [0], [[top, left, 1, 1]]).tolist() == [classes[top, left]]


def test_crop_truth_of_no_crops() -> None:
    assert scenes.crop_truth("val", np.empty(0, np.int64), np.empty((0, 4), np.int32)).shape == (0,)


@pytest.mark.parametrize("index", [-1, scenes.SIZES["val"]])
def test_an_index_out_of_range_is_refused(index: int) -> None:
    for look in (scenes.draw, scenes.label, scenes.class_map):
        with pytest.raises(IndexError):
            look("val", index)
