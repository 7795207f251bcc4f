"""Which files of the project a result depends on, and digests to detect later changes of them."""

import ast
import hashlib
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
# How commands parse options and write results: no figure depends on it. Settings are in the record itself.
_SHOWING = frozenset(
    {
        *("command.py", "bench/chart.py", "bench/record.py", "bench/settings.py"),
        *("train/runs/code.py", "train/runs/environment.py", "train/tables/record.py", "train/tables/text.py"),
    }
)
# Files that are read or imported by names that are known only at run time.
_BY_NAME = {"data/decoders/__init__.py": "data/decoders/*.py", "train/recipe.py": "train/recipes/*.yaml"}


@cache
def files_of(module: str, root: Path = ROOT) -> dict[str, str]:
    """The digests of a module, or of a package with all its modules, and of everything they import, by path below root.

    Imports of the project's own modules are followed wherever they occur. Empty if there is no such module.
    """
    # Its name when installed.
    module = module.removeprefix("label_refinery.")
    place = root.joinpath(*module.split("."))
    if not (place.is_dir() or place.with_suffix(".py").is_file()):
        return {}
    waiting = [*_modules(module, root), *_below(root, f"{module.replace('.', '/')}/*.py")]
    found: dict[str, str] = {}
    while waiting:
        path = waiting.pop()
        if path in found or path in _SHOWING:
            continue
        found[path], imported = _read(root / path)
        waiting += [other for name in imported for other in _modules(name, root)]
        waiting += _below(root, _BY_NAME.get(path, ""))
    return dict(sorted(found.items()))


def digest(path: Path) -> str:
    """16 hex digits. Comments, docstrings, formatting and messages, raised or printed, are ignored."""
    return _read(path)[0]


def training_code() -> str:
    """16 hex digits of all bytes of the training code; fast."""
    rooms = ("data", "kernels", "models", "train")
    files = [path for room in rooms for kind in ("py", "yaml") for path in _below(ROOT, f"{room}/**/*.{kind}")]
    whole = hashlib.sha256()
    for path in sorted(files):
        whole.update(path.encode() + hashlib.sha256((ROOT / path).read_bytes()).digest())
    return whole.hexdigest()[:16]


@cache
def _read(path: Path) -> tuple[str, list[str]]:
    """A file's digest, and the names of modules or of their contents that it imports."""
    content, imported = path.read_bytes(), []
    if path.suffix == ".py":
        tree = ast.parse(content)
        imported = list(_imported(tree))
        content = repr(_run(tree)).encode()
    elif path.suffix == ".yaml":
        content = repr(yaml.safe_load(content)).encode()
    return hashlib.sha256(content).hexdigest()[:16], imported


def _run(node: Any) -> Any:
    """A syntax tree as lists of names and constants, the same in all versions of Python."""
    if isinstance(node, list):
        return [_run(item) for item in node]
    if not isinstance(node, ast.AST):
        return repr(node)
    if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
        # Messages are in no result.
        return ["Raise", _run(node.exc.func)]
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print":
        return ["print"]
    fields = dict(ast.iter_fields(node))
    if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)) and ast.get_docstring(node):
        fields["body"] = node.body[1:]
    # Fields that older versions lack are empty in their files.
    return [type(node).__name__, [(name, _run(value)) for name, value in fields.items() if value not in (None, [])]]


def _imported(tree: ast.Module) -> Iterator[str]:
    """Names of modules or of their contents; the project uses only absolute imports."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{name.name}" for name in node.names)


def _modules(name: str, root: Path) -> Iterator[str]:
    """The files of a module and of its parent packages, if they belong to the project."""
    place = root
    for part in name.removeprefix("label_refinery.").split("."):
        place /= part
        for path in (place / "__init__.py", place.with_suffix(".py")):
            if path.is_file():
                yield path.relative_to(root).as_posix()


def _below(root: Path, pattern: str) -> list[str]:
    return [path.relative_to(root).as_posix() for path in root.glob(pattern)] if pattern else []
