"""Finds the figures in a Markdown text and checks that each is in the record that the text names for it.

A figure is a number with decimals, a number with the unit of a measurement, or a number alone in a table's cell.
HTML comments, which readers do not see, name the source of the figures in the table or text before them, back to the
previous comment or empty line:

    <!-- record: 2026-11-22-loaders-amd-epyc-2-cores -->            all figures are in this file of bench/results (.md);
                                                                    those of one table row are together in one line
    <!-- record: 2026-11-22-loaders-amd-epyc-2-cores: ours blocks -->   only lines with these words count
    <!-- record by cell: ... -->                                    the figures of each cell are together in one line
    <!-- derived: 3.3 = 73.03 - 69.68; 0.7 = sqrt(69.68 * (100 - 69.68) / 3925) -->     computed from figures of the
                                                                    records named here, and numbers of the text itself
    <!-- no measurement: 57.93 63.55, the paper's -->               these figures are not results of this project;
                                                                    without numbers, none of the figures is
"""

import ast
import math
import operator
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

_NUMBER = r"(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?:e-?\d+)?"
_FREE = rf"(?<![\w.,:=#/\-])(?<!\d[ ,]){_NUMBER}(?![\w-]|[.,:]\d)"
_UNIT = (
    r"(?:%|points?\b|times\b|nats\b|dB\b|[µmn]?s\b|min\b|minutes?\b|seconds?\b|hours?\b|bytes?\b|[kKMGT]i?B\b"
    r"|(?:images|crops|reads|steps)/s\b|[MGT]?FLOPS?\b)"
)
# "52 and 58 %", "0.4 to 0.6 s", "55, 71 and 61 %": the unit applies to all numbers.
_WITH_UNIT = re.compile(rf"{_FREE}(?:(?:, | and | to | or | against | -> |–| / |/){_NUMBER})*[ -]?{_UNIT}|× ?{_NUMBER}")
_ANY = re.compile(_FREE)
_ALONE = re.compile(rf"[\s±×~(]*{_NUMBER}(?:(?:\s|[±×–/()%]|{_UNIT})+(?:{_NUMBER})?)*\s*")
_VERSION = re.compile(r"(?:Python|PyTorch|Triton|NumPy|CUDA|FFCV|Apache|[Ww]andb|version) \d+(?:\.\d+)*")
_COMMENT = re.compile(r"<!--(.*?)-->", re.DOTALL)
# Code, link targets and HTML tags.
_NOT_READ = re.compile(r"`[^`\n]*`|\]\([^)]*\)|<[a-z/][^>]*>")


@dataclass(frozen=True)
class Reference:
    """A comment. kind: record, record by cell, derived or no measurement. said: the text after the colon."""

    kind: str
    said: str

    @property
    def record(self) -> str:
        """The name of the record, without folder and suffix."""
        return self.said.partition(":")[0].strip()


@dataclass
class Claim:
    """A table or a text with the comments that apply to it. first, last: its line numbers in the file, from 1."""

    first: int
    last: int
    text: str
    references: list[Reference] = field(default_factory=list)

    def named(self, *kinds: str) -> list[Reference]:
        return [reference for reference in self.references if reference.kind in kinds]

    @property
    def groups(self) -> Iterator[tuple[int, list[str]]]:
        """Yields (line number, figures as written); the figures of a group must be together in one line of a record."""
        by_cell = bool(self.named("record by cell"))
        lines = self.text.split("\n")
        # Numbers in a table's header are not figures.
        rules = [number for number, line in enumerate(lines) if re.fullmatch(r"\s*\|[-:| ]+\|\s*", line)]
        prose = []
        for number, line in enumerate(lines):
            if not line.lstrip().startswith("|"):
                prose.append(line)
            elif rules and number > rules[0]:
                prose.append("")
                cells = [_in_cell(cell) for cell in line.strip().strip("|").split("|")]
                for group in cells if by_cell else [[figure for cell in cells for figure in cell]]:
                    if group:
                        yield self.first + number, group
            else:
                prose.append("")
        # In a text each figure is a group; its unit may be on the next line.
        whole = "\n".join(prose)
        for found in _in_text(whole):
            yield self.first + whole[: found.start()].count("\n"), [found[0]]


def claims(text: str) -> list[Claim]:
    """Returns the tables and texts of a Markdown file, each with the comments that apply to it."""
    found: list[Claim] = []
    place = 0
    text = _without_code(text)
    for comment in [*_COMMENT.finditer(text), None]:
        passage = text[place : comment.start() if comment else len(text)]
        line = text.count("\n", 0, place) + 1
        for part in re.split(r"(\n[ \t]*(?=\n))", passage):
            if part.strip():
                skipped = len(part) - len(part.lstrip("\n"))
                first, last = line + skipped, line + part.rstrip().count("\n")
                found.append(Claim(first, last, _NOT_READ.sub(_blank, part[skipped:])))
            line += part.count("\n")
        if comment:
            place = comment.end()
            kind, colon, said = comment[1].partition(":")
            if colon and found:
                found[-1].references.append(Reference(kind.strip(), " ".join(said.split())))
            elif found:
                found[-1].references.append(Reference(comment[1].strip(), ""))
    return found


