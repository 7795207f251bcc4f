"""Compiles every Triton kernel and prints the registers and memory it takes; no GPU is needed.

python -m kernels
make kernels ARGS='--targets 80 90 120'
"""

import re
import subprocess
import tempfile
from dataclasses import dataclass
from typing import Any

import triton
from jsonargparse import ArgumentParser
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from command import UserError, exit_on_user_error
from kernels import binarise, pool_labels, refinery_loss, sample_blocks

# The kernels' arguments; those in capitals are constants, all others int32.
_TYPES = {
    "student_ptr": "*bf16",
    "refinery_ptr": "*bf16",
    "classes_ptr": "*i64",
    "values_ptr": "*fp32",
    "ids_ptr": "*i64",
    "sums_ptr": "*fp32",
    "rest_ptr": "*fp32",
    "loss_ptr": "*fp32",
    "gradient_ptr": "*bf16",
    "temperature": "fp32",
    "x_ptr": "*bf16",
    "signs_ptr": "*bf16",
    "passes_ptr": "*i1",
    "result_ptr": "*bf16",
    "blocks_ptr": "*i64",
    "offsets_ptr": "*i64",
    "places_ptr": "*i32",
    "crops_ptr": "*u8",
}


_TARGETS = (75, 80, 86, 89, 90, 100, 120)


class KernelError(UserError):
    """A kernel that does not compile, or a bad input to this room."""


@dataclass
class Version:
    """A kernel with all that is fixed when it is compiled."""

    kernel: Any
    shape: str
    constants: dict[str, Any]
    warps: int = 4

    @property
    def name(self) -> str:
        kind = self.constants.get("KIND")
        return self.kernel.__name__.strip("_") + (f" {kind}" if kind else "")


@dataclass
class Usage:
    """What a compiled kernel takes: registers and spilled bytes of a thread, bytes of shared memory of a program."""

    registers: int
    spilled: int
    shared: int


def versions() -> list[Version]:
    """Every kernel: every kind at ImageNet's 1000 classes, the usual kind at few and at many, too."""
    found = [
        Version(binarise._binarise_kernel, "any", {"BLOCK": binarise._BLOCK}),
        Version(binarise._backward_kernel, "any", {"BLOCK": binarise._BLOCK}),
    ]
    for kernel in (refinery_loss._refinery_kernel, refinery_loss._sparse_kernel):
        for classes, kinds in ((10, ("soft",)), (1000, refinery_loss.KINDS), (21841, ("soft",))):
            block, warps = refinery_loss.tile(classes)
            found += [Version(kernel, f"C={classes}", {"KIND": kind, "BLOCK": block}, warps) for kind in kinds]
    for classes in (10, 1000, 21841):
        block, warps = pool_labels.tile(classes)
        constants = {"ENTRIES": pool_labels.ENTRIES, "BLOCK": block}
        found.append(Version(pool_labels._sum_kernel, f"C={classes}", constants, warps))
    constants = {name: getattr(sample_blocks, name) for name in ("TILE", "ROWS", "COLUMNS")}
    found.append(Version(sample_blocks._sample_kernel, "any", constants, sample_blocks.WARPS))
    return found


def compile_version(version: Version, target: int) -> Usage:
    """Compiles for a compute capability (80: A100, 90: H100). Raises KernelError."""
    names = version.kernel.arg_names
    source = ASTSource(
        version.kernel,
        {name: "constexpr" if name.isupper() else _TYPES.get(name, "i32") for name in names},
        version.constants,
        # What Triton knows of the arguments at a launch: memory begins at multiples of 16 bytes, and sizes of
        # activations, unlike numbers of classes, are multiples of 16 too.
        {(at,): [["tt.divisibility", 16]] for at, name in enumerate(names) if name.endswith("_ptr") or name == "count"},
    )
    try:
        compiled = triton.compile(source, target=GPUTarget("cuda", target, 32), options={"num_warps": version.warps})
    except Exception as error:  # Triton has no common kind for what may go wrong.
        reason = " ".join(str(error).split()) or type(error).__name__
        raise KernelError(f"{version.name}, {version.shape}, for sm_{target}: {reason}") from error
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        listing = subprocess.run(
            [triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name], check=True, capture_output=True, text=True
        ).stdout
    usage = {key: int(value) for key, value in re.findall(r"\b(REG|STACK):(\d+)", listing)}
    # The kernels keep nothing on the stack themselves: what lies there was spilled.
    return Usage(usage["REG"], usage["STACK"], compiled.metadata.shared)


def main() -> None:
    parser = ArgumentParser(
        prog="python -m kernels", description="Compiles every Triton kernel; no GPU is needed.", exit_on_error=False
    )
    parser.add_argument(
        "--targets",
        type=int,
        nargs="+",
        choices=_TARGETS,
        default=[80, 90],
        metavar="SM",
        help=f"compute capabilities, of {', '.join(map(str, _TARGETS))} (default: 80 90)",
    )
    targets = parser.parse_args().targets
    if triton.knobs.runtime.interpret:
        raise KernelError("TRITON_INTERPRET is set, which leaves nothing to compile: unset it")
    row = "{:<24} {:<6} {:<8} {:>9} {:>14} {:>13}"
    print(row.format("kernel", "target", "shape", "registers", "spilled bytes", "shared memory"))
    for version in versions():
        for target in targets:
            usage = compile_version(version, target)
            print(
                row.format(version.name, f"sm_{target}", version.shape, usage.registers, usage.spilled, usage.shared),
                flush=True,
            )


if __name__ == "__main__":
    exit_on_user_error(main)
