"""The command of the installed package: `label-refinery VERB ...`, with the verbs of the Makefile.

    label-refinery train --model mobilenet --refinery resnet50
    label-refinery train MODEL=mobilenet REFINERY=resnet50

Options are those of the verb's module; make's variables are accepted as well. This file is used when the package is
installed: the build writes the verbs to verbs.json beside it.
"""

import difflib
import json
import os
import re
import shlex
import sys
from pathlib import Path
from typing import Any, NoReturn

_VARIABLE = re.compile(r"([A-Z][A-Z0-9_]*)=(.*)", re.DOTALL)

_HELP = """\
usage: label-refinery VERB [options]

Train image classifiers on labels that a better network gives to every crop.

  label-refinery train --model mobilenet --refinery resnet50    the first thing to try: no data needed, minutes

Verbs
{verbs}

Options may also be given as MODEL=mobilenet in place of --model mobilenet, as make takes them in the checkout.
label-refinery VERB --help lists a verb's options; label-refinery --version prints the version.
"""


def main() -> NoReturn:
    """Replaces this process by the verb's program, as `python -m` would start it. A bad verb: one line, status 2."""
    listed = json.loads(Path(__file__).with_name("verbs.json").read_text())
    words = sys.argv[1:]
    try:
        module, options = program(words, listed)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    if not module:
        print(options[0])
        sys.exit(0)
    os.environ["TYPED_COMMAND"] = shlex.join(["label-refinery", *words])
    # -P: ignores modules of the current folder, such as a data.py.
    os.execv(sys.executable, [sys.executable, "-P", "-m", f"{__package__}.{module}", *options])


def program(words: list[str], listed: dict[str, Any]) -> tuple[str, list[str]]:
    """The module for a command line and its options; or "" and the text to print.

    listed: what setup.py reads from the Makefile. Raises ValueError, with one line, for an unknown command.
    """
    verbs = listed["verbs"]
    verb, *rest = words or ["--help"]
    if verb in ("--help", "-h", "help"):
        width = max(map(len, verbs)) + 2
        lines = [f"  {name:<{width}}{said['about']}" for name, said in verbs.items()]
        return "", [_HELP.format(verbs="\n".join(lines)).rstrip()]
    if verb == "--version":
        from importlib.metadata import version

        return "", [version("label-refinery")]
    if verb not in verbs:
        near = difflib.get_close_matches(verb, verbs, 1)
        raise ValueError(
            f"{ascii(verb)[1:-1]}: no such verb; " + (f"did you mean {near[0]}?" if near else "--help lists them")
        )
    options = []
    for word in rest:
        found = _VARIABLE.fullmatch(word)
        options += _options(found[1], found[2], verbs[verb]["options"], listed) if found else [word]
    return verbs[verb]["module"], options


def _options(variable: str, value: str, named: dict[str, str], listed: dict[str, Any]) -> list[str]:
    """The words for a variable, as in the Makefile: raw words of ARGS; an operand; a flag unless it is 0; an option."""
    if variable == "ARGS":
        return shlex.split(value)
    if not value:
        raise ValueError(f"{variable} is empty: give it a value or leave it out")
    if variable in listed["operands"]:
        return [value]
    option = named.get(variable, f"--{variable.lower()}")
    if variable in listed["flags"]:
        return [] if value == "0" else [option]
    return [option, value]
