"""How every command takes its options, and how it ends: bad input in one line with exit status 2."""

import argparse
import os
import shlex
import sys
from collections.abc import Callable
from typing import Any, NoReturn, TypeVar

Result = TypeVar("Result")


class UserError(ValueError):
    """A bad input: one line that names the option or file and says what to do. Base of the error of every room."""


def run_command(function: Callable[..., Any], *, prog: str, words: list[str] | None = None) -> Any:
    """Calls function with the options of the command line, typed and described by its signature and docstring.

    words: the command line without the program's name (default: sys.argv's). Ends as `exit_on_user_error` does.
    """
    # Loaded here: the processes that encode images import UserError, and need no parser.
    from jsonargparse import auto_cli

    typed = with_underscores(sys.argv[1:] if words is None else words)
    return exit_on_user_error(
        lambda: auto_cli(function, as_positional=False, prog=prog, args=typed, exit_on_error=False)
    )


def exit_on_user_error(work: Callable[[], Result]) -> Result:
    """Returns what a command's work returns; bad input ends the program with one line and status 2.

    A stop by the user ends it with status 130. Parsers are to be built with exit_on_error=False.
    """
    try:
        return work()
    except argparse.ArgumentError as error:
        _fail(f"{' '.join(str(error).split())} (--help lists the options)")
    except UserError as error:
        _fail(error)
    except KeyboardInterrupt as stop:
        print(str(stop) or "\ninterrupted", file=sys.stderr, flush=True)
        sys.exit(130)


def typed_command() -> str:
    """The command that the user typed, to be typed again."""
    spec = sys.modules["__main__"].__spec__
    module = spec.name.removesuffix(".__main__") if spec else "train"
    # Of torchrun's own options its processes know nothing.
    starter = "torchrun ..." if "TORCHELASTIC_RUN_ID" in os.environ else "python"
    return os.environ.get("TYPED_COMMAND") or f"{starter} -m {module} {shlex.join(sys.argv[1:])}"


def first_line(error: BaseException) -> str:
    """What an exception says first, or its type where it says nothing."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def printable(text: str) -> str:
    """File names may hold bytes that are no text; a terminal is shown a mark in their place."""
    return text.encode(errors="surrogateescape").decode(errors="replace")


def with_underscores(words: list[str]) -> list[str]:
    """--max-resolution as --max_resolution: both spellings are common, and neither is worth an error."""
    return [_with_underscores(word) if word.startswith("--") else word for word in words]


def _with_underscores(option: str) -> str:
    name, equals, value = option[2:].partition("=")
    return f"--{name.replace('-', '_')}{equals}{value}"


def _fail(message: object) -> NoReturn:
    print(f"error: {message}", file=sys.stderr, flush=True)
    sys.exit(2)
