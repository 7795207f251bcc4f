"""How modules are rewritten for the package, and that setup.cfg lists all of them."""

import ast
import configparser
import importlib.util
import re
import subprocess
from pathlib import Path

import pytest
from setuptools.errors import SetupError

ROOT = Path(__file__).parents[1]
found = importlib.util.spec_from_file_location("setup_of_the_package", ROOT / "setup.py")
assert found
assert found.loader
build = importlib.util.module_from_spec(found)
found.loader.exec_module(build)

LISTED = build.verbs_of((ROOT / "Makefile").read_text())
MODULES = {"data", "data.plan", "data.decoders", "train", "train.maps", "train.label", "command"}


def rewritten(source: str) -> str:
    return build.rewritten(source, "some.py", MODULES, LISTED)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("from data import plan", "from label_refinery.data import plan"),
        ("from data.plan import (\n    CropRule,\n)", "from label_refinery.data.plan import (\n    CropRule,\n)"),
        ("if x:\n    from train.label import y", "if x:\n    from label_refinery.train.label import y"),
        ("from command import UserError", "from label_refinery.command import UserError"),
        ("import command  # noqa", "from label_refinery import command  # noqa"),
        ("import data.plan as p", "import label_refinery.data.plan as p"),
        # Other packages, and names that only start like ours.
        ("from dataclasses import dataclass", None),
        ("from torchvision import models", None),
        ("import datasets, os", None),
        ("from . import plan", None),
        # Not code.
        ('text = "from data import plan"', None),
        ('x = ["data", "train.maps", "train.beton"]', None),
        ("words = ['-m', 'pytest']", None),
        # Commands in texts, without changes of line breaks.
        ('"""python -m train.label --data x"""', '"""label-refinery label --data x"""'),
        ('say("python -m train --help")', 'say("label-refinery train --help")'),
        ('"""of (python\n    -m train.maps)"""', '"""of (label-refinery\n    maps)"""'),
        ('"""python -m\ntrain"""', '"""label-refinery\ntrain"""'),
        ("f'make train LABELS={x}'", "f'label-refinery train LABELS={x}'"),
        ('"make compare-labels A=b"', '"label-refinery compare-labels A=b"'),
        ('"python -m pip install; make labels"', None),
    ],
)
def test_rewriting(before, after):
    assert rewritten(before + "\n") == (after or before) + "\n"


@pytest.mark.parametrize(
    "source",
    [
        "import data.plan",
        "import data, os",
        "import os; from data import plan",
        "import_module('data')",
        "importlib.import_module(f'data.decoders.{x}')",
        "x = 'data.plan'",
        "context.set_forkserver_preload(['data.plan'])",
        "run([sys.executable, '-m', 'train', *words])",
        "launch('-u', '-m', 'train', *words)",
        "'python -m data.plan'",
        "'run `make setup`'",
        "'make test-all'",
    ],
)
def test_unsupported_source_ends_the_build(source):
    with pytest.raises(SetupError, match=r"^some\.py:"):
        rewritten(source + "\n")


def test_all_of_our_modules_can_be_rewritten():
    """As the build does. data/scenes.py is not changed: the fingerprint of `scenes` is that of this file."""
    paths = [path for room in build.ROOMS for path in (ROOT / room).rglob("*.py")]
    paths += [ROOT / f"{name}.py" for name in build.MODULES]
    names = {".".join(path.relative_to(ROOT).with_suffix("").parts) for path in paths}
    for path in paths:
        source = path.read_text()
        after = build.rewritten(source, str(path), names, LISTED)
        ast.parse(after)
        assert after.count("\n") == source.count("\n")
        assert not re.search(rf"^\s*(from|import) ({'|'.join(build.ROOMS)}|command)\b", _code_of(after), re.MULTILINE)
        if path.name == "scenes.py":
            assert after == source


def _code_of(source: str) -> str:
    """The source's statements, without docstrings."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            node.value.value = ""
    return ast.unparse(tree)


def test_setup_cfg_names_every_folder_of_modules():
    described = configparser.ConfigParser()
    described.read(ROOT / "setup.cfg")
    named = set(described["options"]["packages"].split())
    folders = {path.parent.relative_to(ROOT) for room in build.ROOMS for path in (ROOT / room).rglob("*.py")}
    assert named == {"label_refinery"} | {f"label_refinery.{'.'.join(folder.parts)}" for folder in folders}
    tops = {path.parent.name for path in ROOT.glob("*/__init__.py")} - {"tests"}
    assert tops == set(build.ROOMS)


def test_the_verbs_are_those_of_make():
    shown = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    shown = shown.split("Verbs, and the variables they take")[1]
    about = dict(re.findall(r"^  ([a-z][\w-]+) +(\S.*)$", shown, re.MULTILINE))
    assert {verb: said["about"] for verb, said in LISTED["verbs"].items()}.items() <= about.items()
    assert set(about) == LISTED["verbs"].keys() | set(LISTED["others"])
    assert set(LISTED["others"]) == {
        *("test", "test-all", "test-gpu", "gpu", "test-wheel", "kills", "soak", "mutants"),
        *("lint", "types", "format", "setup", "help"),
    }
    for said in LISTED["verbs"].values():
        place = ROOT / said["module"].replace(".", "/")
        assert place.with_suffix(".py").is_file() or (place / "__main__.py").is_file()
