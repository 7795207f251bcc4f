"""Runs on a tiny set, within this process."""

import pytest

from train.config import parse
from train.job import train

TINY = ["--model", "mobilenet0.25", "--resolution", "32", "--batch", "16", "--epochs", "2", "--device", "cpu"]


@pytest.fixture
def run(converted, tmp_path, monkeypatch):
    """Trains with these words on the tiny set, in a folder of its own."""
    monkeypatch.chdir(tmp_path)

    def run(*words: str):
        arguments = [*TINY, "--data", str(converted.folder), *words]
        runs = train(parse(arguments), arguments)
        return runs[0] if len(runs) == 1 else runs

    return run
