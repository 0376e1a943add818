"""Processors: the functions that do tasks, and the registry that finds them by name."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import importlib
import inspect
import json
import pkgutil
import re
import typing as t
import uuid

import sqlalchemy as sa
from sqlalchemy.orm import Session, SessionTransaction

from .claim import current_task_id
from .config import ConfigError
from .models import TaskModelMixin
from .retry import RetryPolicy

if t.TYPE_CHECKING:
    from .extension import BeanQueue

P = t.ParamSpec("P")
R = t.TypeVar("R")
R_co = t.TypeVar("R_co", covariant=True)

# The types of ``db``, ``task`` and ``savepoint``, in any order.
A = t.TypeVar("A", bound=Session | TaskModelMixin | SessionTransaction)
B = t.TypeVar("B", bound=Session | TaskModelMixin | SessionTransaction)
C = t.TypeVar("C", bound=Session | TaskModelMixin | SessionTransaction)

#: Parameters that the queue fills in, if the function names them.
INJECTED = ("db", "task", "savepoint")

#: Lists within lists that an argument may hold. Python's own limit depends on the caller: what a
#: view can encode, a worker may not be able to decode.
DEEPEST = 100

#: The longest delay, so that it ends in a year that Python knows.
CENTURIES = datetime.timedelta(days=365_000)

#: U+0000 as JSON writes it, but not an escaped backslash before the text "u0000".
NUL = re.compile(r"(?<!\\)(?:\\\\)*\\u0000")

Exceptions = type[BaseException] | tuple[type[BaseException], ...]


class ArgumentError(TypeError):
    """A task's arguments do not fit its processor, or cannot be stored."""


@dataclasses.dataclass(frozen=True)
class Options:
    """What one task may have of its own, beside its arguments."""

    channel: str
    priority: int = 0
    scheduled_at: datetime.datetime | None = None
    delay: datetime.timedelta | None = None

    def __post_init__(self) -> None:
        check_channel(self.channel)
        if not isinstance(self.priority, int) or not -(2**31) <= self.priority < 2**31:
            raise ValueError(f"priority must be a whole number of 32 bits, not {self.priority!r}")
        if self.delay is not None:
            if self.scheduled_at is not None:
                raise ValueError("Give scheduled_at or delay, not both.")
            if not isinstance(self.delay, datetime.timedelta):
                raise TypeError(f"delay must be a datetime.timedelta, not {self.delay!r}")
            if abs(self.delay) > CENTURIES:
                raise ValueError(f"delay is longer than ten centuries: {self.delay!r}")
        if self.scheduled_at is not None:
            check_aware("scheduled_at", self.scheduled_at)

    def due(self) -> t.Any:
        """The value of ``scheduled_at``: a delay counts by the database's clock."""
        if self.delay is not None:
            return sa.func.clock_timestamp() + self.delay
        return self.scheduled_at


def check_channel(channel: t.Any) -> None:
    if not isinstance(channel, str):
        raise TypeError(f"channel must be text, not {channel!r}")
    if not channel or "\0" in channel:
        raise ValueError(f"channel must not be empty or hold U+0000: {channel!r}")


def check_exceptions(exceptions: t.Any) -> None:
    for each in exceptions if isinstance(exceptions, tuple) else (exceptions,):
        if not (isinstance(each, type) and issubclass(each, BaseException)):
            raise TypeError(
                f"retry_exceptions must be an exception class or a tuple of them, not"
                f" {exceptions!r}"
            )


def check_aware(name: str, moment: t.Any) -> None:
    if not isinstance(moment, datetime.datetime):
        raise TypeError(f"{name} must be a datetime.datetime, not {moment!r}")
    if moment.utcoffset() is None:
        raise ValueError(
            f"{name} has no time zone: {moment!r}. Use datetime.now(timezone.utc) as its base,"
            " or give delay=timedelta(…)."
        )
    # In another time zone, PostgreSQL's answer may be a year that Python does not know.
    if not datetime.MINYEAR < moment.year < datetime.MAXYEAR:
        raise ValueError(f"{name} is out of range: {moment!r}")


