"""The build: what pip installs is one package, `label_refinery`, with the rooms of this checkout below it.

    pip install .                       # or: pip wheel .

setup.cfg says what is packed. Here each module is rewritten on its way, as the rooms import one another by the names
that they have in the checkout:

    from data.plan import CropRule      from label_refinery.data.plan import CropRule
    make label REFINERY=... (in texts)  label-refinery label REFINERY=...
    python -m train.label (in texts)    label-refinery label

and the verbs are taken from the Makefile, for console.py. A form that is not known ends the build.
"""

import ast
import json
import re
import shutil
from pathlib import Path
from typing import Any

from setuptools import setup
from setuptools.command.build_py import build_py
from setuptools.command.editable_wheel import editable_wheel
from setuptools.errors import SetupError

PACKAGE = "label_refinery"
ROOMS = ("bench", "data", "kernels", "models", "train")
MODULES = ("command", "console")
# Strings that look like modules of ours and are none: names of files.
FILE_NAMES = ("train.maps",)
_LOADERS = ("__import__", "import_module", "find_spec", "run_module", "set_forkserver_preload")


def verbs_of(makefile: str) -> dict[str, Any]:
    """What the Makefile says: of each verb that is a command of ours its `module`, `about`, and names of `options`.

    And which variables are `flags` and which are `operands`.
    """
    said: dict[str, dict[str, str]] = {}
    for key, name, value in re.findall(r"^(\w+)\.([\w.-]+?) *:= *(.*)$", makefile, re.MULTILINE):
        said.setdefault(key, {})[name] = value
    verbs = {}
    for verb, module in said["runs"].items():
        if module.split()[0].split(".")[0] in ROOMS:
            options = {name.split(".", 1)[1]: to for name, to in said["option"].items() if name.split(".")[0] == verb}
            verbs[verb] = {"module": module, "about": said["about"][verb], "options": options}
    kinds = dict(re.findall(r"^(flags|operands) := (.*)$", makefile, re.MULTILINE))
    return {
        "verbs": verbs,
        "others": sorted(set(said["about"]) - set(verbs)),
        "flags": kinds["flags"].split(),
        "operands": kinds["operands"].split(),
    }


def rewritten(source: str, name: str, modules: set[str], listed: dict[str, Any]) -> str:
    """A module's text as it is installed, line by line.

    modules: all that are packed, by their names in the checkout. listed: see verbs_of.
    Raises SetupError for what it cannot rewrite.
    """
    lines = source.splitlines(keepends=True)
    for node in ast.walk(ast.parse(source, name)):
        if isinstance(node, ast.ImportFrom) and not node.level and _is_ours(node.module):
            _replace(lines, node, f"from {node.module} ", f"from {PACKAGE}.{node.module} ", name)
        elif isinstance(node, ast.Import) and any(_is_ours(alias.name) for alias in node.names):
            (alias, *more) = node.names
            if more or ("." in alias.name and not alias.asname):
                raise SetupError(f"{name}:{node.lineno}: write this import as one `from ... import ...`")
            if alias.asname:
                _replace(lines, node, f"import {alias.name} as", f"import {PACKAGE}.{alias.name} as", name)
            else:
                _replace(lines, node, f"import {alias.name}", f"from {PACKAGE} import {alias.name}", name)
        elif isinstance(node, ast.expr) and (found := _named_modules(node, modules)):
            raise SetupError(f"{name}:{node.lineno}: {found[0]!r} names a module; use __name__ or __package__")
    return with_console_commands("".join(lines), name, listed)


