"""The installed package: built, installed in an empty environment, and used beside a project's own data.py."""

import json
import os
import shutil
import site
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import timm
import torch

from data.sources import scenes_fingerprint
from tests.pictures import write_class_folders

# The first use on a machine compiles its decoder.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "docs" / "examples"
ROOMS = ("bench", "data", "kernels", "models", "train")


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy, as a build leaves files in the folder that it builds."""
    copy = tmp_path_factory.mktemp("build") / "checkout"
    copy.mkdir()
    for room in ROOMS:
        shutil.copytree(ROOT / room, copy / room, ignore=shutil.ignore_patterns("__pycache__", "results"))
    for name in ("command.py", "console.py", "setup.py", "setup.cfg", "pyproject.toml", "Makefile"):
        shutil.copy(ROOT / name, copy)
    for name in ("README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    # Leftovers of an older build, which put rooms at top level.
    stale = copy / "build" / "lib" / "data"
    stale.mkdir(parents=True)
    (stale / "loader.py").write_text("")
    return copy


@pytest.fixture(scope="module")
def wheel(checkout: Path) -> Path:
    words = ["-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", "dist", "."]
    subprocess.run([sys.executable, *words], cwd=checkout, env=clean(), check=True, timeout=280)
    (built,) = (checkout / "dist").glob("*.whl")
    return built


@pytest.fixture(scope="module")
def environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bin folder of an environment that holds the wheel, and this environment's packages by a path to them."""
    root = tmp_path_factory.mktemp("environment")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", root], check=True, timeout=100)
    python = root / "bin" / "python"
    words = ["--python", python, "install", "--quiet", "--no-deps", "--no-index", wheel]
    subprocess.run([sys.executable, "-m", "pip", *words], env=clean(), check=True, timeout=100)
    (packages,) = (root / "lib").glob("python*/site-packages")
    ours = [folder for folder in (*site.getsitepackages(), site.getusersitepackages()) if os.path.isdir(folder)]
    (packages / "ours.pth").write_text("".join(f"import site; site.addsitedir({folder!r})\n" for folder in ours))
    return root / "bin"


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder: a user's project whose modules have the names of our rooms."""
    for name in (*ROOMS, "command", "console"):
        (tmp_path / f"{name}.py").write_text('raise ImportError("this module is of the project")\n')
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("images")
    write_class_folders(root / "train", 3, 32)
    write_class_folders(root / "val", 3, 5, seed=1000)
    return root


def clean() -> dict[str, str]:
    return {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "TYPED_COMMAND")}


def run(*words: object, status: int = 0) -> subprocess.CompletedProcess:
    done = subprocess.run(
        list(map(str, words)), env=clean() | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=800
    )
    assert done.returncode == status, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done


def test_the_wheel_has_one_package_with_all_rooms(wheel):
    with zipfile.ZipFile(wheel) as packed:
        names = set(packed.namelist())
        (described,) = (name for name in names if name.endswith("top_level.txt"))
        assert packed.read(described) == b"label_refinery\n"
    assert {name.split("/")[0].split("-")[0] for name in names} == {"label_refinery"}
    parts = [path.relative_to(ROOT) for room in ROOMS for path in (ROOT / room).rglob("*") if path.is_file()]
    wanted = {f"label_refinery/{path}" for path in parts if path.suffix in (".py", ".yaml")}
    wanted |= {f"label_refinery/{name}" for name in ("__init__.py", "command.py", "console.py", "verbs.json")}
    assert {name for name in names if name.startswith("label_refinery/")} == wanted


def test_it_is_built_from_a_source_distribution_too(checkout, wheel, tmp_path):
    again = tmp_path / "checkout"
    shutil.copytree(checkout, again, ignore=shutil.ignore_patterns("build", "dist", "*.egg-info"))
    build = "import setuptools.build_meta as b; print(b.build_sdist('sdist'))"
    done = subprocess.run([sys.executable, "-c", build], cwd=again, capture_output=True, text=True, check=True)
    with tarfile.open(again / "sdist" / done.stdout.split()[-1]) as packed:
        packed.extractall(tmp_path, filter="data")
    (unpacked,) = tmp_path.glob("label_refinery-*")
    build = "import setuptools.build_meta as b; print(b.build_wheel('.'))"
    done = subprocess.run([sys.executable, "-c", build], cwd=unpacked, capture_output=True, text=True, check=True)
    with zipfile.ZipFile(wheel) as ours, zipfile.ZipFile(unpacked / done.stdout.split()[-1]) as theirs:
        assert sorted(ours.namelist()) == sorted(theirs.namelist())


def test_an_editable_installation_is_refused(checkout):
    words = ["-m", "pip", "install", "--no-deps", "--no-build-isolation", "--target", "there", "-e", "."]
    done = subprocess.run([sys.executable, *words], cwd=checkout, env=clean(), capture_output=True, text=True)
    assert done.returncode
    assert "the checkout is used as it is (make help); to install: pip install ." in done.stderr + done.stdout


