"""What the log says of tasks that fail, and what it holds."""

from __future__ import annotations

import contextlib
import gc
import logging
import threading
import traceback
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import sqlalchemy as sa
from flask import Flask, appcontext_pushed, g
from flask_sqlalchemy import SQLAlchemy

from flask_beanqueue import BeanQueue, LimitAttempt, current_task, task_failed, task_retried
from flask_beanqueue.engine import outcome
from flask_beanqueue.log import log

from .conftest import MakeApp, only_task
from .probe import query

Work = Callable[..., None]


def with_exception(caplog: pytest.LogCaptureFixture) -> list[Any]:
    return [record for record in caplog.records if record.exc_info]


def enqueue(app: Flask, processor: Any, **kwargs: Any) -> str:
    with app.app_context():
        task = processor.enqueue(**kwargs)
        task_id = str(task.id)
        processor.queue.db.session.commit()
        return task_id


@pytest.fixture
def heard() -> Iterator[list[dict[str, Any]]]:
    """What task_failed and task_retried say, in their order."""
    heard: list[dict[str, Any]] = []

    def receive(sender: Flask, **arguments: Any) -> None:
        heard.append(arguments)

    with task_failed.connected_to(receive), task_retried.connected_to(receive):
        yield heard


# Each attempt that fails is told once, with what was raised.


@pytest.mark.parametrize("uses_session", [True, False])
def test_a_task_that_fails_is_logged_with_its_exception(
    app: Flask, bq: BeanQueue, work: Work, caplog: pytest.LogCaptureFixture, uses_session: bool
) -> None:
    raised = []

    @bq.processor(channel="numbers", retry_policy=LimitAttempt(3))
    def fail() -> None:
        if uses_session:
            bq.db.session.execute(sa.text("SELECT 1"))
        raised.append(ValueError("no good"))
        raise raised[-1]

    task_id = enqueue(app, fail)
    work("numbers")
    found = with_exception(caplog)
    assert [record.exc_info[1] for record in found] == raised
    name = f"{__name__}.fail"
    words = ["will be retried", "will be retried", "failed"]
    assert [record.getMessage() for record in found] == [
        f"{name} {task_id} {each}: ValueError: no good" for each in words
    ]
    assert [record.levelname for record in found] == ["WARNING", "WARNING", "ERROR"]
    for record in found:
        assert (record.task_id, record.task_name, record.task_channel) == (task_id, name, "numbers")
        text = "".join(traceback.format_exception(*record.exc_info))
        assert "raise raised[-1]" in text
    assert len([each for each in caplog.records if task_id in each.getMessage()]) == 3


def test_what_hears_the_log_finds_the_task_its_context_and_the_variables(
    app: Flask, bq: BeanQueue, work: Work
) -> None:
    seen = []

    class Handler(logging.Handler):
        def emit(self, record: Any) -> None:
            if record.exc_info:
                *_, (frame, _) = traceback.walk_tb(record.exc_info[2])
                seen.append((current_task.func_name, g.tenant, frame.f_locals["number"]))

    @bq.processor()
    def fail(number: int) -> None:
        g.tenant = "a tenant"
        raise ValueError

    enqueue(app, fail, number=5)
    handler = Handler()
    log.addHandler(handler)
    try:
        work()
    finally:
        log.removeHandler(handler)
    assert seen == [("fail", "a tenant", 5)]


def leave_unflushable(db: Any, task: Any) -> None:
    task.channel = None


def take_away(db: Any, task: Any) -> None:
    """Change the row past the ORM: nobody has it, and it is written as FAILED."""
    db.execute(
        sa.text("UPDATE bq_tasks SET worker_id = NULL, parked = true WHERE id = :id"),
        {"id": task.id},
    )


async def coroutine() -> None:
    pass


class Quiet(Exception):
    """It is false."""

    def __len__(self) -> int:
        return 0


def raise_quiet(db: Any, task: Any) -> None:
    raise Quiet("quiet")


def lose_connection(db: Any, task: Any) -> None:
    db.execute(sa.text("SELECT pg_terminate_backend(pg_backend_pid())"))


WAYS: dict[str, tuple[Any, str]] = {
    "at its commit": (leave_unflushable, "IntegrityError"),
    "with a lost claim": (take_away, "ClaimLost"),
    "with an unrun result": (lambda db, task: coroutine(), "TypeError"),
    "with an exception that is false": (raise_quiet, "Quiet"),
    "with its connection, once too often": (lose_connection, "OperationalError"),
}


