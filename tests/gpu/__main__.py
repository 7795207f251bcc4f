"""Runs everything that needs a GPU, in stages: kernels, tests, the quick bench, a training from each storage.

python -m tests.gpu
make gpu
make PYTHON=python3 gpu             # on a machine with PyTorch and no network
make gpu DEVICE=cpu                 # tries every stage on a CPU

A stage takes at most 8 minutes. The same command continues an earlier one: finished stages are not repeated, stages
that were not tried come first, then those that failed. All results are on one page, OUT/page.md.
"""

import argparse
import contextlib
import importlib.metadata
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from bench.process import _tree
from command import UserError, exit_on_user_error, typed_command
from tests.gpu.report import FAILED, FINISHED, SKIPPED, UNFINISHED, Outcome, Report
from tests.gpu.stages import LIMIT, ROOT, Stage, end_of, installed, stages

_AT_LEAST = {"torch": (2, 11), "triton": (3, 4)}
# Seconds that a stopped stage has to end by itself.
_GRACE = 15
_OPTIONAL = {"nvidia-dali-cuda130": "nvidia.dali", "ffcv": "ffcv", "jsonargparse": "jsonargparse"}


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.gpu", description=__doc__.split("\n\n")[0], exit_on_error=False
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: try the stages on a CPU")
    parser.add_argument("--only", default="", help="stages with one of these texts in their names, comma-separated")
    parser.add_argument("--minutes", type=float, help="time limit of this call, for a machine lent for a limited time")
    parser.add_argument("--out", help="the folder for results (default: gpu/DEVICE)")
    options, unknown = parser.parse_known_args()
    if unknown:
        raise UserError(f"{unknown[0]}: unknown option (--help lists them)")
    if options.minutes is not None and not options.minutes > 0:
        raise UserError(f"minutes={options.minutes:g}: must be above 0")
    _check_versions()
    device, machine, gpus = _look_at(options.device)
    slug = re.sub(r"[^a-z0-9.]+", "-", device.lower()).strip("-")
    out = Path(options.out or ROOT / "gpu" / slug).absolute()
    planned = stages(options.device, out, gpus)
    report = Report(out, [device, *machine], [stage.name for stage in planned])
    asked = [word.strip() for word in options.only.split(",")]
    chosen = [stage for stage in planned if any(word in stage.name for word in asked)]
    if not chosen:
        raise UserError(f"only={options.only}: no stage has this in its name; there are {_list(planned)}")
    print(f"{len(planned)} stages on {device}; the page: {report.page}", flush=True)
    ends = time.monotonic() + 60 * options.minutes if options.minutes else None
    over = _run(chosen, report, ends)
    results = [report.result(stage.name) for stage in chosen]
    print(f"{results.count(FINISHED)} of {len(chosen)} stages finished; the page: {report.page}")
    if over:
        print(f"the {options.minutes:g} minutes are over; continue with: {typed_command()}")
    return 1 if FAILED in results else 0


def _run(chosen: list[Stage], report: Report, ends: float | None) -> bool:
    """Runs the stages that have not finished, untried ones first. Returns whether the time ended before all had run."""
    left = [stage for stage in chosen if report.result(stage.name) != FINISHED]
    left.sort(key=lambda stage: report.result(stage.name) in (FAILED, UNFINISHED))
    while left:
        # In their order, but after the stages that it needs, if these are still to run.
        stage = next(each for each in left if not any(other.name in each.after for other in left))
        left.remove(stage)
        lacks = _lacks(stage, report)
        if lacks:
            report.note(stage.name, Outcome(SKIPPED, lacks))
            print(f"{stage.name}: skipped: {lacks}", flush=True)
            continue
        seconds = LIMIT if ends is None else min(LIMIT, ends - time.monotonic())
        if ends is not None and seconds < min(stage.seconds, LIMIT) / 2:
            return True
        outcome = run_stage(stage, report, seconds)
        report.note(stage.name, outcome)
        print(f"{stage.name}: {outcome.result} after {outcome.seconds:.0f} s {outcome.why}".rstrip(), flush=True)
        if outcome.result == UNFINISHED and ends is not None and time.monotonic() >= ends:
            return True
    return False