def to_json(value: t.Any) -> str:
    """Encode a value as JSON that PostgreSQL's JSONB takes.

    :raises ValueError: saying what stands in the way.
    """
    try:
        text = json.dumps(value, allow_nan=False, ensure_ascii=True)
    except RecursionError:
        raise ValueError("it is nested too deeply, or holds itself") from None
    except TypeError as error:
        raise ValueError(str(error)) from None
    except ValueError as error:
        raise ValueError(
            str(error).replace("Out of range float values", "NaN and Infinity")
        ) from None
    if NUL.search(text):
        raise ValueError("it holds the character U+0000, which PostgreSQL cannot store")
    if r"\ud" in text:  # a surrogate, perhaps a lone one
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise ValueError("it holds half of a surrogate pair, which is no text") from None
    if text.count("[") + text.count("{") > DEEPEST and is_deep(value):
        raise ValueError("it is nested too deeply")
    return text


def is_deep(value: t.Any) -> bool:
    layer = [value]
    for _ in range(DEEPEST):
        inner = [each.values() if isinstance(each, dict) else each for each in layer]
        layer = [each for part in inner for each in part if isinstance(each, (list, tuple, dict))]
    return bool(layer)


class Processor(t.Generic[P, R_co]):
    """A function that does tasks of one kind, as :meth:`BeanQueue.processor` returns it.

    Calling it calls the function. The other methods make tasks. ``P`` are the parameters that a
    task gives: all of the function's but ``db``, ``task`` and ``savepoint``.
    """

    def __init__(
        self,
        bq: BeanQueue,
        func: t.Callable[..., R_co],
        options: Options,
        *,
        retry_policy: RetryPolicy | None = None,
        retry_exceptions: Exceptions | None = None,
        auto_complete: bool = True,
    ) -> None:
        self.bq = bq
        self.func = func
        self.options = options
        self.retry_policy = retry_policy
        self.retry_exceptions: Exceptions = (
            BaseException if retry_exceptions is None else retry_exceptions
        )
        self.auto_complete = auto_complete
        self.module = func.__module__
        self.func_name = func.__name__
        self.__name__ = func.__name__
        self.__doc__ = func.__doc__
        self.__wrapped__ = func
        if not callable(func) or inspect.iscoroutinefunction(func):
            raise TypeError(
                f"{self.name} is a coroutine function. A processor is an ordinary function;"
                " call asyncio.run(…) inside one."
            )
        if inspect.isgeneratorfunction(func) or inspect.isasyncgenfunction(func):
            raise TypeError(f"{self.name} is a generator function: nothing in it would run.")
        if retry_policy is not None and not callable(retry_policy):
            raise TypeError(f"{self.name}: retry_policy must be callable, not {retry_policy!r}")
        check_exceptions(self.retry_exceptions)
        signature = inspect.signature(func)
        for parameter in signature.parameters.values():
            if parameter.kind in (parameter.VAR_POSITIONAL, parameter.POSITIONAL_ONLY):
                raise TypeError(
                    f"{self.name}: a task's arguments are stored by name, so the parameter"
                    f" {str(parameter).split(':')[0]!r} must be one that can be passed by name."
                )
        self.injected = tuple(name for name in INJECTED if name in signature.parameters)
        self.signature = signature.replace(
            parameters=[
                parameter
                for name, parameter in signature.parameters.items()
                if name not in self.injected
            ]
        )

    @property
    def name(self) -> str:
        return f"{self.module}.{self.func_name}"

    def __repr__(self) -> str:
        return f"<Processor {self.name} on {self.options.channel!r}>"

    def __call__(self, /, *args: t.Any, **kwargs: t.Any) -> R_co:
        """Call the function, here and now. ``db``, ``task`` and ``savepoint`` are filled in as
        in a worker where they are not given; ``task`` is None outside of one."""
        injected: dict[str, t.Any] = {}
        if self.injected and not args:
            injected = self.bq.injection(name for name in self.injected if name not in kwargs)
        with injected.get("savepoint") or contextlib.nullcontext():
            return self.func(*args, **injected, **kwargs)

    def using(
        self,
        *,
        channel: str | None = None,
        priority: int | None = None,
        scheduled_at: datetime.datetime | None = None,
        delay: datetime.timedelta | None = None,
    ) -> Processor[P, R_co]:
        """Return the same processor with other options for the tasks made through it.

        :param channel: where the task waits, instead of the processor's own channel.
        :param priority: the smaller comes first; 0 unless said.
        :param scheduled_at: not before this time, which has a time zone.
        :param delay: not before this time has passed since the INSERT.
        :raises ValueError: for a time without a zone, or both times at once.
        """
        changes: dict[str, t.Any] = {}
        if channel is not None:
            changes["channel"] = channel
        if priority is not None:
            changes["priority"] = priority
        if scheduled_at is not None or delay is not None:
            changes.update(scheduled_at=scheduled_at, delay=delay)
        other = object.__new__(type(self))
        other.__dict__.update(self.__dict__)
        other.options = dataclasses.replace(self.options, **changes)
        return other

    def run(self, /, *args: P.args, **kwargs: P.kwargs) -> TaskModelMixin:
        """Make a task for this processor. It is in no session yet.

        :return: a ``bq.Task``; add it, or a row that refers to it, to a session.
        :raises ArgumentError: if the arguments do not fit the processor's parameters, or cannot
            be encoded as JSON.
        """
        task: TaskModelMixin = self.bq.Task(
            channel=self.options.channel,
            module=self.module,
            func_name=self.func_name,
            kwargs=self.check(*args, **kwargs),
            priority=self.options.priority,
        )
        if (due := self.options.due()) is not None:
            task.scheduled_at = due
        if (parent_id := current_task_id()) is not None and hasattr(task, "parent_id"):
            task.parent_id = parent_id
        return task

    def enqueue(self, /, *args: P.args, **kwargs: P.kwargs) -> TaskModelMixin:
        """Make a task and add it to ``db.session``; the session's commit hands it over.

        :raises ArgumentError: as :meth:`run` does.
        """
        task = self.run(*args, **kwargs)
        self.bq.db.session.add(task)
        return task

    def enqueue_many(self, arguments: t.Iterable[t.Mapping[str, t.Any]]) -> list[uuid.UUID]:
        """Insert many tasks with one statement in the transaction of ``db.session``.

        :param arguments: for each task, its arguments by name.
        :return: the ids of the tasks, in order.
        :raises ArgumentError: naming the first set of arguments that does not fit; then none is
            inserted.
        """
        rows = []
        for number, kwargs in enumerate(arguments):
            if not isinstance(kwargs, t.Mapping):
                raise ArgumentError(
                    f"{self.name}: enqueue_many takes a dict of arguments for each task,"
                    f" but item {number} is {kwargs!r}"
                )
            try:
                rows.append(to_json_arguments(self, self.bind((), kwargs)))
            except ArgumentError as error:
                raise ArgumentError(f"Item {number}: {error}") from None
        return self.bq.insert_many(self, rows) if rows else []

    def check(self, /, *args: t.Any, **kwargs: t.Any) -> dict[str, t.Any]:
        """Return a task's arguments by name.

        :raises ArgumentError: as :meth:`run` does.
        """
        arguments = self.bind(args, kwargs)
        to_json_arguments(self, arguments)
        return arguments

    def bind(self, args: tuple[t.Any, ...], kwargs: t.Mapping[str, t.Any]) -> dict[str, t.Any]:
        for name in self.injected:
            if name in kwargs:
                raise ArgumentError(
                    f"{self.name}: {name!r} is filled in by the worker; leave it out."
                )
        try:
            bound = self.signature.bind(*args, **kwargs)
        except TypeError as error:
            raise ArgumentError(f"{self.name}{self.signature}: {error}") from None
        arguments = dict(bound.arguments)
        for name, parameter in self.signature.parameters.items():
            if parameter.kind is parameter.VAR_KEYWORD:
                arguments.update(arguments.pop(name, {}))
        return arguments


