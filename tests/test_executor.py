"""One task, one app context, one outcome."""

from __future__ import annotations

import contextlib
import datetime
import logging
import sys
import threading
import uuid
from collections.abc import Callable
from typing import Any

import pytest
import sqlalchemy as sa
from flask import Flask, appcontext_pushed, appcontext_tearing_down, current_app, g
from flask_sqlalchemy import SQLAlchemy

from flask_beanqueue import BeanQueue, LimitAttempt, current_task, task_started
from flask_beanqueue.log import log

from .conftest import only_task, texts
from .probe import query

Work = Callable[..., None]


def test_effects_and_completion_are_committed_together(
    app: Flask, db: SQLAlchemy, bq: BeanQueue, Note: Any, work: Work
) -> None:
    @bq.processor()
    def write(db: Any, text: str) -> dict[str, int]:
        db.add(Note(text=text))
        return {"length": len(text)}

    with app.app_context():
        write.enqueue(text="hello")
        db.session.commit()
    work()
    assert texts(app, db, Note) == ["hello"]
    task = only_task(app, bq)
    assert (task.state, task.result, task.claims, task.attempts) == ("DONE", {"length": 5}, 1, 1)
    assert task.created_at <= task.started_at <= task.finished_at


@pytest.mark.parametrize("how", ["change", "complete"])
def test_a_commit_in_another_session_than_that_of_the_tasks_change_raises(
    app: Flask, db: SQLAlchemy, bq: BeanQueue, Note: Any, work: Work, how: str
) -> None:
    """It would wait for ever for a lock that its own processor holds."""

    @bq.processor()
    def write(db: Any, task: Any) -> None:
        if how == "complete":
            bq.complete(task.id)
        else:
            task.priority = 3
            db.flush()
        with app.app_context():
            bq.db.session.add(Note(text="elsewhere"))
            bq.db.session.commit()

    with app.app_context():
        write.enqueue()
        db.session.commit()
    work()
    task = only_task(app, bq)
    assert task.state == "FAILED"
    assert "changed its own task in another session" in task.error_message
    assert texts(app, db, Note) == []


def test_a_commit_in_another_session_after_that_of_the_tasks_change_is_fine(
    app: Flask, db: SQLAlchemy, bq: BeanQueue, Note: Any, work: Work
) -> None:
    @bq.processor()
    def write(db: Any, task: Any) -> None:
        task.priority = 3
        db.commit()
        with app.app_context():
            bq.db.session.add(Note(text="elsewhere"))
            bq.db.session.commit()

    with app.app_context():
        write.enqueue()
        db.session.commit()
    work()
    assert only_task(app, bq).state == "DONE"
    assert texts(app, db, Note) == ["elsewhere"]


@pytest.mark.parametrize("flushes", [False, True])
def test_effects_and_completion_are_of_one_transaction(
    app: Flask, db: SQLAlchemy, bq: BeanQueue, Note: Any, work: Work, flushes: bool
) -> None:
    @bq.processor()
    def write(db: Any) -> None:
        db.add(Note(text="hello"))
        if flushes:
            db.flush()

    with app.app_context():
        write.enqueue()
        db.session.commit()
        work()
        same = db.session.scalar(sa.text("SELECT note.xmin = bq_tasks.xmin FROM note, bq_tasks"))
        assert same is True


@pytest.mark.parametrize("wanted", [False, True])
@pytest.mark.parametrize("uses_session", [False, True])
def test_success_leaves_an_event_only_if_that_is_wanted(
    make_app: Any, db: SQLAlchemy, bq: BeanQueue, Note: Any, wanted: bool, uses_session: bool
) -> None:
    @bq.processor()
    def write(db: Any) -> str:
        if uses_session:
            db.add(Note(text="hello"))
        return "well"

    app = make_app(db, bq, BQ_SUCCESS_EVENTS=wanted)
    with app.app_context():
        task = write.enqueue()
        db.session.commit()
        bq.process_tasks(burst=True)
        assert [event.type for event in task.events] == (["DONE"] if wanted else [])
        assert (task.state, task.result, task.attempts) == ("DONE", "well", 1)


