"""Arguments and results as JSON that PostgreSQL takes."""

from __future__ import annotations

import json
import typing as t

from .exceptions import ArgumentError

#: Lists within lists that an argument may hold. Python's own limit depends on the caller: what a
#: view can encode, a worker may not be able to decode.
DEEPEST = 100
#: Bytes of JSON, as PostgreSQL gives it back: whoever reads a value must be able to hold it.
LARGEST = 2**27
#: How many times as long a text is at most when it comes back: ``5e-324, ``, with all its zeros.
GROWTH = 50


def refuse(value: t.Any) -> t.NoReturn:
    """Say of what type a value is that JSON does not know; json itself believes its ``__class__``.

    :raises TypeError: always.
    """
    kind, pretended = type(value), value.__class__
    if kind is not pretended:
        raise TypeError(
            f"it is no {pretended.__name__}, but a {kind.__name__} of one; what is behind a"
            " LocalProxy is its _get_current_object()"
        )
    raise TypeError(f"Object of type {kind.__name__} is not JSON serializable")


#: json.dumps would make one anew for each value.
ENCODER = json.JSONEncoder(allow_nan=False, ensure_ascii=True, default=refuse)


def to_json(value: t.Any) -> str:
    """Encode a value as JSON that PostgreSQL's JSONB takes.

    :raises ValueError: saying what stands in the way.
    """
    try:
        text = ENCODER.encode(value)
    except RecursionError:
        raise ValueError("it is nested too deeply, or holds itself") from None
    except TypeError as error:
        raise ValueError(str(error)) from None
    except ValueError as error:
        raise ValueError(
            str(error).replace("Out of range float values", "NaN and Infinity")
        ) from None
    except Exception as error:  # of the value's own: a mapping's items() may do anything
        raise ValueError(f"it raises {type(error).__name__}: {error}") from error
    # But not an escaped backslash before the text "u0000".
    if r"\u0000" in text and r"\u0000" in text.replace(r"\\", ""):
        raise ValueError("it holds the character U+0000, which PostgreSQL cannot store")
    if r"\ud" in text:  # a surrogate, perhaps a lone one
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise ValueError("it holds half of a surrogate pair, which is no text") from None
    if text.count("[") + text.count("{") > DEEPEST and is_deep(value):
        raise ValueError("it is nested too deeply")
    size = len(text)
    if size > LARGEST // GROWTH:
        size += sum(map(zeros, floats(value)))
    if size > LARGEST:
        raise ValueError(
            f"it is too large: {size} characters of JSON, of which a task may have {LARGEST}"
        )
    return text


def zeros(number: float) -> int:
    """How many digits PostgreSQL writes where JSON has an exponent."""
    return abs(int(repr(number).partition("e")[2] or 0))


def floats(value: t.Any) -> t.Iterator[float]:
    """The numbers in a value that JSON may write with an exponent, and PostgreSQL does not."""
    inside = [value]
    while inside:
        each = inside.pop()
        if isinstance(each, float):
            yield each
        elif isinstance(each, dict):
            inside += each.values()
        elif isinstance(each, (list, tuple)):
            inside += each


def is_deep(value: t.Any) -> bool:
    layer = [value]
    for _ in range(DEEPEST):
        inner = [each.values() if isinstance(each, dict) else each for each in layer]
        layer = [each for part in inner for each in part if isinstance(each, (list, tuple, dict))]
    return bool(layer)


def to_json_arguments(name: str, arguments: dict[str, t.Any]) -> str:
    """Encode a task's arguments.

    :param name: whose arguments they are.
    :raises ArgumentError: naming the one that cannot be stored.
    """
    try:
        return to_json(arguments)
    except ValueError as problem:
        for key, value in arguments.items():
            try:
                to_json({key: value})
            except ValueError as error:
                raise ArgumentError(
                    f"{name}: the argument {key!r} cannot be stored as JSON: {error}."
                    " Pass something plain in its place, such as an id, a string or a number."
                ) from None
        raise ArgumentError(f"{name}: the arguments cannot be stored as JSON: {problem}.") from None


def decode(arguments: str) -> dict[str, t.Any]:
    """Decode a task's arguments.

    :raises ValueError: if they are no JSON object that Python can read.
    """
    try:
        kwargs = json.loads(arguments)
    except RecursionError:
        raise ValueError("the task's kwargs are nested too deeply") from None
    if not isinstance(kwargs, dict):
        raise ValueError("the task's kwargs are no JSON object")
    return kwargs
