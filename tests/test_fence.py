"""What the fence lets through, and what it does not."""

from __future__ import annotations

import contextlib
import contextvars
import gc
import threading
import weakref
from collections.abc import Callable
from typing import Any

import flask_sqlalchemy.session
import pytest
import sqlalchemy as sa
from flask import Flask
from flask_sqlalchemy import SQLAlchemy

from flask_beanqueue import BeanQueue, ClaimLost, current_task
from flask_beanqueue.current import current_attempt

from .conftest import only_task, texts
from .probe import query

Work = Callable[..., None]


def set_state(app: Flask, bq: BeanQueue, state: str) -> None:
    """As somebody else does, past the processor's session."""
    with bq.engine(app).begin() as connection:
        connection.execute(sa.update(bq.Task.__table__).values(state=state))


@pytest.mark.parametrize("state", ["CANCELLED", "FAILED", "PENDING"])
@pytest.mark.parametrize("commits", [False, True])
def test_a_state_that_somebody_else_has_set_is_not_overwritten_by_the_processors(
    app: Flask, db: SQLAlchemy, bq: BeanQueue, Note: Any, work: Work, state: str, commits: bool
) -> None:
    runs = []

    @bq.processor()
    def decide(db: Any, task: Any) -> None:
        runs.append(task.claims)
        if len(runs) > 1:
            return
        db.add(Note(text="never"))
        set_state(app, bq, state)
        task.state = "DONE"
        if commits:
            db.commit()

    with app.app_context():
        decide.enqueue()
        db.session.commit()
    work()
    assert texts(app, db, Note) == []
    assert only_task(app, bq).state == ("DONE" if state == "PENDING" else state)
    assert runs == ([1, 2] if state == "PENDING" else [1])


@pytest.mark.parametrize(
    ("state", "ends"), [("DONE", True), ("FAILED", True), ("CANCELLED", True), ("PENDING", False)]
)
@pytest.mark.parametrize("auto_complete", [False, True])
def test_a_state_that_a_processor_sets_counts_as_an_attempt(
    app: Flask,
    db: SQLAlchemy,
    bq: BeanQueue,
    work: Work,
    state: str,
    ends: bool,
    auto_complete: bool,
) -> None:
    @bq.processor(auto_complete=auto_complete)
    def decide(db: Any, task: Any) -> None:
        if task.claims == 1:
            task.state = state

    with app.app_context():
        decide.enqueue()
        db.session.commit()
    work()
    task = only_task(app, bq)
    if ends:
        assert (task.state, task.attempts) == (state, 1)
        assert task.finished_at >= task.started_at
    else:
        assert (task.claims, task.attempts) == (2, 2)
        assert (task.finished_at is not None) == auto_complete


@pytest.mark.parametrize("commits", [False, True])
def test_a_state_that_a_processor_takes_back_is_none(
    app: Flask, db: SQLAlchemy, bq: BeanQueue, Note: Any, work: Work, commits: bool
) -> None:
    @bq.processor()
    def decide(db: Any, task: Any) -> str:
        task.state = "CANCELLED"
        db.flush()
        task.state = "PROCESSING"
        db.add(Note(text="kept"))
        if commits:
            db.commit()
        return "ended"

    with app.app_context():
        decide.enqueue()
        db.session.commit()
    work()
    assert texts(app, db, Note) == ["kept"]
    task = only_task(app, bq)
    assert (task.state, task.result, task.attempts) == ("DONE", "ended", 1)
    assert task.finished_at is not None


def test_a_state_may_be_set_twice(
    app: Flask, db: SQLAlchemy, bq: BeanQueue, Note: Any, work: Work
) -> None:
    @bq.processor()
    def decide(db: Any, task: Any) -> None:
        task.state = "FAILED"
        db.flush()
        task.state = "CANCELLED"
        db.add(Note(text="kept"))

    with app.app_context():
        decide.enqueue()
        db.session.commit()
    work()
    assert texts(app, db, Note) == ["kept"]
    task = only_task(app, bq)
    assert (task.state, task.attempts) == ("CANCELLED", 1)


