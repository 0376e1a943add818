"""Tasks that something else ends: ``auto_complete=False``, ``bq.complete`` and ``bq.fail``."""

from __future__ import annotations

import re
import threading
import uuid
from collections.abc import Callable
from typing import Any

import pytest
import sqlalchemy as sa
from flask import Flask
from flask_sqlalchemy import SQLAlchemy

from flask_beanqueue import BeanQueue, TaskStateError, current_task

from .conftest import running
from .probe import Probe, query

Work = Callable[..., None]


@pytest.fixture
def order(app: Flask, bq: BeanQueue, Note: Any) -> Any:
    """A processor that leaves its task to somebody else."""

    @bq.processor(auto_complete=False)
    def order(db: Any) -> dict[str, int]:
        db.add(Note(text="ordered"))
        return {"number": 1}

    return order


@pytest.fixture
def parked(app: Flask, db: SQLAlchemy, order: Any, work: Work) -> uuid.UUID:
    """The id of a task that has been left so."""
    with app.app_context():
        task_id: uuid.UUID = order.enqueue().id
        db.session.commit()
    work()
    return task_id


@pytest.fixture
def row(database_url: str) -> Callable[..., Any]:
    """Reads the only task."""

    def row(columns: str) -> Any:
        [found] = query(database_url, f"SELECT {columns} FROM bq_tasks")
        return found

    return row


def test_the_task_stays_processing_and_its_effects_are_committed(
    parked: uuid.UUID, row: Any, database_url: str
) -> None:
    assert row("state, parked, worker_id, attempts, result, finished_at") == (
        "PROCESSING",
        True,
        None,
        1,
        {"number": 1},
        None,
    )
    assert query(database_url, "SELECT text FROM note") == [("ordered",)]


def test_a_task_without_effects_is_parked_too(
    app: Flask, db: SQLAlchemy, bq: BeanQueue, work: Work, row: Any
) -> None:
    @bq.processor(auto_complete=False)
    def call() -> None:
        pass

    with app.app_context():
        call.enqueue()
        db.session.commit()
    work()
    assert row("state, parked, worker_id") == ("PROCESSING", True, None)


def test_a_processor_that_raises_is_not_parked(
    app: Flask, db: SQLAlchemy, bq: BeanQueue, work: Work, row: Any
) -> None:
    @bq.processor(auto_complete=False)
    def call() -> None:
        raise ValueError

    with app.app_context():
        call.enqueue()
        db.session.commit()
    work()
    assert row("state, parked") == ("FAILED", False)


def test_a_parked_task_is_not_taken_over(
    app: Flask, db: SQLAlchemy, bq: BeanQueue, parked: uuid.UUID, database_url: str, probe: Probe
) -> None:
    @bq.processor()
    def orphan() -> None:
        pass

    # What is taken over shows that the worker has looked.
    query(
        database_url,
        "INSERT INTO bq_tasks (module, func_name, state, claims)"
        " VALUES (%s, 'orphan', 'PROCESSING', 1)",
        __name__,
    )
    probe.listen_states()
    with running(app, bq):
        probe.wait("orphan DONE")
    found = query(
        database_url,
        "SELECT state, parked, claims, crashes FROM bq_tasks WHERE id = %s",
        parked.hex,
    )
    assert found == [("PROCESSING", True, 1, 0)]


def test_a_parked_task_that_is_set_back_runs_again(
    app: Flask, db: SQLAlchemy, bq: BeanQueue, parked: uuid.UUID, work: Work, row: Any
) -> None:
    with app.app_context():
        task: Any = db.session.get(bq.Task, parked)
        task.state = "PENDING"
        db.session.commit()
    work()
    assert row("state, parked, claims, attempts") == ("PROCESSING", True, 2, 2)
    with app.app_context():
        bq.complete(parked)
        db.session.commit()
    assert row("state, parked, claims, attempts") == ("DONE", False, 2, 2)


# From outside: a webhook, say.


def test_complete_ends_a_task_with_the_commit(
    app: Flask, db: SQLAlchemy, bq: BeanQueue, parked: uuid.UUID, row: Any, database_url: str
) -> None:
    with app.app_context():
        bq.complete(parked, result={"number": 2})
        assert row("state") == ("PROCESSING",)
        db.session.commit()
    assert row("state, parked, result, attempts") == ("DONE", False, {"number": 2}, 1)
    assert row("finished_at >= started_at, error_message") == (True, None)
    assert query(database_url, "SELECT type FROM bq_events") == []


