"""The bench of loaders, end to end on a few small images, and its errors."""

import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image

from bench import images
from bench.__main__ import run
from bench.contenders import CONTENDERS
from bench.loaders import _figures, _shares_of_parts, _with_ratios, _write
from bench.machine import DecodeTiles
from bench.peers import PEERS
from bench.settings import Settings, resolve
from command import run_command
from data.beton import Beton, Encoded, write_beton
from data.sources import image_files
from tests.pictures import photograph

ROOT = Path(__file__).parents[2]
DALI = "nvidia-dali-cuda130"
OPTIONS = ("--quick", "--only", "loaders", "--resolution", "32", "--batch", "4", "--crops", "16", "--epochs", "1")


def bench(*words: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "bench", *OPTIONS, *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    return done


@pytest.fixture
def folder(tmp_path):
    """Twelve JPEGs in a folder and a subfolder."""
    (tmp_path / "images" / "more").mkdir(parents=True)
    for i in range(12):
        photograph(i, 60 + i, 90).save(tmp_path / "images" / ("more" if i % 2 else "") / f"{i}.jpg")
    return tmp_path / "images"


@pytest.mark.slow
def test_the_record_is_consistent_and_a_failing_contender_does_not_end_it(folder, tmp_path):
    # torchvision does not read BMP; Pillow, which makes the converted set, does.
    photograph(12, 60, 90).save(folder / "12.bmp")
    # TorchCodec does not read it either, or is not installed; "torchcodec cuda" needs a GPU.
    refused = "torchvision,torchcodec,torchcodec cuda"
    out, names = tmp_path / "results", f"{refused},ours torchvision,ours torchvision x4"
    done = bench("--data", str(folder), "--threads", "1", "--contenders", names, "--out", str(out))

    (record,) = (json.loads(path.read_text()) for path in out.glob("*-loaders-*.json"))
    assert record["environment"]["versions"]["torch"] == torch.__version__.split("+")[0]
    assert record["settings"]["images"] == 13
    rows = {row["name"]: row for row in record["rows"]}
    assert list(rows) == names.split(",")
    assert "nsupported image file" in rows.pop("torchvision")["not_run"]
    assert rows.pop("torchcodec")["not_run"]
    assert rows.pop("torchcodec cuda")["not_run"] == "delivers to a GPU only"

    stored = tmp_path / "stored.beton"
    images.write_converted(stored, images.spread(image_files(folder).files, 16))
    whole = Beton(stored).lengths.mean()
    assert (
        whole / 4 < rows["ours torchvision x4"]["bytes_per_crop"] * 2 < rows["ours torchvision"]["bytes_per_crop"] * 2
    )
    assert rows["ours torchvision"]["bytes_per_crop"] <= whole
    for row in rows.values():
        assert row["threads"] == 1
        assert (row["kind"], row["stored_bytes"]) == ("ours", pytest.approx(whole))
        assert row["conversion_minutes"] > 0
        assert row["peak_memory_bytes"] > 10e6
        assert len(row["turns"]) == 1
        for turn in row["turns"]:
            assert turn["amount"] > 0
            assert turn["amount"] % 16 == 0
            assert turn["seconds"] >= 0.3
        rates = [turn["amount"] / turn["seconds"] for turn in row["turns"]]
        assert row["rate"] == {
            "median": pytest.approx(statistics.median(rates)),
            "min": pytest.approx(min(rates)),
            "max": pytest.approx(max(rates)),
        }
        used, seconds = (sum(turn[key] for turn in row["turns"]) for key in ("cpu_seconds", "seconds"))
        assert row["cores"] == pytest.approx(used / seconds)
        assert "times_ffcv" not in row  # FFCV was not measured

    (written,) = out.glob("*.md")
    table = written.read_text().split("\n\n", 1)[1]
    assert table in done.stdout
    assert "| torchvision " in table
    assert "- 1 threads, torchvision: not run: " in table
    (chart,) = out.glob("*.png")
    assert Image.open(chart).width > 500


def test_our_rate_is_compared_with_decoding_and_resizing_alone():
    def row(name: str, rate: float, threads: int = 2) -> dict:
        return {"name": name, "threads": threads, "rate": {"median": rate}}

    parts = [row("decode alone", 300), row("resize alone", 600), row("decode alone x4", 600)]
    found = _shares_of_parts([*parts, row("ours ffcv", 150), row("ours ffcv x4", 240), row("ours ffcv", 9, threads=1)])
    assert [line.split(" images/s")[0] for line in found] == [
        "ours ffcv, 2 threads: 75 % of 200",
        "ours ffcv x4, 2 threads: 80 % of 300",
    ]
    assert _shares_of_parts([*parts[1:], row("ours ffcv", 150)]) == []


def test_ratios_to_ffcv_and_to_the_fewest_threads():
    def row(name: str, threads: int, rate: float) -> dict:
        return {"name": name, "threads": threads, "rate": {"median": rate}}

    missing = {"name": "spdl", "threads": 1, "not_run": "not installed"}
    rows = [row("ffcv", 1, 100), row("ours ffcv", 1, 300), missing, row("ours ffcv", 2, 450), row("pillow", 2, 90)]
    ratios = [(row.get("times_ffcv"), row.get("times_fewest")) for row in _with_ratios(rows)]
    assert ratios == [(1, 1), (3, 1), (None, None), (None, 1.5), (None, None)]
    heads = [[column.head for column in _figures(threads)] for threads in ((2,), (1, 2))]
    assert heads[1] == [*heads[0][:3], "scaling", *heads[0][3:]]


def test_the_rate_of_conversion_counts_each_image_once(tmp_path):
    calls: list[list[str]] = []

    def write(path: Path, files: list[str]) -> None:
        calls.append(files)
        time.sleep(0.02 * len(files))
        write_beton(path, (Encoded(file.encode(), 8, 8, 0) for file in files), at_most=len(files))

    seconds, size = _write(write, tmp_path / "set.beton", ["a", "bcd", "bcd"])
    assert calls == [["a"], ["a", "bcd"], ["a", "bcd", "bcd"]]
    assert 0.02 <= seconds < 0.2
    assert size == pytest.approx(7 / 3)
    assert [path.name for path in tmp_path.iterdir()] == ["set.beton"]


@pytest.mark.parametrize(("words", "counts"), [("1", (1,)), ("2, 1", (1, 2)), ("1,1", (1,))])
def test_threads_are_one_number_or_several(words, counts, monkeypatch):
    monkeypatch.setattr("bench.settings.default_threads", lambda: 2)
    assert _settings(threads=words).threads == counts


def _settings(**options) -> Settings:
    names = ("resolution", "batch", "epochs", "crops", "steps", "contenders", "pairs", "compile", "threads", "gpus")
    asked = dict.fromkeys(names) | options
    return resolve(quick=True, device="cpu", precision="auto", data=None, refinery=None, **asked)


def test_the_tiles_of_images_are_decoded_alone(folder):
    files = image_files(folder).files
    assert DecodeTiles(files).run().amount == len(files) == 12


@pytest.mark.slow
def test_the_parts_are_measured_and_our_share_of_their_rate_is_printed(folder, tmp_path):
    names = "decode alone,decode alone x4,resize alone,ours ffcv"
    done = bench("--data", str(folder), "--threads", "1", "--contenders", names, "--out", str(tmp_path / "results"))
    (record,) = (json.loads(path.read_text()) for path in (tmp_path / "results").glob("*.json"))
    rates = {row["name"]: row["rate"]["median"] for row in record["rows"]}
    assert rates["decode alone x4"] > rates["decode alone"]
    limit = 1 / (1 / rates["decode alone"] + 1 / rates["resize alone"])
    assert f"ours ffcv, 1 threads: {100 * rates['ours ffcv'] / limit:.0f} % of {limit:.0f} images/s" in done.stdout


@pytest.mark.slow
def test_every_contender_runs(folder, tmp_path):
    bench("--data", str(folder), "--threads", "2", "--contenders", "", "--out", str(tmp_path / "results"))
    (record,) = (json.loads(path.read_text()) for path in (tmp_path / "results").glob("*.json"))
    assert [row["name"] for row in record["rows"]] == list(CONTENDERS)
    dali = {name for name in CONTENDERS if "dali" in name} if record["environment"]["versions"][DALI] is None else set()
    assert {row["name"] for row in record["rows"] if "not_run" in row} <= set(PEERS) | dali
    rows = [row for row in record["rows"] if "not_run" not in row]
    rates = {row["name"]: row["rate"]["median"] for row in rows}
    for row in rows:
        assert row["times_ffcv"] == pytest.approx(rates[row["name"]] / rates["ffcv"])


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--only", "loader"], "only=loader: unknown; there are machine, loaders,"),
        (["--only", "loaders", "--data", "{empty}"], "no images in this folder or below it"),
        (["--only", "loaders", "--data", "{empty}/missing"], "no such folder"),
        (["--only", "loaders", "--contenders", "webdataset"], "contenders=webdataset: no loader has this in its name"),
        (["--pairs", "resnet50"], "pairs=resnet50: give REFINERY:STUDENT"),
        (["--pairs", "resnet50:mobilnet"], "unknown network 'mobilnet'"),
        (["--threads", "4096"], "threads=4096: give 1 to"),
        (["--threads", "1,two"], "threads=1,two: give 1 to"),
        (["--batch", "0"], "batch=0: must be at least 1"),
        (["--epochs", "many"], "epochs"),
        (["--minutes", "0"], "minutes=0: must be above 0"),
    ],
)
def test_wrong_options_end_in_one_line(words, says, tmp_path, capsys):
    words = [word.format(empty=tmp_path) for word in words]
    with pytest.raises(SystemExit) as ended:
        run_command(run, prog="python -m bench", words=words)
    assert ended.value.code == 2
    printed = capsys.readouterr().err
    assert says in printed
    assert len(printed.splitlines()) == 1
