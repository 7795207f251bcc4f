"""The comparison of two results."""

import copy
import json
import subprocess
import sys
from pathlib import Path

import pytest

from bench import BenchError
from bench.compare import compare

ROOT = Path(__file__).parents[2]


def row(name: str, low: float, median: float, high: float, group: str = "") -> dict:
    return {"name": name, "group": group, "unit": "images/s", "rate": {"min": low, "median": median, "max": high}}


RESULT = {
    "part": "loop",
    "environment": {"device": "one", "cpu": {"model": "one", "cores": 2}, "versions": {"torch": "2.11", "numpy": "2"}},
    "settings": {"batch": 64},
    "rows": [row("loop", 90, 100, 110), row("step", 100, 120, 130), {"name": "baseline", "group": "", "not_run": "x"}],
}


def written(tmp_path: Path, name: str, **changes) -> Path:
    path = tmp_path / f"{name}.json"
    path.write_text(json.dumps(copy.deepcopy(RESULT) | changes))
    return path


def lines_of(text: str) -> dict[str, list[str]]:
    """Returns the cells of the table's rows, by name."""
    cells = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")
    ]
    return {row[0]: row[1:] for row in cells}


def test_rows_are_joined_by_name_and_noise_is_marked(tmp_path):
    rows = [row("step", 150, 180, 190), row("loop", 105, 112, 120), row("limit", 1, 2, 3)]
    text = compare(written(tmp_path, "a"), written(tmp_path, "b", rows=rows))
    found = lines_of(text)
    assert found["loop"] == ["images/s", "100", "112", "1.120", "within noise"]
    assert found["step"] == ["images/s", "120", "180", "1.500", ""]
    assert found["limit"] == ["images/s", "–", "2", "–", "in one only"]
    assert found["baseline"] == ["", "–", "–", "–", "in one only"]
    assert "DIFFERENT" not in text.upper()


def test_rows_without_a_rate_are_left_out(tmp_path):
    rows = [row("step", 1, 2, 3), {"name": "agreement", "group": "", "share": 0.25}]
    text = compare(written(tmp_path, "a", rows=rows), written(tmp_path, "b", rows=rows))
    assert "step" in lines_of(text)
    assert "agreement" not in text


def test_rows_of_the_same_name_are_joined_by_group(tmp_path):
    rows = [row("step", 1, 2, 3, group="a"), row("step", 10, 20, 30, group="b")]
    other = [row("step", 10, 10, 30, group="b"), row("step", 1, 1, 3, group="a")]
    text = compare(written(tmp_path, "a", rows=rows), written(tmp_path, "b", rows=other))
    assert lines_of(text)["a"] == ["step", "images/s", "2", "1", "0.500", "within noise"]
    assert lines_of(text)["b"] == ["step", "images/s", "20", "10", "0.500", "within noise"]


def test_different_machines_versions_and_settings_are_reported(tmp_path):
    environment = copy.deepcopy(RESULT["environment"])
    environment["device"] = "another"
    environment["versions"]["torch"] = "2.14"
    text = compare(written(tmp_path, "a"), written(tmp_path, "b", environment=environment, settings={"batch": 256}))
    assert "DIFFERENT DEVICE: one / another\n" in text
    assert "DIFFERENT VERSIONS: torch 2.11 / 2.14\n" in text
    assert "DIFFERENT CPU" not in text
    assert "different setting, batch: 64 / 256\n" in text
    assert "GPUS" not in text
    driven = environment | {"gpus": [{"driver": "580.1"}]}
    text = compare(
        written(tmp_path, "a", environment=environment | {"gpus": []}), written(tmp_path, "b", environment=driven)
    )
    assert "DIFFERENT GPUS: None / [{'driver': '580.1'}]\n" in text
    text = compare(written(tmp_path, "a"), written(tmp_path, "b", environment=RESULT["environment"] | {"gpus": []}))
    assert "DIFFERENT" not in text


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (json.dumps(RESULT | {"part": "loaders"}), "is of part loop and .* of loaders; compare results of one part"),
        ('{"part": "loop"}', "is not a result of this version"),
        ("[]", "is not a result of this version"),
        ("\x89PNG", "is not a result of this version"),
        (None, "cannot be read"),
    ],
)
def test_files_that_cannot_be_compared_end_in_one_line(tmp_path, content, says):
    other = tmp_path / "other.json"
    if content is not None:
        other.write_text(content)
    with pytest.raises(BenchError, match=says) as raised:
        compare(written(tmp_path, "a"), other)
    assert len(str(raised.value).splitlines()) == 1


def test_the_command_takes_two_files(tmp_path):
    def run(*words: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            [sys.executable, "-m", "bench.compare", *words], cwd=ROOT, capture_output=True, text=True, timeout=120
        )

    path = str(written(tmp_path, "a"))
    done = run(path, path)
    assert done.returncode == 0
    assert lines_of(done.stdout)["loop"][3] == "1.000"
    for words in ([path], [path, path, path], [path, f"{path}.missing"]):
        done = run(*words)
        assert done.returncode == 2
        assert len(done.stderr.splitlines()) == 1