def test_the_end_of_a_task_is_when_it_ended(
    app: Flask, db: SQLAlchemy, bq: BeanQueue, work: Work
) -> None:
    """And not when its transaction began."""
    last: list[Any] = []

    @bq.processor()
    def look(db: Any) -> None:
        db.execute(sa.text("SELECT pg_sleep(0.01)"))
        last.append(db.scalar(sa.text("SELECT clock_timestamp()")))

    with app.app_context():
        look.enqueue()
        db.session.commit()
    work()
    assert only_task(app, bq).finished_at > last[0]


def test_effects_of_a_processor_that_raises_are_rolled_back(
    app: Flask, db: SQLAlchemy, bq: BeanQueue, Note: Any, work: Work
) -> None:
    @bq.processor()
    def write(db: Any) -> None:
        db.add(Note(text="never"))
        db.flush()
        raise ValueError("no good")

    with app.app_context():
        write.enqueue()
        db.session.commit()
    work()
    assert texts(app, db, Note) == []
    with app.app_context():
        task = db.session.scalars(sa.select(bq.Task)).one()
        assert (task.state, task.error_message) == ("FAILED", "ValueError: no good")
        [event] = task.events
        assert event.type == "FAILED"
        assert "in write\n    raise ValueError" in event.traceback


def test_a_processor_gets_only_what_it_names(
    app: Flask, db: SQLAlchemy, bq: BeanQueue, work: Work
) -> None:
    seen: dict[str, Any] = {}

    @bq.processor()
    def plain(number: int) -> None:
        seen["plain"] = number

    @bq.processor()
    def everything(db: Any, task: Any, savepoint: Any, number: int) -> None:
        seen["everything"] = (db is bq.db.session(), task.id, savepoint.is_active, number)

    with app.app_context():
        plain.enqueue(number=1)
        task_id = everything.enqueue(number=2).id
        db.session.commit()
    work()
    assert seen == {"plain": 1, "everything": (True, task_id, True, 2)}


def test_a_task_in_a_processor_is_found_by_relationship(
    app: Flask, db: SQLAlchemy, bq: BeanQueue, Note: Any, work: Work
) -> None:
    @bq.processor()
    def shout(db: Any, task: Any) -> None:
        note = db.scalars(sa.select(Note).where(Note.task == task)).one()
        note.text = note.text.upper()

    with app.app_context():
        db.session.add(Note(text="quiet", task=shout.run()))
        db.session.commit()
    work()
    assert texts(app, db, Note) == ["QUIET"]


def test_a_rolled_back_savepoint_takes_its_effects_and_leaves_the_rest(
    app: Flask, db: SQLAlchemy, bq: BeanQueue, Note: Any, work: Work
) -> None:
    @bq.processor()
    def write(db: Any, savepoint: Any) -> None:
        db.add(Note(text="inside"))
        savepoint.rollback()
        db.add(Note(text="outside"))

    with app.app_context():
        write.enqueue()
        db.session.commit()
    work()
    assert texts(app, db, Note) == ["outside"]
    assert only_task(app, bq).state == "DONE"


def test_current_task_is_there_below_a_processor_and_not_outside(
    app: Flask, db: SQLAlchemy, bq: BeanQueue, work: Work
) -> None:
    seen = []

    def deep_down() -> uuid.UUID:
        return current_task.id  # type: ignore[no-any-return]

    @bq.processor()
    def look(task: Any) -> None:
        seen.append((deep_down(), current_task == task, bool(current_task)))

    with app.app_context():
        task_id = look.enqueue().id
        db.session.commit()
        assert not current_task
        with pytest.raises(RuntimeError, match="Working outside of a task"):
            current_task.id  # noqa: B018
    work()
    assert seen == [(task_id, True, True)]


def test_what_the_claim_did_not_bring_loads_itself(
    app: Flask, db: SQLAlchemy, bq: BeanQueue, work: Work
) -> None:
    seen = []

    @bq.processor()
    def look(task: Any) -> None:
        seen.append((task.state, task.claims, task.worker.name, task.created_at.tzinfo is not None))

    with app.app_context():
        look.enqueue()
        db.session.commit()
    work(name="the-worker")
    assert seen == [("PROCESSING", 1, "the-worker", True)]
    assert only_task(app, bq).state == "DONE"


