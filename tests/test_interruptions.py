"""Tasks that lose their database connection, which is no fault of theirs."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from typing import Any

import pytest
import sqlalchemy as sa
from flask import Flask
from flask_sqlalchemy import SQLAlchemy

from flask_beanqueue import BeanQueue, current_task
from flask_beanqueue.engine import outcome

Work = Callable[..., None]

KILL = sa.text("SELECT pg_terminate_backend(pg_backend_pid())")


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A busy machine must not find the task due again before the burst has ended."""
    monkeypatch.setattr(outcome, "INTERRUPTION_DELAY", outcome.LONGEST_INTERRUPTION_DELAY)


@pytest.fixture
def only_task(app: Flask, bq: BeanQueue) -> Callable[[], Any]:
    def only_task() -> Any:
        with app.app_context():
            return bq.db.session.scalars(
                sa.select(bq.Task).options(sa.orm.selectinload(bq.Task.events))
            ).one()

    return only_task


def start(app: Flask, db: SQLAlchemy, processor: Any, **columns: Any) -> None:
    with app.app_context():
        task = processor.enqueue()
        for name, value in columns.items():
            setattr(task, name, value)
        db.session.commit()


def test_a_lost_connection_is_no_failure(
    app: Flask,
    db: SQLAlchemy,
    bq: BeanQueue,
    Note: Any,
    work: Work,
    only_task: Callable[[], Any],
) -> None:
    @bq.processor()
    def write(db: Any, task: Any) -> None:
        db.add(Note(text="once"))
        db.flush()
        if task.claims == 1:
            db.execute(KILL)

    start(app, db, write)
    work()
    task = only_task()
    assert (task.state, task.attempts, task.crashes, task.interruptions) == ("PENDING", 0, 0, 1)
    assert task.error_message.startswith("The database was in trouble (1 of 20 times).")
    [event] = task.events
    assert event.type == "INTERRUPTED"
    assert 0.5 < (event.scheduled_at - event.created_at).total_seconds() < 1.5
    assert event.scheduled_at == task.scheduled_at
    with app.app_context():
        db.session.execute(sa.update(bq.Task).values(scheduled_at=sa.func.now()))
        db.session.commit()
    work()
    with app.app_context():
        assert list(db.session.scalars(sa.select(Note.text))) == ["once"]
    task = only_task()
    assert (task.state, task.attempts, task.error_message) == ("DONE", 1, None)


@pytest.mark.parametrize(("before", "seconds"), [(0, 1), (3, 8), (7, 128), (9, 300), (18, 300)])
def test_each_interruption_is_followed_by_a_longer_pause(
    app: Flask,
    db: SQLAlchemy,
    bq: BeanQueue,
    work: Work,
    only_task: Callable[[], Any],
    before: int,
    seconds: int,
) -> None:
    @bq.processor()
    def kill(db: Any) -> None:
        db.execute(KILL)

    start(app, db, kill, interruptions=before)
    work()
    [event] = only_task().events
    assert round((event.scheduled_at - event.created_at).total_seconds()) == seconds


def test_of_tasks_that_lose_their_connections_together_only_the_first_waits(
    app: Flask, db: SQLAlchemy, bq: BeanQueue, work: Work
) -> None:
    """It cannot know yet that others do, too. They have been through a lot already."""
    together = threading.Barrier(4)

    @bq.processor()
    def kill(task: Any, db: Any) -> None:
        db.execute(sa.text("SELECT 1"))
        if task.interruptions == 5:
            together.wait(60)
            db.execute(KILL)

    with app.app_context():
        for _ in range(4):
            kill.enqueue().interruptions = 5
        db.session.commit()
        work(concurrency=4)
        delays = db.session.scalars(
            sa.select(bq.Event.scheduled_at - bq.Event.created_at).order_by(sa.text("1"))
        )
        *others, first = [delay.total_seconds() for delay in delays]
    assert len(others) == 3
    assert max(others) < 0.1
    assert round(first) == 32


@pytest.mark.usefixtures("patient")
def test_a_task_that_is_always_interrupted_fails_in_the_end(
    app: Flask, db: SQLAlchemy, bq: BeanQueue, work: Work, only_task: Callable[[], Any]
) -> None:
    @bq.processor()
    def kill(db: Any) -> None:
        db.execute(KILL)

    start(app, db, kill, interruptions=19)
    work()
    task = only_task()
    assert (task.state, task.interruptions) == ("FAILED", 20)
    assert "in trouble 20 times while this task ran. It will not be run again" in task.error_message
    assert [event.type for event in task.events] == ["INTERRUPTED"]


@pytest.mark.usefixtures("patient")
def test_a_task_that_cannot_connect_is_interrupted_too(
    app: Flask, db: SQLAlchemy, bq: BeanQueue, work: Work, only_task: Callable[[], Any]
) -> None:
    engine = bq.engine(app)

    @bq.processor()
    def read(db: Any) -> None:
        engine.dispose()
        db.execute(sa.text("SELECT 1"))

    def refuse(dialect: Any, record: Any, args: Any, kwargs: Any) -> None:
        if current_task:
            raise dialect.loaded_dbapi.OperationalError("sorry, too many clients already")

    sa.event.listen(engine, "do_connect", refuse)
    start(app, db, read)
    work()
    task = only_task()
    assert (task.state, task.interruptions) == ("PENDING", 1)
    assert task.error_message.endswith("OperationalError: sorry, too many clients already")


