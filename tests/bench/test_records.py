"""Figures and their records: what counts as a figure, whether it is in its record, and changes of a record's code."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from bench import BenchError
from bench.claims import claims, lines_in, unrecorded
from bench.records import command_of, run, state, used
from train.runs.code import digest

ROOT = Path(__file__).parents[2]
RECORD = """# loaders

Made by `make bench ONLY=loaders`.

| loader | images/s | × ffcv |
|--------|---------:|-------:|
| ffcv   |     1354 |   1.00 |
| ours   |     5062 |   3.74 |

The loop is 1.93 times as fast, and takes 1,234,567 B.
"""


def figures(text: str) -> list[str]:
    return [figure for claim in claims(text) for _, group in claim.groups for figure in group]


def complaints(text: str, **records: str) -> list[tuple[int, str]]:
    records = records or {"loaders": RECORD}
    found = {name: text.splitlines() for name, text in records.items()}
    return [each for claim in claims(text) for each in unrecorded(claim, found.get)]


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("It is 25 % faster.", ["25"]),
        ("Gains of 3.0 to 7.7, and 12 and 13 points.", ["3.0", "7.7", "12", "13"]),
        ("It takes 0.4 to 0.6 s, 3 minutes, 4 to 5 min, 20 ms.", ["0.4", "0.6", "3", "4", "5", "20"]),
        ("From 148 -> 47 images/s, 3 times, 600 MB/s.", ["148", "47", "3", "600"]),
        ("55.8 kB, 8 MB, 1,234 bytes, 4 KiB, 1e-5.", ["55.8", "8", "1,234", "4", "1e-5"]),
        ("A rate of 1,131\nimages/s", ["1,131"]),
        # Settings, counts, versions, names and code are not figures.
        ("300 photographs, crops of 224 px, 4 epochs, 2 cores, batch 64, three seeds", []),
        ("PyTorch 2.14.1, Python 3.11, mobilenet0.25, resnet-50, ImageNet-1k, SHA-256, 2026-11-22", []),
        ("`--lr 0.004` and [a record](bench/2.5.md); <a href='3.5'>", []),
        ("```\ntop-1 45.3 %\n```\n", []),
        ("Typed:\n\n    make train ARGS='--lr 0.1'   # 45.3 %\n\nIt ends.", []),
    ],
)
def test_what_a_figure_is(text, found):
    assert figures(text) == found


def test_numbers_alone_in_a_cell_of_a_table_are_figures():
    rows = ["| maps of 73 px | 33.3 ± 0.5 |", "| at 2 x 2 | 2.4 / 19 |", "| half | 0.65 (0.55–0.69) |"]
    text = "\n".join(["| what | of 8 / 64 |", "|---|---:|", *rows])
    assert figures(text) == ["33.3", "0.5", "2.4", "19", "0.65", "0.55", "0.69"]


def test_a_figure_needs_a_record():
    text = "# Head\n\nOne is 5062 images/s.\n\nNothing here.\n"
    assert complaints(text) == [(3, "5062: no record is named")]
    assert complaints(text.replace("/s.\n", "/s.\n<!-- record: loaders -->\n")) == []
    assert complaints(text.replace("/s.\n", "/s.\n\n<!-- record: loaders -->\n")) == []
    ((line, why),) = complaints(text.replace("/s.\n", "/s.\n<!-- record: loader -->\n"))[:1]
    assert (line, why) == (3, "loader: no such record in bench/results")
    # A comment applies to the text before it, back to an empty line or another comment.
    assert complaints("It is 5062 images/s.\n\nAnd 3.74.\n<!-- record: loaders -->\n")[0][0] == 1
    assert complaints("It is 5063 images/s. <!-- no measurement --> And 3.74.\n<!-- record: loaders -->\n") == []
    assert complaints("It is 5062 images/s. <!-- record: loaders --> And 3.74.\n")[0][1].startswith("3.74")


@pytest.mark.parametrize(
    ("figure", "stands"),
    [("1.93", True), ("1.9", True), ("2.0", False), ("1.94", False), ("1.930", True), ("1,234,567", True)],
)
def test_a_figure_may_be_rounded(figure, stands):
    assert (complaints(f"It is {figure} times.\n<!-- record: loaders -->") == []) == stands


def test_the_figures_of_a_row_are_together_in_a_line_of_the_record():
    rows = ["| what | images/s | × |", "|---|---|---|", "| ours | 5062 | 3.74 |", "| theirs | 1354 | {} |"]
    table = "\n".join([*rows, "<!-- record{}: loaders -->"])
    assert complaints(table.format("1.0", "")) == []
    assert complaints(table.format("3.74", "")) == [(4, "1354, 3.74: in no line of the records that are named")]
    assert complaints(table.format("3.74", " by cell")) == []
    assert complaints(table.format("3.75", " by cell")) == [(4, "3.75: in no line of the records that are named")]
    # A number in a name is not a figure of the record.
    assert complaints("It is 2 times.\n<!-- record: loaders -->", loaders="| step2 | 1.0 |") != []


def test_words_select_lines_of_the_record():
    text = "It is 1354 images/s.\n<!-- record: loaders: {} -->"
    assert complaints(text.format("ffcv")) == []
    assert complaints(text.format("ours")) == [(1, "1354: in no line of the records that are named")]
    assert complaints(text.format("dali"))[0] == (1, "loaders: no line of it has the words dali")


def test_figures_are_derived_from_records_and_numbers_of_the_text():
    text = "Of 3,925 it is 3.7 times.\n<!-- record: loaders -->\n<!-- derived: {} -->"
    assert complaints(text.format("3.7 = 5062 / 1354")) == []
    assert complaints(text.format("3.7 = 100 * sqrt(5062 * (3.74 - 1.00)) / (3925 - 738 - 1)"))[0][1].endswith(
        "738 is neither in the records that are named nor in the text"
    )
    assert complaints(text.format("3.7 = 5062 / 3925"))[0][1] == "derived 3.7 = 5062 / 3925: that is 1.28968"
    for formula in ("3.7", "3.7 = open('a')", "3.7 = 5062 /", "3.7 = 5062 ** 1", "3.7 = 5062 / (1 - 1)"):
        assert "give FIGURE = FORMULA" in complaints(text.format(formula))[0][1]


def test_figures_that_are_not_measurements_are_listed():
    text = "It is 57.9, and 66.3.\n<!-- no measurement: {} -->"
    assert complaints(text.format("57.9 66.3, the paper's")) == []
    assert complaints(text.format("57.9, the paper's")) == [(1, "66.3: no record is named")]
    assert complaints(text.format("the paper's")) == []


@pytest.fixture
def checkout(tmp_path):
    """A checkout with one file of code, one record made by it, and a README that names the record."""
    results = tmp_path / "bench" / "results"
    results.mkdir(parents=True)
    (tmp_path / "docs").mkdir()
    (tmp_path / "room.py").write_text("x = 1\n")
    (results / "loaders.md").write_text(RECORD)
    made = {"environment": {"command": "make bench ONLY=loaders THREADS=2"}}
    made |= {"files": {"room.py": digest(tmp_path / "room.py")}}
    (results / "loaders.json").write_text(json.dumps(made))
    (tmp_path / "README.md").write_text("# It\n\nIt is 5062 images/s.\n<!-- record: loaders -->\n")
    return tmp_path


def test_records_whose_code_has_changed_are_listed(checkout, capsys):
    run(str(checkout))
    assert capsys.readouterr().out == "loaders: holds\n  README.md:3\n1 records: 1 hold, 0 changed since, 0 unknown\n"
    results = checkout / "bench" / "results"
    made = json.loads((results / "loaders.json").read_text())
    for files, said in [
        ({"room.py": "0" * 16, "gone.py": "0" * 16}, "changed since: room.py, gone.py"),
        ({f"{number}.py": "" for number in range(6)}, "changed since: 0.py, 1.py, 2.py, 3.py and 2 more"),
        (None, "unknown, its runs were made by different versions of the code"),
    ]:
        (results / "loaders.json").write_text(json.dumps(made | {"files": files}))
        run(str(checkout))
        lines = capsys.readouterr().out.splitlines()
        assert lines[:3] == [f"loaders: {said}", "  README.md:3", "  make bench ONLY=loaders THREADS=2"]
    (results / "loaders.json").unlink()
    assert state(results / "loaders.json", checkout) == "unknown, it has no digests"
    assert command_of(results, "loaders") == "make bench ONLY=loaders"
    (results / "loaders.json").write_text(json.dumps({"again": "make bench"}))
    assert command_of(results, "loaders") == "make bench"


def test_a_figure_without_a_record_ends_with_status_2(checkout):
    (checkout / "docs" / "more.md").write_text("It is 5062 images/s.\n")
    (checkout / "bench" / "results" / "other.md").write_text("")
    done = subprocess.run(
        [sys.executable, "-m", "bench.records", "--root", str(checkout)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 2
    *_, unused, complaint = done.stdout.splitlines()
    assert (unused, complaint) == ("not used by any figure: other", "docs/more.md:1: 5062: no record is named")
    assert done.stderr.startswith("error: 1 figures have no record: ")


def test_bad_input_ends_in_one_line(checkout, tmp_path):
    with pytest.raises(BenchError, match="is not a checkout"):
        run(str(tmp_path / "bench"))
    (checkout / "bench" / "results" / "loaders.json").write_text("{")
    with pytest.raises(BenchError, match=r"loaders\.json: cannot be read"):
        run(str(checkout))


def test_every_figure_of_the_readme_and_the_docs_has_its_record():
    places, missing = used(ROOT)
    assert missing == []
    assert len(places) > 10
    assert any(place.startswith("README.md:") for found in places.values() for place in found)
    assert lines_in(ROOT / "bench" / "results")("no-such-record") is None


@pytest.mark.parametrize(
    "figure",
    [
        r"\| ours \| 512 px, q90 \| \d+ \| \d*(\d) \|",
        r"\| ours \| 512 px, q90 \| \d+ \| \d+ \| [\d.]*(\d) \|",
        r"\| soft dynamic: the method \| [\d.]*(\d) ±",
        r"\| torchvision v2, DataLoader \| files \| \d*(\d) \|",
    ],
)
def test_a_wrong_digit_in_the_readme_is_noticed(figure):
    text, lines_of = (ROOT / "README.md").read_text(), lines_in(ROOT / "bench" / "results")
    (match,) = re.finditer(figure, text)
    digit = (int(match[1]) + 1) % 10
    wrong = f"{text[: match.start(1)]}{digit}{text[match.end(1) :]}"
    assert [why for claim in claims(text) for _, why in unrecorded(claim, lines_of)] == []
    found = [why for claim in claims(wrong) for _, why in unrecorded(claim, lines_of)]
    assert len(found) == 1
