"""Which outputs of a network stand for the classes of a set."""

import random

from models.imagenet import class_ids
from train.classes import are_imagenet, by_id, lacking, places_of

IDS = class_ids()


def test_folders_numbered_as_imagenetv2s_are_in_the_order_of_numbers():
    numbered = sorted(map(str, range(1000)))
    assert numbered[:4] == ["0", "1", "10", "100"]
    assert by_id(numbered)[:4] == (IDS[0], IDS[1], IDS[10], IDS[100])
    assert places_of(IDS, numbered) == [int(name) for name in numbered]
    assert places_of(numbered, IDS) == [numbered.index(str(number)) for number in range(1000)]
    assert are_imagenet(numbered)


def test_other_numbers_are_names_like_any():
    digits = [str(number) for number in range(10)]
    assert by_id(digits) == tuple(digits)
    assert not are_imagenet(digits)
    assert places_of(IDS, digits) == [-1] * 10
    assert places_of(digits, digits[::-1]) == list(range(10))[::-1]


def test_places_among_more_and_among_fewer_classes():
    some = random.Random(0).sample(IDS, 10)
    places = places_of(IDS, some)
    assert [IDS[place] for place in places] == some
    back = places_of(some, IDS)
    assert [back[place] for place in places] == list(range(10))
    assert back.count(-1) == 990
    assert are_imagenet(some)
    assert not are_imagenet([*some, "cat"])


def test_what_is_lacking_is_named():
    ours = ["ant", "bee", "cat", "dog", "eel"]
    assert lacking(places_of(["bee"], ours), ours) == "ant, cat, dog, ..."
    assert lacking(places_of(["bee", "dog", "ant"], ours), ours) == "cat, eel"