def test_complete_without_a_result_keeps_what_the_processor_returned(
    app: Flask, db: SQLAlchemy, bq: BeanQueue, parked: uuid.UUID, row: Any
) -> None:
    with app.app_context():
        bq.complete(parked)
        db.session.commit()
    assert row("state, result") == ("DONE", {"number": 1})


def test_fail_ends_a_task_with_the_commit(
    app: Flask, db: SQLAlchemy, bq: BeanQueue, parked: uuid.UUID, row: Any, database_url: str
) -> None:
    with app.app_context():
        bq.fail(parked, error="out of stock")
        assert row("state") == ("PROCESSING",)
        db.session.commit()
    assert row("state, parked, error_message") == ("FAILED", False, "out of stock")
    assert query(database_url, "SELECT type, error_message, task_id::text FROM bq_events") == [
        ("FAILED", "out of stock", str(parked))
    ]


def test_an_error_that_cannot_be_stored_is_stored_as_far_as_it_goes(
    app: Flask, db: SQLAlchemy, bq: BeanQueue, parked: uuid.UUID, row: Any
) -> None:
    with app.app_context():
        bq.fail(parked, error="a\0b\ud800" + "x" * 100_000)
        db.session.commit()
    state, message = row("state, error_message")
    assert state == "FAILED"
    assert message.startswith(r"a\0b\ud800xxx")
    assert len(message) < 3_000


@pytest.mark.parametrize("end", ["complete", "fail"])
def test_a_rollback_takes_the_end_back(
    app: Flask, db: SQLAlchemy, bq: BeanQueue, parked: uuid.UUID, row: Any, end: str
) -> None:
    with app.app_context():
        if end == "complete":
            bq.complete(parked)
        else:
            bq.fail(parked, error="no")
        db.session.rollback()
    assert row("state, parked") == ("PROCESSING", True)
    with app.app_context():
        bq.complete(parked)
    assert row("state, parked") == ("PROCESSING", True)  # nobody committed
    with app.app_context():
        bq.complete(parked)
        db.session.commit()
    assert row("state") == ("DONE",)


def test_an_id_may_be_text(
    app: Flask, db: SQLAlchemy, bq: BeanQueue, parked: uuid.UUID, row: Any
) -> None:
    with app.app_context():
        bq.complete(str(parked))
        db.session.commit()
    assert row("state") == ("DONE",)


def test_a_task_that_is_loaded_shows_its_end(
    app: Flask, db: SQLAlchemy, bq: BeanQueue, parked: uuid.UUID
) -> None:
    with app.app_context():
        task = db.session.get(bq.Task, parked)
        assert task.state == "PROCESSING"
        bq.complete(parked)
        assert task.state == "DONE"


def test_the_callers_changes_go_with_it(
    app: Flask, db: SQLAlchemy, bq: BeanQueue, parked: uuid.UUID, Note: Any, database_url: str
) -> None:
    with app.app_context():
        db.session.add(Note(text="delivered"))
        bq.complete(parked)
        db.session.commit()
    assert query(database_url, "SELECT text FROM note ORDER BY id") == [
        ("ordered",),
        ("delivered",),
    ]


def test_another_task_may_end_it(
    app: Flask, db: SQLAlchemy, bq: BeanQueue, parked: uuid.UUID, work: Work, database_url: str
) -> None:
    @bq.processor()
    def confirm(task_id: str) -> str:
        bq.complete(task_id, result="by another")
        return "confirmed"

    with app.app_context():
        confirm.enqueue(task_id=str(parked))
        db.session.commit()
    work()
    found = query(database_url, "SELECT func_name, state, parked, result FROM bq_tasks ORDER BY id")
    assert found == [
        ("order", "DONE", False, "by another"),
        ("confirm", "DONE", False, "confirmed"),
    ]


# What cannot be ended.


@pytest.mark.parametrize("task_id", [uuid.UUID(int=1), str(uuid.UUID(int=1))])
def test_a_task_that_is_not_there_cannot_be_ended(app: Flask, bq: BeanQueue, task_id: Any) -> None:
    with app.app_context():
        with pytest.raises(LookupError, match=f"There is no task {task_id}"):
            bq.complete(task_id)
        with pytest.raises(LookupError, match=f"There is no task {task_id}"):
            bq.fail(task_id, error="no")


