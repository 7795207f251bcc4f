"""Digests of the code that a result depends on, and records of machine and command."""

import sys
import zlib
from pathlib import Path

import pytest
import torch

from train.runs.code import ROOT, digest, files_of, training_code
from train.runs.environment import environment, machine_line

SOURCE = '''"""About."""

import os


def double(x):
    """Twice."""
    print("doubling")
    if x is None:
        raise ValueError("a number is needed")
    return 2 * x  # a comment
'''


@pytest.mark.parametrize(
    ("changed", "differs"),
    [
        (SOURCE.replace("a comment", "another"), False),
        (SOURCE.replace('"""Twice."""', '"""Two times."""'), False),
        (SOURCE.replace('"""About."""\n', ""), False),
        (SOURCE.replace("a number is needed", "give a number"), False),
        (SOURCE.replace("doubling", "twice the number"), False),
        (SOURCE.replace("2 * x ", "2*x ").replace("\n\n\n", "\n"), False),
        (SOURCE.replace("2 * x", "3 * x"), True),
        (SOURCE.replace("2 * x", "2 + x"), True),
        (SOURCE.replace("2 * x", "None"), True),
        (SOURCE.replace("import os", "import sys"), True),
        (SOURCE.replace("(x)", "(x, y=0)"), True),
        (SOURCE.replace("double", "twice"), True),
        (SOURCE.replace("ValueError", "TypeError"), True),
        (SOURCE.replace("raise ValueError", "ValueError"), True),
        (SOURCE.replace("print", "log"), True),
    ],
)
def test_a_digest_covers_only_what_affects_execution(tmp_path, changed, differs):
    # Digests are cached by path, and pytest may use a folder again.
    one, other = (tmp_path / f"{zlib.crc32(text.encode())}{kind}.py" for kind, text in enumerate((SOURCE, changed)))
    one.write_text(SOURCE)
    other.write_text(changed)
    assert (digest(one) != digest(other)) == differs


def test_the_digest_of_a_recipe_covers_its_values(tmp_path):
    for name, text in (("one", "epochs: 4\n"), ("same", "# Why.\nepochs:  4\n"), ("other", "epochs: 5\n")):
        (tmp_path / f"{name}.yaml").write_text(text)
    digests = {name: digest(tmp_path / f"{name}.yaml") for name in ("one", "same", "other")}
    assert digests["one"] == digests["same"] != digests["other"]


def test_imports_are_followed_wherever_they_occur(tmp_path):
    files = {
        "room/__init__.py": "",
        "room/part.py": "from room.near import thing\n\ndef f():\n    import other.deep.far\n",
        "room/near.py": "import numpy\n",
        "room/apart.py": "",
        "other/__init__.py": "import command\n",
        "other/deep/__init__.py": "from other import sister\n",
        "other/deep/far.py": "",
        "other/sister.py": "",
        "command.py": "",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    found = files_of("room.part", tmp_path)
    assert list(found) == sorted(set(files) - {"room/apart.py", "command.py"})
    assert found["room/near.py"] == digest(tmp_path / "room/near.py")
    assert set(files_of("room", tmp_path)) == set(files) - {"command.py"}
    assert files_of("room.absent", tmp_path) == {}


def test_files_loaded_by_name_are_included():
    loaders, training = files_of("bench.loaders"), files_of("train.tables")
    assert {"data/decoders/dali.py", "data/decoders/ffcv.py", "data/plan.py", "bench/contenders.py"} <= set(loaders)
    assert {"train/recipes/quick.yaml", "train/loop.py", "models/mobilenet.py", "data/tiles.py"} <= set(training)
    assert "train/loop.py" not in loaders
    assert not {"README.md", "command.py", "bench/record.py"} & {*loaders, *training}
    # A part of the bench that measures one kernel does not depend on the networks.
    assert "models/mobilenet.py" not in files_of("bench.pooling")
    assert "kernels/pool_labels.py" in files_of("bench.pooling")


def test_training_code_covers_every_byte(monkeypatch, tmp_path):
    (tmp_path / "train" / "recipes").mkdir(parents=True)
    monkeypatch.setattr("train.runs.code.ROOT", tmp_path)
    seen = set()
    for name, text in [
        ("train/a.py", "x = 1"),
        ("train/a.py", "x = 1  # why"),
        ("train/recipes/b.yaml", ""),
        ("c.py", ""),
    ]:
        (tmp_path / name).write_text(text)
        seen.add(training_code())
    assert len(seen) == 3


def test_an_environment_holds_what_a_result_needs(monkeypatch):
    monkeypatch.setenv(
        "TYPED_COMMAND", "make train DATA=/home/me/my/photos ARGS='--real /data/real.json --lr 1/2' OUT=a/b"
    )
    found = environment("cpu")
    assert found["command"] == "make train DATA=photos ARGS='--real real.json --lr 1/2' OUT=a/b"
    assert found["versions"]["python"] == sys.version.split()[0]
    assert {"torch", "numpy", "llvmlite", "ffcv"} <= {name for name, version in found["versions"].items() if version}
    assert found["cpu"]["model"]
    assert {"compiler", "system", "memory_bytes", "load_average"} <= set(found)
    assert found["threads"] == torch.get_num_threads()
    # If the code is in a git repository.
    assert found["commit"] is None or len(found["commit"]) == 40
    line, short = machine_line(found), machine_line(found, load=False)
    for text in (found["cpu"]["model"], found["versions"]["torch"], found["compiler"] or "no C++ compiler"):
        assert text in line
        assert text in short
    assert "load before" in line
    assert found["date"][:10] not in short


def test_a_machine_without_a_compiler(monkeypatch):
    from train.runs import environment as module

    monkeypatch.setenv("CXX", "/there/is/none")
    module._compiler.cache_clear()
    try:
        assert "no C++ compiler" in machine_line(environment("cpu"))
    finally:
        module._compiler.cache_clear()


def test_the_root_is_this_checkout():
    assert (ROOT / "train" / "runs" / "code.py").samefile(Path(__file__).parents[2] / "train" / "runs" / "code.py")
