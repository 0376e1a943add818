"""What a processor returns or raises, and what is stored of it.

There is a table for each: what it is, in words, and what comes of it. What a retry policy answers
is in test_retry.
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pytest
import sqlalchemy as sa
from flask import Flask
from flask_sqlalchemy import SQLAlchemy
from hypothesis import example, given, settings
from hypothesis import strategies as st

from flask_beanqueue import BeanQueue
from flask_beanqueue import codec as arguments
from flask_beanqueue.engine import completer, outcome
from flask_beanqueue.engine.outcome import Outcome

from .stage import Act, End, raising
from .values import CYCLE, TEXT, VALUES, Leaving, Mapping, Unprintable, bad, nested, same

Work = Callable[..., None]

# Results: stored as they are, or the task is DONE without, and the log says why.

RESULTS = {
    "nothing": (None, True),
    "a list of one object": ([{"a": [1, 2.5, "é", None, True]}], True),
    "a number of 4,000 digits": (10**3_999, True),
    "text of a megabyte": ("x" * 1_000_000, True),
    "an object": (object(), False),
    "an object that cannot be printed": (Unprintable(), False),
    "a set in a dict": ({"a": {1, 2}}, False),
    "NaN": (float("nan"), False),
    "NUL": ("\0", False),
    "half of a surrogate pair": ("\ud800", False),
    "a list that holds itself": (CYCLE, False),
    "100,000 lists within each other": (nested(100_000), False),
    "a number of 5,000 digits": (10**4_999, False),
    "a mapping that raises": (Mapping(a=1), False),
    "a mapping that ends the program": (Leaving(a=1), False),
}


@pytest.fixture(scope="module")
def results_ended(end_all: Callable[..., dict[str, End]]) -> dict[str, End]:
    return end_all({name: returning(value) for name, (value, _) in RESULTS.items()})


def returning(value: Any) -> Act:
    return lambda db, task: value


@pytest.mark.parametrize("name", RESULTS)
def test_a_result_is_stored_or_left_out(results_ended: dict[str, End], name: str) -> None:
    value, stored = RESULTS[name]
    end = results_ended[name]
    assert (end.state, end.attempts, len(end.effects)) == ("DONE", 1, 1)
    assert end.result == (value if stored else None)
    assert ("is not stored: " in end.log) is not stored


def test_a_result_that_is_too_large_is_left_out(
    end_all: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(arguments, "LARGEST", 100)
    [end] = end_all({"large": returning("x" * 99)}).values()
    assert (end.state, end.result, len(end.effects)) == ("DONE", None, 1)
    assert "is not stored: ValueError: it is too large: 101 characters" in end.log


def test_large_results_go_into_several_statements(monkeypatch: pytest.MonkeyPatch) -> None:
    """PostgreSQL closes the connection to who sends a gigabyte at once."""
    monkeypatch.setattr(completer, "LARGEST_PART", 100)
    claim: Any = None
    waiting = [
        Outcome(claim, "DONE", result=size and "x" * size) for size in (None, 60, 30, 20, 300, 50)
    ]
    parts = []
    while waiting:
        part = completer.first_part(waiting, 3)
        parts.append([each.result and len(each.result) for each in part])
        waiting = waiting[len(part) :]
    assert parts == [[None, 60, 30], [20], [300], [50]]


async def coroutine() -> None:
    pass


def generator() -> Iterator[int]:
    yield 1


async def async_generator() -> Any:
    yield 1


def test_a_result_that_has_yet_to_run_is_a_failure(end_all: Any) -> None:
    """Behind a decorator, nobody sees that the function is no ordinary one."""
    unrun = {
        function.__name__: lambda db, task, function=function: function()
        for function in (coroutine, generator, async_generator)
    }
    for name, end in end_all(unrun).items():
        assert (end.state, end.effects) == ("FAILED", [])
        assert f"The processor returned a {name}, and nothing has run in it. Call" in end.error


@pytest.fixture
def done_with(app: Flask, db: SQLAlchemy, bq: BeanQueue, work: Work) -> Callable[..., Any]:
    """Do an act with each of some values, in a task of its own; tell each task and its value."""

    @contextlib.contextmanager
    def done_with(act: Callable[[Any], Any], values: list[Any]) -> Iterator[Iterable[Any]]:
        @bq.processor()
        def do(db: Any, number: int) -> Any:
            if number % 2:  # the others do not use their session
                db.execute(sa.text("SELECT 1"))
            return act(values[number])

        with app.app_context():
            do.enqueue_many({"number": number} for number in range(len(values)))
            db.session.commit()
            work(concurrency=1)
            tasks = db.session.scalars(sa.select(bq.Task).order_by(bq.Task.id)).all()
            yield zip(tasks, values, strict=True)
            db.session.execute(sa.delete(bq.Task))
            db.session.commit()

    return done_with


def test_a_result_is_stored_or_the_task_is_done_without(
    done_with: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    @settings(max_examples=12)
    @given(results=st.lists(VALUES, min_size=10, max_size=30))
    def check(results: list[Any]) -> None:
        caplog.clear()
        with done_with(lambda result: result, results) as done:
            for task, result in done:
                assert (task.state, task.attempts) == ("DONE", 1)
                assert same(None if bad(result) else result, task.result)
                assert (f"{task.id} is not stored: " in caplog.text) is bad(result)

    check()


# Exceptions: what the error message says of them.


class WithoutWords(Exception):
    def __str__(self) -> str:
        raise ZeroDivisionError


class OddNotes(Exception):
    @property
    def __notes__(self) -> list[str]:
        raise ZeroDivisionError


class Untrue(Exception):
    def __bool__(self) -> bool:
        raise ZeroDivisionError


def caused_by(cause: BaseException) -> Exception:
    error = ValueError("last")
    error.__cause__ = cause
    return error


def circle() -> Exception:
    first, second = ValueError("first"), ValueError("second")
    first.__cause__, second.__cause__ = second, first
    return first


def chain(length: int) -> Exception:
    error = ValueError(0)
    for number in range(1, length + 1):
        later = ValueError(number)
        later.__cause__, error = error, later
    return error


def group(depth: int) -> Exception:
    error: Exception = ValueError("innermost")
    for _ in range(depth):
        error = ExceptionGroup("group", [error])
    return error


def odd_syntax_error() -> Exception:
    error: Any = SyntaxError("odd")
    error.lineno = error.offset = error.text = error.filename = object()
    return error  # type: ignore[no-any-return]


def endless(db: Any, task: Any) -> None:
    endless(db, task)


def raise_from_nowhere(db: Any, task: Any) -> None:
    code = compile("raise ValueError('elsewhere')", "\ud800", "exec")
    tracer = sys.gettrace()
    sys.settrace(None)  # coverage cannot write such a name
    try:
        exec(code)
    finally:
        sys.settrace(tracer)


ERRORS: dict[str, tuple[Act, str]] = {
    "sys.exit(0)": (lambda db, task: sys.exit(0), "SystemExit: 0"),
    "sys.exit with words": (lambda db, task: sys.exit("words"), "SystemExit: words"),
    "KeyboardInterrupt": (raising(KeyboardInterrupt), "KeyboardInterrupt"),
    "GeneratorExit": (raising(GeneratorExit), "GeneratorExit"),
    "StopIteration": (raising(StopIteration(5)), "StopIteration: 5"),
    "CancelledError": (raising(asyncio.CancelledError), "CancelledError"),
    "BaseException": (raising(BaseException("base")), "BaseException: base"),
    "MemoryError": (raising(MemoryError), "MemoryError"),
    "endless recursion": (endless, "RecursionError: maximum recursion depth exceeded"),
    "what is no exception": (raising("odd"), "TypeError: exceptions must derive from"),
    "no words": (raising(ValueError), "ValueError"),
    "NUL": (raising(ValueError("a\0b")), "ValueError: a\\0b"),
    "half of a surrogate pair": (raising(ValueError("\ud800")), "ValueError: \\ud800"),
    "ten megabytes of words": (raising(ValueError("x" * 10_000_000)), "ValueError: xxx"),
    "a __str__ that raises": (
        raising(WithoutWords()),
        "WithoutWords: (its message cannot be read: ZeroDivisionError)",
    ),
    "notes that raise": (raising(OddNotes("odd")), "OddNotes: odd"),
    "a file whose name is no text": (raise_from_nowhere, "ValueError: elsewhere"),
    "a class with a long name": (raising(type("X" * 1_000_000, (Exception,), {})), "XXX"),
    "a class with an odd name": (raising(type("%s {}\n'", (Exception,), {})), "%s {}\n'"),
    "a syntax error of odd parts": (raising(odd_syntax_error()), "SyntaxError: odd"),
    "causes in a circle": (raising(circle()), "ValueError: first"),
    "5,000 causes": (raising(chain(5_000)), "ValueError: 5000"),
    "a cause that is neither true nor false": (raising(caused_by(Untrue())), "ValueError: last"),
    "a group of a thousand": (
        raising(ExceptionGroup("group", [ValueError()] * 1_000)),
        "ExceptionGroup: group (1000 sub-exceptions)",
    ),
    "5,000 groups within each other": (
        raising(group(5_000)),
        "ExceptionGroup: group (1 sub-exception)",
    ),
}


@pytest.fixture(scope="module")
def errors_ended(end_all: Callable[..., dict[str, End]]) -> dict[str, End]:
    return end_all({name: act for name, (act, _) in ERRORS.items()})


@pytest.mark.parametrize("name", ERRORS)
def test_whatever_is_raised_fails_its_task_and_takes_its_effects_back(
    errors_ended: dict[str, End], name: str
) -> None:
    end = errors_ended[name]
    assert (end.state, end.attempts, end.effects) == ("FAILED", 1, [])
    assert end.error.startswith(ERRORS[name][1])
    assert len(end.error) < outcome.MESSAGE_LENGTH + 100
    [(error, traceback)] = end.events
    assert error == end.error
    assert 0 < len(traceback) < outcome.TRACEBACK_LENGTH + 100


def test_a_cause_that_is_neither_true_nor_false_leaves_the_retry_policy_its_say(
    end_all: Any,
) -> None:
    [end] = end_all({"odd": raising(caused_by(Untrue()))}, attempts=2).values()
    assert (end.state, end.attempts) == ("DONE", 2)


def test_an_error_is_stored_whatever_it_says(done_with: Callable[..., Any]) -> None:
    def fail(message: str) -> None:
        raise ValueError(message) from LookupError(message)

    @settings(max_examples=12)
    @given(messages=st.lists(TEXT, min_size=10, max_size=20), times=st.integers(1, 20_000))
    @example(messages=["", "\0", "\ud800", "\\", "é", "\udfff\uffff\U0010ffff"], times=60_000)
    def check(messages: list[str], times: int) -> None:
        words = [*messages, *(message * times for message in messages)]
        with done_with(fail, words) as done:
            for task, message in done:
                assert (task.state, task.attempts) == ("FAILED", 1)
                assert task.error_message.startswith("ValueError")
                assert len(task.error_message) < outcome.MESSAGE_LENGTH + 100
                if 0 < len(message) < 1_000 and not bad(message):
                    assert task.error_message == f"ValueError: {message}"
                [event] = task.events
                assert (event.type, event.error_message) == ("FAILED", task.error_message)
                assert 0 < len(event.traceback) < outcome.TRACEBACK_LENGTH + 100

    check()
