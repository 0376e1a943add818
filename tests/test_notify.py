"""What other connections hear, and when."""

from __future__ import annotations

import contextlib
import select
from collections.abc import Iterator
from typing import Any

import pytest
import sqlalchemy as sa
from flask import Flask
from flask_sqlalchemy import SQLAlchemy
from hypothesis import example, given, settings
from hypothesis import strategies as st

from flask_beanqueue import BeanQueue, LimitAttempt
from flask_beanqueue.engine.listener import Listener

from .conftest import MakeApp
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


@pytest.mark.parametrize("when", ["before", "after"])
def test_notify_can_be_switched_off(
    make_app: Any, db: SQLAlchemy, bq: BeanQueue, ears: Probe, database_url: str, when: str
) -> None:
    """Also once the app is set up."""

    @bq.processor(channel="images")
    def resize() -> None:
        pass

    @bq.processor(channel="images", retry_policy=LimitAttempt(2))
    def fail() -> None:
        raise ValueError

    app = make_app(db, bq, BQ_NOTIFY=when == "after")
    app.config["BQ_NOTIFY"] = False
    with app.app_context():
        resize.enqueue()
        resize.enqueue_many([{}])
        fail.enqueue()
        db.session.commit()
    bq.process_tasks(app=app, burst=True)
    assert query(database_url, "SELECT attempts FROM bq_tasks ORDER BY 1") == [(1,), (1,), (2,)]
    assert heard(ears, database_url) == []


def test_notify_can_be_switched_on_again(
    make_app: Any, db: SQLAlchemy, bq: BeanQueue, ears: Probe, database_url: str
) -> None:
    @bq.processor(channel="images")
    def resize() -> None:
        pass

    app = make_app(db, bq, BQ_NOTIFY=False)
    app.config["BQ_NOTIFY"] = True
    with app.app_context():
        resize.enqueue()
        db.session.commit()
        resize.enqueue_many([{}])
        db.session.commit()
    assert heard(ears, database_url) == ["images", "images"]


TEXT = st.characters(exclude_categories=["Cs"], exclude_characters="\0")
ODD = st.sampled_from("\"'\\%$;:{}-/*\n\r\t\v\x1b\x7f aA\u0130ß\u202e☃\U0001f600")
CHANNELS = st.text(TEXT, min_size=1, max_size=80) | st.text(ODD, min_size=1, max_size=80)


def test_any_channel_name_wakes_its_worker(
    app: Flask, db: SQLAlchemy, bq: BeanQueue, work: Any, database_url: str
) -> None:
    """LISTEN takes no parameters, so the name is quoted; and a long one is replaced."""
    channels = set()

    @bq.processor()
    def nothing() -> None:
        pass

    def hears(listener: Listener) -> bool:
        assert select.select([listener], [], [], 10)[0] == [listener]
        return listener.drain() and not listener.drain()

    @settings(max_examples=50)
    @given(channel=CHANNELS)
    @example(channel='"')
    @example(channel='""; DROP TABLE bq_tasks; --"')
    @example(channel="%s%(name)s%%")
    @example(channel="\\")
    @example(channel="x" * 63)
    @example(channel="x" * 64)
    @example(channel='"' * 63)
    @example(channel="ü" * 31 + "x")
    @example(channel="ü" * 32)
    @example(channel="☃" * 800)
    def check(channel: str) -> None:
        with contextlib.closing(Listener(bq.engine(app), [channel])) as listener:
            assert listener.listen()
            with app.app_context():
                nothing.using(channel=channel).enqueue()
                db.session.commit()
                assert hears(listener)
                nothing.using(channel=channel).enqueue_many([{}])
                db.session.commit()
                assert hears(listener)
        channels.add(channel)

    check()
    work(*channels)
    assert query(database_url, "SELECT DISTINCT state FROM bq_tasks") == [("DONE",)]


@pytest.mark.parametrize("channel", ['a"b', "%s", "☃" * 800])
def test_a_task_that_is_given_back_wakes_the_worker_of_any_channel(
    app: Flask, db: SQLAlchemy, bq: BeanQueue, work: Any, channel: str
) -> None:
    with contextlib.closing(Listener(bq.engine(app), [channel])) as listener:
        with app.app_context():
            db.session.add(bq.Task(channel=channel, module="no", name="where"))
            db.session.commit()
        assert listener.listen()
        work(channel)
        assert select.select([listener], [], [], 10)[0] == [listener]
        assert listener.drain()


def test_a_task_of_a_derived_class_notifies_as_any_other(
    make_app: MakeApp, db: SQLAlchemy, bq: BeanQueue, ears: Probe, database_url: str
) -> None:
    class MailTask(bq.Task):  # type: ignore[name-defined, misc]
        pass

    app = make_app(db, bq)

    class LateMailTask(MailTask):
        pass

    with app.app_context():
        for kind in (MailTask, LateMailTask):
            task = kind(module="m", func_name="f", channel="mails", state="FAILED")
            db.session.add(task)
            db.session.add(kind(module="m", func_name="f", channel="images"))
            db.session.commit()
            assert heard(ears, database_url) == ["images"]
            task.state = "PENDING"
            db.session.commit()
            assert heard(ears, database_url) == ["mails"]