def test_modules_that_need_no_torch_load_without_it(environment, project):
    lists = "import sys; print(*sorted({{name.split('.')[0] for name in sys.modules}}))"
    for module, heavy in [
        ("", {"torch", "numpy", "numba", "PIL", "scipy", "argparse", "jsonargparse"}),
        (".command", {"torch", "numpy", "numba", "PIL", "scipy", "jsonargparse"}),
        (".data.plan", {"torch", "numba", "PIL", "scipy", "jsonargparse"}),
        (".data.sets, label_refinery.data.convert, label_refinery.data.scenes", {"torch", "timm", "jsonargparse"}),
        (".train, label_refinery.bench, label_refinery.kernels", {"torch", "numpy", "numba", "jsonargparse"}),
    ]:
        # -P ignores the project's own modules, which would hide that ours are still loaded by their short names.
        done = run(environment / "python", "-P", "-c", f"import label_refinery{module}; " + lists.format())
        loaded = set(done.stdout.split())
        assert not loaded & heavy, module
        assert not loaded & {*ROOMS, "command", "console"}, module


def test_every_module_can_be_imported_and_none_is_imported_by_its_short_name(environment, project):
    """Except modules that need packages of other projects."""
    script = """
import importlib, pkgutil, sys, label_refinery
for found in pkgutil.walk_packages(label_refinery.__path__, "label_refinery."):
    if not found.name.endswith(("__main__", "decoders.dali")):
        importlib.import_module(found.name)
print(*sorted(name for name in sys.modules if name.split(".")[0] in sys.argv[1:]))
"""
    assert run(environment / "python", "-c", script, *ROOMS, "command", "console").stdout.split() == []


def test_scenes_are_the_same_as_in_the_checkout(environment, project):
    script = "from label_refinery.data.sources import scenes_fingerprint; print(scenes_fingerprint())"
    assert run(environment / "python", "-c", script).stdout.strip() == scenes_fingerprint()


def test_plain_pytorch_trains_in_a_project_with_a_data_module(environment, project, images):
    """And without an `if __name__ == "__main__"`, although the conversion starts processes."""
    done = run(environment / "python", EXAMPLES / "plain_pytorch.py", images)
    assert [line.split(":")[0] for line in done.stdout.splitlines() if "top-1" in line] == ["epoch 1", "epoch 2"]
    assert "3 steps" in done.stdout
    # It is converted once; the next script uses it.
    script = project / "loop.py"
    shutil.copy(EXAMPLES / "plain_pytorch.py", script)
    assert "images/s" not in run(environment / "python", script, images).stdout


def test_timms_parts_train_a_student(environment, project, images):
    torch.save(timm.create_model("resnet18", num_classes=3).state_dict(), "refinery.pt")
    done = run(environment / "python", EXAMPLES / "timm_parts.py", images, "refinery.pt")
    assert "6 steps, loss" in done.stdout


def test_the_command_lists_its_verbs(environment, project):
    said = run(environment / "label-refinery", "--help").stdout
    assert said == run(environment / "label-refinery").stdout
    listed = [line.split()[0] for line in said.split("Verbs\n")[1].split("\n\n")[0].splitlines()]
    assert {"train", "label", "convert", "evaluate", "predict", "export", "runs", "bench-compare"} <= set(listed)
    assert not {"test", "lint", "setup", "kills"} & set(listed)
    assert run(environment / "label-refinery", "--version").stdout.strip() == "0.1.0"
    assert run(environment / "label-refinery", "trian", status=2).stderr == (
        "error: trian: no such verb; did you mean train?\n"
    )


def test_verbs_print_their_usage(environment, project):
    assert run(environment / "label-refinery", "convert", "--help").stdout.startswith("usage: label-refinery convert")
    assert run(environment / "label-refinery", "train", "--help").stdout.startswith("usage: label-refinery train")
    failed = run(environment / "label-refinery", "train", "--modle", "x", status=2)
    (line,) = failed.stderr.splitlines()
    assert line.startswith("error: ")


def test_all_main_verbs_in_turn(environment, project, images):
    """Convert, train from a name, evaluate, export: with options, and with make's variables."""
    command = environment / "label-refinery"
    run(command, "convert", "--data", images, "--out", "set", "--processes", "1")
    done = run(command, "train", "MODEL=timm:test_resnet", "DATA=set", "EPOCHS=1", "RESOLUTION=32", "ARGS=--batch 8")
    assert "finished: top-1" in done.stdout
    (folder,) = Path("runs").glob("*/timm*")
    # The same run, which is finished.
    words = ["--model", "timm:test_resnet", "--data", "set", "--epochs", "1", "--resolution", "32", "--batch", "8"]
    assert run(command, "train", *words).stdout.count("epoch 1/1") == 0
    run(command, "evaluate", f"CHECKPOINT={folder}", "DATA=set", "OUT=scores.json")
    assert json.loads(Path("scores.json").read_text())["images"] == 15
    assert "timm:test_resnet" in run(command, "runs").stdout
    run(command, "export", f"CHECKPOINT={folder}", "FORMAT=safetensors", "OUT=exported")
    assert Path("exported", "config.json").is_file()