@pytest.mark.parametrize("auto_complete", [False, True])
@pytest.mark.parametrize("uses_session", [False, True])
def test_what_a_teardown_function_commits_after_the_tasks_end_is_kept(
    make_app: Any,
    db: SQLAlchemy,
    bq: BeanQueue,
    Note: Any,
    auto_complete: bool,
    uses_session: bool,
    caplog: pytest.LogCaptureFixture,
) -> None:
    @bq.processor(auto_complete=auto_complete)
    def order(db: Any) -> None:
        if uses_session:
            db.add(Note(text="ordered"))

    app = make_app(db, bq)

    @app.teardown_appcontext
    def tidy(error: Any) -> None:
        if current_task:
            db.session.add(Note(text="tidied"))
            db.session.commit()

    with app.app_context():
        order.enqueue()
        db.session.commit()
        task_id = db.session.scalars(sa.select(bq.Task.id)).one()
        bq.worker(app=app, burst=True).run()
        expected = (["ordered"] if uses_session else []) + ["tidied"]
        assert list(db.session.scalars(sa.select(Note.text).order_by(Note.id))) == expected
        task: Any = db.session.get(bq.Task, task_id)
        state = "DONE" if auto_complete else "PROCESSING"
        assert (task.state, task.parked, task.attempts) == (state, not auto_complete, 1)
    assert "Traceback" not in caplog.text


def test_an_end_in_a_savepoint_that_is_released_with_the_one_around_it_counts(
    app: Flask, db: SQLAlchemy, bq: BeanQueue, Note: Any, work: Work
) -> None:
    @bq.processor()
    def decide(db: Any, task: Any, savepoint: Any) -> None:
        db.begin_nested()
        db.add(Note(text="kept"))
        task.state = "CANCELLED"
        db.flush()

    with app.app_context():
        decide.enqueue()
        db.session.commit()
    work()
    assert texts(app, db, Note) == ["kept"]
    assert only_task(app, bq).state == "CANCELLED"


@pytest.mark.parametrize("how", ["row", "enqueue", "enqueue_many", "complete"])
def test_a_processor_may_use_another_app_of_the_same_db(
    make_app: Any, db: SQLAlchemy, bq: BeanQueue, Note: Any, other_database_url: str, how: str
) -> None:
    """Its database knows nothing of the task."""
    one = make_app(db, bq)
    two = make_app(db, bq, SQLALCHEMY_DATABASE_URI=other_database_url)

    @bq.processor(channel="other", auto_complete=False)
    def child() -> None:
        pass

    @bq.processor()
    def parent() -> None:
        with two.app_context():
            assert not current_task
            if how == "row":
                db.session.add(Note(text="there"))
            elif how == "enqueue":
                child.enqueue()
            elif how == "enqueue_many":
                child.enqueue_many([{}])
            else:
                bq.complete(parked)
            db.session.commit()
        assert current_task

    with two.app_context():
        parked = child.enqueue().id
        db.session.commit()
        bq.process_tasks(["other"], app=two, burst=True)
    with one.app_context():
        parent.enqueue()
        db.session.commit()
        bq.process_tasks(["default"], app=one, burst=True)
        task = db.session.scalars(sa.select(bq.Task)).one()
        assert (task.state, task.error_message) == ("DONE", None)
    with two.app_context():
        tasks = set(db.session.scalars(sa.select(bq.Task.state)))
        assert (
            tasks
            == {
                "row": {"PROCESSING"},
                "enqueue": {"PROCESSING", "PENDING"},
                "enqueue_many": {"PROCESSING", "PENDING"},
                "complete": {"DONE"},
            }[how]
        )


def test_an_end_in_another_session_than_that_of_a_change_raises(
    app: Flask, db: SQLAlchemy, bq: BeanQueue, work: Work
) -> None:
    @bq.processor()
    def decide(db: Any, task: Any) -> None:
        task.priority = 3
        db.flush()
        with app.app_context():
            bq.complete(task.id)

    with app.app_context():
        decide.enqueue()
        db.session.commit()
    work()
    assert "changed its own task in another session" in only_task(app, bq).error_message


def test_a_state_set_in_another_session_than_that_of_a_change_raises(
    app: Flask, db: SQLAlchemy, bq: BeanQueue, Note: Any, work: Work
) -> None:
    """It would wait for ever for a lock that its own processor holds."""

    @bq.processor()
    def decide(db: Any, task: Any) -> None:
        task.priority = 3
        db.flush()
        with app.app_context():
            other: Any = bq.db.session.get(bq.Task, task.id)
            other.state = "CANCELLED"
            bq.db.session.commit()

    with app.app_context():
        decide.enqueue()
        db.session.commit()
    work()
    task = only_task(app, bq)
    assert task.state == "FAILED"
    assert "changed its own task in another session" in task.error_message


