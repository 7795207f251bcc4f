"""Compiles every Triton kernel and prints the registers and memory it uses; no GPU is needed.

python -m kernels
make kernels ARGS='--targets 80 90 120'
"""

import math
import re
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import triton
from jsonargparse import ArgumentParser
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from command import UserError, exit_on_user_error
from kernels import batch_statistics, depthwise, pool_labels, product, refinery_loss, sample_blocks

# Types of the kernels' arguments; those in capitals are constants, those not listed are int32.
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
    "result_ptr": "*bf16",
    "blocks_ptr": "*i64",
    "offsets_ptr": "*i64",
    "places_ptr": "*i32",
    "crops_ptr": "*u8",
    "y_ptr": "*bf16",
    "other_ptr": "*bf16",
    "sum_ptr": "*bf16",
    "filters_ptr": "*bf16",
    "affine_ptr": "*fp32",
    "other_affine_ptr": "*fp32",
    "weight_ptr": "*fp32",
    "bias_ptr": "*fp32",
    "moments_ptr": "*fp32",
    "eps": "fp32",
}
# Arguments that are multiples of 16 in practice: sizes of activations, and channels.
_SIXTEENS = {"count", "channels", "inputs", "outputs"}


# A typical crop: the square root of the mean area of a training crop of 512 x 384 pixels, and the size it is resized
# to.
_BOX, _RESOLUTION = 326, 224
# H100 (SXM): memory bytes per second, and warp instructions per second that 132 x 4 schedulers issue at 1.755 GHz.
_BYTES, _ISSUED = 3.35e12, 132 * 4 * 1.755e9

_H100 = 90
_TARGETS = (75, 80, 86, 89, 90, 100, 120)


class KernelError(UserError):
    """A kernel that does not compile, or a bad input to this command."""


@dataclass
class Version:
    """A kernel with its compile-time constants and options."""

    kernel: Any
    shape: str
    constants: dict[str, Any]
    warps: int = 4
    stages: int = 3

    @property
    def name(self) -> str:
        kind = self.constants.get("KIND")
        return self.kernel.__name__.strip("_") + (f" {kind}" if kind else "")


@dataclass
class Usage:
    """Resources of a compiled kernel: registers and spilled bytes per thread, bytes of shared memory per program.

    loops: number of instructions of each innermost loop, in order.
    """

    registers: int
    spilled: int
    shared: int
    loops: list[int]


def versions() -> list[Version]:
    """Returns every kernel: all kinds with ImageNet's 1000 classes, the default kind also with few and many classes."""
    found: list[Version] = []
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
    for stride in (1, 2):
        constants = {"STRIDE": stride, "CHANNELS": depthwise.tile(1024)}
        forward, backward = ({"PIXELS": size} | constants for size in (depthwise.PIXELS, depthwise.PIXELS_BACK))
        found.append(Version(depthwise._depthwise_kernel, f"/{stride}", forward))
        found.append(Version(depthwise._depthwise_backward_kernel, f"/{stride}", backward, depthwise.WARPS_BACK))
    return found + _of_fused_refineries()


def _of_fused_refineries() -> list[Version]:
    """Returns the kernels of a fused refinery's forward (models.fused_resnet), products at their widest."""
    sizes = {name: getattr(batch_statistics, name) for name in ("ROWS", "CHANNELS")}
    finished = {"GROUPS": batch_statistics.GROUPS, "CHANNELS": batch_statistics.FINISHED}
    found = [
        Version(batch_statistics._moments_kernel, "any", sizes, batch_statistics.WARPS),
        Version(batch_statistics._finish_kernel, "any", finished),
        Version(batch_statistics._pool_kernel, "any", sizes | {"ROWS": batch_statistics.POOLED}),
    ]
    for kind in ("normalised", "added", "both"):
        found.append(Version(batch_statistics._normalise_kernel, "any", sizes | {"KIND": kind}, batch_statistics.WARPS))
    sizes = {"ROWS": product.ROWS, "INPUTS": product.INPUTS, "OUTPUTS": product.tile(256)}
    for kind, stride in (("plain", 1), ("plain", 2), ("normalised", 1), ("added", 1), ("both", 1)):
        constants = sizes | {"KIND": kind, "STRIDE": stride}
        shape = f"/{stride}" if stride > 1 else "any"
        found.append(Version(product._product_kernel, shape, constants, product.WARPS, product.STAGES))
    return found


