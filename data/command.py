"""How every command takes its options and tells of a bad one: in one line, with exit status 2."""

import sys
from collections.abc import Callable
from typing import Any, NoReturn

from jsonargparse import ArgumentParser, auto_cli

from data import DataError


class OneLineParser(ArgumentParser):
    """An argument parser whose errors are one line, without the usage around it."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        fail(f"{' '.join(message.split())} (--help lists the options)")


def fail(message: object) -> NoReturn:
    print(f"error: {message}", file=sys.stderr, flush=True)
    sys.exit(2)


def _underscored(word: str) -> str:
    if not word.startswith("--"):
        return word
    name, equals, value = word[2:].partition("=")
    return f"--{name.replace('-', '_')}{equals}{value}"


def run_command(
    function: Callable[..., Any], *, prog: str, errors: tuple[type[Exception], ...] = (DataError,), **options: Any
) -> Any:
    """Calls function with the options of the command line, typed and described by its signature and docstring.

    errors: the kinds that end the program with their one line. options: passed on to jsonargparse's auto_cli.
    """
    # --max-resolution is --max_resolution: both spellings are common, and neither is worth an error.
    words = [_underscored(word) for word in options.pop("args", sys.argv[1:])]
    try:
        return auto_cli(function, as_positional=False, parser_class=OneLineParser, prog=prog, args=words, **options)
    except errors as error:
        fail(error)
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr, flush=True)
        sys.exit(130)
