"""Signatures: what a function takes when it is called, whatever it wraps."""

from __future__ import annotations

import functools
import inspect
import types
import typing as t
from inspect import Parameter


def signature_of(func: t.Any) -> inspect.Signature:
    """Return the signature of what is called.

    ``inspect.signature`` shows that of the function which a decorator has wrapped, but a task calls
    the wrapper. So the wrapper's own parameters count, and its ``**kwargs`` stand for those of the
    wrapped function; unless it has a ``__signature__`` of its own, which knows better.

    :raises ValueError: if Python knows none.
    """
    if isinstance(func, functools.partial):

        def inner() -> None: ...

        inner.__signature__ = signature_of(func.func)  # type: ignore[attr-defined]
        return inspect.signature(functools.partial(inner, *func.args, **func.keywords))
    wrapped = getattr(func, "__wrapped__", None)
    declared = getattr(func, "__signature__", None)
    if wrapped is None or declared is not getattr(wrapped, "__signature__", None):
        return inspect.signature(func, follow_wrapped=False)
    if declared is not None:  # functools.wraps has copied it
        func = bare(func) if isinstance(func, types.FunctionType) else func.__call__
    try:
        own = inspect.signature(func, follow_wrapped=False).parameters.values()
    except ValueError:  # such as what functools.cache makes: it passes on whatever it is given
        return signature_of(wrapped)
    if not any(each.kind is Parameter.VAR_KEYWORD for each in own):
        return inspect.Signature(list(own))
    return inspect.Signature(merge(own, signature_of(wrapped).parameters.values()))


def bare(func: types.FunctionType) -> types.FunctionType:
    """Copy a function without its attributes."""
    copy = types.FunctionType(
        func.__code__, func.__globals__, None, func.__defaults__, func.__closure__
    )
    copy.__kwdefaults__ = func.__kwdefaults__
    return copy


def merge(own: t.Collection[Parameter], inner: t.Iterable[Parameter]) -> list[Parameter]:
    """Put the parameters of a wrapped function in the place of its wrapper's ``**kwargs``."""
    variable = {each.kind for each in own} & {Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD}
    named = [each for each in own if each.kind not in variable]
    names = {each.name for each in named}
    passed = [each for each in inner if each.name not in names]
    # By position they come through *args, and only behind what cannot be left out.
    if Parameter.VAR_POSITIONAL not in variable or any(
        each.default is not each.empty and each.kind is not each.KEYWORD_ONLY for each in named
    ):
        passed = [
            each.replace(kind=each.KEYWORD_ONLY)
            if each.kind is each.POSITIONAL_OR_KEYWORD
            else each
            for each in passed
        ]
    return sorted([*named, *passed], key=lambda each: each.kind)
