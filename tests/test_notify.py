"""What other connections hear, and when."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import sqlalchemy as sa
from flask import Flask
from flask_sqlalchemy import SQLAlchemy

from flask_beanqueue import BeanQueue, LimitAttempt

from .probe import Probe, query


@pytest.fixture
def ears(database_url: str) -> Iterator[Probe]:
    """A connection that LISTENs on the queue's channels, and on one that marks the end."""
    ears = Probe(database_url, "images", "mails", "end")
    yield ears
    ears.close()


@pytest.fixture
def resize(app: Flask, bq: BeanQueue) -> Any:
    @bq.processor(channel="images")
    def resize(width: int = 0) -> None:
        pass

    return resize


def heard(ears: Probe, url: str) -> list[str]:
    """The channels that were notified by now: what is sent later comes behind the end."""
    query(url, "SELECT pg_notify('end', 'end')")
    names: list[str] = []

    def ended() -> bool:
        return "end" in ears.heard

    ears.connection.poll()
    while not any(notify.channel == "end" for notify in ears.connection.notifies):
        ears.connection.poll()
    names = [notify.channel for notify in ears.connection.notifies if notify.channel != "end"]
    ears.connection.notifies.clear()
    return names


def tasks(url: str) -> int:
    [(count,)] = query(url, "SELECT count(*) FROM bq_tasks")
    return int(count)


def test_a_commit_notifies_once_for_each_channel(
    app: Flask, db: SQLAlchemy, bq: BeanQueue, resize: Any, ears: Probe, database_url: str
) -> None:
    with app.app_context():
        for width in range(3):
            resize.enqueue(width=width)
            db.session.flush()
        resize.using(channel="mails").enqueue()
        assert heard(ears, database_url) == []
        db.session.commit()
    assert sorted(heard(ears, database_url)) == ["images", "mails"]
    assert tasks(database_url) == 4


def test_a_rollback_leaves_no_task_and_no_notify(
    app: Flask, db: SQLAlchemy, resize: Any, ears: Probe, database_url: str
) -> None:
    with app.app_context():
        resize.enqueue()
        db.session.flush()
        db.session.rollback()
        db.session.commit()
    assert heard(ears, database_url) == []
    assert tasks(database_url) == 0


def test_an_exception_in_a_view_leaves_no_task_and_no_notify(
    app: Flask, db: SQLAlchemy, resize: Any, ears: Probe, database_url: str
) -> None:
    @app.post("/")
    def view() -> str:
        resize.enqueue()
        db.session.flush()
        raise LookupError

    app.testing = False
    app.logger.disabled = True
    assert app.test_client().post("/").status_code == 500
    assert heard(ears, database_url) == []
    assert tasks(database_url) == 0


def test_a_rolled_back_savepoint_leaves_no_task_and_no_notify(
    app: Flask, db: SQLAlchemy, resize: Any, ears: Probe, database_url: str
) -> None:
    with app.app_context():
        savepoint = db.session.begin_nested()
        resize.enqueue()
        db.session.flush()
        savepoint.rollback()
        db.session.commit()
    assert heard(ears, database_url) == []
    assert tasks(database_url) == 0


def test_a_task_after_a_rolled_back_savepoint_notifies_all_the_same(
    app: Flask, db: SQLAlchemy, resize: Any, ears: Probe, database_url: str
) -> None:
    with app.app_context():
        savepoint = db.session.begin_nested()
        resize.enqueue()
        db.session.flush()
        savepoint.rollback()
        resize.enqueue()
        db.session.commit()
    assert heard(ears, database_url) == ["images"]
    assert tasks(database_url) == 1


def test_a_task_in_a_savepoint_of_a_rolled_back_savepoint_leaves_nothing(
    app: Flask, db: SQLAlchemy, resize: Any, ears: Probe, database_url: str
) -> None:
    with app.app_context():
        outer = db.session.begin_nested()
        with db.session.begin_nested():
            resize.enqueue()
        outer.rollback()
        with db.session.begin_nested():
            resize.using(channel="mails").enqueue()
        db.session.commit()
    assert heard(ears, database_url) == ["mails"]
    assert tasks(database_url) == 1


