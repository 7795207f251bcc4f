"""Command lines of all commands: options, output, and errors; bad input ends with one line and exit status 2."""

import argparse
import difflib
import errno
import inspect
import os
import re
import shlex
import signal
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any, NoReturn, TextIO, TypeVar

Result = TypeVar("Result")

# Characters that control a terminal instead of being shown: control characters and those that change text direction.
# Other people's file and class names may hold them, as well as bytes that are not text (as surrogates).
_ACTING = re.compile("[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
_LINES = re.compile("(?![\t\n])" + _ACTING.pattern)
# Cursor movements of a progress bar.
_BAR = re.compile(r"\n*(?:\x1b\[A)*")

# Messages of libraries that could not get memory.
_NO_MEMORY = (
    "allocate memory",
    "bad_alloc",
    "can't start new thread",
    "failed to map segment",
    "out of memory",
)


# jsonargparse's message for a value of a wrong type, and names for the expected types.
_WRONG_TYPE = re.compile(
    r"key \"([\w.]+)\": (?:Does not validate .*?Subtypes: \[|Expected a )<class '(int|float|bool)'>"
    r"(?:, <class 'NoneType'>\].*Given value:|\. Got value:) (.*)"
)
_KINDS = {"int": "a whole number", "float": "a number", "bool": "true or false"}


class UserError(ValueError):
    """A bad input: one line that names the option or file and the remedy. Base class of the error of every room."""


def run_command(function: Callable[..., Any], *, prog: str, words: list[str] | None = None) -> Any:
    """Calls function with the options of the command line; its signature and docstring give their types and help.

    words: the command line without the program's name (default: sys.argv's). Ends as `exit_on_user_error` does.
    """
    # Imported here: the processes that encode images import UserError, but need no parser.
    from jsonargparse import DefaultHelpFormatter, auto_cli

    class Help(DefaultHelpFormatter):
        def format_help(self) -> str:
            # jsonargparse moves the cursor back to write --print_config[=flags] without a space.
            return super().format_help().replace(" \b", "")

    typed = with_underscores(sys.argv[1:] if words is None else words)

    def work() -> Any:
        try:
            return auto_cli(
                function, as_positional=False, prog=prog, args=typed, exit_on_error=False, formatter_class=Help
            )
        except argparse.ArgumentError as error:
            raise UserError(said_of_options(error, inspect.signature(function).parameters)) from None

    return exit_on_user_error(work)


def exit_on_user_error(work: Callable[[], Result]) -> Result:
    """Returns the result of a command's work; bad input or a lack of memory ends the program with one line and status
    2.

    A stop by the user ends it with status 130. The work's output is escaped (`Escaped`). Parsers must be built with
    exit_on_error=False.
    """
    try:
        if signal.getsignal(signal.SIGINT) is _leave:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        with _escaped_output():
            return work()
    except argparse.ArgumentError as error:
        _fail(said_of_options(error))
    except UserError as error:
        _fail(error)
    except KeyboardInterrupt as stop:
        Escaped(sys.stderr).write((str(stop) or "\ninterrupted") + "\n")
        sys.exit(130)
    except Exception as error:
        lack = _lack_of_memory(error)
        if lack:
            _fail(lack)
        raise


def said_of_options(error: Exception, known: Collection[str] = ()) -> str:
    """A parser's message about bad options as one readable line. known: the existing options, without dashes."""
    said = " ".join(str(error).split())
    wrong = _WRONG_TYPE.search(said)
    if wrong:
        option, kind, value = wrong.groups()
        return f"{option}={value}: give {_KINDS[kind]} (--help lists the options)"
    unknown = re.findall(r"--([\w.]+)", said.partition("nrecognized arguments:")[2])
    return f"{said}{did_you_mean(unknown, known)} (--help lists the options)"


def did_you_mean(unknown: Iterable[str], known: Collection[str]) -> str:
    """The options most similar to unknown ones, as the end of a message; "" if there is none."""
    near = [option for word in unknown for option in difflib.get_close_matches(word, known, 1)]
    return f"; did you mean {' or '.join(f'--{option}' for option in near)}?" if near else ""


def _lack_of_memory(error: BaseException) -> str | None:
    """The message for an error by which the system or a limit refused memory, or a thread, to this process."""
    seen: BaseException | None = error
    while seen:
        lines = [line.strip() for line in str(seen).splitlines()]
        said = next((line for line in lines if any(words in line for words in _NO_MEMORY)), None)
        if isinstance(seen, MemoryError) or (isinstance(seen, OSError) and seen.errno == errno.ENOMEM):
            said = said or first_line(seen)
        if said and isinstance(seen, (MemoryError, RuntimeError, ImportError, OSError)):
            advice = "take a smaller batch, end other programs, or raise the limit (ulimit -v)"
            return f"out of memory: {said}; {advice}"
        # Libraries raise their own errors from the original one.
        seen = seen.__cause__ or seen.__context__
    return None


def typed_command() -> str:
    """The command that the user typed, for messages."""
    if typed := os.environ.get("TYPED_COMMAND"):
        return typed
    spec = sys.modules["__main__"].__spec__
    words = ["-m", spec.name.removesuffix(".__main__"), *sys.argv[1:]] if spec else sys.argv
    # torchrun's processes do not know torchrun's own options.
    starter = "torchrun ..." if "TORCHELASTIC_RUN_ID" in os.environ else "python"
    return f"{starter} {shlex.join(words)}"


def safe_path() -> list[str]:
    """Python's option to ignore the current folder's modules, for further interpreters if this one uses it."""
    return ["-P"] if sys.flags.safe_path else []


def first_line(error: BaseException) -> str:
    """The first line of an exception's message, or its type if there is none."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def printable(text: str) -> str:
    """A name as one line that is safe to print on a terminal: control characters are escaped, as in \\x1b."""
    return _ACTING.sub(_escape, text)


class Escaped:
    """A stream that is safe for a terminal: all control characters except newlines and tabs are escaped.

    bars: whether progress bars are written to it.
    """

    def __init__(self, stream: TextIO, *, bars: bool = False):
        self._stream, self._bars = stream, bars

    def write(self, text: str) -> int:
        begin = ""
        if self._bars:
            if _BAR.fullmatch(text):
                return self._stream.write(text)
            begin = "\r" if text.startswith("\r") else ""
        self._stream.write(begin + _LINES.sub(_escape, text[len(begin) :]))
        return len(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def _escaped_output() -> Iterator[None]:
    before = sys.stdout, sys.stderr
    # Help in colours (from Python 3.14 on) would be escaped too.
    os.environ.setdefault("NO_COLOR", "1")
    sys.stdout, sys.stderr = Escaped(sys.stdout), Escaped(sys.stderr, bars=True)  # type: ignore[assignment]
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before


def _escape(found: re.Match[str]) -> str:
    code = ord(found[0])
    # os.fsdecode maps bytes that are not text to surrogates from 0xDC80 on.
    code = code - 0xDC00 if 0xDC80 <= code <= 0xDCFF else code
    return f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}"


def with_flags(words: Sequence[str], flags: Collection[str]) -> list[str]:
    """The words of a command line, with these flags as --flag=true if they have no value."""
    following = [*words, "--"][1:]
    return [
        f"{word}=true" if word in flags and after.startswith("--") else word
        for word, after in zip(words, following, strict=True)
    ]


def with_underscores(words: list[str]) -> list[str]:
    """--max-resolution as --max_resolution: both spellings are common, and both are accepted."""
    return [_with_underscores(word) if word.startswith("--") else word for word in words]


def _with_underscores(option: str) -> str:
    name, equals, value = option[2:].partition("=")
    return f"--{name.replace('-', '_')}{equals}{value}"


def _fail(message: object) -> NoReturn:
    print(f"error: {printable(str(message))}", file=sys.stderr, flush=True)
    sys.exit(2)


def _leave(number: int, frame: Any) -> None:
    """Handles Ctrl-C while libraries are imported: nothing has begun, and they would turn an exception into others."""
    os.write(2, b"\ninterrupted\n")
    os._exit(130)


def _not_loaded(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    lack = _lack_of_memory(error)
    if lack:
        print(f"error: {printable(lack)}", file=sys.stderr, flush=True)
        os._exit(2)
    sys.__excepthook__(kind, error, trace)


# For `python -m ROOM`, while Python looks for the module and the room's package imports this file.
if sys.argv[:1] == ["-m"]:
    # Set before PyTorch is imported. Its threads spin for milliseconds while they wait for each other, and if other
    # programs or the decoding threads also need the processors, a step takes many times as long; without any spinning,
    # a quiet machine loses a third of its speed.
    if not os.environ.keys() & {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"}:
        os.environ["GOMP_SPINCOUNT"] = "1000"
    sys.excepthook = _not_loaded
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _leave)