def test_each_task_has_an_app_context_of_its_own(
    app: Flask, db: SQLAlchemy, bq: BeanQueue, work: Work
) -> None:
    seen = []
    torn_down = []

    @app.teardown_appcontext
    def teardown(error: BaseException | None) -> None:
        torn_down.append(g.get("number"))

    @bq.processor()
    def look(number: int) -> None:
        seen.append((current_app._get_current_object() is app, g.get("number")))  # type: ignore[attr-defined]
        g.number = number

    with app.app_context():
        look.enqueue_many([{"number": 1}, {"number": 2}])
        db.session.commit()
    work(concurrency=1)
    assert seen == [(True, None), (True, None)]
    assert [number for number in torn_down if number] == [1, 2]


def test_a_teardown_function_that_raises_does_not_change_the_outcome(
    app: Flask, db: SQLAlchemy, bq: BeanQueue, work: Work, caplog: pytest.LogCaptureFixture
) -> None:
    @bq.processor()
    def mark() -> str:
        g.mark = True
        return "done"

    with app.app_context():
        mark.enqueue()
        db.session.commit()

    @app.teardown_appcontext
    def teardown(error: BaseException | None) -> None:
        if g.pop("mark", False):
            raise RuntimeError("teardown")

    work()
    task = only_task(app, bq)
    assert (task.state, task.result) == ("DONE", "done")
    assert "RuntimeError: teardown" in caplog.text


class Stop(BaseException):
    pass


def violate(db: Any, Note: Any) -> None:
    db.add(Note())


def lose(db: Any, Note: Any) -> None:
    db.add(Note(text="never"))
    db.execute(sa.text("UPDATE bq_tasks SET claims = 7"))


def raise_(error: BaseException) -> Callable[..., None]:
    def act(db: Any, Note: Any) -> None:
        db.add(Note(text="never"))
        raise error

    return act


@pytest.mark.parametrize(
    ("act", "name"),
    [
        (raise_(ValueError("no good")), "ValueError"),
        (raise_(SystemExit(3)), "SystemExit"),
        (raise_(KeyboardInterrupt()), "KeyboardInterrupt"),
        (raise_(Stop()), "Stop"),
        (violate, "IntegrityError"),  # raised as the worker commits
        (lose, "ClaimLost"),
    ],
    ids=["ValueError", "SystemExit", "KeyboardInterrupt", "Stop", "IntegrityError", "ClaimLost"],
)
def test_what_a_task_raises_is_told_to_teardown_functions(
    app: Flask, db: SQLAlchemy, bq: BeanQueue, Note: Any, work: Work, act: Any, name: str
) -> None:
    seen: list[Any] = []

    @bq.processor(retry_policy=LimitAttempt(1))
    def do(db: Any) -> None:
        act(db, Note)

    def look(error: BaseException | None) -> None:
        if current_task:
            # What it has written is rolled back by now.
            seen.append((type(error).__name__, db.session.query(Note).count()))

    app.teardown_appcontext(look)
    app.teardown_appcontext(look)
    with app.app_context():
        do.enqueue()
        db.session.commit()
    told = []
    with appcontext_tearing_down.connected_to(lambda sender, exc: told.append(exc), app):
        work()
    assert seen == [(name, 0)] * 2
    assert [type(error).__name__ for error in told if error is not None] == [name]
    task = only_task(app, bq)
    assert task.state == "FAILED"
    assert task.error_message.startswith(name)


def test_a_task_that_succeeds_tells_teardown_functions_of_no_error(
    app: Flask, db: SQLAlchemy, bq: BeanQueue, Note: Any, work: Work
) -> None:
    seen = []

    @bq.processor()
    def write(db: Any) -> None:
        db.add(Note(text="hello"))

    @app.teardown_appcontext
    def look(error: BaseException | None) -> None:
        if current_task:
            seen.append(error)

    with app.app_context():
        write.enqueue()
        db.session.commit()
    work()
    assert seen == [None]


@pytest.mark.parametrize("raises_again", [False, True])
def test_a_teardown_function_that_raises_in_its_turn_does_not_change_the_outcome(
    app: Flask,
    db: SQLAlchemy,
    bq: BeanQueue,
    work: Work,
    caplog: pytest.LogCaptureFixture,
    raises_again: bool,
) -> None:
    @bq.processor()
    def fail() -> None:
        raise ValueError("its own")

    @app.teardown_appcontext
    def teardown(error: BaseException | None) -> None:
        if current_task:
            raise error if raises_again and error is not None else RuntimeError("teardown")

    with app.app_context():
        fail.enqueue()
        db.session.commit()
    work()
    task = only_task(app, bq)
    assert (task.state, task.error_message, task.attempts) == ("FAILED", "ValueError: its own", 1)
    assert ("RuntimeError: teardown" in caplog.text) == (not raises_again)


