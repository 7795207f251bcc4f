"""The command of the installed package: `label-refinery VERB ...`, with the verbs of the Makefile.

    label-refinery train --model mobilenet --refinery resnet50
    label-refinery train MODEL=mobilenet REFINERY=resnet50

Options are those of the verb's module; make's variables stand for the same options as they do there. This file is at
work where the package is installed: the build writes the verbs beside it, in verbs.json.
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

Train image classifiers on labels that a better network writes for every crop.

  label-refinery train --model mobilenet --refinery resnet50    the first thing to try: no data needed, minutes

Verbs
{verbs}

Options may also be given as MODEL=mobilenet in place of --model mobilenet, as make takes them in the checkout.
label-refinery VERB --help lists a verb's options; label-refinery --version prints the version.
"""


def main() -> NoReturn:
    """Becomes the verb's program, as `python -m` would start it. Ends with status 2 and one line for a bad verb."""
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
    # -P: modules of the folder it is typed in, such as its data.py, are none of ours.
    os.execv(sys.executable, [sys.executable, "-P", "-m", f"{__package__}.{module}", *options])


def program(words: list[str], listed: dict[str, Any]) -> tuple[str, list[str]]:
    """The module that a command line asks for and its options; or "" and what is to be shown.

    listed: what setup.py takes from the Makefile. Raises ValueError, in one line, for what is no command.
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
    """What a variable becomes, as in the Makefile: raw words of ARGS; an operand; a flag unless it is 0; an option."""
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