def compile_version(version: Version, target: int) -> Usage:
    """Compiles for a compute capability (80: A100, 90: H100). Raises KernelError if that fails."""
    names = version.kernel.arg_names
    source = ASTSource(
        version.kernel,
        {name: "constexpr" if name.isupper() else _TYPES.get(name, "i32") for name in names},
        version.constants,
        # Properties that Triton would find at launch: memory begins at multiples of 16 bytes, and sizes of activations,
        # unlike numbers of classes, are multiples of 16.
        {
            (at,): [["tt.divisibility", 16]]
            for at, name in enumerate(names)
            if name.endswith("_ptr") or name in _SIXTEENS
        },
    )
    try:
        options = {"num_warps": version.warps, "num_stages": version.stages}
        compiled = triton.compile(source, target=GPUTarget("cuda", target, 32), options=options)
    except Exception as error:  # Triton's errors have no common base class.
        reason = " ".join(str(error).split()) or type(error).__name__
        raise KernelError(f"{version.name}, {version.shape}, for sm_{target}: {reason}") from error
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        listing, code = (_dumped(file.name, what) for what in ("-res-usage", "-sass"))
    usage = {key: int(value) for key, value in re.findall(r"\b(REG|STACK):(\d+)", listing)}
    # The kernels do not use the stack themselves: everything on it was spilled.
    return Usage(usage["REG"], usage["STACK"], compiled.metadata.shared, _innermost_loops(code))


def _dumped(file: str, what: str) -> str:
    command = [triton.knobs.nvidia.cuobjdump.path, what, file]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def _innermost_loops(code: str) -> list[int]:
    """Returns the number of instructions of each innermost loop with more than one, from a listing of machine code."""
    found = re.findall(r"^\s+/\*([0-9a-f]{4,})\*/\s+(.*?);", code, re.MULTILINE)
    instructions = [(int(address, 16), text) for address, text in found]
    backward = []
    for end, text in instructions:
        jump = re.search(r"\bBRA\b.*?0x([0-9a-f]+)", text)
        if jump and int(jump[1], 16) < end:
            backward.append((int(jump[1], 16), end))
    inner = [
        one
        for one in backward
        if not any(one != other and one[0] <= other[0] <= other[1] <= one[1] for other in backward)
    ]
    return [sum(start <= address <= end for address, _ in instructions) for start, end in sorted(inner)]


def crop_bound(usage: Usage) -> str:
    """Returns, as text, a lower bound of the cost of a crop from block storage and an upper bound of an H100's rate."""
    side, resolution = _BOX, _RESOLUTION
    # Number of iterations of one tile's loops over the source pixels, each over ROWS x COLUMNS of them.
    step = side / resolution
    span = sample_blocks.TILE * step + 2 * max(step, 1)
    luma = math.ceil(span / sample_blocks.ROWS) * math.ceil(span / sample_blocks.COLUMNS)
    chroma = math.ceil(span / 2 / (sample_blocks.ROWS // 2)) * math.ceil(span / 2 / sample_blocks.COLUMNS)
    of_luma, of_chroma, *_ = usage.loops[-3:]
    tiles = math.ceil(resolution / sample_blocks.TILE) ** 2
    instructions = tiles * sample_blocks.WARPS * (luma * of_luma + 2 * chroma * of_chroma)
    moved = 0.75 * side**2 + 3 * resolution**2
    return (
        f"{resolution} px from a box of {side}: {moved / 1e3:.0f} kB moved, {instructions / 1e6:.2f} million "
        f"instructions of a warp in its innermost loops; an H100 moves {_BYTES / moved / 1e6:.0f} million and issues "
        f"{_ISSUED / instructions / 1e6:.1f} million such crops per second, at most"
    )


def _listed(targets: Sequence[int]) -> str:
    return ", ".join(map(str, targets))


def main() -> None:
    parser = ArgumentParser(
        prog="python -m kernels", description="Compiles every Triton kernel; no GPU is needed.", exit_on_error=False
    )
    parser.add_argument(
        "--targets",
        nargs="+",
        type=int,
        default=[80, 90],
        metavar="SM",
        help=f"compute capabilities, from {_listed(_TARGETS)}",
    )
    targets = parser.parse_args().targets
    # Not by `choices`, for which the help would show a function as the type.
    unknown = [target for target in targets if target not in _TARGETS]
    if unknown:
        raise KernelError(f"targets={unknown[0]}: give compute capabilities from {_listed(_TARGETS)}")
    if triton.knobs.runtime.interpret:
        raise KernelError("TRITON_INTERPRET is set, so kernels are not compiled: unset it")
    row = "{:<27} {:<6} {:<8} {:>9} {:>14} {:>13}"
    print(row.format("kernel", "target", "shape", "registers", "spilled bytes", "shared memory"))
    for version in versions():
        for target in targets:
            usage = compile_version(version, target)
            print(
                row.format(version.name, f"sm_{target}", version.shape, usage.registers, usage.spilled, usage.shared),
                flush=True,
            )
            if version.kernel is sample_blocks._sample_kernel and target == _H100:
                print(f"  {crop_bound(usage)}")


if __name__ == "__main__":
    exit_on_user_error(main)
