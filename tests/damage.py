"""Damage for files of every kind, drawn by hypothesis."""

import copy
import json
from typing import Any

from hypothesis import strategies as st

_NUMBERS = st.integers() | st.floats() | st.sampled_from([0, -1, 2**31, 2**63, 10**400, 1e308, float("nan"), 1e-300])
_TEXTS = st.text(max_size=8) | st.sampled_from(
    ["", "..", "../..", "/etc", "a/b", "\x1b[2J", "\udcff", "\ud800", "a\0b"]
)
_LEAVES = st.none() | st.booleans() | _NUMBERS | _TEXTS
VALUES = st.recursive(_LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_TEXTS, inner, max_size=3))


def _places(document: Any, at: tuple = ()) -> list[tuple]:
    """The paths of a document's values: the keys and indices that lead to them."""
    inner = (
        document.items() if isinstance(document, dict) else enumerate(document) if isinstance(document, list) else ()
    )
    return [at, *(place for key, value in inner for place in _places(value, (*at, key)))]


@st.composite
def documents(draw, valid: Any) -> Any:
    """The JSON document with one to three of its values replaced, removed or duplicated."""
    document = copy.deepcopy(valid)
    for _ in range(draw(st.integers(1, 3))):
        place = draw(st.sampled_from(_places(document)))
        if not place:
            continue
        holder = document
        for key in place[:-1]:
            holder = holder[key]
        match draw(st.sampled_from(["replace", "replace", "leave out", "double"])):
            case "replace":
                holder[place[-1]] = draw(VALUES)
            case "leave out":
                del holder[place[-1]]
            case "double":
                holder[place[-1]] = [holder[place[-1]]] * 2
    return document


@st.composite
def bytes_of(draw, contents: bytes) -> bytes:
    """The bytes with some of them changed, removed or inserted, or truncated."""
    damaged = bytearray(contents)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(len(damaged) - 1, 0)))
        match draw(st.sampled_from(["change", "change", "put in", "leave out", "cut"])):
            case "change":
                damaged[at : at + 1] = draw(st.binary(min_size=1, max_size=4))
            case "put in":
                damaged[at:at] = draw(st.binary(max_size=8))
            case "leave out":
                del damaged[at : at + draw(st.integers(1, 16))]
            case "cut":
                del damaged[at:]
    return bytes(damaged)


def files(valid: Any) -> st.SearchStrategy[bytes]:
    """Files of a damaged JSON document, or damaged files of it."""
    whole = json.dumps(valid, indent=1).encode()
    return documents(valid).map(lambda document: json.dumps(document).encode()) | bytes_of(whole)
