"""The Triton kernels without a GPU: interpreted, and compiled for GPUs."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from kernels import __main__ as command

ROOT = Path(__file__).parents[2]
INTERPRETED = ("tests/kernels/interpreted.py", "tests/kernels/interpreted_fused.py")


def run(*words: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *words],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=280,
    )


def test_interpreted_kernels_follow_their_references():
    """In a separate process, since Triton chooses between interpreting and compiling when kernels are defined."""
    interpret("not slow")


@pytest.mark.slow
def test_interpreted_networks_follow_their_references():
    interpret("slow")


def interpret(which: str) -> None:
    done = run("-m", "pytest", "--noconftest", "-q", "-m", which, *INTERPRETED, TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("target", [80, 90])
def test_every_kernel_compiles(target):
    for version in command.versions():
        usage = command.compile_version(version, target)
        assert 0 < usage.registers <= 255
        # Up to 16384 classes, a row fits in registers.
        assert (usage.spilled == 0) == (version.shape != "C=21841"), version


def test_the_bound_of_crops_from_blocks():
    """By hand: boxes of 326 px in tiles of 32 outputs, each of 50 x 50 source pixels: 1 x 4 iterations for luma."""
    usage = command.Usage(200, 0, 0, loops=[7, 100, 10, 10])
    instructions = 49 * 4 * (4 * 100 + 2 * 2 * 10)
    assert f"230 kB moved, {instructions / 1e6:.2f} million instructions" in command.crop_bound(usage)
    code = "".join(f"        /*{address:04x}*/    {text} ;\n" for address, text in enumerate(["MOV"] * 40))
    code = code.replace("/*0009*/    MOV", "/*0009*/    @P0 BRA 0x3").replace("/*0010*/    MOV", "/*0010*/    BRA 0x1")
    assert command._innermost_loops(code) == [7]


def test_by_default_all_kernels_are_compiled_for_two_targets(monkeypatch, capsys):
    asked = []

    def compile_version(version, target):
        asked.append((version.name, version.shape, target))
        return command.Usage(40, 0, 1024, loops=[7, 100, 10, 10])

    monkeypatch.setattr(command, "compile_version", compile_version)
    monkeypatch.setattr(sys, "argv", ["kernels"])
    command.main()
    names = [(version.name, version.shape) for version in command.versions()]
    assert asked == [(*name, target) for name in names for target in (80, 90)]
    out = capsys.readouterr().out
    assert (out.count("sm_80"), out.count("sm_90")) == (len(names), len(names))


@pytest.mark.slow
def test_errors_are_one_line():
    done = run("-m", "kernels", TRITON_INTERPRET="1")
    assert done.returncode == 2
    assert done.stderr == "error: TRITON_INTERPRET is set, so kernels are not compiled: unset it\n"
    done = run("-m", "kernels", "--targets", "81")
    assert done.returncode == 2
    assert done.stderr.startswith("error: targets=81: give compute capabilities from 75, 80, ")
    assert len(done.stderr.splitlines()) == 1
    broken = command.versions()[0]
    broken.constants["BLOCK"] = 3
    with pytest.raises(command.KernelError, match="refinery_kernel soft, C=10, for sm_90: .*power of 2") as caught:
        command.compile_version(broken, 90)
    assert "\n" not in str(caught.value)
