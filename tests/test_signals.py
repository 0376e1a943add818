"""Signals: who hears what, and when."""

from __future__ import annotations

import contextlib
import threading
import types
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import sqlalchemy as sa
from flask import Flask, appcontext_pushed, current_app, g
from flask_sqlalchemy import SQLAlchemy

from flask_beanqueue import (
    BeanQueue,
    LimitAttempt,
    current_task,
    task_failed,
    task_retried,
    task_started,
    task_succeeded,
    worker_started,
    worker_stopped,
)

from .conftest import MakeApp
from .probe import query

Work = Callable[..., None]

SIGNALS = (
    worker_started,
    task_started,
    task_retried,
    task_succeeded,
    task_failed,
    worker_stopped,
)


COLUMNS = (
    "id",
    "state",
    "func_name",
    "kwargs",
    "attempts",
    "error_message",
    "result",
    "created_at",
)


@pytest.fixture
def heard() -> Iterator[list[tuple[str, Any, dict[str, Any]]]]:
    """All signals that have been sent, in their order: name, sender, arguments."""
    heard: list[tuple[str, Any, dict[str, Any]]] = []
    with contextlib.ExitStack() as stack:
        for signal in SIGNALS:

            def receiver(sender: Any, name: str = signal.name, **arguments: Any) -> None:
                if (task := arguments.get("task")) is not None:  # as it is now
                    arguments["task"] = types.SimpleNamespace(
                        **{key: getattr(task, key) for key in COLUMNS}
                    )
                heard.append((name, sender, arguments))

            stack.enter_context(signal.connected_to(receiver))
        yield heard


@pytest.fixture
def uses_session() -> bool:
    """Whether a task's completion goes with its own commit, or with others'."""
    return True


both_ways = pytest.mark.parametrize(
    "uses_session", [True, False], ids=["with session", "without session"]
)


@pytest.fixture
def succeed(bq: BeanQueue, Note: Any, uses_session: bool) -> Any:
    @bq.processor()
    def succeed() -> str:
        if uses_session:
            bq.db.session.add(Note(text="done"))
        return "well"

    return succeed


@pytest.fixture
def fail(bq: BeanQueue, Note: Any, uses_session: bool) -> Any:
    @bq.processor(retry_policy=LimitAttempt(2))
    def fail() -> None:
        if uses_session:
            bq.db.session.add(Note(text="never"))
            bq.db.session.flush()
        raise ValueError("no good")

    return fail


def enqueue(app: Flask, *processors: Any) -> None:
    with app.app_context():
        for processor in processors:
            processor.enqueue()
            processor.queue.db.session.commit()


@both_ways
def test_a_task_that_succeeds(
    app: Flask, bq: BeanQueue, succeed: Any, work: Work, heard: list[Any]
) -> None:
    enqueue(app, succeed)
    work("default", "mails")
    names = ["worker-started", "task-started", "task-succeeded", "worker-stopped"]
    assert [name for name, _, _ in heard] == names
    assert all(sender is app for _, sender, _ in heard)
    (_, _, started), (_, _, task_begun), (_, _, task_done), (_, _, stopped) = heard
    assert started["channels"] == ("default", "mails")
    assert started == stopped
    with app.app_context():
        task = bq.db.session.scalars(sa.select(bq.Task)).one()
        assert task.worker_id == started["worker_id"]
    assert [*task_begun, *task_done] == ["task", "task"]
    assert task_begun["task"].id == task_done["task"].id == task.id
    done = task_done["task"]
    assert (done.state, done.func_name, done.kwargs, done.attempts) == ("DONE", "succeed", {}, 1)
    assert (done.result, done.created_at) == ("well", task.created_at)


@both_ways
def test_a_task_that_is_retried_and_fails(
    app: Flask, fail: Any, work: Work, heard: list[Any]
) -> None:
    enqueue(app, fail)
    work()
    about_tasks = [(name, arguments) for name, _, arguments in heard if name.startswith("task")]
    names = ["task-started", "task-retried", "task-started", "task-failed"]
    assert [name for name, _ in about_tasks] == names
    retried, failed = about_tasks[1][1], about_tasks[3][1]
    assert (retried["error"], failed["error"]) == ("ValueError: no good",) * 2
    assert (retried["task"].state, retried["task"].attempts) == ("PENDING", 1)
    assert (failed["task"].state, failed["task"].attempts) == ("FAILED", 2)
    assert failed["task"].error_message == "ValueError: no good"


def test_an_unknown_processor_that_fails_is_heard_of(
    make_app: MakeApp, db: SQLAlchemy, bq: BeanQueue, heard: list[Any]
) -> None:
    app = make_app(db, bq, BQ_UNKNOWN_GRACE=0.0)
    with app.app_context():
        db.session.add(bq.Task(module="elsewhere", name="unheard_of"))
        db.session.commit()
    bq.process_tasks(["default"], app=app, burst=True)
    [failed] = [arguments for name, _, arguments in heard if name == "task-failed"]
    assert failed["task"].func_name == "unheard_of"
    assert "BQ_UNKNOWN_GRACE" in failed["error"]
    assert "task-started" not in {name for name, _, _ in heard}