@pytest.mark.parametrize("state", ["DONE", "FAILED", "CANCELLED", "PENDING"])
def test_a_task_that_does_not_run_cannot_be_ended(
    app: Flask, db: SQLAlchemy, bq: BeanQueue, state: str
) -> None:
    with app.app_context():
        task = bq.Task(module="a", name="b", state=state)
        db.session.add(task)
        db.session.commit()
        with pytest.raises(TaskStateError, match=f"{task.id} is {state}; only a running one"):
            bq.complete(task.id)
        with pytest.raises(TaskStateError, match=f"{task.id} is {state}; only a running one"):
            bq.fail(task.id, error="no")


def test_a_task_is_ended_once(
    app: Flask, db: SQLAlchemy, bq: BeanQueue, parked: uuid.UUID, row: Any
) -> None:
    with app.app_context():
        bq.complete(parked, result=1)
        with pytest.raises(TaskStateError, match="is DONE"):
            bq.fail(parked, error="late")
        db.session.commit()
        with pytest.raises(TaskStateError, match="is DONE"):
            bq.complete(parked, result=2)
        db.session.commit()
    assert row("state, result") == ("DONE", 1)


@pytest.mark.parametrize("auto_complete", [False, True])
def test_a_task_whose_processor_still_runs_cannot_be_ended_by_others(
    app: Flask, db: SQLAlchemy, bq: BeanQueue, work: Work, row: Any, auto_complete: bool
) -> None:
    errors = []

    def webhook(task_id: uuid.UUID) -> None:
        with app.app_context():
            try:
                bq.complete(task_id)
            except TaskStateError as error:
                errors.append(str(error))

    @bq.processor(auto_complete=auto_complete)
    def call(task: Any) -> None:
        thread = threading.Thread(target=webhook, args=(task.id,))
        thread.start()
        thread.join()

    with app.app_context():
        task_id = call.enqueue().id
        db.session.commit()
    work()
    [error] = errors
    assert f"Task {task_id} is still with its worker" in error
    assert "a webhook that came early has to come again" in error
    assert row("state") == (("DONE" if auto_complete else "PROCESSING"),)


@pytest.mark.parametrize("result", [object(), float("nan"), "\0"])
def test_a_result_that_cannot_be_stored_is_refused(
    app: Flask, db: SQLAlchemy, bq: BeanQueue, parked: uuid.UUID, row: Any, result: Any
) -> None:
    with app.app_context():
        with pytest.raises(ValueError, match=f"result of task {parked} cannot be stored as JSON: "):
            bq.complete(parked, result=result)
        db.session.commit()
    assert row("state, parked") == ("PROCESSING", True)


@pytest.mark.parametrize(
    ("task_id", "error"),
    [
        ("", ValueError),
        ("order-7", ValueError),
        (7, TypeError),
        (None, TypeError),
        (b"", TypeError),
    ],
)
def test_what_is_no_id_is_refused(bq: BeanQueue, task_id: Any, error: type[Exception]) -> None:
    message = rf"A task's id is wanted, a UUID or its text, not {re.escape(repr(task_id))}\."
    with pytest.raises(error, match=message):
        bq.complete(task_id)
    with pytest.raises(error, match=message):
        bq.fail(task_id, error="no")


def test_a_task_in_place_of_its_id_is_refused(bq: BeanQueue, order: Any) -> None:
    with pytest.raises(TypeError, match=r"not <BQTask.*>\. Of a task, pass task\.id"):
        bq.complete(order.run())


@pytest.mark.parametrize("error", [None, ValueError("no"), b"no", False], ids=repr)
def test_an_error_that_is_no_text_is_refused(
    app: Flask, db: SQLAlchemy, bq: BeanQueue, parked: uuid.UUID, row: Any, error: Any
) -> None:
    message = re.escape(f"error must be text, not {error!r}; write error=str(e)")
    with app.app_context():
        with pytest.raises(TypeError, match=message):
            bq.fail(parked, error=error)
        db.session.commit()
    assert row("state, parked") == ("PROCESSING", True)


# By the processor itself, in its own transaction.


@pytest.mark.parametrize("auto_complete", [False, True])
@pytest.mark.parametrize("commits", [False, True])
def test_a_processor_may_complete_its_own_task(
    app: Flask,
    db: SQLAlchemy,
    bq: BeanQueue,
    Note: Any,
    work: Work,
    row: Any,
    database_url: str,
    auto_complete: bool,
    commits: bool,
) -> None:
    @bq.processor(auto_complete=auto_complete)
    def order(db: Any) -> str:
        db.add(Note(text="before"))
        bq.complete(current_task.id, result="completed")
        if commits:
            db.commit()
        db.add(Note(text="after"))
        return "returned"

    with app.app_context():
        order.enqueue()
        db.session.commit()
    work()
    assert row("state, parked, result") == ("DONE", False, "completed")
    assert query(database_url, "SELECT text FROM note ORDER BY id") == [("before",), ("after",)]