#: A processor of which nothing is known, as the queue meets them.
AnyProcessor = Processor[..., t.Any]


class Decorator(t.Protocol):
    """What :meth:`BeanQueue.processor` returns, for type checkers.

    They cannot go by the names of parameters, so they take ``db``, ``task`` and ``savepoint`` off
    where these come first, annotated as ``Session``, :class:`TaskModelMixin` (or an own model) and
    ``SessionTransaction``. In second place, beside ``**kwargs``, or annotated as ``Any``, they let
    any arguments pass.
    """

    @t.overload
    def __call__(self, func: t.Callable[t.Concatenate[A, B, C, P], R], /) -> Processor[P, R]: ...
    @t.overload
    def __call__(self, func: t.Callable[t.Concatenate[A, B, P], R], /) -> Processor[P, R]: ...
    @t.overload
    def __call__(self, func: t.Callable[t.Concatenate[A, P], R], /) -> Processor[P, R]: ...
    @t.overload
    def __call__(self, func: t.Callable[t.Concatenate[A, ...], R], /) -> Processor[..., R]: ...
    @t.overload
    def __call__(
        self, func: t.Callable[t.Concatenate[t.Any, A, ...], R], /
    ) -> Processor[..., R]: ...
    @t.overload
    def __call__(self, func: t.Callable[P, R], /) -> Processor[P, R]: ...