def _lacks(stage: Stage, report: Report) -> str:
    """Returns why a stage cannot be run, or ""."""
    missing = stage.missing()
    if missing:
        packages = {module: name for name, module in _OPTIONAL.items()}
        names = " and ".join(packages.get(name, name) for name in missing)
        return f"{names} {'is' if len(missing) == 1 else 'are'} not installed"
    needed = [name for name in stage.after if report.result(name) != FINISHED]
    return f'needs "{needed[0]}", which has not finished' if needed else ""


def run_stage(stage: Stage, report: Report, seconds: float) -> Outcome:
    """Runs a stage for at most `seconds`, with its output in a log in the report's folder."""
    folder = report.page.parent
    log = folder / "logs" / f"{re.sub('[^a-z0-9.]+', '-', stage.name.lower())}.log"
    if stage.makes:
        shutil.rmtree(stage.makes, ignore_errors=True)
    began, started = time.time(), time.monotonic()
    # Programs that print how to continue must name their own command, not this one.
    environment = {name: value for name, value in os.environ.items() if name != "TYPED_COMMAND"} | stage.environment
    stopped = False
    with log.open("w") as output:
        process = subprocess.Popen(
            [sys.executable, *stage.words],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            stopped = True
        finally:
            _end(process)
    text = log.read_text(errors="replace")
    took = time.monotonic() - started
    typed = shlex.join(["python", *stage.words])
    if stopped:
        why = f"stopped after {took:.0f} s"
        return Outcome(UNFINISHED, why, took, end_of(text), typed, _commit())
    if process.returncode:
        return Outcome(FAILED, _reason(process.returncode, log), took, end_of(text), typed, _commit())
    return Outcome(FINISHED, "", took, stage.shows(text, folder, began), typed, _commit())


def _reason(status: int, log: Path) -> str:
    how = f"killed by {signal.Signals(-status).name}" if status < 0 else f"status {status}"
    return f"{how}; logs/{log.name}"


def _end(process: subprocess.Popen) -> None:
    """Interrupts a process that is still running, as Ctrl-C would, and after _GRACE seconds kills its whole tree."""
    if process.poll() is not None:
        return
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGINT)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(_GRACE)
        return
    for pid in list(_tree(process.pid)):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.wait()


def _check_versions() -> None:
    for name, least in _AT_LEAST.items():
        wanted = ".".join(map(str, least))
        try:
            found = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            raise UserError(f"{sys.executable}: {name} is not installed; {wanted} or newer is needed") from None
        if tuple(map(int, re.findall(r"\d+", found)[:2])) < least:
            raise UserError(f"{sys.executable}: {name} {found} is too old; {wanted} or newer is needed")


def _look_at(device: str) -> tuple[str, list[str], int]:
    """Returns the device's name, lines about the machine, and the number of devices. Raises UserError without one."""
    import torch

    from train.device import device_named

    if device == "cuda" and not torch.cuda.is_available():
        device_named("auto")  # raises if there is a GPU that PyTorch cannot use
        raise UserError("this machine has no NVIDIA GPU; make gpu DEVICE=cpu tries every stage on its CPU")
    from train.runs.environment import environment, machine_line

    found = environment(device)
    missing = [name for name, module in _OPTIONAL.items() if not installed(module)]
    lines = [machine_line(found)]
    if missing:
        lines += ["", f"Not installed: {', '.join(missing)}."]
    if device == "cpu":
        lines += ["", "**Run on a CPU: no figure on this page is from a GPU.**"]
    return found["device"], lines, torch.cuda.device_count() if device == "cuda" else 1


def _commit() -> str:
    if not (ROOT / ".git").exists():
        return ""
    done = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    return done.stdout.strip()


def _list(planned: list[Stage]) -> str:
    return ", ".join(stage.name for stage in planned)


if __name__ == "__main__":
    sys.exit(exit_on_user_error(main))