def test_a_logging_filter_that_raises_loses_no_task(
    app: Flask, db: SQLAlchemy, bq: BeanQueue, work: Work, database_url: str
) -> None:
    @bq.processor()
    def succeed() -> object:
        return object()  # which cannot be stored, and that is logged

    @bq.processor(retry_policy=LimitAttempt(2))
    def fail(db: Any) -> None:
        db.execute(sa.text("SELECT 1"))
        raise ValueError("its own")

    def refuse(record: logging.LogRecord) -> bool:
        raise RuntimeError("filter")

    with app.app_context():
        for processor in (succeed, fail, succeed, fail):
            processor.enqueue()
        db.session.commit()
    log.addFilter(refuse)
    log.setLevel(logging.WARNING)
    try:
        work(concurrency=1)
    finally:
        log.removeFilter(refuse)
        log.setLevel(logging.NOTSET)
    assert query(database_url, "SELECT DISTINCT state, crashes FROM bq_tasks") == [("FAILED", 0)]
    assert query(database_url, "SELECT state FROM bq_workers") == [("SHUTDOWN",)]


def test_a_commit_halfway_stays_when_the_rest_fails(
    app: Flask, db: SQLAlchemy, bq: BeanQueue, Note: Any, work: Work
) -> None:
    @bq.processor()
    def write(db: Any) -> None:
        db.add(Note(text="first half"))
        db.commit()
        db.add(Note(text="second half"))
        db.flush()
        raise ValueError

    with app.app_context():
        write.enqueue()
        db.session.commit()
    work()
    assert texts(app, db, Note) == ["first half"]
    assert only_task(app, bq).state == "FAILED"


def take_away(app: Flask, db: SQLAlchemy, bq: BeanQueue) -> None:
    """Do what take-over and another worker's claim do to a task's row."""
    engine = bq.engine(app)
    with engine.begin() as connection:
        connection.execute(sa.update(bq.Task.__table__).values(claims=bq.Task.claims + 1))


def test_a_commit_of_a_processor_whose_claim_is_lost_raises(
    app: Flask, db: SQLAlchemy, bq: BeanQueue, Note: Any, work: Work
) -> None:
    raised = []

    @bq.processor()
    def write(db: Any) -> None:
        db.add(Note(text="never"))
        take_away(app, bq.db, bq)
        try:
            db.commit()
        except Exception as error:
            raised.append(type(error).__name__)
            raise

    with app.app_context():
        write.enqueue()
        db.session.commit()
    work()
    assert raised == ["ClaimLost"]
    assert texts(app, db, Note) == []
    assert only_task(app, bq).state == "PROCESSING"  # as the other worker has it


def test_effects_of_a_processor_whose_claim_is_lost_are_rolled_back(
    app: Flask, db: SQLAlchemy, bq: BeanQueue, Note: Any, work: Work
) -> None:
    @bq.processor()
    def write(db: Any) -> None:
        db.add(Note(text="never"))
        take_away(app, bq.db, bq)

    with app.app_context():
        write.enqueue()
        db.session.commit()
    work()
    assert texts(app, db, Note) == []
    assert only_task(app, bq).state == "PROCESSING"


def test_a_task_that_waits_again_is_not_completed_by_who_held_it(
    app: Flask, db: SQLAlchemy, bq: BeanQueue, Note: Any, work: Work
) -> None:
    """Taken over, and claimed by nobody yet: the claim is as old as before, the state is not."""
    runs = []

    def taken_over() -> None:
        runs.append(1)
        if len(runs) < 3:
            with bq.engine(app).begin() as connection:
                connection.execute(
                    sa.update(bq.Task.__table__)
                    .where(bq.Task.state == "PROCESSING")
                    .values(state="PENDING")
                )

    @bq.processor()
    def with_effects(db: Any, task: Any) -> None:
        db.add(Note(text=str(task.claims)))
        taken_over()

    @bq.processor()
    def without() -> int:
        taken_over()
        return len(runs)

    with app.app_context():
        with_effects.enqueue()
        db.session.commit()
        work(concurrency=1)
        assert texts(app, db, Note) == ["3"]
        runs.clear()
        without.enqueue()
        db.session.commit()
        work(concurrency=1)
        task = db.session.scalars(sa.select(bq.Task).where(bq.Task.func_name == "without")).one()
        assert (task.state, task.claims, task.result) == ("DONE", 3, 3)


