"""The stages: what each runs, needs and takes, and the part of its output that the page shows."""

import importlib.util
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[2]
TESTS = Path(__file__).parents[1]
# Seconds after which a stage is stopped.
LIMIT = 480

_PYTEST = ("pytest", "pytest_timeout")
# Also loaded by tests/conftest.py.
_SUITE = (*_PYTEST, "hypothesis")
_COMMANDS = ("jsonargparse",)
_DECODERS = {
    "jpeg": ("ffcv", "dali", "torchvision"),
    "raw": ("ffcv", "dali", "torchvision"),
    "blocks": ("auto", "ffcv"),
}
_OF_DECODERS = {"ffcv": ("ffcv",), "dali": ("nvidia.dali",)}
_LAST_LINES = 25

# Called as shows(log, folder, since): returns Markdown for the page. since: begin of the stage, in seconds since 1970.
Shows = Callable[[str, Path, float], str]


@dataclass(frozen=True)
class Stage:
    """A command, run as `python WORDS...` in the root of the checkout.

    seconds: its approximate time on a GPU; a call with a time limit begins it only if half of this is left.
    needs: names of packages, as imported. after: stages that must have finished. makes: a folder that the stage
    creates, which is removed before. environment: additional environment variables.
    """

    name: str
    words: tuple[str, ...]
    shows: Shows
    seconds: int = 120
    needs: tuple[str, ...] = ()
    after: tuple[str, ...] = ()
    makes: Path | None = None
    environment: dict[str, str] = field(default_factory=dict)

    def missing(self) -> list[str]:
        return [name for name in self.needs if not installed(name)]


def installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # the parent package is missing
        return False


def stages(device: str, out: Path, gpus: int) -> list[Stage]:
    """Returns all stages. device: cpu or cuda. out: the folder for results. gpus: number of such devices."""
    found = [*_kernels(device), *_gpu_tests()]
    # On a GPU at most 4 minutes in all; a slow CPU may take longer for a part.
    for parts in ("networks,loop,loaders",) if device == "cuda" else ("networks", "loop", "loaders"):
        found.append(_bench(device, out, f"quick bench {parts}", parts, 240))
    found += _trainings(device, out)
    found += [
        _bench(device, out, "bench machine", "machine", 60),
        _bench(device, out, "bench batches", "batches", 450, "--minutes", "7"),
        _bench(device, out, "bench depthwise", "depthwise", 450, "--minutes", "7"),
    ]
    if gpus > 1:
        found.append(_bench(device, out, "bench devices", "devices", 450, "--minutes", "7"))
    trace = ("-m", "bench", "--profile", "--device", device, "--out", str(out / "bench"))
    small = () if device == "cuda" else ("--quick",)
    found.append(Stage("trace of a step", (*trace, *small), _table, needs=_COMMANDS))
    return found


def _kernels(device: str) -> list[Stage]:
    """Returns the stages of the kernels: compiled on a GPU, by Triton's interpreter on a CPU."""
    words = ("-m", "pytest", "--noconftest", "-q", "-p", "no:cacheprovider")
    if device == "cuda":
        # Most of the time goes to compiling the loss, for every number of classes.
        gpu = (*words, "-m", "gpu", "tests/kernels/test_kernels_gpu.py", "-k")
        parts = {"kernels loss": "loss", "kernels others": "not loss"}
        return [Stage(name, (*gpu, tests), _tests, needs=_PYTEST) for name, tests in parts.items()]
    interpreted = (*words, "-m", "not slow", "tests/kernels/interpreted.py", "tests/kernels/interpreted_fused.py")
    return [Stage("kernels", interpreted, _tests, needs=_PYTEST, environment={"TRITON_INTERPRET": "1"})]


def _gpu_tests() -> list[Stage]:
    """Returns the tests of `make test-gpu`, except those of the kernels, as a stage per file."""
    found = []
    for path in sorted(TESTS.rglob("test_*.py")):
        if "pytest.mark.gpu" in path.read_text() and path.name != "test_kernels_gpu.py" and path.parent.name != "gpu":
            name = path.relative_to(ROOT)
            needs = (*_SUITE, *(() if path.parent.name in ("data", "kernels") else _COMMANDS))
            words = ("-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "gpu", str(name))
            found.append(Stage(f"test-gpu {path.parent.name}/{path.name}", words, _tests, needs=needs))
    return found


def _bench(device: str, out: Path, name: str, parts: str, seconds: int, *more: str) -> Stage:
    words = ("-m", "bench", "--quick", "--device", device, "--out", str(out / "bench"), "--only", parts)
    if device == "cpu":
        more = ("--batch", "4", *more) if parts in ("batches", "depthwise") else more
    return Stage(name, (*words, *more), _records, seconds=seconds, needs=_COMMANDS)


def _trainings(device: str, out: Path) -> list[Stage]:
    """Returns stages that train a refinery, and a student of it from each storage by each decoder, for one epoch."""
    short = ("--recipe", "quick", "--epochs", "1", "--device", device)
    found = []
    for storage in _DECODERS:
        folder = out / "sets" / storage
        words = ("-m", "data.convert", "--data", "scenes", "--out", str(folder), "--storage", storage)
        found.append(Stage(f"convert {storage}", words, _last_line, seconds=30, needs=_COMMANDS, makes=folder))
    runs, sets = out / "runs", out / "sets"
    words = ("-m", "train", "--model", "resnet18", "--data", str(sets / "jpeg"), "--out", str(runs / "refinery"))
    first = Stage("train the refinery", (*words, *short), _trained, needs=_COMMANDS, after=("convert jpeg",))
    found.append(first)
    for storage, decoders in _DECODERS.items():
        for decoder in decoders:
            words = ("-m", "train", "--model", "mobilenet0.25", "--refinery", str(runs / "refinery"))
            words += ("--data", str(sets / storage), "--decoder", decoder, "--out", str(runs / f"{storage}-{decoder}"))
            needs = (*_COMMANDS, *_OF_DECODERS.get(decoder, ()))
            after = (f"convert {storage}", first.name)
            name = f"train from {storage}, decoder {decoder}"
            found.append(Stage(name, (*words, *short), _trained, needs=needs, after=after))
    return found


# ---- the part of a finished stage's output that the page shows


def end_of(log: str) -> str:
    """Returns the last lines of a log as a code block."""
    lines = [line.rstrip() for line in log.replace("\r", "\n").splitlines() if line.strip()]
    return "```\n" + "\n".join(lines[-_LAST_LINES:]) + "\n```"


def _last_line(log: str, out: Path, since: float) -> str:
    lines = [line.strip() for line in log.replace("\r", "\n").splitlines() if line.strip()]
    return lines[-1] if lines else ""


def _tests(log: str, out: Path, since: float) -> str:
    """Returns pytest's summary line."""
    return _last_line(log, out, since).strip("= ")


def _trained(log: str, out: Path, since: float) -> str:
    lines = re.findall(r"^(?:device |finished:).*$", log, re.MULTILINE)
    return "; ".join(" ".join(line.split()) for line in lines[-2:])


def _table(log: str, out: Path, since: float) -> str:
    lines = [line for line in log.splitlines() if line.startswith(("|", "A step of"))]
    return "\n".join([*lines[:1], "", *lines[1:]])


def _records(log: str, out: Path, since: float) -> str:
    """Returns the records that the stage wrote, with their headings."""
    written = [path for path in (out / "bench").glob("*.md") if path.stat().st_mtime >= since]
    written.sort(key=lambda path: path.stat().st_mtime)
    return "\n".join(re.sub(r"^#", "###", path.read_text(), flags=re.MULTILINE) for path in written)
