"""The verbs of the Makefile: the command that each starts; only make's command line sets options."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture
def make(tmp_path):
    """Calls make with an interpreter that prints its arguments and the typed command."""
    recorder = tmp_path / "record python"
    recorder.write_text(
        f"#!{sys.executable}\nimport json, os, sys\n"
        "print(json.dumps([sys.argv[1:], os.environ['TYPED_COMMAND'], 'DATA' in os.environ]))\n"
    )
    recorder.chmod(0o755)

    def make(*words: str, **environment: str):
        clean = {key: value for key, value in os.environ.items() if not key.startswith(("MAKE", "MFLAGS"))}
        return subprocess.run(
            ["make", f"PYTHON={recorder}", *words],
            cwd=ROOT,
            env=clean | environment,
            capture_output=True,
            text=True,
            timeout=60,
        )

    return make


def words_of(done: subprocess.CompletedProcess) -> list[str]:
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])[0]


def test_train_takes_its_variables(make):
    done = make(
        "train", "MODEL=mobilenet", "REFINERY=resnet50", "EPOCHS=3", "ARGS=--optimizer.lr 0.1 --crop.flip false"
    )
    assert words_of(done) == [
        *("-m", "train", "--model", "mobilenet", "--refinery", "resnet50", "--epochs", "3"),
        *("--optimizer.lr", "0.1", "--crop.flip", "false"),
    ]


def test_a_chain_takes_models(make):
    done = make("chain", "MODELS=alexnet alexnet", "DATA=images")
    assert words_of(done) == ["-m", "train.chain", "--models", "alexnet alexnet", "--data", "images"]
    assert "does not take MODEL OUT" in make("chain", "MODEL=alexnet", "OUT=here").stderr


@pytest.mark.parametrize("value", ["a b", "it's", 'say "x"', "$HOME", "`id`", "#1", "50%", "a;b"])
def test_values_arrive_as_typed(make, value):
    escaped = value.replace("$", "$$")
    assert words_of(make("train", f"DATA={escaped}"))[-1] in (value, escaped)


def test_environment_variables_are_ignored(make):
    assert words_of(make("train", DATA="elsewhere", OUT="there", MODEL="alexnet")) == ["-m", "train"]


def test_every_verb_is_one_command(make):
    for words, command in [
        (["convert", "DATA=a", "OUT=b"], ["-m", "data.convert", "--data", "a", "--out", "b"]),
        (["evaluate", "CHECKPOINT=c", "DATA=a"], ["-m", "train.evaluate", "--checkpoint", "c", "--data", "a"]),
        (
            ["export", "CHECKPOINT=c", "FORMAT=onnx", "INT8=1"],
            ["-m", "train.export", "--checkpoint", "c", "--format", "onnx", "--int8"],
        ),
        (
            [
                "look",
                "DATA=a",
                "REFINERY=r",
                "CHECKPOINT=c",
                "RESOLUTION=64",
                "BATCH=8",
                "OUT=o.html",
                "ARGS=--images 9",
            ],
            [
                *("-m", "train.look", "--data", "a", "--refinery", "r", "--checkpoint", "c", "--resolution", "64"),
                *("--batch", "8", "--out", "o.html", "--images", "9"),
            ],
        ),
        (["predict", "CHECKPOINT=c", "IMAGES=i"], ["-m", "train.predict", "--checkpoint", "c", "--images", "i"]),
        (
            ["predict", "CHECKPOINT=c", "WHICH=best", "IMAGES=a/*.jpg b", "OUT=p.csv"],
            [
                *("-m", "train.predict", "--checkpoint", "c", "--which", "best", "--images", "a/*.jpg b"),
                *("--out", "p.csv"),
            ],
        ),
        (
            ["evaluate", "CHECKPOINT=c", "WHICH=best", "PREDICTIONS=p.csv"],
            ["-m", "train.evaluate", "--checkpoint", "c", "--which", "best", "--predictions", "p.csv"],
        ),
        (["runs"], ["-m", "train.runs"]),
        (["runs", "FIGURE=a.svg"], ["-m", "train.runs", "--figure", "a.svg"]),
        (["report", "RUNS=a b", "OUT=c"], ["-m", "train.report", "--runs", "a b", "--out", "c"]),
        (["bench", "ONLY=loaders", "THREADS=2"], ["-m", "bench", "--only", "loaders", "--threads", "2"]),
        (["bench", "ONLY=devices", "GPUS=2"], ["-m", "bench", "--only", "devices", "--gpus", "2"]),
        (["bench", "QUICK=1", "PROFILE=0", "PAIRS=a:b"], ["-m", "bench", "--quick", "--pairs", "a:b"]),
        (["bench-compare", "A=a b.json", "B=c.json"], ["-m", "bench.compare", "a b.json", "c.json"]),
        (["kernels", "ARGS=--targets 90"], ["-m", "kernels", "--targets", "90"]),
        (
            ["label", "REFINERY=r", "DATA=a", "EPOCHS=2", "OUT=b", "ARGS=--format packed --k 10"],
            [
                *("-m", "train.label", "--refinery", "r", "--data", "a", "--epochs", "2", "--out", "b"),
                *("--format", "packed", "--k", "10"),
            ],
        ),
        (
            ["maps", "REFINERY=r", "OUT=b", "GPUS=2"],
            ["-m", "train.maps", "--refinery", "r", "--out", "b", "--gpus", "2"],
        ),
        (["train", "MODEL=m", "LABELS=a b"], ["-m", "train", "--model", "m", "--labels.stored", "a b"]),
        (
            ["compare-labels", "LABELS=a b", "REFINERY=r", "EPOCHS=3"],
            ["-m", "bench.compare_labels", "--labels", "a b", "--refinery", "r", "--epochs", "3"],
        ),
        (["kills", "ONLY=conversion", "KILLS=9"], ["-m", "tests.kills", "--only", "conversion", "--kills", "9"]),
        (["soak", "MINUTES=2", "OUT=a b"], ["-m", "tests.soak", "--minutes", "2", "--out", "a b"]),
        (
            ["mutants", "FILE=data/plan.py", "SAMPLE=9"],
            ["-m", "tests.mutants", "--file", "data/plan.py", "--sample", "9"],
        ),
        (["test"], ["-m", "pytest", "-m", "not slow and not gpu"]),
        (["test-all"], ["-m", "pytest", "-m", "not gpu"]),
        (["test-gpu"], ["-m", "pytest", "-m", "gpu"]),
        (
            ["gpu", "DEVICE=cpu", "MINUTES=9", "ONLY=bench", "OUT=a b"],
            ["-m", "tests.gpu", "--device", "cpu", "--only", "bench", "--minutes", "9", "--out", "a b"],
        ),
        (["test-wheel"], ["-m", "pytest", "tests/test_wheel.py"]),
    ]:
        assert words_of(make(*words)) == command


def test_typing_errors_are_refused_in_one_line(make):
    for words, says in [
        (["train", "MODLE=alexnet"], "unknown: MODLE. Did you mean MODEL or MODELS?"),
        (["train", "epoch=3"], "unknown: epoch. Did you mean EPOCHS?"),
        (["train", "QQQQQQ=3"], "unknown: QQQQQQ. Known are"),
        (["train", "MODEL="], "MODEL is empty"),
        (["predict", "DATA=x"], "does not take DATA"),
        (["train", "THREADS=2"], "does not take THREADS"),
    ]:
        done = make(*words)
        assert done.returncode == 2
        assert says in done.stderr
        assert len(done.stderr.splitlines()) == 1


def test_programs_know_what_was_typed(make):
    done = make("train", "DATA=my images", "MODEL=alexnet")
    typed = json.loads(done.stdout.splitlines()[-1])[1]
    assert typed.startswith("make ")
    assert "train" in typed
    assert "MODEL=alexnet" in typed
    assert "DATA='my images'" in typed


def test_help_lists_the_verbs(make):
    text = make("help").stdout
    verbs = ("train", "convert", "evaluate", "predict", "runs", "bench", "kernels", "test")
    for word in (*verbs, "MODEL", "REFINERY", "ARGS"):
        assert word in text