@pytest.mark.usefixtures("patient")
def test_a_processor_that_wraps_the_loss_is_interrupted_too(
    app: Flask, db: SQLAlchemy, bq: BeanQueue, work: Work, only_task: Callable[[], Any]
) -> None:
    @bq.processor()
    def kill(db: Any) -> None:
        try:
            db.execute(KILL)
        except sa.exc.DBAPIError as error:
            raise RuntimeError("could not order") from error

    start(app, db, kill)
    work()
    assert only_task().interruptions == 1


@pytest.mark.usefixtures("patient")
def test_a_processor_that_swallows_the_loss_is_interrupted_too(
    app: Flask, db: SQLAlchemy, bq: BeanQueue, work: Work, only_task: Callable[[], Any]
) -> None:
    """What it wrote before is gone with its transaction."""

    @bq.processor()
    def kill(db: Any) -> None:
        with contextlib.suppress(sa.exc.DBAPIError):
            db.execute(KILL)

    start(app, db, kill)
    work()
    task = only_task()
    assert (task.state, task.interruptions) == ("PENDING", 1)


@pytest.mark.usefixtures("patient")
def test_a_processor_that_recovers_from_the_loss_is_done(
    app: Flask, db: SQLAlchemy, bq: BeanQueue, Note: Any, work: Work, only_task: Callable[[], Any]
) -> None:
    @bq.processor()
    def kill(db: Any) -> None:
        with contextlib.suppress(sa.exc.DBAPIError):
            db.execute(KILL)
        db.rollback()
        db.add(Note(text="anew"))

    start(app, db, kill)
    work()
    task = only_task()
    assert (task.state, task.interruptions, task.attempts) == ("DONE", 0, 1)


@pytest.mark.usefixtures("patient")
def test_what_a_processor_raises_after_it_recovered_is_a_failure(
    app: Flask, db: SQLAlchemy, bq: BeanQueue, work: Work, only_task: Callable[[], Any]
) -> None:
    @bq.processor()
    def kill(db: Any) -> None:
        with contextlib.suppress(sa.exc.DBAPIError):
            db.execute(KILL)
        db.rollback()
        raise ValueError("the task's own doing")

    start(app, db, kill)
    work()
    task = only_task()
    assert (task.state, task.error_message) == ("FAILED", "ValueError: the task's own doing")


@pytest.mark.usefixtures("patient")
@pytest.mark.parametrize("loses", [True, False])
def test_an_exception_that_is_its_own_cause_is_a_failure(
    app: Flask, db: SQLAlchemy, bq: BeanQueue, work: Work, only_task: Callable[[], Any], loses: bool
) -> None:
    @bq.processor()
    def again(db: Any) -> None:
        if loses:
            with contextlib.suppress(sa.exc.DBAPIError):
                db.execute(KILL)
            db.rollback()
        try:
            raise ValueError("odd")
        except ValueError as error:
            raise error from error

    start(app, db, again)
    work()
    assert only_task().error_message == "ValueError: odd"


@pytest.mark.usefixtures("patient")
def test_a_retry_policy_that_loses_the_connection_is_interrupted(
    app: Flask, db: SQLAlchemy, bq: BeanQueue, work: Work, only_task: Callable[[], Any]
) -> None:
    @bq.processor(retry_policy=lambda task: db.session.execute(KILL))
    def kill() -> None:
        raise ValueError

    start(app, db, kill)
    work()
    task = only_task()
    assert (task.state, task.interruptions) == ("PENDING", 1)


@pytest.mark.usefixtures("patient")
def test_a_commit_whose_answer_is_lost_is_not_called_rolled_back(
    app: Flask,
    db: SQLAlchemy,
    bq: BeanQueue,
    Note: Any,
    work: Work,
    only_task: Callable[[], Any],
    caplog: pytest.LogCaptureFixture,
) -> None:
    lost = []

    @bq.processor()
    def write(db: Any) -> None:
        db.add(Note(text="kept"))

    def lose(connection: Any) -> None:
        if current_task and not lost:
            dbapi_connection = connection.connection.dbapi_connection
            dbapi_connection.commit()
            dbapi_connection.close()
            lost.append(1)

    sa.event.listen(bq.engine(app), "commit", lose)
    start(app, db, write)
    work()
    assert lost == [1]
    assert only_task().state == "DONE"
    assert "had ended, or was taken over, when it lost its connection" in caplog.text
    assert "rolled back" not in caplog.text


@pytest.mark.usefixtures("patient")
@pytest.mark.parametrize("lives", [True, False])
def test_losing_another_database_is_a_failure(
    app: Flask,
    db: SQLAlchemy,
    bq: BeanQueue,
    work: Work,
    only_task: Callable[[], Any],
    other_database_url: str,
    lives: bool,
) -> None:
    url = sa.make_url(other_database_url)
    other = sa.create_engine(url if lives else url.set(database="nowhere"), poolclass=sa.NullPool)

    @bq.processor()
    def ask() -> None:
        with other.connect() as connection:
            connection.execute(KILL)

    start(app, db, ask)
    work()
    task = only_task()
    assert (task.state, task.attempts, task.interruptions) == ("FAILED", 1, 0)


@pytest.mark.usefixtures("patient")
def test_an_error_of_the_database_is_told_without_the_statement_and_its_values(
    app: Flask,
    db: SQLAlchemy,
    bq: BeanQueue,
    Note: Any,
    work: Work,
    only_task: Callable[[], Any],
    caplog: pytest.LogCaptureFixture,
) -> None:
    @bq.processor()
    def write(db: Any) -> None:
        db.add_all([Note(id=1, text="secret"), Note(id=1, text="secret")])
        db.flush()

    start(app, db, write)
    work()
    task = only_task()
    assert task.error_message.startswith("IntegrityError: duplicate key value")
    assert "secret" not in task.error_message
    assert not any("secret" in record.getMessage() for record in caplog.records)