@pytest.mark.parametrize("commits", [False, True])
def test_of_a_task_that_somebody_deletes_while_it_runs_nothing_is_left(
    app: Flask, db: SQLAlchemy, bq: BeanQueue, Note: Any, work: Work, commits: bool
) -> None:
    @bq.processor()
    def write(db: Any) -> None:
        db.add(Note(text="never"))
        with bq.engine(app).begin() as connection:
            connection.execute(sa.delete(bq.Task.__table__))
        if commits:
            db.commit()

    with app.app_context():
        write.enqueue()
        db.session.commit()
    work()
    assert texts(app, db, Note) == []
    with app.app_context():
        assert db.session.query(bq.Task).count() == 0


def test_a_claim_that_is_through_keeps_no_session_alive(
    app: Flask, db: SQLAlchemy, bq: BeanQueue, Note: Any, work: Callable[..., None]
) -> None:
    """Else hundreds of them pile up until the worker lets go of their claims."""
    seen: list[Any] = []

    @bq.processor()
    def write(db: Any) -> None:
        db.add(Note(text="hello"))
        seen.extend([current_attempt(), weakref.ref(db)])

    with app.app_context():
        write.enqueue()
        db.session.commit()
    gc.collect()
    gc.disable()
    try:
        work()
        attempt, session = seen
        assert attempt.claim.settled
        assert session() is None
    finally:
        gc.enable()


# Ways past the session.


def insert(Note: Any) -> Any:
    return sa.insert(Note).values(text="never")


def commit_connection(db: Any) -> None:
    db.connection().commit()


def commit_transaction_of_connection(db: Any) -> None:
    db.connection().get_transaction().commit()


def commit_after_savepoint(db: Any) -> None:
    with db.begin_nested():
        db.execute(sa.text("SELECT 1"))
    db.connection().commit()


@pytest.mark.parametrize(
    "commit", [commit_connection, commit_transaction_of_connection, commit_after_savepoint]
)
@pytest.mark.parametrize("goes_on", [False, True])
@pytest.mark.parametrize("nested", [False, True])
def test_a_connection_of_the_session_cannot_be_committed_past_it(
    app: Flask,
    db: SQLAlchemy,
    bq: BeanQueue,
    Note: Any,
    work: Work,
    commit: Any,
    goes_on: bool,
    nested: bool,
) -> None:
    errors = []

    @bq.processor()
    def write() -> None:
        with app.app_context() if nested else contextlib.nullcontext():
            db.session.execute(insert(Note))
            try:
                commit(db.session())
            except RuntimeError as error:
                errors.append(str(error))
                if not goes_on:
                    raise
            db.session.rollback()
            db.session.add(Note(text="afterwards"))
            db.session.commit()

    with app.app_context():
        write.enqueue()
        db.session.commit()
    work()
    assert "Write db.session.commit(), or use a connection of your own" in errors[0]
    assert texts(app, db, Note) == (["afterwards"] if goes_on else [])
    assert only_task(app, bq).state == ("DONE" if goes_on else "FAILED")


def test_a_connection_of_the_processors_own_is_its_own_affair(
    app: Flask, db: SQLAlchemy, bq: BeanQueue, Note: Any, work: Work
) -> None:
    @bq.processor()
    def write(db: Any) -> None:
        db.add(Note(text="the session's"))
        with bq.engine(app).begin() as connection:
            connection.execute(sa.insert(Note).values(text="its own"))
        db.commit()
        with bq.engine(app).connect() as connection:
            connection = connection.execution_options(isolation_level="AUTOCOMMIT")
            connection.execute(sa.insert(Note).values(text="its own, at once"))

    with app.app_context():
        write.enqueue()
        db.session.commit()
    work()
    assert sorted(texts(app, db, Note)) == ["its own", "its own, at once", "the session's"]
    assert only_task(app, bq).state == "DONE"


AUTOCOMMIT = {"isolation_level": "AUTOCOMMIT"}


