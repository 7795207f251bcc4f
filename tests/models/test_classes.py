"""The mapping from the classes of a set to the outputs of a network."""

import random

from models.classes import are_imagenet, by_id, class_columns, lacking, readable
from models.imagenet import class_ids

IDS = class_ids()


def test_folders_numbered_as_in_imagenetv2_are_ordered_by_number():
    numbered = sorted(map(str, range(1000)))
    assert numbered[:4] == ["0", "1", "10", "100"]
    assert by_id(numbered)[:4] == (IDS[0], IDS[1], IDS[10], IDS[100])
    assert class_columns(IDS, numbered) == [int(name) for name in numbered]
    assert class_columns(numbered, IDS) == [numbered.index(str(number)) for number in range(1000)]
    assert are_imagenet(numbered)


def test_other_numbers_are_ordinary_names():
    digits = [str(number) for number in range(10)]
    assert by_id(digits) == tuple(digits)
    assert not are_imagenet(digits)
    assert class_columns(IDS, digits) == [-1] * 10
    assert class_columns(digits, digits[::-1]) == list(range(10))[::-1]


def test_columns_with_more_and_with_fewer_classes():
    some = random.Random(0).sample(IDS, 10)
    columns = class_columns(IDS, some)
    assert [IDS[column] for column in columns] == some
    back = class_columns(some, IDS)
    assert [back[column] for column in columns] == list(range(10))
    assert back.count(-1) == 990
    assert are_imagenet(some)
    assert not are_imagenet([*some, "cat"])


def test_missing_classes_are_named():
    ours = ["ant", "bee", "cat", "dog", "eel"]
    assert lacking(class_columns(["bee"], ours), ours) == "ant, cat, dog, ..."
    assert lacking(class_columns(["bee", "dog", "ant"], ours), ours) == "cat, eel"


def test_names_in_words():
    words = readable(IDS)
    assert words[:2] == ("tench", "goldfish")
    assert len(set(words)) == 1000
    assert words[IDS.index("n02979186")] == "cassette player"
    # The two cranes share all synonyms; the two maillots do not.
    assert {words[IDS.index(name)] for name in ("n02012849", "n03126707")} == {"crane (n02012849)", "crane (n03126707)"}
    assert {words[IDS.index(name)] for name in ("n03710637", "n03710721")} == {"maillot", "maillot, tank suit"}
    assert readable(sorted(map(str, range(1000))))[:4] == (words[0], words[1], words[10], words[100])
    # A single crane needs no id.
    assert readable(["n02012849", "n00004475", "n99999999", "ant"]) == ("crane", "organism", "n99999999", "ant")
    assert readable(["tench", "n01440764"]) == ("tench", "tench, Tinca tinca")