def test_what_a_processor_writes_after_it_sent_its_task_back_is_fenced(
    app: Flask, db: SQLAlchemy, bq: BeanQueue, Note: Any, work: Work
) -> None:
    runs = []

    @bq.processor()
    def again(db: Any, task: Any) -> None:
        runs.append(task.claims)
        if len(runs) > 1:
            return
        task.state = "PENDING"
        db.commit()
        db.add(Note(text="still its own"))
        db.commit()
        take_away(app, bq.db, bq)
        db.add(Note(text="another's by now"))
        db.commit()

    with app.app_context():
        again.enqueue()
        db.session.commit()
    work()
    assert texts(app, db, Note) == ["still its own"]
    assert only_task(app, bq).state == "DONE"


def test_a_swallowed_claim_lost_does_not_help(
    app: Flask, db: SQLAlchemy, bq: BeanQueue, Note: Any, work: Work
) -> None:
    @bq.processor()
    def write(db: Any) -> None:
        db.add(Note(text="never"))
        take_away(app, bq.db, bq)
        try:
            db.commit()
        except Exception:
            db.rollback()
        db.add(Note(text="nor this"))

    with app.app_context():
        write.enqueue()
        db.session.commit()
    work()
    assert texts(app, db, Note) == []


@pytest.mark.parametrize("commits", [False, True])
def test_a_processor_may_set_the_state_of_its_task(
    app: Flask, db: SQLAlchemy, bq: BeanQueue, Note: Any, work: Work, commits: bool
) -> None:
    @bq.processor(auto_complete=False)
    def decide(db: Any, task: Any) -> None:
        db.add(Note(text="kept"))
        task.state = "CANCELLED"
        if commits:
            db.commit()

    with app.app_context():
        decide.enqueue()
        db.session.commit()
    work()
    assert texts(app, db, Note) == ["kept"]
    task = only_task(app, bq)
    assert (task.state, task.parked) == ("CANCELLED", False)


def test_a_processor_that_sets_its_state_with_a_lost_claim_leaves_nothing(
    app: Flask, db: SQLAlchemy, bq: BeanQueue, Note: Any, work: Work
) -> None:
    @bq.processor(auto_complete=False)
    def decide(db: Any, task: Any) -> None:
        db.add(Note(text="never"))
        take_away(app, bq.db, bq)
        task.state = "DONE"

    with app.app_context():
        decide.enqueue()
        db.session.commit()
    work()
    assert texts(app, db, Note) == []
    assert only_task(app, bq).state == "PROCESSING"


def test_a_processor_may_send_its_task_back_into_the_queue(
    app: Flask, db: SQLAlchemy, bq: BeanQueue, work: Work
) -> None:
    runs = []

    @bq.processor()
    def again(task: Any) -> None:
        runs.append(task.claims)
        if len(runs) < 3:
            task.state = "PENDING"

    with app.app_context():
        again.enqueue()
        db.session.commit()
    work()
    assert runs == [1, 2, 3]
    assert only_task(app, bq).state == "DONE"


def test_a_processor_may_change_other_columns_of_its_task(
    app: Flask, db: SQLAlchemy, bq: BeanQueue, work: Work
) -> None:
    @bq.processor()
    def note(db: Any, task: Any) -> None:
        task.result = {"kept": True}
        db.flush()  # the row moves, and is found by its id

    with app.app_context():
        note.enqueue()
        db.session.commit()
    work()
    task = only_task(app, bq)
    assert (task.state, task.result) == ("DONE", {"kept": True})


def test_a_processor_that_closes_its_session_is_done_all_the_same(
    app: Flask, db: SQLAlchemy, bq: BeanQueue, Note: Any, work: Work
) -> None:
    @bq.processor()
    def close(db: Any) -> None:
        db.add(Note(text="lost"))
        db.flush()
        db.close()

    @bq.processor()
    def remove() -> None:
        bq.db.session.add(Note(text="lost"))
        bq.db.session.remove()
        bq.db.session.add(Note(text="kept"))

    with app.app_context():
        close.enqueue()
        remove.enqueue()
        db.session.commit()
    work()
    assert texts(app, db, Note) == ["kept"]
    with app.app_context():
        assert set(db.session.scalars(sa.select(bq.Task.state))) == {"DONE"}