@pytest.mark.parametrize("whose", ["connection", "engine", "bind"])
@pytest.mark.parametrize("catches", [False, True])
def test_a_session_of_a_task_cannot_be_in_autocommit(
    make_app: Any, whose: str, catches: bool
) -> None:
    """What it writes could not be taken back."""

    class Own(flask_sqlalchemy.session.Session):
        def get_bind(self, *args: Any, **more: Any) -> Any:
            bind: Any = super().get_bind(*args, **more)
            if current_task and whose == "bind":
                return vars(bind).setdefault("own", bind.execution_options(**AUTOCOMMIT))
            return bind

    db = SQLAlchemy(session_options={"class_": Own})
    bq = BeanQueue(db=db)

    class Note(db.Model):  # type: ignore[name-defined, misc]
        id = sa.Column(sa.Integer, primary_key=True)
        text = sa.Column(sa.Text, nullable=False)

    app = make_app(db, bq)

    @bq.processor()
    def write(db: Any) -> None:
        try:
            if whose == "connection":
                db.connection(execution_options=AUTOCOMMIT)
            elif whose == "engine":
                bq.engine(app).update_execution_options(**AUTOCOMMIT)
            db.execute(insert(Note))
        except RuntimeError:
            if not catches:
                raise

    with app.app_context():
        write.enqueue()
        db.session.commit()
    bq.process_tasks(app=app, burst=True)
    bq.engine(app).update_execution_options(isolation_level="READ COMMITTED")
    assert texts(app, db, Note) == []
    task = only_task(app, bq)
    assert task.state == "FAILED"
    assert "This session is in AUTOCOMMIT" in task.error_message


def test_a_driver_that_commits_each_statement_is_refused(
    app: Flask, db: SQLAlchemy, bq: BeanQueue, Note: Any, work: Work
) -> None:
    """SQLAlchemy does not know of it."""

    @bq.processor()
    def write(db: Any) -> None:
        db.execute(insert(Note))

    def commit_all(connection: Any, record: Any) -> None:
        connection.autocommit = True

    with app.app_context():
        write.enqueue()
        db.session.commit()
        sa.event.listen(db.engine, "connect", commit_all)
        db.engine.dispose()
        write.enqueue()
        with pytest.raises(RuntimeError, match="This session is in AUTOCOMMIT"):
            db.session.flush()
        db.session.rollback()
    with pytest.raises(RuntimeError, match="This session is in AUTOCOMMIT"):
        work()
    assert only_task(app, bq).state == "PENDING"
    assert texts(app, db, Note) == []


def test_another_bind_may_be_in_autocommit(
    make_app: Any, database_url: str, other_database_url: str
) -> None:
    db = SQLAlchemy()
    bq = BeanQueue(db=db)

    class Line(db.Model):  # type: ignore[name-defined, misc]
        __bind_key__ = "log"
        id = sa.Column(sa.Integer, primary_key=True)

    app = make_app(db, bq, SQLALCHEMY_BINDS={"log": {"url": other_database_url, **AUTOCOMMIT}})

    @bq.processor()
    def write(db: Any) -> None:
        db.add(Line())
        db.flush()

    with app.app_context():
        write.enqueue()
        db.session.commit()
    bq.process_tasks(app=app, burst=True)
    assert only_task(app, bq).state == "DONE"
    assert query(other_database_url, "SELECT count(*) FROM line") == [(1,)]


@pytest.mark.parametrize("way", ["enqueue", "enqueue_many", "complete", "fail"])
def test_a_view_cannot_hand_over_tasks_in_autocommit(
    app: Flask, db: Any, bq: BeanQueue, work: Work, way: str, database_url: str
) -> None:
    @bq.processor(auto_complete=False)
    def wait() -> None:
        pass

    with app.app_context():
        task_id = wait.enqueue().id
        db.session.commit()
    work()
    acts = {
        "enqueue": wait.enqueue,
        "enqueue_many": lambda: wait.enqueue_many([{}]),
        "complete": lambda: bq.complete(task_id),
        "fail": lambda: bq.fail(task_id, error="no"),
    }

    def view() -> None:
        acts[way]()
        db.session.flush()

    with app.app_context():
        db.session.connection(execution_options=AUTOCOMMIT)
        with pytest.raises(RuntimeError, match="This session is in AUTOCOMMIT"):
            view()
        db.session.rollback()
    assert query(database_url, "SELECT state FROM bq_tasks") == [("PROCESSING",)]


def test_a_thread_that_is_given_the_tasks_context_is_fenced(
    app: Flask, db: SQLAlchemy, bq: BeanQueue, Note: Any, work: Work, database_url: str
) -> None:
    raised = []

    def write() -> None:
        with app.app_context():
            db.session.execute(insert(Note))
            try:
                db.session.commit()
            except ClaimLost as error:
                raised.append(error)

    @bq.processor()
    def start() -> None:
        query(database_url, "UPDATE bq_tasks SET claims = 7")
        context = contextvars.copy_context()
        thread = threading.Thread(target=context.run, args=(write,))
        thread.start()
        thread.join()

    with app.app_context():
        start.enqueue()
        db.session.commit()
    work()
    assert len(raised) == 1
    assert texts(app, db, Note) == []
