"""The project works with the oldest versions that setup.cfg allows."""

import configparser
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from tests.paths import ROOT

LOCK = ROOT / "tests" / "oldest.lock"
# PyTorch requires one version of it.
_DECIDED_ELSEWHERE = {"triton"}


def asked() -> dict[str, Requirement]:
    found = configparser.ConfigParser()
    found.read(ROOT / "setup.cfg")
    lists = [
        found["options"]["install_requires"],
        *(found["options.extras_require"][key] for key in ("dev", "parquet")),
    ]
    requirements = [Requirement(line) for each in lists for line in each.strip().splitlines()]
    return {each.name.lower(): each for each in requirements}


def locked() -> dict[str, Version]:
    lines = [line for line in LOCK.read_text().splitlines() if "==" in line and not line.startswith("#")]
    return {name.lower(): Version(version) for name, _, version in (line.partition("==") for line in lines)}


def test_the_lock_is_of_the_oldest_versions():
    """2.3 stands for 2.3.1 where there is no 2.3.0."""
    versions = locked()
    for name, requirement in asked().items():
        assert versions[name] in requirement.specifier, name
        for limit in requirement.specifier:
            release = Version(limit.version).release
            assert name in _DECIDED_ELSEWHERE or versions[name].release[: len(release)] == release, name


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_the_quick_tests_pass_with_the_oldest_versions(tmp_path: Path):
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "oldest"], check=True)
    python = tmp_path / "oldest" / "bin" / "python"
    words = ["-m", "pip", "install", "--quiet", "--progress-bar", "off", "--no-compile", "-r", LOCK]
    installing = subprocess.run([python, *words], capture_output=True, text=True)
    if installing.returncode:
        pytest.skip(f"they cannot be installed here: {installing.stderr.strip().splitlines()[-1]}")
    rooms = [str(ROOT / "tests" / room) for room in ("bench", "data", "kernels", "models", "train")]
    words = ["-m", "pytest", "-q", "--tb=short", "-p", "no:cacheprovider", "-m", "not slow and not gpu"]
    testing = subprocess.run([python, *words, *rooms], cwd=ROOT, capture_output=True, text=True)
    assert testing.returncode == 0, testing.stdout[-20_000:]