def test_a_failing_commit_fails_the_task(
    app: Flask, db: SQLAlchemy, bq: BeanQueue, work: Work
) -> None:
    with app.app_context():
        db.session.execute(
            sa.text(
                "CREATE TABLE deferred (id uuid REFERENCES bq_tasks (id) DEFERRABLE INITIALLY"
                " DEFERRED)"
            )
        )
        db.session.commit()

    @bq.processor()
    def write(db: Any) -> None:
        db.execute(sa.text("INSERT INTO deferred VALUES (gen_random_uuid())"))

    with app.app_context():
        write.enqueue()
        db.session.commit()
    work()
    task = only_task(app, bq)
    assert task.state == "FAILED"
    assert "IntegrityError" in task.error_message


def test_a_task_made_while_another_runs_is_its_child(
    app: Flask, db: SQLAlchemy, bq: BeanQueue, work: Work
) -> None:
    @bq.processor()
    def child(number: int) -> None:
        pass

    @bq.processor()
    def parent(db: Any) -> None:
        child.enqueue(number=1)
        child.enqueue_many([{"number": 2}])
        db.add(bq.Task(module=child.module, name="child", kwargs={"number": 3}))
        assert child.run(number=4).parent_id == current_task.id

    with app.app_context():
        parent_id = parent.enqueue().id
        db.session.commit()
    work()
    with app.app_context():
        task = db.session.get(bq.Task, parent_id)
        assert task.parent is None
        assert sorted(each.kwargs["number"] for each in task.children) == [1, 2, 3]
        assert {each.state for each in task.children} == {"DONE"}


@pytest.mark.parametrize("kwargs", [["secret"], "secret", 5, True])
def test_arguments_that_are_no_object_fail_the_task_and_are_not_shown(
    app: Flask,
    db: SQLAlchemy,
    bq: BeanQueue,
    work: Work,
    caplog: pytest.LogCaptureFixture,
    kwargs: Any,
) -> None:
    @bq.processor()
    def nothing() -> None:
        pass

    with app.app_context():
        db.session.add(bq.Task(module=__name__, name="nothing", kwargs=kwargs))
        db.session.commit()
    work()
    message = "ValueError: the task's kwargs are no JSON object"
    task = only_task(app, bq)
    assert (task.state, task.error_message) == ("FAILED", message)
    [record] = [each for each in caplog.records if each.levelname == "ERROR"]
    assert record.getMessage().endswith(f"failed: {message}")


def test_an_unknown_processor_is_left_for_a_worker_that_knows_it(
    app: Flask, db: SQLAlchemy, bq: BeanQueue, work: Work
) -> None:
    with app.app_context():
        db.session.add(bq.Task(module="elsewhere", name="unheard_of"))
        db.session.commit()
    work("default")
    with app.app_context():
        task = db.session.scalars(sa.select(bq.Task)).one()
        assert (task.state, task.attempts, task.claims) == ("PENDING", 0, 1)
        assert "No processor elsewhere.unheard_of" in task.error_message
        assert task.scheduled_at > task.created_at
        assert [event.type for event in task.events] == ["UNKNOWN"]


def test_an_unknown_processor_fails_after_its_grace(
    make_app: Any, db: SQLAlchemy, bq: BeanQueue
) -> None:
    app = make_app(db, bq, BQ_UNKNOWN_GRACE=0.0)
    with app.app_context():
        db.session.add(bq.Task(module="elsewhere", name="unheard_of"))
        db.session.commit()
    bq.process_tasks(["default"], app=app, burst=True)
    task = only_task(app, bq)
    assert task.state == "FAILED"
    assert "BQ_PROCESSOR_PACKAGES" in task.error_message
    assert "BQ_UNKNOWN_GRACE" in task.error_message


