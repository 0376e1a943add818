"""A task is handed over by a commit: what is enqueued after it, and what is never committed."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import sqlalchemy as sa
from flask import Flask, abort
from flask_sqlalchemy import SQLAlchemy
from flask_sqlalchemy.track_modifications import models_committed

from flask_beanqueue import BeanQueue, current_task, task_succeeded

from .conftest import MakeApp
from .probe import query

Work = Callable[..., None]


@pytest.fixture
def pack(app: Flask, bq: BeanQueue) -> Any:
    @bq.processor()
    def pack() -> None:
        pass

    return pack


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What was lost, by what the log says."""
    return [
        record.getMessage()
        for record in caplog.records
        if record.name == "flask_beanqueue" and record.levelno == logging.WARNING
    ]


PACK = (
    f"Lost, since the app context has ended without a commit: the task {__name__}.pack. Call"
    " db.session.commit(), or db.session.rollback() if it was to be dropped."
)


def enqueue(db: Any, pack: Any, Note: Any) -> None:
    pack.enqueue()


def flush(db: Any, pack: Any, Note: Any) -> None:
    pack.enqueue()
    db.session.flush()


def add(db: Any, pack: Any, Note: Any) -> None:
    db.session.add(pack.run())


def add_with_row(db: Any, pack: Any, Note: Any) -> None:
    db.session.add(Note(text="a row", task=pack.run()))


def enqueue_many(db: Any, pack: Any, Note: Any) -> None:
    pack.enqueue_many([{}, {}])


def merge(db: Any, pack: Any, Note: Any) -> None:
    db.session.merge(pack.run())


def release(db: Any, pack: Any, Note: Any) -> None:
    with db.session.begin_nested(), db.session.begin_nested():
        pack.enqueue()


def release_many(db: Any, pack: Any, Note: Any) -> None:
    with db.session.begin_nested():
        pack.enqueue_many([{}])


def roll_another_back(db: Any, pack: Any, Note: Any) -> None:
    pack.enqueue()
    savepoint = db.session.begin_nested()
    db.session.add(Note(text="never"))
    savepoint.rollback()


def commit_another(db: Any, pack: Any, Note: Any) -> None:
    db.session.add(Note(text="a row"))
    db.session.commit()
    pack.enqueue()


WAYS = [
    *(enqueue, flush, add, add_with_row, enqueue_many, merge, release, release_many),
    *(roll_another_back, commit_another),
]


@pytest.mark.parametrize("way", WAYS)
def test_a_forgotten_commit_is_told(
    app: Flask, db: Any, pack: Any, Note: Any, caplog: pytest.LogCaptureFixture, way: Any
) -> None:
    @app.get("/")
    def view() -> str:
        way(db, pack, Note)
        return "well"

    app.test_client().get("/")
    assert warnings(caplog) == [PACK]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("end", ["commit", "rollback", "remove", "close"])
def test_what_is_committed_or_dropped_by_hand_is_not(
    app: Flask,
    db: Any,
    pack: Any,
    Note: Any,
    caplog: pytest.LogCaptureFixture,
    way: Any,
    end: str,
) -> None:
    with app.app_context():
        way(db, pack, Note)
        getattr(db.session, end)()
        db.session.query(Note).all()
    assert warnings(caplog) == []


def test_what_a_savepoint_takes_back_is_not(
    app: Flask, db: Any, pack: Any, caplog: pytest.LogCaptureFixture
) -> None:
    with app.app_context():
        with db.session.begin_nested() as outer:
            with db.session.begin_nested():
                pack.enqueue()
            pack.enqueue_many([{}])
            pack.enqueue()
            outer.rollback()
        db.session.execute(sa.text("SELECT 1"))
    assert warnings(caplog) == []


@pytest.mark.parametrize("way", [enqueue, flush, enqueue_many])
@pytest.mark.parametrize("how", ["raises", "aborts", "is handled"])
def test_a_request_that_fails_may_leave_its_tasks_behind(
    app: Flask, db: Any, pack: Any, Note: Any, caplog: pytest.LogCaptureFixture, way: Any, how: str
) -> None:
    @app.get("/")
    def view() -> str:
        way(db, pack, Note)
        if how == "aborts":
            abort(409)
        raise ZeroDivisionError if how == "raises" else LookupError

    @app.errorhandler(LookupError)
    def handle(error: LookupError) -> Any:
        return "not there", 404

    app.testing = False
    assert app.test_client().get("/").status_code >= 400
    assert warnings(caplog) == []