def test_a_parked_task_has_neither_succeeded_nor_failed(
    app: Flask, bq: BeanQueue, work: Work, heard: list[Any]
) -> None:
    @bq.processor(auto_complete=False)
    def order() -> None:
        pass

    enqueue(app, order)
    work()
    assert [name for name, _, _ in heard] == ["worker-started", "task-started", "worker-stopped"]


@both_ways
@pytest.mark.parametrize(
    ("signal", "state"),
    [
        (task_started, "PROCESSING"),
        (task_succeeded, "DONE"),
        (task_retried, "PENDING"),
        (task_failed, "FAILED"),
    ],
    ids=lambda value: getattr(value, "name", value),
)
def test_what_a_signal_says_is_committed(
    app: Flask, succeed: Any, fail: Any, work: Work, database_url: str, signal: Any, state: str
) -> None:
    seen = []

    def receiver(sender: Flask, task: Any, **_: Any) -> None:
        # From another connection.
        seen.extend(query(database_url, "SELECT state FROM bq_tasks WHERE id = %s", str(task.id)))

    enqueue(app, succeed if signal is task_succeeded else fail)
    with signal.connected_to(receiver):
        work()
    assert (state,) in seen
    assert set(seen) == {(state,)}


def test_a_task_starts_in_its_own_thread_and_app_context(
    app: Flask, bq: BeanQueue, work: Work
) -> None:
    seen: list[Any] = []

    @bq.processor()
    def look() -> None:
        seen.append(threading.get_ident())

    def receiver(sender: Flask, task: Any) -> None:
        assert current_app._get_current_object() is sender  # type: ignore[attr-defined]
        assert current_task == task
        seen.append(threading.get_ident())

    enqueue(app, look)
    with task_started.connected_to(receiver):
        work()
    assert len(seen) == 2
    assert seen[0] == seen[1] != threading.get_ident()


@pytest.mark.parametrize("signal", SIGNALS, ids=lambda signal: signal.name)
def test_every_receiver_has_an_app_context_and_a_session(
    app: Flask,
    db: SQLAlchemy,
    Note: Any,
    succeed: Any,
    fail: Any,
    work: Work,
    signal: Any,
    database_url: str,
) -> None:
    closed = []

    @app.teardown_appcontext
    def teardown(error: BaseException | None) -> None:
        if "heard" in g:
            closed.append(error)

    def receiver(sender: Flask, **_: Any) -> None:
        assert current_app._get_current_object() is sender  # type: ignore[attr-defined]
        g.heard = True
        db.session.add(Note(text=signal.name + " heard"))
        db.session.commit()

    enqueue(app, succeed, fail)
    with signal.connected_to(receiver):
        work()
    found = query(database_url, "SELECT count(*) FROM note WHERE text LIKE '%% heard'")
    assert found == [(len(closed),)]
    assert closed


#: The contexts that a worker makes as it starts, to find its engines.
ITS_OWN = 2


