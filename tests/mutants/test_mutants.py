"""Mutation testing on a small tree: which mutants are caught, which survive, and that files are restored."""

import subprocess
from pathlib import Path

import pytest

from command import UserError
from tests.mutants.mutations import sample_of
from tests.mutants.trial import Trial, copy_tree, stages_of

CODE = """\
def clamp(value: int | None, most: int = 10) -> int:
    assert value is not None
    while value > most:
        value = most
    return value
"""
TEST = """\
from room.part import clamp

def test_it():
    assert clamp(11) == 10
"""


@pytest.fixture
def tree(tmp_path) -> Path:
    files = {
        "room/part.py": CODE,
        "room/parts/__init__.py": "",
        "tests/room/test_part.py": TEST,
        "tests/room/test_others.py": "import room.part\n",
        "tests/room/test_more.py": "from room import (part)\n",
        "tests/room/test_wide.py": "from room import (\n    part,\n)\n",
        "pyproject.toml": '[tool.pytest.ini_options]\npythonpath = ["."]\nmarkers = ["slow: s", "gpu: g"]\n',
        "new.txt": "not yet known to git",
        ".gitignore": "/left\n",
        "left": "left out",
    }
    root = tmp_path / "tree"
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    subprocess.run(["git", "init", "-q"], cwd=root, check=True)
    subprocess.run(["git", "add", "room", "tests"], cwd=root, check=True)
    return root


def test_a_copy_has_the_current_files_of_the_working_tree(tree, tmp_path):
    (tree / "room/part.py").write_text("changed = 1\n")
    (tree / "tests/room/test_others.py").unlink()
    copy = copy_tree(tree, tmp_path / "copy")
    names = {str(path.relative_to(copy)) for path in copy.rglob("*") if path.is_file()}
    tests = {f"tests/room/test_{name}.py" for name in ("part", "more", "wide")}
    assert names == {"room/part.py", "room/parts/__init__.py", "pyproject.toml", "new.txt", ".gitignore", *tests}
    assert (copy / "room/part.py").read_text() == "changed = 1\n"


def test_the_order_of_the_tests_of_a_file(tree):
    def names(file):
        return [[test.stem for test in stage] for stage in stages_of(tree / file, tree)]

    assert names("room/part.py") == [["test_part"], ["test_more", "test_others", "test_wide"]]
    assert names("room/parts/__init__.py") == [["test_more", "test_others", "test_part", "test_wide"]]
    assert names("room/parts") == names("room/parts/__init__.py")


@pytest.mark.parametrize(
    ("old", "new", "caught", "hung"),
    [
        ("value > most", "value < most", True, False),
        ("value > most", "value >= most", True, True),
        ("= 10", "= 9", True, False),
        ("def clamp", "raise ValueError('broken')\ndef clamp", True, False),
        ("value is not None", "value is not 3.5", False, False),
    ],
)
def test_mutants_are_caught_or_survive(tree, tmp_path, monkeypatch, old, new, caught, hung):
    monkeypatch.setattr("tests.mutants.trial._SECONDS_OF_A_TEST", 2)
    trial = Trial(copy_tree(tree, tmp_path / "copy"), [[Path("tests/room/test_part.py")]])
    code = CODE.replace(old, new)
    assert code != CODE
    end = trial.end_of(Path("room/part.py"), code)
    assert (end.caught, end.hung) == (caught, hung)
    assert ("test_part.py" in end.by) == caught
    assert (tmp_path / "copy/room/part.py").read_text() == (tree / "room/part.py").read_text() == CODE


def test_tests_that_fail_without_a_mistake_are_an_error(tree, tmp_path):
    (tree / "tests/room/test_part.py").write_text("def test_it():\n    assert 0\n")
    trial = Trial(copy_tree(tree, tmp_path / "copy"), [[Path("tests/room/test_part.py")]])
    with pytest.raises(UserError, match=r"without a mistake, the tests fail too: by tests/room/test_part.py::test_it"):
        trial.end_of(Path("room/part.py"), CODE)


def test_the_sample_has_different_places_and_depends_only_on_the_seed(tree):
    pytest.importorskip("cosmic_ray")
    found, places = sample_of(tree / "room/part.py", 100, 0)
    assert 4 <= len(found) <= places < 15
    assert len({mutant.code for mutant in found}) == len(found)
    assert all(mutant.before == CODE for mutant in found)
    changed = "".join(mutant.code for mutant in found)
    # The annotation is not changed, since no test could detect it.
    assert changed.count("value: int | None") == len(found)
    few, _ = sample_of(tree / "room/part.py", 3, 0)
    assert few == found[:3]
    assert sample_of(tree / "room/part.py", 100, 1)[0] != found
    assert sample_of(tree / "room", 100, 0)[0] == found


def test_without_cosmic_ray_the_error_names_what_to_install(tree, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "cosmic_ray.mutating", None)
    with pytest.raises(UserError, match=r"made by cosmic-ray, which is not installed: .*pip install"):
        sample_of(tree / "room/part.py", 3, 0)