def test_a_task_of_a_script_that_was_run_directly_says_how_to_run_it(
    app: Flask, db: SQLAlchemy, bq: BeanQueue, work: Work
) -> None:
    def resize() -> str:
        return "done"

    resize.__module__ = "__main__"  # as in app.py under `python app.py`
    with app.app_context():
        # Another process finds no processor of that module; only the script itself does.
        db.session.add(bq.Task(module="__main__", name="resize"))
        db.session.commit()
    work("default")
    task = only_task(app, bq)
    assert task.state == "PENDING"
    assert task.error_message == (
        "No processor __main__.resize is registered in this worker, which knows 0. A script that"
        " was run directly, as python app.py, made this task. Run it as a module that can be"
        " imported: flask --app app run."
    )
    with app.app_context():
        bq.processor()(resize).enqueue()
        db.session.commit()
    work()
    with app.app_context():
        results = sa.select(bq.Task.result).where(bq.Task.state == "DONE")
        assert db.session.scalars(results).all() == ["done"]


def test_a_policy_that_ends_programs_ends_only_the_task(
    app: Flask, db: SQLAlchemy, bq: BeanQueue, work: Work
) -> None:
    @bq.processor(retry_policy=lambda task: sys.exit("policy"))
    def fail() -> None:
        raise ValueError("first")

    with app.app_context():
        fail.enqueue()
        db.session.commit()
    work()
    task = only_task(app, bq)
    assert task.state == "FAILED"
    assert task.error_message == "ValueError: first (its retry policy failed: SystemExit: policy)"


def test_an_app_context_that_cannot_be_pushed_fails_the_task(
    app: Flask, db: SQLAlchemy, bq: BeanQueue, work: Work
) -> None:
    ran = []

    @bq.processor()
    def run() -> None:
        ran.append(1)

    with app.app_context():
        run.enqueue()
        db.session.commit()

    def refuse(sender: Flask) -> None:
        if threading.current_thread().name == "beanqueue-0":
            raise LookupError("no context")

    with appcontext_pushed.connected_to(refuse, app):
        work(concurrency=1)
    task = only_task(app, bq)
    assert (task.state, task.error_message) == ("FAILED", "LookupError: no context")
    assert ran == []


@pytest.mark.parametrize("state", ["CANCELLED", "PENDING"])
@pytest.mark.parametrize("halfway", [False, True])
def test_a_state_that_was_loaded_is_not_one_that_was_set(
    app: Flask, db: SQLAlchemy, bq: BeanQueue, Note: Any, work: Work, state: str, halfway: bool
) -> None:
    """Somebody else sets it, and the processor reads it."""
    runs = []

    @bq.processor()
    def look(db: Any, task: Any) -> None:
        runs.append(task.claims)
        if len(runs) > 1:
            return
        with bq.engine(app).begin() as connection:
            connection.execute(sa.update(bq.Task.__table__).values(state=state))
        db.refresh(task)
        assert task.state == state
        db.add(Note(text="never"))
        if halfway:
            db.commit()

    with app.app_context():
        look.enqueue()
        db.session.commit()
    work()
    assert texts(app, db, Note) == []
    assert only_task(app, bq).state == ("DONE" if state == "PENDING" else "CANCELLED")


def test_a_late_outcome_does_not_undo_a_parked_task(
    app: Flask, db: SQLAlchemy, bq: BeanQueue, Note: Any, work: Work
) -> None:
    """The commit goes through, and its answer is lost: what looks like a failure is none."""
    raised = []

    @bq.processor(auto_complete=False, retry_policy=lambda task: datetime.timedelta(0))
    def order(db: Any) -> None:
        db.add(Note(text="ordered"))

    def lose(connection: Any) -> None:
        if current_task and not raised:
            raised.append(1)
            connection.connection.dbapi_connection.commit()
            raise ConnectionError("the answer is lost")

    sa.event.listen(bq.engine(app), "commit", lose)
    with app.app_context():
        order.enqueue()
        db.session.commit()
    work()
    assert raised == [1]
    assert texts(app, db, Note) == ["ordered"]
    task = only_task(app, bq)
    assert (task.state, task.parked, task.attempts) == ("PROCESSING", True, 1)


@pytest.mark.parametrize("ends", ["close", "remove", "rollback"])
def test_an_outcome_that_is_thrown_away_is_written_anew(
    app: Flask, db: SQLAlchemy, bq: BeanQueue, Note: Any, work: Work, ends: str
) -> None:
    @bq.processor()
    def order() -> str:
        bq.complete(current_task.id, result="thrown away")
        getattr(bq.db.session, ends)()
        bq.db.session.add(Note(text="kept"))
        return "kept"

    with app.app_context():
        order.enqueue()
        db.session.commit()
    work()
    assert texts(app, db, Note) == ["kept"]
    task = only_task(app, bq)
    assert (task.state, task.result, task.attempts) == ("DONE", "kept", 1)