def with_console_commands(text: str, name: str, listed: dict[str, Any]) -> str:
    """A text in which commands are those of the console. Raises SetupError for one that is not installed."""
    verb_of = {said["module"]: verb for verb, said in listed["verbs"].items()}

    def typed(found: re.Match[str]) -> str:
        before, space, module = found.groups()
        if module not in verb_of:
            raise SetupError(f"{name}: {found[0]!r} is no command of the package; say it so that it holds there too")
        # Lines stay lines.
        return f"label-refinery{before if before.strip(' ') else space}{verb_of[module]}"

    def made(found: re.Match[str]) -> str:
        if found[1] in listed["others"]:
            raise SetupError(f"{name}: {found[0]!r} is no command of the package; say it so that it holds there too")
        return f"label-refinery {found[1]}"

    known = sorted([*verb_of.values(), *listed["others"]], key=len, reverse=True)
    text = re.sub(rf"\bpython(\s+)-m(\s+)((?:{'|'.join(ROOMS)})\b(?:\.\w+)*)", typed, text)
    return re.sub(rf"\bmake ({'|'.join(map(re.escape, known))})\b(?!-)", made, text)


def _named_modules(node: ast.expr, modules: set[str]) -> list[str]:
    """The strings that name modules of ours: dotted ones anywhere, rooms alone where they are loaded or after -m."""
    if isinstance(node, ast.Constant):
        name = str(node.value).rstrip(".")
        return [name] if "." in name and name in modules and name not in FILE_NAMES else []
    parts = node.args if isinstance(node, ast.Call) else getattr(node, "elts", [])
    words = [part.value if isinstance(part, ast.Constant) else None for part in parts]
    loads = isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in _LOADERS
    after = zip(words, [None, *words], strict=False)
    return [word for word, before in after if isinstance(word, str) and _is_ours(word) and (loads or before == "-m")]


def _is_ours(module: str | None) -> bool:
    return (module or "").split(".")[0] in (*ROOMS, *MODULES)


def _replace(lines: list[str], node: ast.stmt, old: str, new: str, name: str) -> None:
    """Replaces how the statement begins. Columns count bytes, and before a statement there are only blanks."""
    line = lines[node.lineno - 1]
    before, rest = line[: node.col_offset], line[node.col_offset :]
    if before.strip() or not rest.startswith(old):
        raise SetupError(f"{name}:{node.lineno}: write this import on a line of its own: {rest.strip()!r}")
    lines[node.lineno - 1] = before + new + rest.removeprefix(old)


class Below(build_py):
    """Copies the rooms below one package."""

    def run(self) -> None:
        self.listed = verbs_of(Path("Makefile").read_text("utf-8"))
        # Packages count as modules too.
        paths = [Path(path).with_suffix("") for *_, path in self.find_all_modules()]
        self.packed = {".".join(part.parts) for path in paths for part in (path, path.parent)}
        # What an earlier build has left would be packed too.
        shutil.rmtree(self.build_lib, ignore_errors=True)
        super().run()
        root = Path(self.build_lib, PACKAGE)
        for recipe in root.rglob("*.yaml"):
            text = with_console_commands(recipe.read_text("utf-8"), recipe.name, self.listed)
            recipe.write_text(text, "utf-8")
        version = self.distribution.metadata.version
        (root / "__init__.py").write_text(
            f'"""{self.distribution.metadata.description}."""\n\n__version__ = "{version}"\n'
        )
        (root / "verbs.json").write_text(json.dumps(self.listed, indent=1) + "\n")

    def find_package_modules(self, package: str, package_dir: str) -> list[tuple[str, str, str]]:
        if package == PACKAGE:
            return [(package, module, f"{module}.py") for module in MODULES]
        return super().find_package_modules(package, package_dir)

    def build_module(self, module, module_file, package):
        target, copied = super().build_module(module, module_file, package)
        text = Path(module_file).read_text("utf-8")
        Path(target).write_text(rewritten(text, module_file, self.packed, self.listed), "utf-8")
        return target, copied

    def get_source_files(self) -> list[str]:
        return [*super().get_source_files(), "Makefile"]


class Refused(editable_wheel):
    """Links to the checkout's modules would not be what is installed."""

    def run(self) -> None:
        raise SetupError("pip install -e: the checkout is used as it is (make help); to install: pip install .")


if __name__ == "__main__":
    setup(cmdclass={"build_py": Below, "editable_wheel": Refused})
