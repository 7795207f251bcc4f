"""JSON that may come from other people: the type of each field is checked before it is used."""

import json
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

Fits = Callable[[Any], bool]

_SHOWN = 60


def read_json(path: Path) -> Any:
    """The contents of a JSON file. Raises OSError, and ValueError if it is not JSON or nested too deep."""
    try:
        return json.loads(path.read_text())
    except RecursionError:
        raise ValueError("nested too deep") from None


def check_fields(said: Any, fields: Mapping[str, Fits], *, of: str = "") -> None:
    """Raises ValueError, which names the field, unless `said` is an object that has these fields, and each fits.

    of: prefix of a field's name in the message.
    """
    if not isinstance(said, dict):
        raise ValueError(f"{of.rstrip('.') or 'it'} is not a JSON object")
    for name, fits in fields.items():
        if name not in said:
            raise ValueError(f"{of}{name} is missing")
        if not fits(said[name]):
            shown = json.dumps(said[name])
            raise ValueError(f"{of}{name} is {shown if len(shown) <= _SHOWN else f'{shown[:_SHOWN]}...'}")


def of_type(*types: type) -> Fits:
    """A value of one of these types; true and false are not numbers."""
    return lambda value: isinstance(value, types) and not isinstance(value, bool)


def whole(low: int, high: int) -> Fits:
    """A whole number within these bounds."""
    return lambda value: type(value) is int and low <= value <= high


def number(low: float, high: float = sys.float_info.max) -> Fits:
    """A finite number within these bounds."""
    return lambda value: type(value) in (int, float) and low <= value <= high


def span(low: float, high: float) -> Fits:
    """Two numbers a <= b of this range."""
    within = number(low, high)
    return lambda value: (
        isinstance(value, list) and len(value) == 2 and all(map(within, value)) and value[0] <= value[1]
    )


def text(value: Any) -> bool:
    """A string that can be a file name: bytes that are not text are escaped as os.fsdecode does."""
    if not isinstance(value, str) or "\0" in value:
        return False
    try:
        os.fsencode(value)
    except UnicodeEncodeError:
        return False
    return True


def file_name(value: Any) -> bool:
    """A string that names a file directly in a folder, and no other place."""
    return text(value) and value not in ("", ".", "..") and "/" not in value and len(os.fsencode(value)) <= 255


def path_below(value: Any) -> bool:
    """A string that names a file in a folder or below it, and no other place."""
    return text(value) and not {"", ".", ".."} & set(value.split("/"))


def json_object(value: Any) -> bool:
    return isinstance(value, dict)


def flag(value: Any) -> bool:
    return isinstance(value, bool)


def one_of(*values: Any) -> Fits:
    return lambda value: any(type(value) is type(each) and value == each for each in values)


def optional(fits: Fits) -> Fits:
    """null, or what fits."""
    return lambda value: value is None or fits(value)