def test_a_transaction_that_was_left_broken_fails_the_task(
    app: Flask, db: SQLAlchemy, bq: BeanQueue, Note: Any, work: Work
) -> None:
    @bq.processor()
    def order(db: Any) -> None:
        db.add(Note(text="never"))
        bq.complete(current_task.id)
        with contextlib.suppress(sa.exc.ProgrammingError):
            db.execute(sa.text("SELECT no_such_column"))

    with app.app_context():
        order.enqueue()
        db.session.commit()
    work()
    assert texts(app, db, Note) == []
    assert only_task(app, bq).state == "FAILED"


# Transactions of the processor's own.


@pytest.mark.parametrize(
    "options", [{}, {"autobegin": False}, {"expire_on_commit": False}], ids=str
)
@pytest.mark.parametrize("way", ["parameter", "current_task", "receiver", "all"])
def test_a_processor_may_begin_its_transaction_by_itself(
    make_app: Any, options: Any, way: str
) -> None:
    """Although it has asked for its task, which is then in the session."""
    db = SQLAlchemy(session_options=options)
    bq = BeanQueue(db=db)

    class Note(db.Model):  # type: ignore[name-defined, misc]
        id = sa.Column(sa.Integer, primary_key=True)
        text = sa.Column(sa.Text, nullable=False)

    app = make_app(db, bq)
    seen = []

    def write() -> None:
        with db.session.begin():
            db.session.add(Note(text="first"))
        with db.session.begin():
            db.session.add(Note(text="second"))
            if way != "receiver":
                assert current_task._get_current_object() in db.session

    @bq.processor()
    def with_parameter(task: Any) -> None:
        seen.append((task.func_name, task.kwargs, task.state))
        write()

    @bq.processor()
    def without() -> None:
        if way != "receiver":
            seen.append((current_task.func_name, current_task.kwargs, current_task.state))
        write()

    def receiver(sender: Flask, task: Any) -> None:
        seen.append((task.func_name, task.kwargs, task.state))

    processor = with_parameter if way in ("parameter", "all") else without
    with app.app_context():
        with db.session.begin():
            processor.enqueue()
        with contextlib.ExitStack() as stack:
            if way in ("receiver", "all"):
                stack.enter_context(task_started.connected_to(receiver, app))
            bq.process_tasks(app=app, burst=True)
        with db.session.begin():
            task = db.session.scalars(sa.select(bq.Task)).one()
            assert (task.state, task.error_message) == ("DONE", None)
            assert sorted(db.session.scalars(sa.select(Note.text))) == ["first", "second"]
    assert set(map(str, seen)) == {str((processor.func_name, {}, "PROCESSING"))}


def test_to_ask_for_the_task_leaves_a_transaction_as_it_is(
    app: Flask, db: SQLAlchemy, bq: BeanQueue, Note: Any, work: Work
) -> None:
    @bq.processor()
    def write(db: Any) -> None:
        db.add(Note(text="hello"))
        transaction = db.get_transaction()
        assert current_task.priority == 0
        assert current_task.created_at is not None  # which is loaded
        assert db.get_transaction() is transaction
        savepoint = db.begin_nested()
        db.add(Note(text="never"))
        savepoint.rollback()

    with app.app_context():
        write.enqueue()
        db.session.commit()
    work()
    assert texts(app, db, Note) == ["hello"]


@pytest.mark.parametrize("orm", [False, True])
def test_what_a_thread_of_a_processor_writes_in_its_session_is_committed_with_the_task(
    app: Flask, db: SQLAlchemy, bq: BeanQueue, Note: Any, work: Work, orm: bool
) -> None:
    """The thread knows nothing of the task."""

    @bq.processor()
    def write(db: Any) -> None:
        def write() -> None:
            with app.app_context():
                if orm:
                    db.add(Note(text="hello"))
                    db.flush()
                else:
                    db.execute(sa.insert(Note).values(text="hello"))

        thread = threading.Thread(target=write)
        thread.start()
        thread.join()

    with app.app_context():
        write.enqueue()
        db.session.commit()
    work()
    assert texts(app, db, Note) == ["hello"]
