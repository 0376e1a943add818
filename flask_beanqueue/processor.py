"""Processors: the functions that do tasks, and what makes tasks for them."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import functools
import inspect
import types
import typing as t
import uuid
from collections import abc

from sqlalchemy.orm import Session, SessionTransaction, scoped_session

from .codec import to_json_arguments
from .current import current_task_id
from .exceptions import ArgumentError
from .models.task import TaskModelMixin
from .options import Options
from .retry import RetryPolicy, check_policy
from .signature import signature_of

if t.TYPE_CHECKING:
    from .engine.queue import Queue
    from .models.make import BQTask

P = t.ParamSpec("P")
R = t.TypeVar("R")
R_co = t.TypeVar("R_co", covariant=True)

# The types of ``db``, ``task`` and ``savepoint``, in any order.
Filled = Session | scoped_session[t.Any] | TaskModelMixin | SessionTransaction
A = t.TypeVar("A", bound=Filled)
B = t.TypeVar("B", bound=Filled)
C = t.TypeVar("C", bound=Filled)

#: Parameters that the queue fills in, if the function names them.
INJECTED = ("db", "task", "savepoint")

Exceptions = type[BaseException] | tuple[type[BaseException], ...]


def check_exceptions(exceptions: t.Any) -> None:
    for each in exceptions if isinstance(exceptions, tuple) else (exceptions,):
        if not (isinstance(each, type) and issubclass(each, BaseException)):
            raise TypeError(
                f"retry_exceptions must be an exception class or a tuple of them, not"
                f" {exceptions!r}"
            )


def signature_for(name: str, func: t.Any) -> inspect.Signature:
    """Return the signature of a processor's function.

    :raises TypeError: if it is none that a task could call.
    """
    outside = "Write a def outside of the class, or put @staticmethod above @bq.processor(…)."
    if isinstance(func, types.MethodType):
        raise TypeError(
            f"{name} is a method of {func.__self__!r}, which a worker has to make or find for"
            " itself. Write a def in a module that does so, and calls it."
        )
    if not callable(func):
        raise TypeError(f"{name} is a {type(func).__name__}, and no function. {outside}")
    if inspect.iscoroutinefunction(func):
        raise TypeError(
            f"{name} is a coroutine function. A processor is an ordinary function; call"
            " asyncio.run(…) inside one."
        )
    if inspect.isgeneratorfunction(func) or inspect.isasyncgenfunction(func):
        raise TypeError(f"{name} is a generator function: nothing in it would run.")
    try:
        signature = signature_of(func)
    except ValueError:
        raise TypeError(f"{name} does not say its parameters. Write a def.") from None
    if (first := next(iter(signature.parameters), None)) in ("self", "cls"):
        raise TypeError(f"{name} is a method, whose {first!r} no task could give. {outside}")
    for parameter in signature.parameters.values():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.POSITIONAL_ONLY):
            raise TypeError(
                f"{name}: a task's arguments are stored by name, so the parameter"
                f" {str(parameter).split(':')[0]!r} must be one that can be passed by name. If it"
                " is a decorator's, let that use functools.wraps and pass **kwargs on."
            )
    return signature


class Processor(t.Generic[P, R_co]):
    """A function that does tasks of one kind, as :meth:`BeanQueue.processor` returns it.

    Calling it calls the function. The other methods make tasks. ``P`` are the parameters that a
    task gives: all of the function's but ``db``, ``task`` and ``savepoint``.
    """

    def __init__(
        self,
        queue: Queue,
        func: t.Callable[..., R_co],
        options: Options,
        *,
        retry_policy: RetryPolicy | None = None,
        retry_exceptions: Exceptions | None = None,
        auto_complete: bool = True,
    ) -> None:
        if isinstance(func, Processor):
            raise TypeError(
                f"{func!r} is a processor already: take the second @bq.processor(…) away."
                " One task may go to another channel with .using(channel=…)."
            )
        # The function's attributes stay readable, but none takes the place of one of our own.
        for name, value in getattr(func, "__dict__", {}).items():
            if not hasattr(type(self), name):
                self.__dict__[name] = value
        self.queue = queue
        self.func = func
        self.options = options
        self.retry_policy = retry_policy
        self.retry_exceptions: Exceptions = (
            BaseException if retry_exceptions is None else retry_exceptions
        )
        self.auto_complete = auto_complete
        if not all(getattr(func, name, None) for name in ("__name__", "__module__")):
            raise TypeError(
                f"{func!r} has no name or no module, by which its tasks could find it. Write a def"
                " in a module that calls it."
            )
        self.module = func.__module__
        self.func_name = func.__name__
        functools.update_wrapper(self, func, updated=())
        check_policy(retry_policy)
        check_exceptions(self.retry_exceptions)
        if retry_policy is None and retry_exceptions is not None:
            raise TypeError(
                "retry_exceptions has no effect without a retry_policy: give one, or leave it out."
            )
        if not isinstance(auto_complete, bool):
            raise TypeError(f"auto_complete must be true or false, not {auto_complete!r}")
        signature = signature_for(self.name, func)
        self._whole = signature
        self.injected = tuple(name for name in INJECTED if name in signature.parameters)
        self.signature = signature.replace(
            parameters=[
                parameter
                for name, parameter in signature.parameters.items()
                if name not in self.injected
            ]
        )

        parameters = self.signature.parameters.values()
        self._named = {each.name for each in parameters if each.kind is not each.VAR_KEYWORD}
        self._required = {each.name for each in parameters if each.default is each.empty}

    @property
    def name(self) -> str:
        return f"{self.module}.{self.func_name}"

    def __repr__(self) -> str:
        return f"<Processor {self.name} on {self.options.channel!r}>"

    def __call__(self, /, *args: t.Any, **kwargs: t.Any) -> R_co:
        """Call the function, here and now. ``db``, ``task`` and ``savepoint`` are filled in as
        in a worker where they are not given, by position or by name; ``task`` is None outside of
        one."""
        given = {*kwargs, *list(self._whole.parameters)[: len(args)]}
        missing = [name for name in self.injected if name not in given]
        injected = self.queue.injection(missing)
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

    def run(self, /, *args: P.args, **kwargs: P.kwargs) -> BQTask:
        """Make a task for this processor. It is in no session yet.

        :return: a ``bq.Task``; add it, or a row that refers to it, to a session.
        :raises ArgumentError: if the arguments do not fit the processor's parameters, or cannot
            be encoded as JSON.
        """
        task = self.queue.Task(
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

    def enqueue(self, /, *args: P.args, **kwargs: P.kwargs) -> BQTask:
        """Make a task and add it to ``db.session``; the session's commit hands it over.

        :raises ArgumentError: as :meth:`run` does.
        """
        task = self.run(*args, **kwargs)
        self.queue.db.session.add(task)
        return task

    def enqueue_many(self, arguments: t.Iterable[t.Mapping[str, t.Any]]) -> list[uuid.UUID]:
        """Insert many tasks with one statement in the transaction of ``db.session``.

        :param arguments: for each task, its arguments by name.
        :return: the ids of the tasks, in order.
        :raises ArgumentError: naming the first set of arguments that does not fit; then none is
            inserted.
        """
        # A dict or text can be iterated over, too, but not by task.
        if isinstance(arguments, (abc.Mapping, str, bytes)) or not isinstance(
            arguments, abc.Iterable
        ):
            raise ArgumentError(
                f"{self.name}: enqueue_many takes a list with a dict of arguments for each task,"
                f" not {type(arguments).__name__}. For a single task, use enqueue."
            )
        rows = []
        for number, kwargs in enumerate(arguments):
            if not isinstance(kwargs, abc.Mapping):
                raise ArgumentError(
                    f"{self.name}: enqueue_many takes a dict of arguments for each task,"
                    f" but item {number} is of the type {type(kwargs).__name__}"
                )
            try:
                rows.append(to_json_arguments(self.name, self.bind((), kwargs)))
            except ArgumentError as error:
                raise ArgumentError(f"Item {number}: {error}") from None
        return (
            self.queue.insert_many(self.module, self.func_name, self.options, rows) if rows else []
        )

    def check(self, /, *args: t.Any, **kwargs: t.Any) -> dict[str, t.Any]:
        """Return a task's arguments by name.

        :raises ArgumentError: as :meth:`run` does.
        """
        arguments = self.bind(args, kwargs)
        to_json_arguments(self.name, arguments)
        return arguments

    def bind(self, args: tuple[t.Any, ...], kwargs: t.Mapping[str, t.Any]) -> dict[str, t.Any]:
        for name in self.injected:
            if name in kwargs:
                raise ArgumentError(
                    f"{self.name}: {name!r} is filled in by the worker; leave it out."
                )
        if not args and self._required <= kwargs.keys() <= self._named:
            return dict(kwargs)
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
    where these come first, annotated as ``Session`` (or ``scoped_session``),
    :class:`TaskModelMixin` (or an own model) and ``SessionTransaction``. In second place, beside
    ``**kwargs``, or annotated as ``Any``, they let any arguments pass. Elsewhere, also behind a
    ``*``, they take them for arguments of the task.
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