def test_without_receivers_a_worker_makes_no_context_for_its_signals(
    app: Flask, succeed: Any, fail: Any, work: Work
) -> None:
    made = []

    def count(sender: Flask, **_: Any) -> None:
        if threading.current_thread() is threading.main_thread():
            made.append(sender)

    enqueue(app, succeed, fail)
    with appcontext_pushed.connected_to(count, app):
        work()
    assert len(made) == ITS_OWN


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("error", [LookupError, SystemExit])
@pytest.mark.parametrize(
    "signal", [worker_started, task_failed, worker_stopped], ids=lambda s: s.name
)
def test_a_context_of_a_signal_that_raises_is_logged_and_harmless(
    app: Flask,
    fail: Any,
    work: Work,
    signal: Any,
    when: str,
    error: type[BaseException],
    database_url: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    contexts = []
    heard = []

    def pushed(sender: Flask, **_: Any) -> None:
        if threading.current_thread() is threading.main_thread():
            contexts.append(sender)
            if when == "before" and len(contexts) > ITS_OWN:
                raise error("no context")

    @app.teardown_appcontext
    def teardown(_: BaseException | None) -> None:
        if "heard" in g:
            raise error("no end")

    def receiver(sender: Flask, **_: Any) -> None:
        g.heard = True
        heard.append(sender)

    enqueue(app, fail)
    with signal.connected_to(receiver), appcontext_pushed.connected_to(pushed, app):
        work()
    assert len(heard) == (when == "after")
    assert query(database_url, "SELECT state FROM bq_tasks") == [("FAILED",)]
    assert query(database_url, "SELECT state FROM bq_workers") == [("SHUTDOWN",)]
    assert f"The app context of the signal '{signal.name}' raised" in caplog.text


@pytest.mark.parametrize("signal", SIGNALS, ids=lambda signal: signal.name)
def test_a_receiver_that_raises_is_logged_and_harmless(
    app: Flask,
    succeed: Any,
    fail: Any,
    work: Work,
    signal: Any,
    heard: list[Any],
    database_url: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def receiver(sender: Flask, **_: Any) -> None:
        raise ValueError("deaf")

    enqueue(app, succeed, fail)
    with signal.connected_to(receiver):
        work(concurrency=1)
    assert dict(query(database_url, "SELECT func_name, state FROM bq_tasks")) == {
        "succeed": "DONE",
        "fail": "FAILED",
    }
    assert query(database_url, "SELECT state FROM bq_workers") == [("SHUTDOWN",)]
    assert f"A receiver of the signal '{signal.name}' raised" in caplog.text
    assert signal.name in {name for name, _, _ in heard}  # the other receivers go on


@pytest.mark.parametrize("signal", SIGNALS, ids=lambda signal: signal.name)
def test_a_receiver_that_would_end_the_program_does_not(
    app: Flask, succeed: Any, fail: Any, work: Work, signal: Any, database_url: str
) -> None:
    def receiver(sender: Flask, **_: Any) -> None:
        raise SystemExit(3)

    enqueue(app, succeed, fail)
    with signal.connected_to(receiver):
        work()
    found = query(database_url, "SELECT func_name, state, error_message FROM bq_tasks ORDER BY id")
    assert found == [("succeed", "DONE", None), ("fail", "FAILED", "ValueError: no good")]
    assert query(database_url, "SELECT state FROM bq_workers") == [("SHUTDOWN",)]


@both_ways
@pytest.mark.parametrize(
    "signal", [task_started, task_succeeded, task_retried, task_failed], ids=lambda s: s.name
)
def test_a_receiver_may_use_the_session(
    app: Flask,
    db: SQLAlchemy,
    Note: Any,
    succeed: Any,
    fail: Any,
    work: Work,
    signal: Any,
    database_url: str,
) -> None:
    def receiver(sender: Flask, task: Any, **_: Any) -> None:
        db.session.add(Note(text=f"{signal.name} {task.func_name}"))
        db.session.commit()

    enqueue(app, succeed, fail)
    with signal.connected_to(receiver):
        work()
    assert dict(query(database_url, "SELECT func_name, state FROM bq_tasks")) == {
        "succeed": "DONE",
        "fail": "FAILED",
    }
    found = query(database_url, "SELECT text FROM note WHERE text LIKE '%% %%' ORDER BY text")
    wanted = {
        "task-started": ["fail", "fail", "succeed"],
        "task-succeeded": ["succeed"],
        "task-retried": ["fail"],
        "task-failed": ["fail"],
    }
    assert found == [(f"{signal.name} {name}",) for name in wanted[signal.name]]


def test_what_a_receiver_adds_when_a_task_starts_goes_with_the_task(
    app: Flask, db: SQLAlchemy, Note: Any, succeed: Any, fail: Any, work: Work, database_url: str
) -> None:
    def receiver(sender: Flask, task: Any) -> None:
        db.session.add(Note(text=f"started {task.func_name}"))

    enqueue(app, succeed, fail)
    with task_started.connected_to(receiver):
        work()
    found = query(database_url, "SELECT text FROM note WHERE text LIKE 'started%%'")
    assert found == [("started succeed",)]


@pytest.mark.parametrize(
    "signal", [task_started, task_succeeded, task_retried, task_failed], ids=lambda s: s.name
)
def test_a_receiver_whose_sql_fails_is_harmless(
    app: Flask, db: SQLAlchemy, succeed: Any, fail: Any, work: Work, signal: Any, database_url: str
) -> None:
    def receiver(sender: Flask, **_: Any) -> None:
        db.session.execute(sa.text("SELECT no_such_column"))

    enqueue(app, succeed, fail)
    with signal.connected_to(receiver):
        work()
    found = query(database_url, "SELECT func_name, state, error_message FROM bq_tasks ORDER BY id")
    assert found == [("succeed", "DONE", None), ("fail", "FAILED", "ValueError: no good")]


def test_a_receiver_may_make_tasks(
    app: Flask, db: SQLAlchemy, bq: BeanQueue, succeed: Any, work: Work, database_url: str
) -> None:
    @bq.processor()
    def follow() -> None:
        pass

    def receiver(sender: Flask, task: Any) -> None:
        if task.func_name == "succeed":
            follow.enqueue()
            db.session.commit()

    enqueue(app, succeed)
    with task_succeeded.connected_to(receiver):
        work()
    found = query(database_url, "SELECT func_name, state FROM bq_tasks ORDER BY id")
    assert found == [("succeed", "DONE"), ("follow", "DONE")]


def test_a_receiver_of_one_app_hears_only_of_that_app(app: Flask, succeed: Any, work: Work) -> None:
    here, there = [], []

    def hear_here(sender: Flask, **_: Any) -> None:
        here.append(sender)

    def hear_there(sender: Flask, **_: Any) -> None:
        there.append(sender)

    enqueue(app, succeed)
    with (
        task_succeeded.connected_to(hear_here, sender=app),
        task_succeeded.connected_to(hear_there, sender=Flask("elsewhere")),
    ):
        work()
    assert (here, there) == ([app], [])
