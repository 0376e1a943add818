"""Values that tasks are given and return, plain ones and odd ones."""

from __future__ import annotations

import enum
import math
import sys
from typing import Any

from hypothesis import strategies as st

#: The largest number of a column for numbers.
MOST = 2**31 - 1


class Color(enum.Enum):
    RED = 1


class Mapping(dict[str, Any]):
    def items(self) -> Any:
        raise LookupError("no items")


class Unprintable:
    def __str__(self) -> str:
        raise ZeroDivisionError

    __repr__ = __str__


class Leaving(dict[str, Any]):
    def items(self) -> Any:
        sys.exit("no items")


def nested(depth: int) -> Any:
    value: Any = 0
    for _ in range(depth):
        value = [value]
    return value


CYCLE: list[Any] = []
CYCLE.append({"itself": CYCLE})

NUMBERS = st.integers() | st.integers(4_000, 5_000).map(lambda digits: 10**digits) | st.floats()
TEXT = st.text() | st.text(st.sampled_from("a\0\\\"'u0{}%:\ud800\udfff\uffff\U0010ffff"))
VALUES = st.recursive(
    st.none() | st.booleans() | NUMBERS | TEXT | st.sampled_from([98, 101, 150]).map(nested),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4),
    max_leaves=8,
)


def same(value: Any, back: Any) -> bool:
    """Whether a value came back, with the types of its parts.

    JSONB knows one kind of number: from 1e16 on, a float comes back as a whole one.
    """
    if isinstance(value, list):
        return isinstance(back, list) and len(value) == len(back) and all(map(same, value, back))
    if isinstance(value, dict):
        return (
            isinstance(back, dict)
            and value.keys() == back.keys()
            and all(same(value[key], back[key]) for key in value)
        )
    if isinstance(value, float) and abs(value) >= 1e16:
        return type(back) is int and value == float(back)
    return type(value) is type(back) and bool(value == back)


def bad(value: Any, depth: int = 1) -> bool:
    """Whether a value cannot be stored."""
    if isinstance(value, str):
        return "\0" in value or any("\ud800" <= letter <= "\udfff" for letter in value)
    if isinstance(value, float):
        return not math.isfinite(value)
    if isinstance(value, int):
        return abs(value) >= 10**4_300
    if isinstance(value, (list, dict)):
        parts = [*value, *value.values()] if isinstance(value, dict) else value
        return depth > 100 or any(bad(part, depth + 1) for part in parts)
    return False