@pytest.mark.parametrize("way", WAYS)
def test_however_a_task_fails_there_is_one_record_with_the_exception(
    app: Flask,
    bq: BeanQueue,
    work: Work,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    way: str,
) -> None:
    act, kind = WAYS[way]
    monkeypatch.setattr(outcome, "MAX_INTERRUPTIONS", 1)

    @bq.processor()
    def fail(db: Any, task: Any) -> Any:
        db.execute(sa.text("SELECT 1"))
        return act(db, task)

    enqueue(app, fail)
    work()
    task = only_task(app, bq)
    assert task.state == "FAILED"
    [record] = with_exception(caplog)
    assert (record.levelname, record.task_id) == ("ERROR", str(task.id))
    assert record.exc_info[0].__name__ == kind
    assert record.getMessage().endswith(f"{task.id} failed: {task.error_message}")
    assert len([each for each in caplog.records if each.levelname == "ERROR"]) == 1


def test_a_context_that_cannot_be_pushed_is_logged_once(
    app: Flask, bq: BeanQueue, work: Work, caplog: pytest.LogCaptureFixture
) -> None:
    @bq.processor()
    def run() -> None:
        raise AssertionError

    error = LookupError("no context")

    def refuse(sender: Flask) -> None:
        if threading.current_thread().name == "beanqueue-0":
            raise error

    task_id = enqueue(app, run)
    with appcontext_pushed.connected_to(refuse, app):
        work(concurrency=1)
    [record] = with_exception(caplog)
    assert record.exc_info[1] is error
    assert record.getMessage().endswith(f"{task_id} failed: LookupError: no context")


def test_a_task_that_nothing_was_raised_in_fails_without_an_exception(
    make_app: MakeApp,
    db: SQLAlchemy,
    bq: BeanQueue,
    caplog: pytest.LogCaptureFixture,
    heard: list[Any],
) -> None:
    @bq.processor()
    def refused() -> None:
        pass

    app = make_app(db, bq, BQ_UNKNOWN_GRACE=0.0, BQ_MAX_CRASHES=1)
    with app.app_context():
        worker = bq.Worker(name="dead", state="NO_HEARTBEAT", channels=["default"])
        db.session.add_all([worker, bq.Task(module="elsewhere", name="unknown")])
        db.session.flush()
        crashed = {"state": "PROCESSING", "claims": 1, "worker_id": worker.id}
        db.session.add(bq.Task(module="elsewhere", name="crashed", **crashed))
        refused.enqueue()
        db.session.commit()
        db.session.execute(sa.text("ALTER TABLE bq_tasks ADD CHECK (state <> 'DONE')"))
        db.session.commit()
    bq.process_tasks(["default"], app=app, burst=True)
    errors = [record for record in caplog.records if record.levelname == "ERROR"]
    names = {record.getMessage().partition(" ")[0] for record in errors}
    assert names == {"elsewhere.unknown", "elsewhere.crashed", f"{__name__}.refused"}
    assert with_exception(caplog) == []
    assert [(each["task"].state, each["exception"]) for each in heard] == [("FAILED", None)] * 3