def unrecorded(claim: Claim, lines_of: Callable[[str], list[str] | None]) -> list[tuple[int, str]]:
    """Returns (line number, reason) for each figure of a claim that is in no record.

    lines_of: returns the lines of the record with this name, or None if there is no such record.
    """
    missing, lines = [], []
    for reference in claim.named("record", "record by cell"):
        own = lines_of(reference.record)
        words = reference.said.partition(":")[2].strip()
        own = own and [line for line in own if words in line]
        if own is None:
            missing.append((claim.last, f"{reference.record}: no such record in bench/results"))
        elif not own:
            missing.append((claim.last, f"{reference.record}: no line of it has the words {words}"))
        lines += own or []
    numbers = [[number for number in re.findall(_NUMBER, _apart(line))] for line in lines]
    derived = {}
    for reference in claim.named("derived"):
        for equation in reference.said.split(";"):
            figure, _, formula = (part.strip() for part in equation.partition("="))
            why = _not_derived(figure, formula, [*numbers, re.findall(_NUMBER, claim.text)])
            if why:
                missing.append((claim.last, f"derived {equation.strip()}: {why}"))
            derived[figure] = formula
    exempt = claim.named("no measurement")
    given = [number for reference in exempt for number in re.findall(_NUMBER, reference.said)]
    if exempt and not all(re.search(r"\d", reference.said) for reference in exempt):
        return missing
    for line, group in claim.groups:
        asked = [figure for figure in group if figure not in derived and figure not in given]
        if asked and not any(all(_stands(figure, found) for figure in asked) for found in numbers):
            why = "in no line of the records that are named" if numbers else "no record is named"
            missing.append((line, f"{', '.join(asked)}: {why}"))
    return missing


def value(number: str) -> float:
    return float(number.replace(",", ""))


def _in_cell(text: str) -> list[str]:
    return re.findall(_NUMBER, text) if _ALONE.fullmatch(text) else [found[0] for found in _in_text(text)]


def _in_text(text: str) -> Iterator[re.Match[str]]:
    """Yields the figures of a text, in order."""
    text = _VERSION.sub(_blank, text)
    places: dict[int, re.Match[str]] = {}
    number = re.compile(_NUMBER)
    flat = text.replace("\n", " ")
    for chain in _WITH_UNIT.finditer(flat):
        for found in number.finditer(text, chain.start(), chain.end()):
            places[found.start()] = found
    for found in _ANY.finditer(text):
        if "." in found[0] or "e" in found[0]:
            places[found.start()] = found
    yield from (places[place] for place in sorted(places))


def _stands(figure: str, numbers: Sequence[str]) -> bool:
    """Whether one of the numbers rounds to this figure."""
    return any(_rounds_to(value(number), figure) for number in numbers)


def _rounds_to(exact: float, figure: str) -> bool:
    plain = figure.replace(",", "").partition("e")
    unit = 10.0 ** -len(plain[0].partition(".")[2]) * (10.0 ** int(plain[2]) if plain[2] else 1)
    return abs(exact - value(figure)) <= 0.5 * unit * (1 + 1e-6)


def _not_derived(figure: str, formula: str, known: Sequence[Sequence[str]]) -> str:
    """Returns why a formula does not give a figure, or ""."""
    for number in re.findall(_NUMBER, formula):
        if value(number) not in (1, 10, 100, 1000, 60) and not any(
            value(other) == value(number) for line in known for other in line
        ):
            return f"{number} is neither in the records that are named nor in the text"
    try:
        exact = _computed(ast.parse(formula, mode="eval").body)
        return "" if _rounds_to(exact, figure) else f"that is {exact:.6g}"
    except (SyntaxError, ValueError, KeyError, ZeroDivisionError):
        return "give FIGURE = FORMULA, of numbers, + - * / and sqrt(...)"


_OPERATORS: dict[type[ast.operator], Callable[[float, float], float]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}


def _computed(node: ast.expr) -> float:
    match node:
        case ast.Constant(value=int() | float() as number):
            return number
        case ast.BinOp(left=left, op=op, right=right):
            return _OPERATORS[type(op)](_computed(left), _computed(right))
        case ast.Call(func=ast.Name(id="sqrt"), args=[argument]):
            return math.sqrt(_computed(argument))
    raise ValueError


def _without_code(text: str) -> str:
    """Returns the text with fenced and indented code replaced by spaces."""
    text = re.sub(r"^ *```.*?^ *```$", _blank, text, flags=re.DOTALL | re.MULTILINE)
    return re.sub(r"(?<=\n)[ \t]*\n(?: {4}[^\n]*\n|[ \t]*\n)+", _blank, text)


def _apart(line: str) -> str:
    """Returns a record's line without names, since numbers in names are not figures."""
    return re.sub(r"[A-Za-z_][\w.]*", " ", line)


def _blank(found: re.Match[str]) -> str:
    return re.sub(r"[^\n]", " ", found[0])


def lines_in(folder: Path) -> Callable[[str], list[str] | None]:
    """Returns a function that reads the lines of a record in `folder` by its name, or gives None if there is none."""

    def lines_of(name: str) -> list[str] | None:
        path = folder / f"{name}.md"
        return path.read_text().splitlines() if path.is_file() else None

    return lines_of