def test_a_processor_may_fail_its_own_task_and_keep_its_effects(
    app: Flask, db: SQLAlchemy, bq: BeanQueue, Note: Any, work: Work, row: Any, database_url: str
) -> None:
    @bq.processor(auto_complete=False)
    def order(db: Any) -> None:
        db.add(Note(text="refused"))
        bq.fail(current_task.id, error="out of stock")

    with app.app_context():
        order.enqueue()
        db.session.commit()
    work()
    assert row("state, error_message") == ("FAILED", "out of stock")
    assert query(database_url, "SELECT text FROM note") == [("refused",)]


@pytest.mark.parametrize("auto_complete", [False, True])
@pytest.mark.parametrize("way", ["savepoint", "whole", "close", "remove"])
def test_an_end_that_is_rolled_back_is_none(
    app: Flask,
    db: SQLAlchemy,
    bq: BeanQueue,
    Note: Any,
    work: Work,
    row: Any,
    database_url: str,
    auto_complete: bool,
    way: str,
) -> None:
    @bq.processor(auto_complete=auto_complete)
    def order(db: Any, savepoint: Any) -> str:
        bq.complete(current_task.id, result="completed")
        db.add(Note(text="inside"))
        db.flush()
        if way == "savepoint":
            savepoint.rollback()
        elif way == "whole":
            savepoint.commit()
            db.rollback()
        elif way == "close":
            db.close()
        else:
            bq.db.session.remove()
        bq.db.session.add(Note(text="outside"))
        return "returned"

    with app.app_context():
        order.enqueue()
        db.session.commit()
    work()
    state = ("DONE", False) if auto_complete else ("PROCESSING", True)
    assert row("state, parked, result") == (*state, "returned")
    assert query(database_url, "SELECT text FROM note") == [("outside",)]


def test_an_end_in_a_savepoint_that_is_released_counts(
    app: Flask, db: SQLAlchemy, bq: BeanQueue, work: Work, row: Any
) -> None:
    @bq.processor(auto_complete=False)
    def order(db: Any) -> None:
        with db.begin_nested():
            bq.complete(current_task.id, result="completed")

    with app.app_context():
        order.enqueue()
        db.session.commit()
    work()
    assert row("state, parked, result") == ("DONE", False, "completed")


def test_a_processor_that_raises_after_it_completed_has_failed(
    app: Flask, db: SQLAlchemy, bq: BeanQueue, work: Work, row: Any
) -> None:
    @bq.processor(auto_complete=False)
    def order() -> None:
        bq.complete(current_task.id)
        raise ValueError("no good")

    with app.app_context():
        order.enqueue()
        db.session.commit()
    work()
    assert row("state, error_message") == ("FAILED", "ValueError: no good")


def test_what_a_processor_raises_after_it_committed_its_end_is_logged_and_changes_nothing(
    app: Flask,
    db: SQLAlchemy,
    bq: BeanQueue,
    Note: Any,
    work: Work,
    row: Any,
    caplog: pytest.LogCaptureFixture,
    database_url: str,
) -> None:
    @bq.processor()
    def order() -> None:
        bq.complete(current_task.id, result="completed")
        db.session.commit()
        db.session.add(Note(text="after"))
        db.session.flush()
        raise ValueError("no good")

    with app.app_context():
        order.enqueue()
        db.session.commit()
    work()
    assert row("state, result, error_message") == ("DONE", "completed", None)
    assert query(database_url, "SELECT text FROM note") == []
    assert "raised after its end" in caplog.text
    assert "no good" in caplog.text


def test_a_processor_whose_claim_is_lost_cannot_end_its_task(
    app: Flask, db: SQLAlchemy, bq: BeanQueue, work: Work, row: Any
) -> None:
    raised = []

    @bq.processor(auto_complete=False)
    def order() -> None:
        with bq.engine(app).begin() as connection:  # what another worker's claim does
            connection.execute(sa.update(bq.Task.__table__).values(claims=bq.Task.claims + 1))
        try:
            bq.complete(current_task.id)
        except TaskStateError as error:
            raised.append(str(error))
            raise

    with app.app_context():
        order.enqueue()
        db.session.commit()
    work()
    assert "was taken from this worker" in raised[0]
    assert row("state, claims, parked") == ("PROCESSING", 2, False)
