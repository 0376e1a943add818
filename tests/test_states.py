"""What has ended stays as it ended, also where an object that is older than its row is written."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import sqlalchemy as sa
from flask import Flask
from flask_sqlalchemy import SQLAlchemy

from flask_beanqueue import BeanQueue, TaskStateError

from .conftest import only_task, running, texts
from .probe import Probe, pause, query, wait_until

Work = Callable[..., None]

STATES = ("PENDING", "PROCESSING", "DONE", "FAILED", "CANCELLED")
LIVE = ("PENDING", "PROCESSING")

#: What may be written if the object is as new as its row, by what both say.
FRESH = {
    "PENDING": ("PROCESSING", "DONE", "FAILED", "CANCELLED"),
    "PROCESSING": ("PENDING", "DONE", "FAILED", "CANCELLED"),
    "DONE": (),
    "FAILED": ("PENDING",),
    "CANCELLED": ("PENDING",),
}
#: And if it is older, by what the row says.
STALE = {
    "PENDING": ("PENDING", "DONE", "FAILED", "CANCELLED"),
    "PROCESSING": ("PROCESSING", "DONE", "FAILED", "CANCELLED"),
    "DONE": ("DONE",),
    "FAILED": ("FAILED",),
    "CANCELLED": ("CANCELLED",),
}


@pytest.fixture
def session(app: Flask, db: SQLAlchemy) -> Any:
    with app.app_context():
        yield db.session


@pytest.fixture
def task(session: Any, bq: BeanQueue) -> Any:
    task = bq.Task(module="m", name="f")
    session.add(task)
    session.commit()
    return task


@pytest.mark.parametrize("actual", STATES)
@pytest.mark.parametrize("known", [*STATES, None])
def test_what_the_orm_may_write(
    session: Any, task: Any, database_url: str, actual: str, known: str | None
) -> None:
    """``known`` is what the object says; None: it has not been read since a commit."""
    for new in STATES:
        if new == known:
            continue  # nothing is written
        if known is not None:
            query(database_url, "UPDATE bq_tasks SET state = %s", known)
            assert task.state == known
        query(database_url, "UPDATE bq_tasks SET state = %s, finished_at = NULL", actual)
        task.state = new
        if new in (FRESH if known in (actual, None) else STALE)[actual] or new == actual:
            session.commit()
            [(state, finished)] = query(database_url, "SELECT state, finished_at FROM bq_tasks")
            assert state == new
            assert (finished is not None) == (new not in LIVE and actual in LIVE)
        else:
            with pytest.raises(TaskStateError, match=f"is {actual} and cannot be made {new}") as no:
                session.commit()
            assert no.value.state == actual
            session.rollback()
            assert query(database_url, "SELECT state FROM bq_tasks") == [(actual,)]
            session.rollback()


def test_a_task_that_is_done_meanwhile_is_not_cancelled(
    app: Flask, db: Any, bq: BeanQueue, work: Work, database_url: str
) -> None:
    @bq.processor()
    def answer() -> int:
        return 42

    with app.app_context():
        task = answer.enqueue()
        db.session.commit()
        assert task.state == "PENDING"
        work()
        task.state = "CANCELLED"
        with pytest.raises(TaskStateError, match="What is done stays done"):
            db.session.commit()
        db.session.rollback()
        merged = bq.Task(id=task.id, state="PENDING")
        db.session.merge(merged)
        with pytest.raises(TaskStateError, match="to do it again, enqueue a new task"):
            db.session.flush()
        db.session.rollback()
        db.session.delete(task)
        db.session.commit()
    assert query(database_url, "SELECT * FROM bq_tasks") == []


def test_a_retry_that_comes_too_late_takes_the_task_from_nobody(
    session: Any, task: Any, database_url: str
) -> None:
    """Somebody else was faster, and the task runs again."""
    query(database_url, "UPDATE bq_tasks SET state = 'FAILED'")
    assert task.state == "FAILED"
    query(database_url, "UPDATE bq_tasks SET state = 'PROCESSING'")
    task.state = "PENDING"
    with pytest.raises(TaskStateError, match=r"It was FAILED when it was read: db\.session\.ref"):
        session.flush()
    session.rollback()


def test_failed_tasks_are_tried_again_one_by_one(
    app: Flask, db: Any, bq: BeanQueue, work: Work, database_url: str
) -> None:
    """Each commit expires the others."""
    fails = [True]

    @bq.processor()
    def fail() -> None:
        if fails[0]:
            raise ValueError

    with app.app_context():
        fail.enqueue_many([{}, {}, {}])
        db.session.commit()
        work()
        fails[0] = False
        for task in db.session.scalars(sa.select(bq.Task).filter_by(state="FAILED")).all():
            task.state = "PENDING"
            db.session.commit()
        assert query(database_url, "SELECT count(finished_at) FROM bq_tasks") == [(0,)]
        work()
        tasks = db.session.scalars(sa.select(bq.Task)).all()
        assert [(task.state, task.attempts) for task in tasks] == [("DONE", 2)] * 3


def test_what_is_deleted_meanwhile_is_not_there_to_be_cancelled(
    session: Any, task: Any, database_url: str
) -> None:
    assert task.state == "PENDING"
    query(database_url, "DELETE FROM bq_tasks")
    task.state = "CANCELLED"
    with pytest.raises(sa.orm.exc.StaleDataError):
        session.flush()
    session.rollback()


@pytest.mark.parametrize("uses_session", [False, True])
@pytest.mark.parametrize("waits", [False, True])
def test_to_cancel_a_running_task_is_nothing_to_warn_of(
    app: Flask,
    db: Any,
    bq: BeanQueue,
    Note: Any,
    probe: Probe,
    database_url: str,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    uses_session: bool,
    waits: bool,
) -> None:
    """Whether the task ends before or after the cancel is committed."""
    monkeypatch.setenv("DATABASE_URL", database_url)
    caplog.set_level(logging.INFO, "flask_beanqueue")

    @bq.processor()
    def write(db: Any) -> None:
        if uses_session:
            db.add(Note(text="never"))
        pause("write")

    with app.app_context(), running(app, bq), probe.paused("write", write) as go_on:
        task = db.session.scalars(sa.select(bq.Task)).one()
        task.state = "CANCELLED"
        if waits:
            db.session.flush()
            go_on()
            waiting = "SELECT 1 FROM pg_locks WHERE NOT granted"
            wait_until(lambda: not uses_session or query(database_url, waiting))
        db.session.commit()
        go_on()
        wait_until(lambda: "was cancelled" in caplog.text)
    ended = only_task(app, bq)
    assert ended.state == "CANCELLED"
    assert ended.started_at <= ended.finished_at
    assert texts(app, db, Note) == []
    levels = {record.levelname for record in caplog.records if "write" in record.getMessage()}
    assert levels <= {"INFO", "WARNING"} if waits and not uses_session else levels == {"INFO"}
    [record] = [each for each in caplog.records if "was cancelled" in each.getMessage()]
    assert record.levelname == "INFO"


def test_to_change_anything_else_of_a_task_asks_nothing(
    app: Flask, db: Any, session: Any, task: Any, bq: BeanQueue
) -> None:
    assert task.priority == 0
    statements = []

    @sa.event.listens_for(db.engine, "before_cursor_execute")
    def note(connection: Any, cursor: Any, statement: str, *rest: Any) -> None:
        statements.append(statement.split()[0])

    task.priority = 3
    task.error_message = "seen"
    session.commit()
    assert statements == ["UPDATE", "SELECT"]  # the NOTIFY