def test_an_app_context_that_raises_may_leave_its_tasks_behind(
    app: Flask, db: Any, pack: Any, caplog: pytest.LogCaptureFixture
) -> None:
    def command() -> None:
        with app.app_context():
            pack.enqueue()
            raise SystemExit

    with pytest.raises(SystemExit):
        command()
    assert warnings(caplog) == []


def test_several_are_told_together(
    app: Flask, db: Any, bq: BeanQueue, pack: Any, caplog: pytest.LogCaptureFixture
) -> None:
    @bq.processor(auto_complete=False)
    def ask() -> None:
        pass

    with app.app_context():
        task_id = ask.enqueue().id
        db.session.commit()
        bq.process_tasks(app=app, burst=True)
    with app.app_context():
        bq.complete(task_id)
        pack.enqueue_many([{}])
        ask.enqueue()
        ask.enqueue()
    [warning] = warnings(caplog)
    ended, waits, packs = f"the end of the task {__name__}.ask", "ask", "pack"
    assert f"{ended}, the task {__name__}.{waits}, the task {__name__}.{packs}. Call" in warning


def test_each_app_context_answers_for_its_own(
    app: Flask, db: Any, pack: Any, caplog: pytest.LogCaptureFixture
) -> None:
    with app.app_context():
        pack.enqueue()
        with app.app_context():
            pack.enqueue()
        assert warnings(caplog) == [PACK]
        caplog.clear()
        db.session.commit()
    assert warnings(caplog) == []


