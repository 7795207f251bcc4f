"""make gpu: a second call continues the first, and the page shows the outcome of each stage."""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from command import UserError
from tests.gpu import __main__ as command
from tests.gpu.report import FAILED, FINISHED, SKIPPED, UNFINISHED, Outcome, Report
from tests.gpu.stages import ROOT, Stage, end_of, stages

MACHINE = ["NVIDIA H200", "16 cores"]


def stage(name: str, program: str, **more) -> Stage:
    return Stage(name, ("-c", program), lambda log, out, since: log.strip(), **more)


def report_of(folder: Path, planned: list[Stage]) -> Report:
    return Report(folder, MACHINE, [each.name for each in planned])


def test_finished_stages_are_not_repeated_and_a_failure_does_not_stop_the_others(tmp_path):
    ran = tmp_path / "ran"
    once = f"open({str(ran)!r}, 'a').write('x'); print('all well')"
    planned = [
        stage("first", once),
        stage("breaks", f"open({str(ran)!r}, 'a').write('y'); print('so far'); 1 / 0"),
        stage("needs it", "pass", after=("breaks",)),
        stage("lacks", "pass", needs=("nvidia.dali.none", "no_such_package")),
        stage("last", once),
    ]
    report = report_of(tmp_path / "out", planned)
    assert not command._run(planned, report, None)
    assert [report.result(each.name) for each in planned] == [FINISHED, FAILED, SKIPPED, SKIPPED, FINISHED]
    page = report.page.read_text()
    assert "# NVIDIA H200" in page
    assert "2 of 5 stages finished." in page
    assert "| all well |" in page
    assert "| breaks | failed | " in page
    assert "ZeroDivisionError: division by zero" in page
    assert '| needs it | skipped |  | needs "breaks", which has not finished |' in page
    assert "| lacks | skipped |  | nvidia.dali.none and no_such_package are not installed |" in page
    assert ran.read_text() == "xyx"

    # A second call, which only has the files on disk.
    again = report_of(tmp_path / "out", planned)
    mended = [*planned[:1], stage("breaks", "print('mended')"), *planned[2:]]
    command._run(mended, again, None)
    assert ran.read_text() == "xyx"
    assert [again.result(each.name) for each in planned] == [FINISHED, FINISHED, FINISHED, SKIPPED, FINISHED]
    assert "ZeroDivisionError" not in again.page.read_text()


def test_untried_stages_come_before_failed_ones(tmp_path):
    order = tmp_path / "order"
    planned = [stage(name, f"open({str(order)!r}, 'a').write({name!r})") for name in "abc"]
    report = report_of(tmp_path, planned)
    report.note("a", Outcome(FAILED))
    command._run(planned, report, None)
    assert order.read_text() == "bca"


def test_a_stage_is_stopped_at_its_time_limit(tmp_path):
    """With all processes that it has started, also in other sessions."""
    child = (
        "import os, subprocess; p = subprocess.Popen(['sleep', '60'], start_new_session=True); print(p.pid, flush=True)"
    )
    stubborn = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); time.sleep(60)"
    planned = [stage("slow", f"{child}\n{stubborn}")]
    report = report_of(tmp_path, planned)
    command_grace, command._GRACE = command._GRACE, 0.5
    try:
        outcome = command.run_stage(planned[0], report, 2)
    finally:
        command._GRACE = command_grace
    assert outcome.result == UNFINISHED
    assert 2 <= outcome.seconds < 10
    assert outcome.why.startswith("stopped after ")
    pid = int(outcome.shows.splitlines()[1])
    time.sleep(0.2)
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        state = "Z"
    assert state == "Z"


def test_a_call_ends_when_its_minutes_are_over(tmp_path):
    planned = [stage("short", "pass", seconds=1), stage("long", "import time; time.sleep(60)", seconds=8)]
    report = report_of(tmp_path, planned)
    started = time.monotonic()
    assert command._run(planned, report, started + 5)
    assert report.result("short") == FINISHED
    # It is begun, since half of its time was left, and stopped.
    assert report.result("long") == UNFINISHED
    assert 4 < time.monotonic() - started < 12
    # Too little time is left to begin it.
    assert command._run(planned, report_of(tmp_path, planned), time.monotonic() + 1)
    assert "killed" not in report.page.read_text()