def test_a_task_after_a_released_savepoint_notifies(
    app: Flask, db: SQLAlchemy, resize: Any, ears: Probe, database_url: str
) -> None:
    with app.app_context():
        with db.session.begin_nested():
            resize.enqueue()
        resize.enqueue()
        db.session.commit()
    assert heard(ears, database_url) == ["images"]


def test_many_tasks_send_one_notify_statement(
    app: Flask, db: SQLAlchemy, resize: Any, ears: Probe, database_url: str
) -> None:
    statements = []
    with app.app_context():

        @sa.event.listens_for(db.engine, "before_cursor_execute")
        def count(connection: Any, cursor: Any, statement: str, *rest: Any) -> None:
            if "pg_notify" in statement:
                statements.append(statement)

        for width in range(5):
            resize.enqueue(width=width)
        db.session.commit()
        assert len(statements) == 1
        resize.enqueue()
        db.session.commit()
        assert len(statements) == 2
    assert heard(ears, database_url) == ["images", "images"]


def test_a_return_to_pending_notifies_and_other_changes_do_not(
    app: Flask, db: SQLAlchemy, bq: BeanQueue, resize: Any, ears: Probe, database_url: str
) -> None:
    with app.app_context():
        task = resize.enqueue()
        db.session.commit()
        heard(ears, database_url)
        task.state = "FAILED"
        db.session.commit()
        assert heard(ears, database_url) == []
        task.state = "PENDING"
        db.session.commit()
        assert heard(ears, database_url) == ["images"]
        task.error_message = "a note"
        db.session.commit()
        assert heard(ears, database_url) == []
        task.priority = -1
        db.session.commit()
        assert heard(ears, database_url) == ["images"]


def test_enqueue_many_notifies(
    app: Flask, db: SQLAlchemy, resize: Any, ears: Probe, database_url: str
) -> None:
    with app.app_context():
        resize.enqueue_many([{"width": 1}, {"width": 2}])
        db.session.rollback()
        resize.enqueue_many([{"width": 1}, {"width": 2}])
        db.session.commit()
    assert heard(ears, database_url) == ["images"]
    assert tasks(database_url) == 2


def test_notify_can_be_switched_off(
    make_app: Any, db: SQLAlchemy, bq: BeanQueue, ears: Probe, database_url: str
) -> None:
    @bq.processor(channel="images")
    def resize() -> None:
        pass

    @bq.processor(channel="images", retry_policy=LimitAttempt(2))
    def fail() -> None:
        raise ValueError

    app = make_app(db, bq, BQ_NOTIFY=False)
    with app.app_context():
        resize.enqueue()
        resize.enqueue_many([{}])
        fail.enqueue()
        db.session.commit()
    bq.process_tasks(app=app, burst=True)
    assert query(database_url, "SELECT attempts FROM bq_tasks ORDER BY 1") == [(1,), (1,), (2,)]
    assert heard(ears, database_url) == []


@pytest.mark.parametrize(
    "channel", ['"', "'", "%s", "ünï ☃", "x" * 63, "x" * 64, "☃" * 1000, "a;b--", "\\"]
)
def test_any_channel_name_wakes_its_worker(
    app: Flask, db: SQLAlchemy, bq: BeanQueue, channel: str
) -> None:
    from flask_beanqueue.listen import Listener

    @bq.processor(channel=channel)
    def work() -> None:
        pass

    listener = Listener(bq.engine(app), [channel])
    assert listener.listen()
    try:
        with app.app_context():
            work.enqueue()
            db.session.commit()
        import select

        assert select.select([listener], [], [], 10)[0] == [listener]
        assert listener.drain()
        assert not listener.drain()
    finally:
        listener.close()
    bq.process_tasks([channel], app=app, burst=True)
    with app.app_context():
        assert db.session.scalars(sa.select(bq.Task.state)).one() == "DONE"