def test_a_test_may_commit_what_a_view_has_enqueued(
    app: Flask, db: Any, pack: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """They share the test's app context, and its session."""

    @app.get("/")
    def view() -> str:
        pack.enqueue()
        return "well"

    with app.app_context():
        app.test_client().get("/")
        db.session.commit()
    assert warnings(caplog) == []


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_commit_at_the_end_of_the_app_context_counts(
    make_app: MakeApp, caplog: pytest.LogCaptureFixture, database_url: str, when: str
) -> None:
    db = SQLAlchemy()
    app = make_app(db)

    def commit(error: Any) -> None:
        db.session.commit()

    if when == "before":
        app.teardown_appcontext(commit)
    bq = BeanQueue(app)
    if when == "after":
        app.teardown_appcontext(commit)

    @bq.processor()
    def pack() -> None:
        pass

    with app.app_context():
        db.create_all()
        pack.enqueue()
    assert query(database_url, "SELECT count(*) FROM bq_tasks") == [(1,)]
    assert warnings(caplog) == []


def test_tasks_that_a_task_enqueues_are_committed_with_it(
    app: Flask, db: Any, bq: BeanQueue, pack: Any, work: Work, caplog: pytest.LogCaptureFixture
) -> None:
    @bq.processor()
    def order(fails: bool) -> None:
        pack.enqueue()
        db.session.flush()
        pack.enqueue()
        if fails:
            raise LookupError

    with app.app_context():
        order.enqueue_many([{"fails": False}, {"fails": True}])
        db.session.commit()
    work()
    assert warnings(caplog) == []


def test_what_a_receiver_forgets_to_commit_is_told(
    app: Flask, db: Any, pack: Any, work: Work, caplog: pytest.LogCaptureFixture
) -> None:
    with app.app_context():
        pack.enqueue()
        db.session.commit()

    def follow(sender: Flask, task: Any) -> None:
        pack.enqueue()

    with task_succeeded.connected_to(follow):
        work()
    assert warnings(caplog) == [PACK]


# After the commit.


@pytest.fixture
def after_commit(db: SQLAlchemy) -> Any:
    """Lets something be done when ``db.session`` has committed, once."""

    def do(act: Callable[[], None]) -> list[str]:
        raised: list[str] = []

        def listener(session: Any) -> None:
            if not raised:
                raised.append("")
                try:
                    act()
                except RuntimeError as error:
                    raised[0] = str(error)

        sa.event.listen(db.session, "after_commit", listener)
        return raised

    return do


@pytest.mark.parametrize("way", [enqueue, add, add_with_row, enqueue_many])
@pytest.mark.parametrize("with_task", [False, True])
def test_a_task_cannot_be_enqueued_after_the_commit(
    app: Flask,
    db: Any,
    pack: Any,
    Note: Any,
    after_commit: Any,
    way: Any,
    with_task: bool,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """It would wait for another commit, which nobody knows of."""
    raised = after_commit(lambda: way(db, pack, Note))
    with app.app_context():
        db.session.add(Note(text="a row"))
        if with_task:
            pack.enqueue()
        db.session.commit()
    [message] = raised
    assert "Enqueue before the commit: it hands the task over, so no after_commit" in message
    assert warnings(caplog) == []


def test_nor_can_it_where_a_signal_tells_of_the_commit(make_app: MakeApp, pack: Any) -> None:
    db = SQLAlchemy()
    bq = BeanQueue(db=db)
    app = make_app(db, bq, SQLALCHEMY_TRACK_MODIFICATIONS=True)

    @bq.processor()
    def thank() -> None:
        pass

    def receiver(sender: Flask, changes: Any) -> None:
        thank.enqueue()

    with app.app_context(), models_committed.connected_to(receiver, app):
        thank.enqueue()
        with pytest.raises(RuntimeError, match="no after_commit hook is needed"):
            db.session.commit()


def test_nor_can_it_in_a_processor(
    app: Flask, db: Any, bq: BeanQueue, pack: Any, Note: Any, after_commit: Any, work: Work
) -> None:
    @bq.processor()
    def order(db: Any) -> None:
        db.add(Note(text="a row"))

    with app.app_context():
        order.enqueue()
        db.session.commit()
    raised = after_commit(pack.enqueue)
    work()
    assert "no after_commit hook is needed" in raised[0]


def test_a_task_may_be_enqueued_when_a_savepoint_is_released_or_another_session_commits(
    app: Flask, db: Any, pack: Any, after_commit: Any, database_url: str
) -> None:
    other = sa.orm.sessionmaker()
    sa.event.listen(other, "after_commit", lambda session: pack.enqueue())
    raised = after_commit(pack.enqueue)
    with app.app_context():
        with db.session.begin_nested():
            db.session.execute(sa.text("SELECT 1"))
        with other(bind=db.engine) as session:
            session.commit()
        db.session.commit()
    assert raised == [""]
    assert query(database_url, "SELECT count(*) FROM bq_tasks") == [(2,)]


def test_a_task_may_be_enqueued_before_the_commit_and_in_a_flush(
    app: Flask, db: Any, pack: Any, Note: Any, database_url: str
) -> None:
    """As audit logs do it."""

    def before_commit(session: Any) -> None:
        pack.enqueue()

    def after_flush(session: Any, context: Any) -> None:
        if any(isinstance(each, Note) for each in session.new):
            pack.enqueue()

    sa.event.listen(db.session, "before_commit", before_commit)
    sa.event.listen(db.session, "after_flush", after_flush)
    with app.app_context():
        db.session.add(Note(text="a row"))
        db.session.commit()
    assert query(database_url, "SELECT count(*) FROM bq_tasks") == [(2,)]


def test_a_task_that_is_enqueued_after_an_error_says_what_to_do(
    app: Flask, db: Any, pack: Any, Note: Any, database_url: str
) -> None:
    with app.app_context():
        db.session.add(Note())
        with pytest.raises(sa.exc.IntegrityError):
            db.session.flush()
        db.session.rollback()
        pack.enqueue()
        db.session.commit()
    assert query(database_url, "SELECT count(*) FROM bq_tasks") == [(1,)]


def test_the_running_task_may_be_asked_for_after_its_commit(
    app: Flask, db: Any, bq: BeanQueue, Note: Any, after_commit: Any, work: Work
) -> None:
    @bq.processor()
    def order() -> None:
        bq.db.session.add(Note(text="a row"))

    seen = []
    with app.app_context():
        order.enqueue()
        db.session.commit()
    raised = after_commit(lambda: seen.append(current_task.func_name))
    work()
    assert (raised, seen) == ([""], ["order"])
