"""Draws random mutations of a file's code from cosmic-ray's operators."""

import ast
import random
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

from command import UserError


@dataclass(frozen=True)
class Mutant:
    """A file with one mistake in line `line`. before, code: the file's text without and with the mistake."""

    file: Path
    line: int
    before: str
    code: str


def sample_of(path: Path, count: int, seed: int) -> tuple[list[Mutant], int]:
    """Returns up to `count` mutants of a file or a folder's files, each at a different place; and the number of places.

    A place is drawn first and then one of its mutations, since an arithmetic operator has eleven and a number two.
    Mutations that change only annotations are skipped. Raises UserError if cosmic-ray is not installed.
    """
    try:
        from cosmic_ray.mutating import mutate_code
        from cosmic_ray.plugins import get_operator
    except ImportError:
        raise UserError(
            "mutants are made by cosmic-ray, which is not installed: .venv/bin/pip install 'cosmic-ray>=8.4'"
        ) from None
    files = sorted(path.rglob("*.py")) if path.is_dir() else [path]
    places = [(file, place, kinds) for file in files for place, kinds in _places(file.read_text()).items()]
    draw = random.Random(seed)
    draw.shuffle(places)
    found: list[Mutant] = []
    for file, (line, _), kinds in places:
        if len(found) == count:
            break
        operator, occurrence = draw.choice(kinds)
        before = file.read_text()
        code = mutate_code(before, get_operator(operator)(), occurrence)
        if code is not None and _runs_otherwise(before, code):
            found.append(Mutant(file, line, before, code))
    return found, len(places)


def _places(source: str) -> dict[tuple[int, int], list[tuple[str, int]]]:
    """Returns the mutations at each place (line, column) of a file: (operator's name, index of its occurrence)."""
    from cosmic_ray.ast import ast_nodes, get_ast
    from cosmic_ray.plugins import get_operator, operator_names

    places: dict[tuple[int, int], list[tuple[str, int]]] = defaultdict(list)
    nodes = list(ast_nodes(get_ast(source)))
    for name in operator_names():
        # Operators with arguments need names of variables.
        if get_operator(name).arguments():
            continue
        operator = get_operator(name)()
        starts = [start for node in nodes for start, _ in operator.mutation_positions(node)]
        for occurrence, start in enumerate(starts):
            places[start].append((name, occurrence))
    return dict(sorted(places.items()))


def _runs_otherwise(before: str, code: str) -> bool:
    """Whether `code` is valid Python and differs from `before` in more than annotations."""
    try:
        return _what_runs(before) != _what_runs(code)
    except SyntaxError:
        return False


def _what_runs(source: str) -> str:
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            node.returns = None
        elif isinstance(node, ast.arg):
            node.annotation = None
        elif isinstance(node, ast.AnnAssign):
            node.annotation = ast.Constant(None)
    return ast.dump(tree)
