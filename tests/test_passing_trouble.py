"""What the whole database is in for a while, and what becomes of the tasks that meet it."""

from __future__ import annotations

import contextlib
import datetime
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import sqlalchemy as sa
from flask import Flask
from flask_sqlalchemy import SQLAlchemy

from flask_beanqueue import BeanQueue, DelayRetry

from . import postgres
from .conftest import MakeApp, running, texts, with_driver
from .probe import connect, query, wait_until

Work = Callable[..., None]

#: The whole of its tests' database may be told anything.
SETTINGS = [*postgres.FAST, "max_notify_queue_pages=64"]


@pytest.fixture(scope="module")
def own_server_url() -> Iterator[str]:
    with postgres.running(settings=SETTINGS) as server:
        yield server.url


@pytest.fixture
def url(own_server_url: str) -> Iterator[str]:
    with postgres.database(own_server_url) as url:
        yield with_driver(url)


@pytest.fixture
def app(make_app: MakeApp, db: SQLAlchemy, bq: BeanQueue, Note: Any, url: str) -> Iterator[Flask]:
    app = make_app(db, bq, SQLALCHEMY_DATABASE_URI=url)
    yield app
    with app.app_context():
        db.engine.dispose()


@contextlib.contextmanager
def read_only(url: str) -> Iterator[None]:
    """No transaction of the server may write."""
    with contextlib.closing(connect(url)) as connection, connection.cursor() as cursor:
        cursor.execute("ALTER SYSTEM SET default_transaction_read_only = on")
        cursor.execute("SELECT pg_reload_conf()")
        try:
            yield
        finally:
            cursor.execute("ALTER SYSTEM RESET default_transaction_read_only")
            cursor.execute("SELECT pg_reload_conf()")


@contextlib.contextmanager
def full_queue(url: str) -> Iterator[None]:
    """PostgreSQL can take no more notifications, for somebody does not read theirs."""
    with contextlib.ExitStack() as stack:
        idle, busy = (stack.enter_context(contextlib.closing(connect(url))) for _ in range(2))
        idle.cursor().execute("LISTEN filled")
        idle.cursor().execute("BEGIN")
        idle.cursor().execute("SELECT 1")
        cursor = busy.cursor()
        with contextlib.suppress(Exception):
            while True:
                cursor.execute("SELECT pg_notify('filled', repeat('x', 7900) || random())")
        cursor.execute("SELECT pg_notification_queue_usage() > 0.9")
        assert cursor.fetchone() == (True,)
        yield
    # To ask for it also takes out what everybody has read.
    wait_until(lambda: query(url, "SELECT pg_notification_queue_usage()") == [(0.0,)])


def states(app: Flask, db: SQLAlchemy, bq: BeanQueue) -> list[tuple[str, int]]:
    with app.app_context():
        count = sa.func.count()
        return [
            (state, number)
            for state, number in db.session.execute(
                sa.select(bq.Task.state, count).group_by(bq.Task.state).order_by(bq.Task.state)
            )
        ]