def to_json_arguments(processor: AnyProcessor, arguments: dict[str, t.Any]) -> str:
    """Encode a task's arguments, or name the one that cannot be."""
    try:
        return to_json(arguments)
    except ValueError as problem:
        for name, value in arguments.items():
            try:
                to_json(value)
            except ValueError as error:
                raise ArgumentError(
                    f"{processor.name}: the argument {name!r} cannot be stored as JSON: {error}."
                    " Pass something plain in its place, such as an id, a string or a number."
                ) from None
        raise ArgumentError(
            f"{processor.name}: the arguments cannot be stored as JSON: {problem}."
        ) from None


class Registry:
    """The processors of one BeanQueue, by module and function name."""

    def __init__(self) -> None:
        self._processors: dict[tuple[str, str], AnyProcessor] = {}

    def __len__(self) -> int:
        return len(self._processors)

    def __iter__(self) -> t.Iterator[AnyProcessor]:
        return iter(self._processors.values())

    def add(self, processor: AnyProcessor) -> None:
        """Add a processor.

        :raises ValueError: if another function has that module and name. The same function may
            come again, as it does where an app factory defines it.
        """
        key = processor.module, processor.func_name
        known = self._processors.get(key)
        if known and getattr(known.func, "__code__", 0) is not getattr(
            processor.func, "__code__", 1
        ):
            raise ValueError(
                f"There are two processors called {processor.name}. Tasks find theirs by module"
                " and name: rename one."
            )
        self._processors[key] = processor

    def get(self, module: str, func_name: str) -> AnyProcessor | None:
        return self._processors.get((module, func_name))

    @property
    def channels(self) -> tuple[str, ...]:
        """Every channel that a processor names, in order of appearance."""
        return tuple(dict.fromkeys(processor.options.channel for processor in self))


def import_packages(names: t.Iterable[str]) -> None:
    """Import packages with all their submodules, so that their processors register.

    :raises ConfigError: for a package that is not there.
    """
    for name in names:
        try:
            package = importlib.import_module(name)
        except ModuleNotFoundError as error:
            if not f"{name}.".startswith(f"{error.name}."):  # something that it imports
                raise
            raise ConfigError(f"BQ_PROCESSOR_PACKAGES names {name}: {error}") from error
        for module in pkgutil.walk_packages(getattr(package, "__path__", ()), f"{name}."):
            if not module.name.endswith(".__main__"):
                importlib.import_module(module.name)