def test_a_folder_that_a_stage_makes_is_removed_before(tmp_path):
    made = tmp_path / "made"
    made.mkdir()
    planned = [stage("makes", f"import os; os.mkdir({str(made)!r})", makes=made)]
    assert command.run_stage(planned[0], report_of(tmp_path, planned), 60).result == FINISHED


@pytest.mark.parametrize("content", ["{", "{}", '{"device": "NVIDIA H200", "stages": {"a": {"colour": 1}}}'])
def test_a_damaged_state_file_is_an_error(tmp_path, content):
    (tmp_path / "state.json").write_text(content)
    with pytest.raises(UserError, match=r"state.json: is damaged; remove it to start over"):
        report_of(tmp_path, [])


def test_a_folder_with_results_of_another_device_is_refused(tmp_path):
    report_of(tmp_path, [])
    with pytest.raises(UserError, match="holds results of NVIDIA H200; name another folder with OUT"):
        Report(tmp_path, ["NVIDIA A100"], [])
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be written"):
        Report(tmp_path / "file" / "out", MACHINE, [])


def test_every_stage_is_an_existing_command(tmp_path):
    """And on a GPU, each test that needs one is in a stage."""
    for device in ("cuda", "cpu"):
        planned = stages(device, tmp_path, gpus=2)
        names = [each.name for each in planned]
        assert len(set(names)) == len(names)
        assert all(set(each.after) <= set(names) for each in planned)
        assert all(each.words[0] == "-m" for each in planned)
        assert all(each.seconds <= 480 for each in planned)
        storages = [name.split(",")[0] for name in names if name.startswith("train from")]
        assert {name.removeprefix("train from ") for name in storages} == {"jpeg", "raw", "blocks"}
        files = {word for each in planned for word in each.words if word.endswith(".py")}
        assert all((ROOT / file).exists() for file in files)
    marked = {path for path in (ROOT / "tests").rglob("test_*.py") if "pytest.mark" + ".gpu" in path.read_text()}
    tested = {word for each in stages("cuda", tmp_path, 1) for word in each.words if word.startswith("tests/")}
    assert {str(path.relative_to(ROOT)) for path in marked} == tested
    assert "bench devices" not in [each.name for each in stages("cuda", tmp_path, 1)]


def run(*words: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "tests.gpu", *words],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_wrong_options_and_a_machine_without_a_gpu_end_in_one_line(tmp_path, monkeypatch):
    done = run("--out", str(tmp_path / "out"), CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 2
    assert done.stderr == ("error: this machine has no NVIDIA GPU; make gpu DEVICE=cpu tries every stage on its CPU\n")
    assert not (tmp_path / "out").exists()
    for words, says in [
        (["--device", "tpu"], "invalid choice"),
        (["--minutes", "0"], "minutes=0: must be above 0"),
        (["--hours", "1"], "--hours: unknown option"),
    ]:
        monkeypatch.setattr(sys, "argv", ["gpu", *words])
        with pytest.raises((UserError, argparse.ArgumentError), match=says):
            command.main()


def test_a_version_that_is_too_old_is_named(monkeypatch):
    monkeypatch.setattr(command, "_AT_LEAST", {"torch": (99, 0)})
    with pytest.raises(UserError, match=r"torch \S+ is too old; 99.0 or newer is needed"):
        command._check_versions()
    monkeypatch.setattr(command, "_AT_LEAST", {"no-such-package": (1, 2)})
    with pytest.raises(UserError, match="no-such-package is not installed; 1.2 or newer is needed"):
        command._check_versions()


@pytest.mark.slow
def test_stages_run_on_a_cpu_and_the_page_notes_it(tmp_path):
    out = tmp_path / "a folder"
    words = ("--device", "cpu", "--out", str(out), "--only", "convert blocks,test_waiting")
    done = run(*words)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 of 2 stages finished" in done.stdout
    page = (out / "page.md").read_text()
    assert "**Run on a CPU: no figure on this page is from a GPU.**" in page
    assert "| convert blocks | finished |" in page
    state = json.loads((out / "state.json").read_text())
    assert set(state["stages"]) == {"convert blocks", "test-gpu train/test_waiting.py"}
    assert "finished after" not in run(*words).stdout
    assert end_of("a\rb\n\nc\n") == "```\na\nb\nc\n```"