def test_a_database_that_is_read_only_for_a_while_fails_no_task(
    app: Flask,
    db: SQLAlchemy,
    bq: BeanQueue,
    Note: Any,
    url: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    @bq.processor()
    def write(number: int) -> None:
        db.session.add(Note(text=str(number)))
        db.session.flush()

    with app.app_context():
        write.enqueue_many([{"number": number} for number in range(2000)])
        db.session.commit()
    with running(app, bq):
        wait_until(lambda: texts(app, db, Note))
        with read_only(url):
            wait_until(lambda: "in a read-only transaction" in caplog.text)
        wait_until(lambda: states(app, db, bq) == [("DONE", 2000)])
    assert sorted(map(int, texts(app, db, Note))) == [*range(2000)]


@pytest.mark.parametrize(
    "statement",
    ["SET TRANSACTION READ ONLY", "SET SESSION CHARACTERISTICS AS TRANSACTION READ ONLY"],
    ids=["its transaction", "its connection"],
)
def test_what_has_begun_while_a_database_was_read_only_is_done_on_another_connection(
    app: Flask, db: SQLAlchemy, bq: BeanQueue, Note: Any, statement: str
) -> None:
    @bq.processor()
    def write(task: Any) -> None:
        if task.claims == 1:
            db.session.execute(sa.text(statement))
            if "SESSION" in statement:
                db.session.commit()
        db.session.add(Note(text="once"))
        db.session.flush()

    with app.app_context():
        write.enqueue()
        db.session.commit()
    with running(app, bq):
        wait_until(lambda: states(app, db, bq) == [("DONE", 1)])
    assert texts(app, db, Note) == ["once"]
    with app.app_context(), contextlib.ExitStack() as stack:
        pool: Any = db.engine.pool
        connections = [stack.enter_context(db.engine.connect()) for _ in range(pool.checkedin())]
        shown = [each.scalar(sa.text("SHOW default_transaction_read_only")) for each in connections]
        assert set(shown) == {"off"}


@pytest.mark.parametrize("uses_session", [False, True])
def test_tasks_wait_for_their_next_attempt_although_no_notify_can_be_sent(
    app: Flask, db: SQLAlchemy, bq: BeanQueue, work: Work, url: str, uses_session: bool
) -> None:
    @bq.processor(retry_policy=DelayRetry(datetime.timedelta(hours=1)))
    def fail() -> None:
        if uses_session:
            db.session.execute(sa.select(1))
        raise ValueError

    with app.app_context():
        fail.enqueue_many([{}] * 4)
        db.session.commit()
    with full_queue(url):
        work()
    columns = "SELECT state, attempts, crashes FROM bq_tasks"
    assert query(url, columns) == [("PENDING", 1, 0)] * 4
    assert query(url, "SELECT type FROM bq_events") == [("RETRIED",)] * 4


def test_tasks_of_a_dead_worker_wait_again_although_no_notify_can_be_sent(
    app: Flask, db: SQLAlchemy, bq: BeanQueue, work: Work, url: str
) -> None:
    with app.app_context():
        for _ in range(4):
            db.session.add(bq.Task(module="m", func_name="f", channel="other", state="PROCESSING"))
        db.session.commit()
    with full_queue(url):
        work("default")
    assert query(url, "SELECT state, crashes FROM bq_tasks") == [("PENDING", 1)] * 4


def test_a_task_that_makes_others_is_interrupted_while_no_notify_can_be_sent(
    app: Flask, db: SQLAlchemy, bq: BeanQueue, work: Work, url: str
) -> None:
    """Its own commit is refused, through no fault of its own."""

    @bq.processor()
    def child() -> None:
        pass

    @bq.processor()
    def make() -> None:
        child.enqueue()

    with app.app_context():
        make.enqueue()
        db.session.commit()
    with full_queue(url):
        work()
        columns = "SELECT state, attempts, interruptions FROM bq_tasks"
        assert query(url, columns) == [("PENDING", 0, 1)]
    query(url, "UPDATE bq_tasks SET scheduled_at = now()")
    work()
    assert states(app, db, bq) == [("DONE", 2)]


def test_a_conflict_at_the_completion_is_an_interruption(
    app: Flask, db: SQLAlchemy, bq: BeanQueue, Note: Any, work: Work, url: str
) -> None:
    """With SERIALIZABLE, it is the commit that finds it out."""
    query(
        url,
        """
        CREATE FUNCTION conflict() RETURNS trigger LANGUAGE plpgsql AS $$
        BEGIN RAISE serialization_failure; END $$;
        CREATE CONSTRAINT TRIGGER conflict AFTER INSERT ON note DEFERRABLE INITIALLY DEFERRED
            FOR EACH ROW WHEN (NEW.text = '1') EXECUTE FUNCTION conflict();
        """,
    )

    @bq.processor()
    def write(db: Any, task: Any) -> None:
        db.add(Note(text=str(task.claims)))

    with app.app_context():
        write.enqueue()
        db.session.commit()
    work()
    assert query(url, "SELECT state, attempts, interruptions FROM bq_tasks") == [("PENDING", 0, 1)]
    query(url, "UPDATE bq_tasks SET scheduled_at = now()")
    work()
    assert texts(app, db, Note) == ["2"]


def test_a_conflict_in_a_tasks_own_statement_is_its_failure(
    app: Flask, db: SQLAlchemy, bq: BeanQueue, work: Work
) -> None:
    @bq.processor()
    def conflict(db: Any) -> None:
        db.execute(sa.text("DO $$ BEGIN RAISE serialization_failure; END $$"))

    with app.app_context():
        conflict.enqueue()
        db.session.commit()
    work()
    assert states(app, db, bq) == [("FAILED", 1)]