def test_a_task_that_somebody_cancels_meanwhile_is_no_error(
    app: Flask, bq: BeanQueue, work: Work, database_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    @bq.processor()
    def write(db: Any) -> None:
        query(database_url, "UPDATE bq_tasks SET state = 'CANCELLED'")
        db.execute(sa.text("SELECT 1"))

    enqueue(app, write)
    work()
    assert only_task(app, bq).state == "CANCELLED"
    assert [record for record in caplog.records if record.levelname == "ERROR"] == []
    assert with_exception(caplog) == []


@pytest.mark.parametrize("event", ["FAILED", "RETRIED"])
def test_an_outcome_whose_event_is_refused_is_logged_and_told_all_the_same(
    app: Flask,
    bq: BeanQueue,
    work: Work,
    database_url: str,
    caplog: pytest.LogCaptureFixture,
    heard: list[Any],
    event: str,
) -> None:
    query(database_url, f"ALTER TABLE bq_events ADD CHECK (type <> '{event}')")
    raised = ValueError("no good")

    @bq.processor(retry_policy=LimitAttempt(2))
    def fail(task: Any) -> None:
        if task.attempts == 0 or event == "FAILED":
            raise raised

    enqueue(app, fail)
    work()
    failures = 2 if event == "FAILED" else 1
    assert [record.exc_info[1] for record in with_exception(caplog)] == [raised] * failures
    assert [each["exception"] for each in heard] == [raised] * failures


def test_a_result_is_stored_whole_although_its_event_is_refused(
    make_app: MakeApp, db: SQLAlchemy, bq: BeanQueue, database_url: str
) -> None:
    app = make_app(db, bq, BQ_SUCCESS_EVENTS=True)
    query(database_url, "ALTER TABLE bq_events ADD CHECK (type <> 'DONE')")

    @bq.processor()
    def order() -> str:
        return "café"

    enqueue(app, order)
    bq.process_tasks(app=app, burst=True)
    assert (only_task(app, bq).state, only_task(app, bq).result) == ("DONE", "café")


def test_of_a_long_message_the_log_holds_both_ends(
    app: Flask, bq: BeanQueue, work: Work, caplog: pytest.LogCaptureFixture
) -> None:
    @bq.processor()
    def fail() -> None:
        try:
            raise KeyError("a" * 1_000_000 + "its end")
        except KeyError as error:
            raise ValueError("b" * 1_000_000) from error

    enqueue(app, fail)
    work()
    [record] = with_exception(caplog)
    assert len(record.getMessage()) + len(record.exc_text) < 50_000
    assert "characters …" in record.exc_text


# The signals carry what was raised, and nothing is kept for it.


def test_signals_carry_the_exception_with_its_traceback(
    app: Flask, bq: BeanQueue, work: Work, heard: list[Any]
) -> None:
    raised = []

    @bq.processor(retry_policy=LimitAttempt(2))
    def fail() -> None:
        raised.append(ValueError("no good"))
        raise raised[-1]

    enqueue(app, fail)
    work()
    assert [each["exception"] for each in heard] == raised
    assert [each["error"] for each in heard] == ["ValueError: no good"] * 2
    for each in heard:
        assert "raise raised[-1]" in "".join(traceback.format_exception(each["exception"]))


class Large:
    """What a processor holds: its session, a connection, a megabyte."""


@pytest.fixture
def without_gc() -> Iterator[None]:
    """What is in no circle goes at once."""
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("without_gc")
@pytest.mark.parametrize("told", [True, False])
def test_what_a_processor_held_has_gone_when_the_next_one_runs(
    app: Flask,
    db: SQLAlchemy,
    bq: BeanQueue,
    work: Work,
    monkeypatch: pytest.MonkeyPatch,
    told: bool,
) -> None:
    """The outcome is still to be written then, and there may be a thousand of them."""
    # Where pytest keeps no record.
    monkeypatch.setattr(log, "handlers", [logging.NullHandler()])
    monkeypatch.setattr(log, "propagate", False)
    held: list[weakref.ref[Any]] = []
    seen: list[list[Any]] = []

    def hold() -> Large:
        large = Large()
        held.append(weakref.ref(large))
        return large

    def deeper() -> None:
        large = hold()
        raise LookupError(id(large))

    class Error(ExceptionGroup[Exception]):
        pass

    @bq.processor()
    def fail() -> None:
        large = hold()
        try:
            deeper()
        except LookupError as problem:
            error = Error("several", [ValueError(id(large)), problem])
            held.append(weakref.ref(error))
            raise error from problem

    def look_around() -> None:
        seen.append([each() for each in held if not isinstance(each(), Error)])

    @bq.processor()
    def look() -> None:
        look_around()

    def receive(sender: Flask, exception: BaseException, **_: Any) -> None:
        look_around()
        text = "".join(traceback.format_exception(exception))
        assert "raise error from problem" in text
        assert "raise LookupError(id(large))" in text

    with app.app_context():
        fail.enqueue()
        look.enqueue()
        db.session.commit()
    with task_failed.connected_to(receive) if told else contextlib.nullcontext():
        work(concurrency=1)
    assert [set(each) for each in seen] == [{None}] * (2 if told else 1)
    assert [each() for each in held] == [None] * 3


def test_a_generator_that_has_caught_what_a_processor_raises_goes_on(
    app: Flask, bq: BeanQueue, work: Work, caplog: pytest.LogCaptureFixture
) -> None:
    """As a client does that tells its callers what has gone wrong."""

    def client() -> Iterator[Any]:
        try:
            raise ConnectionError
        except ConnectionError as error:
            yield error
        yield "it goes on"

    talk = client()

    @bq.processor()
    def call() -> None:
        raise next(talk)

    enqueue(app, call)
    work()
    assert len(with_exception(caplog)) == 1
    assert next(talk) == "it goes on"
