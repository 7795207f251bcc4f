"""The installed command: the program and options that it starts."""

import re

import pytest

from console import program
from tests.test_setup import LISTED


@pytest.mark.parametrize(
    ("words", "module", "options"),
    [
        (["train", "--model", "alexnet"], "train", ["--model", "alexnet"]),
        (["train", "MODEL=alexnet", "--epochs", "3"], "train", ["--model", "alexnet", "--epochs", "3"]),
        (["train", "LABELS=a b", "ARGS=--loss.kind hard"], "train", ["--labels.stored", "a b", "--loss.kind", "hard"]),
        (["label", "OUT=x=y"], "train.label", ["--out", "x=y"]),
        (["runs", "OUT=there"], "train.runs", ["--folder", "there"]),
        (["export", "INT8=1"], "train.export", ["--int8"]),
        (["export", "INT8=0"], "train.export", []),
        (["bench-compare", "A=a.json", "b.json"], "bench.compare", ["a.json", "b.json"]),
        (["maps", "import", "--tree", "t"], "train.maps", ["import", "--tree", "t"]),
        (["train", "--out", "runs/SEED=1"], "train", ["--out", "runs/SEED=1"]),
        (["train", "--help"], "train", ["--help"]),
    ],
)
def test_verbs_and_variables(words, module, options):
    assert program(words, LISTED) == (module, options)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["trian"], "^trian: no such verb; did you mean train[?]$"),
        (["test"], "^test: no such verb"),
        ([""], "^: no such verb; --help lists them$"),
        (["\x1b[2J"], r"^\\x1b\[2J: no such verb"),
        (["train", "MODEL="], "^MODEL is empty: give it a value or leave it out$"),
    ],
)
def test_typing_errors_are_named(words, says):
    with pytest.raises(ValueError, match=says):
        program(words, LISTED)


def test_help_lists_every_verb():
    module, (shown,) = program([], LISTED)
    assert module == ""
    assert program(["--help"], LISTED) == ("", [shown])
    assert re.findall(r"^  ([\w-]+)  ", shown, re.MULTILINE) == list(LISTED["verbs"])
    assert max(map(len, shown.splitlines())) <= 120
