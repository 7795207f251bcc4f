"""ReaL and multi-label accuracy, against a few lines that define them."""

import json
import random

import pytest

from models.imagenet import class_ids
from train import TrainError
from train.score.multilabel import Answers, multi_label_accuracy, read_multi_label, read_real, real_accuracy

IDS = class_ids()


def name_of(number: int) -> str:
    return f"ILSVRC2012_val_{number:08}.JPEG"


@pytest.fixture
def guesses():
    """Class numbers that a network found likeliest and those of the folders, for 200 images in no order."""
    draw = random.Random(0)
    numbers = draw.sample(range(1, 301), 200)
    return {number: (draw.randrange(20), draw.randrange(20)) for number in numbers}


def answers_of(guesses, choices=IDS) -> Answers:
    return Answers(
        files=[name_of(number) for number in guesses],
        folders=[IDS[folder] for folder, _ in guesses.values()],
        likeliest=[IDS[guess] for _, guess in guesses.values()],
        choices=frozenset(choices),
    )


@pytest.fixture
def real(tmp_path):
    """A small real.json: labels of 300 images."""
    draw = random.Random(1)
    labels = [draw.sample(range(20), draw.choice([0, 1, 1, 2, 5])) for _ in range(300)]
    (tmp_path / "real.json").write_text(json.dumps(labels))
    return tmp_path / "real.json"


def test_real(guesses, real):
    labels = json.loads(real.read_text())
    right = [guess in labels[number - 1] for number, (_, guess) in guesses.items() if labels[number - 1]]
    ours = real_accuracy(read_real(real), answers_of(guesses))
    assert ours.percent == pytest.approx(100 * sum(right) / len(right))
    assert (ours.images, ours.left_out) == (len(right), 200 - len(right))
    assert 0 < ours.percent < 100


def test_real_among_some_classes(guesses, real):
    """A network of 5 classes: other labels are dropped, and so are images without remaining labels."""
    labels = [set(several) & set(range(5)) for several in json.loads(real.read_text())]
    guesses = {number: (folder, guess % 5) for number, (folder, guess) in guesses.items()}
    right = [guess in labels[number - 1] for number, (_, guess) in guesses.items() if labels[number - 1]]
    ours = real_accuracy(read_real(real), answers_of(guesses, IDS[:5]))
    assert ours.percent == pytest.approx(100 * sum(right) / len(right))
    assert (ours.images, ours.left_out) == (len(right), 200 - len(right))


def test_images_of_other_sets_and_unreadable_ones_do_not_count(real):
    labels = json.loads(real.read_text())
    labelled = next(number for number, several in enumerate(labels, 1) if several)
    right = IDS[labels[labelled - 1][0]]
    answers = Answers(
        files=[name_of(labelled), name_of(labelled), "n01440764_18.JPEG", name_of(301)],
        folders=[IDS[0]] * 4,
        likeliest=[right, None, right, right],
        choices=frozenset(IDS),
    )
    ours = real_accuracy(read_real(real), answers)
    assert (ours.percent, ours.images, ours.left_out) == (100.0, 1, 0)


def test_no_image_to_score_has_no_accuracy(real):
    answers = Answers(files=[name_of(1)], folders=[IDS[0]], likeliest=[IDS[500]], choices=frozenset(IDS[500:]))
    for accuracy in (real_accuracy, multi_label_accuracy):
        ours = accuracy(read_real(real), answers)
        assert (ours.percent, ours.images, ours.left_out) == (None, 0, 1)


def test_multi_label(guesses, tmp_path):
    draw = random.Random(2)
    kinds = ("correct", "unclear", "wrong")
    annotated = {
        name_of(number): {
            kind: [IDS[label] for label in draw.sample(range(20), draw.randrange(1, 7))]
            for kind in kinds
            if draw.random() < 0.8
        }
        for number in range(1, 301, 2)
    }
    problematic = {name_of(number): "drawing" for number in range(1, 301, 10)}
    path = tmp_path / "human_accuracy_v3.0.0.json"
    path.write_text(json.dumps({"initial_annots": annotated, "problematic_images": problematic, "imagenet_m": []}))
    # As the data's authors recommend it in tensorflow_datasets (imagenet2012_multilabel).
    correct, images = {}, {}
    for number, (folder, guess) in guesses.items():
        name = name_of(number)
        if name in annotated and name not in problematic:
            allowed = annotated[name].get("correct", []) + annotated[name].get("unclear", [])
            if allowed:
                images[folder] = images.get(folder, 0) + 1
                correct[folder] = correct.get(folder, 0) + (IDS[guess] in allowed)
    ours = multi_label_accuracy(read_multi_label(path), answers_of(guesses))
    assert ours.images == sum(images.values())
    assert ours.percent == pytest.approx(sum(100 * correct[folder] / images[folder] for folder in images) / len(images))
    # It is a mean over classes, not over images.
    assert ours.percent != pytest.approx(100 * sum(correct.values()) / sum(images.values()))


@pytest.mark.parametrize(
    ("read", "content", "says"),
    [
        (read_real, None, r"^--real .*labels.json: cannot be read \(No such file or directory\)$"),
        (read_real, "{", r"^--real .*labels.json: is not JSON$"),
        (read_real, "[[0], [1000]]", r"is not a list of lists of class numbers, 0 to 999; give real.json$"),
        (read_real, "[[0], 3]", "is not a list of lists"),
        (read_real, "3", "is not a list of lists"),
        (
            read_multi_label,
            "[[0], [1]]",
            "has no initial_annots and problematic_images; give human_accuracy_v3.0.0.json$",
        ),
        (read_multi_label, '{"initial_annots": {}}', "^--multi-label .*labels.json: has no initial_annots"),
    ],
)
def test_files_that_are_not_these_labels(read, content, says, tmp_path):
    path = tmp_path / "labels.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(TrainError, match=says):
        read(path)
