"""The loop: claims, order, schedules, wake-ups."""

from __future__ import annotations

import _thread
import contextlib
import datetime
import re
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from flask import Flask
from flask_sqlalchemy import SQLAlchemy
from flask_sqlalchemy.record_queries import get_recorded_queries

from flask_beanqueue import BeanQueue, LimitAttempt
from flask_beanqueue.engine import heartbeat, loop
from flask_beanqueue.engine.connection import application_name
from flask_beanqueue.engine.cursor import Cursor
from flask_beanqueue.engine.loop import Loop
from flask_beanqueue.engine.threads import HORIZON
from flask_beanqueue.engine.worker import Worker

from .conftest import MakeApp, running
from .probe import Probe, connect, query, wait_until
from .triggers import trigger

Work = Callable[..., None]


class Statements:
    """Counts what is sent to the database, and lets a test wait for a number of it."""

    def __init__(self) -> None:
        self.sent: list[str] = []
        self._changed = threading.Condition()

    def listen(self, engine: sa.Engine) -> None:
        sa.event.listen(engine, "before_cursor_execute", self._add)

    def _add(self, connection: Any, cursor: Any, statement: str, *rest: Any) -> None:
        with self._changed:
            self.sent.append(" ".join(statement.split()))
            self._changed.notify_all()

    def count(self, part: str) -> int:
        return sum(part in statement for statement in self.sent)

    def wait(self, part: str, number: int) -> None:
        with self._changed:
            assert self._changed.wait_for(lambda: self.count(part) >= number, 60), self.sent


@pytest.fixture
def statements(app: Flask, bq: BeanQueue) -> Statements:
    statements = Statements()
    statements.listen(bq.engine(app))
    return statements


class Log(list[Any]):
    """What processors did, with a way to wait for it."""

    def __init__(self) -> None:
        self._changed = threading.Condition()

    def add(self, item: Any) -> None:
        with self._changed:
            self.append(item)
            self._changed.notify_all()

    def wait(self, length: int, timeout: float = 30) -> None:
        with self._changed:
            assert self._changed.wait_for(lambda: len(self) >= length, timeout), list(self)


@pytest.fixture
def log() -> Log:
    return Log()


@pytest.fixture
def note(bq: BeanQueue, log: Log) -> Any:
    @bq.processor()
    def note(number: int) -> None:
        log.add(number)

    return note


@pytest.fixture
def gate() -> threading.Event:
    """What a task waits for that is to take long."""
    return threading.Event()


@pytest.fixture
def busy_worker(
    app: Flask, db: SQLAlchemy, bq: BeanQueue, log: Log, gate: threading.Event
) -> Callable[[int], Any]:
    """A worker of so many threads that has begun a long task."""

    @bq.processor()
    def long() -> None:
        log.add("long")
        gate.wait(60)

    @contextlib.contextmanager
    def busy_worker(concurrency: int) -> Iterator[Any]:
        with app.app_context(), running(app, bq, concurrency=concurrency) as worker:
            long.enqueue()
            db.session.commit()
            log.wait(1)
            yield worker

    return busy_worker


def suspected(db: SQLAlchemy, processor: Any, **arguments: Any) -> Any:
    """Add a task that was in a crash."""
    task = processor.run(**arguments)
    task.crashes = 1
    db.session.add(task)
    return task


def lose(db: SQLAlchemy, worker: Worker, statement: str = "") -> None:
    """End the backends of a worker whose last statement begins so; there is at least one."""
    ended = db.session.scalars(
        sa.text(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
            " WHERE application_name = :name AND query LIKE :statement AND pid <> pg_backend_pid()"
        ),
        {"name": application_name(worker.id), "statement": f"{statement}%"},
    ).all()
    db.session.rollback()
    assert ended


def test_tasks_are_done_in_the_order_of_priority_schedule_and_making(
    app: Flask, db: SQLAlchemy, note: Any, work: Work, log: Log
) -> None:
    with app.app_context():
        hour_ago = datetime.datetime.now(datetime.UTC) - datetime.timedelta(hours=1)
        note.using(priority=1).enqueue(number=5)
        note.enqueue(number=3)
        note.enqueue(number=4)
        note.using(scheduled_at=hour_ago).enqueue(number=2)
        note.using(priority=-1).enqueue(number=1)
        db.session.commit()
    work(concurrency=1)
    assert log == [1, 2, 3, 4, 5]


def test_ten_thousand_tasks_of_one_transaction_keep_their_order(
    app: Flask, db: SQLAlchemy, note: Any, work: Work, log: Log
) -> None:
    with app.app_context():
        note.enqueue_many({"number": number} for number in range(10_000))
        db.session.commit()
    work(concurrency=1)
    assert log == list(range(10_000))


def test_a_worker_does_only_its_channels(
    app: Flask, db: SQLAlchemy, note: Any, work: Work, log: Log
) -> None:
    with app.app_context():
        for number, channel in enumerate(["one", "two", "three"]):
            note.using(channel=channel).enqueue(number=number)
        db.session.commit()
    work("one", "three")
    assert sorted(log) == [0, 2]


def test_tasks_due_later_are_left_until_then(
    app: Flask, db: SQLAlchemy, note: Any, work: Work, log: Log, bq: BeanQueue
) -> None:
    with app.app_context():
        note.using(delay=datetime.timedelta(hours=1)).enqueue(number=1)
        db.session.commit()
    work()
    assert log == []
    with app.app_context():
        db.session.execute(sa.update(bq.Task).values(scheduled_at=sa.func.now()))
        db.session.commit()
    work()
    assert log == [1]


@pytest.mark.parametrize(("when", "done"), [("-infinity", [2, 1]), ("infinity", [2])])
def test_a_time_without_end_disturbs_nobody(
    app: Flask, db: SQLAlchemy, note: Any, work: Work, log: Log, when: str, done: list[int]
) -> None:
    with app.app_context():
        note.enqueue(number=1)
        note.using(priority=-1).enqueue(number=2)
        db.session.flush()
        db.session.execute(
            sa.text("UPDATE bq_tasks SET scheduled_at = :when WHERE priority = 0"), {"when": when}
        )
        db.session.commit()
    work()
    assert log == done


def test_a_scheduled_task_wakes_its_worker_when_it_falls_due(
    app: Flask, db: SQLAlchemy, bq: BeanQueue, note: Any, log: Log
) -> None:
    """The poll would come after half a minute."""
    with running(app, bq):
        with app.app_context():
            note.enqueue(number=0)
            db.session.commit()
            log.wait(1)
            note.using(delay=datetime.timedelta(seconds=1)).enqueue(number=1)
            db.session.commit()
        log.wait(2, timeout=15)
    with app.app_context():
        late = db.session.scalars(
            sa.select(sa.func.max(bq.Task.started_at - bq.Task.scheduled_at))
        ).one()
    assert datetime.timedelta(0) <= late < datetime.timedelta(seconds=5)


def test_a_commit_wakes_a_waiting_worker_without_a_poll(
    app: Flask, db: SQLAlchemy, bq: BeanQueue, note: Any, log: Log, statements: Statements
) -> None:
    with running(app, bq), app.app_context():
        statements.wait("WITH RECURSIVE", 1)  # it has looked, and sleeps for half a minute
        for number in range(5):
            note.enqueue(number=number)
            db.session.commit()
            log.wait(number + 1, timeout=15)


def test_without_listen_a_worker_polls(
    make_app: Any, db: SQLAlchemy, bq: BeanQueue, note: Any, log: Log
) -> None:
    app = make_app(db, bq, BQ_LISTEN=False, BQ_POLL_TIMEOUT=0.1)
    with running(app, bq), app.app_context():
        for number in range(3):
            note.enqueue(number=number)
            db.session.commit()
            log.wait(number + 1)
        [(listening,)] = db.session.execute(
            sa.text(
                "SELECT count(*) FROM pg_stat_activity"
                " WHERE query LIKE 'LISTEN%' AND datname = current_database()"
            )
        )
        assert listening == 0


def test_raw_sql_that_notifies_wakes_a_worker(
    app: Flask, db: SQLAlchemy, bq: BeanQueue, note: Any, log: Log, statements: Statements
) -> None:
    with running(app, bq), app.app_context():
        statements.wait("WITH RECURSIVE", 1)
        db.session.execute(
            sa.text(
                "INSERT INTO bq_tasks (module, func_name, kwargs)"
                " VALUES (:module, 'note', '{\"number\": 7}')"
            ),
            {"module": note.module},
        )
        db.session.execute(sa.text('NOTIFY "default"'))
        db.session.commit()
        log.wait(1)
    assert log == [7]


def test_a_task_behind_the_mark_is_found_by_a_busy_worker(
    app: Flask, db: SQLAlchemy, bq: BeanQueue, note: Any, log: Log
) -> None:
    """A worker that is never idle passes rows which were committed late or came back."""
    stop = threading.Event()

    @bq.processor()
    def busy() -> None:
        if not stop.is_set():
            busy.enqueue()

    with running(app, bq), app.app_context():
        for _ in range(20):
            busy.enqueue()
        db.session.commit()
        note.enqueue(number=1)
        db.session.commit()
        log.wait(1)  # the mark stands here, or later
        hour_ago = datetime.datetime.now(datetime.UTC) - datetime.timedelta(hours=1)
        note.using(scheduled_at=hour_ago).enqueue(number=2)
        note.using(priority=-5).enqueue(number=3)
        note.using(priority=5, scheduled_at=hour_ago).enqueue(number=4)
        db.session.commit()
        log.wait(3)
        stop.set()
        log.wait(4)
    assert set(log[1:3]) == {2, 3}


def test_a_task_behind_the_mark_is_found_before_a_backlog_is_done(
    app: Flask, db: SQLAlchemy, bq: BeanQueue, note: Any, work: Work, log: Log
) -> None:
    @bq.processor()
    def count(number: int) -> None:
        if number == 1_000:
            hour_ago = datetime.datetime.now(datetime.UTC) - datetime.timedelta(hours=1)
            note.using(scheduled_at=hour_ago).enqueue(number=-1)
            bq.db.session.commit()
        log.add(number)

    with app.app_context():
        count.enqueue_many({"number": number} for number in range(40_000))
        db.session.commit()
    work(concurrency=1)
    assert len(log) == 40_001
    assert log.index(-1) < 39_000


def test_a_claim_whose_answer_is_lost_is_given_back(
    app: Flask, db: SQLAlchemy, bq: BeanQueue, note: Any, work: Work, log: Log
) -> None:
    lost = []

    def lose(connection: Any, cursor: Any, statement: str, *rest: Any) -> None:
        if "SET state = 'PROCESSING'" in statement and cursor.rowcount and not lost:
            lost.append(cursor.rowcount)
            connection.connection.dbapi_connection.close()
            raise connection.dialect.dbapi.OperationalError("the answer is lost")

    sa.event.listen(bq.engine(app), "after_cursor_execute", lose)
    with app.app_context():
        note.enqueue_many([{"number": 1}, {"number": 2}])
        db.session.commit()
        work(concurrency=2)
        tasks = db.session.scalars(sa.select(bq.Task)).all()
    assert lost == [2]
    assert sorted(log) == [1, 2]
    assert [(task.state, task.claims, task.crashes) for task in tasks] == [("DONE", 2, 0)] * 2


def test_a_claim_that_arrives_when_its_worker_has_long_come_back_is_given_back(
    make_app: Any,
    db: SQLAlchemy,
    bq: BeanQueue,
    note: Any,
    log: Log,
    database_url: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The backend that was lost was at work still. Nobody else takes over from who lives."""
    timing = {"BQ_WORKER_HEARTBEAT_PERIOD": 0.1, "BQ_WORKER_HEARTBEAT_TIMEOUT": 0.5}
    app = make_app(db, bq, BQ_POLL_TIMEOUT=3600, **timing)
    look = loop.claims_of
    arrived = []

    def arrives_after_the_look(connection: Any, models: Any, worker_id: Any) -> Any:
        found = look(connection, models, worker_id)
        if not arrived:
            claim = "state = 'PROCESSING', claims = 1, scheduled_at = now()"
            query(database_url, f"UPDATE bq_tasks SET {claim}, worker_id = %s", str(worker_id))
            arrived.append(worker_id)
        return found

    monkeypatch.setattr(loop, "claims_of", arrives_after_the_look)
    with running(app, bq) as worker, app.app_context():
        note.using(delay=datetime.timedelta(hours=1)).enqueue(number=1)
        db.session.commit()
        wait_until(lambda: worker._source.listens)
        lose(db, worker)
        log.wait(1)
        assert arrived == [worker.id]


def test_an_outcome_whose_answer_is_lost_is_not_called_lost(
    app: Flask,
    db: SQLAlchemy,
    bq: BeanQueue,
    note: Any,
    work: Work,
    log: Log,
    caplog: pytest.LogCaptureFixture,
) -> None:
    lost = []

    def lose(connection: Any, cursor: Any, statement: str, *rest: Any) -> None:
        if "SET state = 'DONE'" in statement and cursor.rowcount and not lost:
            lost.append(cursor.rowcount)
            connection.connection.dbapi_connection.close()
            raise connection.dialect.dbapi.OperationalError("the answer is lost")

    sa.event.listen(bq.engine(app), "after_cursor_execute", lose)
    with app.app_context():
        note.enqueue(number=1)
        db.session.commit()
        work(concurrency=1)  # in their order
        [task] = db.session.scalars(sa.select(bq.Task))
    assert lost == [1]
    assert log == [1]
    assert (task.state, task.claims, task.attempts) == ("DONE", 1, 1)
    assert "tried again" in caplog.text
    assert "no longer this worker's" not in caplog.text


def test_an_outcome_that_the_database_refuses_holds_up_no_other(
    app: Flask, db: SQLAlchemy, bq: BeanQueue, note: Any, work: Work, log: Log
) -> None:
    @bq.processor()
    def answer(number: int) -> int:
        return number

    with app.app_context():
        db.session.execute(
            sa.text("ALTER TABLE bq_tasks ADD CHECK (result IS NULL OR result <> '13'::jsonb)")
        )
        answer.enqueue_many({"number": number} for number in range(10, 20))
        note.enqueue(number=1)
        db.session.commit()
        work(concurrency=2)
        tasks = db.session.scalars(sa.select(bq.Task)).all()
    states = {task.kwargs["number"]: task.state for task in tasks}
    assert states.pop(13) == "FAILED"
    assert set(states.values()) == {"DONE"}
    assert len(states) == 10
    [failed] = [task for task in tasks if task.state == "FAILED"]
    assert "could not be written" in failed.error_message


def test_a_task_that_was_in_a_crash_does_not_stop_the_queue_behind_a_long_one(
    db: SQLAlchemy, note: Any, log: Log, busy_worker: Callable[[int], Any], gate: threading.Event
) -> None:
    with busy_worker(3):
        suspected(db, note, number=-1)
        note.enqueue_many({"number": number} for number in range(50))
        db.session.commit()
        log.wait(51)
        assert -1 not in log
        gate.set()
        log.wait(52)
    assert -1 in log


def test_tasks_that_were_in_a_crash_follow_each_other(
    app: Flask,
    db: SQLAlchemy,
    bq: BeanQueue,
    note: Any,
    work: Work,
    log: Log,
    statements: Statements,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A worker that holds nothing else takes the next one without a look around."""
    monkeypatch.setattr("flask_beanqueue.engine.quarantine.TURN", 60.0)
    with app.app_context():
        tasks = [note.run(number=number) for number in range(50)]
        for task in tasks:
            task.crashes = 1
        db.session.add_all(tasks)
        db.session.commit()
    work(concurrency=2)
    assert log == list(range(50))
    assert statements.count("WITH RECURSIVE") < 10


def test_a_task_that_was_in_a_crash_gives_way_to_others_and_is_done_in_the_end(
    db: SQLAlchemy,
    note: Any,
    log: Log,
    monkeypatch: pytest.MonkeyPatch,
    probe: Probe,
    busy_worker: Callable[[int], Any],
    gate: threading.Event,
) -> None:
    """It waits beside a long task, is given back, and comes again when it can be alone."""
    probe.listen_states()
    monkeypatch.setattr("flask_beanqueue.engine.quarantine.REST", 2)
    with busy_worker(2):
        suspect = suspected(db, note, number=-1)
        db.session.commit()
        probe.wait("note PENDING")
        assert suspect.claims == 1
        note.enqueue(number=1)
        db.session.commit()
        log.wait(2)
        assert log == ["long", 1]
        gate.set()
        log.wait(3)
        assert log == ["long", 1, -1]
        probe.wait_until(lambda: probe.heard.count("note DONE") == 2)
        assert suspect.state == "DONE"


def test_a_task_that_was_in_a_crash_is_not_left_waiting_by_an_idle_worker(
    db: SQLAlchemy,
    note: Any,
    log: Log,
    monkeypatch: pytest.MonkeyPatch,
    probe: Probe,
    busy_worker: Callable[[int], Any],
    gate: threading.Event,
) -> None:
    """It has given way to a long task, would have to rest, and then there is nothing else to do."""
    probe.listen_states()
    monkeypatch.setattr("flask_beanqueue.engine.quarantine.REST", 1000)
    with busy_worker(2):
        suspect = suspected(db, note, number=-1)
        db.session.commit()
        probe.wait("note PENDING")
        assert suspect.claims == 1
        gate.set()
        log.wait(2)


def test_a_task_that_was_in_a_crash_and_is_locked_at_its_end_stalls_nobody(
    app: Flask,
    db: SQLAlchemy,
    bq: BeanQueue,
    note: Any,
    log: Log,
    probe: Probe,
    gate: threading.Event,
) -> None:
    probe.listen_states()

    @bq.processor()
    def crash() -> None:
        log.add("crash")
        gate.wait(60)

    with app.app_context(), running(app, bq):
        suspected(db, crash)
        db.session.commit()
        log.wait(1)
        with bq.engine(app).begin() as connection:
            connection.execute(sa.select(bq.Task.__table__).with_for_update())
            gate.set()
            note.enqueue(number=2)
            db.session.commit()
            log.wait(2)
        probe.wait("crash DONE")


def test_a_worker_that_leaves_gives_back_a_task_that_waits_to_be_alone(
    db: SQLAlchemy,
    note: Any,
    log: Log,
    monkeypatch: pytest.MonkeyPatch,
    probe: Probe,
    busy_worker: Callable[[int], Any],
    gate: threading.Event,
) -> None:
    probe.listen_states()
    monkeypatch.setattr("flask_beanqueue.engine.quarantine.PATIENCE", 60)
    with busy_worker(2) as worker:
        suspected(db, note, number=-1)
        db.session.commit()
        probe.wait("note PROCESSING")
        worker.stop()
        probe.wait("note PENDING")
        gate.set()
    assert log == ["long"]


def test_what_was_given_back_is_as_it_was(
    app: Flask,
    db: SQLAlchemy,
    bq: BeanQueue,
    note: Any,
    log: Log,
    probe: Probe,
    gate: threading.Event,
) -> None:
    probe.listen_states()

    @bq.processor()
    def long() -> None:
        gate.wait(60)

    with app.app_context(), running(app, bq, concurrency=1):
        note.enqueue(number=0)
        db.session.commit()
        log.wait(1)
        long.enqueue()
        again = note.run(number=1)
        again.error_message, again.attempts = "the last time", 1
        db.session.add(again)
        db.session.commit()
        probe.wait("note PENDING")
        assert (again.claims, again.error_message, again.attempts) == (1, "the last time", 1)
        gate.set()
        log.wait(2)


def test_a_worker_that_leaves_does_not_take_itself_for_dead(
    make_app: Any, db: SQLAlchemy, bq: BeanQueue, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its heartbeat would, once it has said goodbye."""
    app = make_app(db, bq, BQ_WORKER_HEARTBEAT_PERIOD=0.0001, BQ_WORKER_HEARTBEAT_TIMEOUT=60.0)
    retire = heartbeat.retire
    retired = threading.Event()

    def retire_and_wait(*arguments: Any) -> None:
        retire(*arguments)
        for thread in threading.enumerate():
            if thread.name == "beanqueue-heartbeat":
                thread.join(30)  # until it has found its worker gone
        retired.set()

    monkeypatch.setattr(heartbeat, "retire", retire_and_wait)
    bq.process_tasks(["default"], app=app, burst=True)
    assert retired.is_set()


def test_an_uncommitted_row_that_refers_to_a_task_does_not_hide_it(
    app: Flask, db: SQLAlchemy, bq: BeanQueue, Note: Any, note: Any, work: Work, log: Log
) -> None:
    with app.app_context():
        task_id = note.enqueue(number=1).id
        db.session.commit()
        db.session.add(Note(text="refers", task_id=task_id))
        db.session.flush()
        work()
        assert log == [1]
        db.session.rollback()


def test_a_locked_row_is_passed_and_done_later(
    app: Flask, db: SQLAlchemy, bq: BeanQueue, note: Any, log: Log
) -> None:
    with app.app_context(), running(app, bq):
        first = note.run(number=1)
        db.session.add(first)
        db.session.commit()
        log.wait(1)
        with bq.engine(app).begin() as connection:
            task = note.run(number=2)
            db.session.add(task)
            db.session.flush()
            db.session.commit()
            connection.execute(sa.select(bq.Task.id).where(bq.Task.id == task.id).with_for_update())
            note.enqueue(number=3)
            db.session.commit()
            log.wait(2)
        log.wait(3)
    assert set(log) == {1, 2, 3}


def test_a_trigger_that_waits_holds_up_no_other_task(
    app: Flask,
    db: SQLAlchemy,
    bq: BeanQueue,
    database_url: str,
    note: Any,
    log: Log,
    probe: Probe,
) -> None:
    """The rows of the queue are not locked then, but what an app's own trigger wants."""
    probe.listen_states()

    @bq.processor()
    def slow() -> None:
        log.add("slow")

    waits = trigger(
        "wait",
        "BEFORE UPDATE ON bq_tasks",
        "PERFORM pg_advisory_xact_lock(1)",
        condition="NEW.func_name = 'slow' AND NEW.state = 'DONE'",
    )
    query(database_url, waits)
    with app.app_context(), running(app, bq):
        with bq.engine(app).begin() as connection:
            connection.execute(sa.text("SELECT pg_advisory_xact_lock(1)"))
            first = slow.enqueue()
            db.session.commit()
            log.wait(1)
            note.enqueue(number=2)
            db.session.commit()
            probe.wait("note DONE")
            assert first.state == "PROCESSING"
        probe.wait("slow DONE")


def test_a_burst_leaves_what_it_cannot_have(
    app: Flask, db: SQLAlchemy, bq: BeanQueue, note: Any, work: Work, log: Log
) -> None:
    with app.app_context():
        for number in (1, 2):
            note.enqueue(number=number)
        suspected(db, note, number=3)
        db.session.commit()
        db.session.execute(
            sa.select(bq.Task).where(bq.Task.kwargs["number"].as_integer() > 1).with_for_update()
        )
        work()
        assert log == [1]
        db.session.rollback()
    work()
    assert sorted(log) == [1, 2, 3]


def test_an_idle_worker_sends_nothing_but_its_heartbeats(
    make_app: Any, db: SQLAlchemy, bq: BeanQueue, note: Any, log: Log
) -> None:
    """Twelve beats are what a minute has; here they come faster."""
    app = make_app(
        db,
        bq,
        BQ_WORKER_HEARTBEAT_PERIOD=0.1,
        BQ_WORKER_HEARTBEAT_TIMEOUT=20.0,
        SQLALCHEMY_RECORD_QUERIES=True,
    )
    statements = Statements()
    statements.listen(bq.engine(app))
    with running(app, bq):
        with app.app_context():
            note.enqueue(number=1)
            db.session.commit()
        log.wait(1)
        for _ in range(5):  # a machine under load takes its time to come to rest
            before = len(statements.sent)
            statements.wait("WITH beat", statements.count("WITH beat") + 12)
            others = [each for each in statements.sent[before:] if "WITH beat" not in each]
            if not others:
                break
        assert others == []


def test_the_loop_runs_outside_of_any_app_context(
    make_app: Any, db: SQLAlchemy, bq: BeanQueue, note: Any, log: Log
) -> None:
    """In one, SQLALCHEMY_RECORD_QUERIES would keep every query of the loop for ever."""
    app = make_app(db, bq, SQLALCHEMY_RECORD_QUERIES=True)
    with app.app_context():
        note.enqueue(number=1)
        db.session.commit()
        before = len(get_recorded_queries())
        bq.process_tasks(burst=True)
        assert log == [1]
        assert len(get_recorded_queries()) == before


def test_tasks_run_side_by_side_in_threads(
    app: Flask, db: SQLAlchemy, bq: BeanQueue, work: Work
) -> None:
    barrier = threading.Barrier(3, timeout=30)

    @bq.processor()
    def meet() -> None:
        barrier.wait()

    with app.app_context():
        meet.enqueue_many([{}] * 3)
        db.session.commit()
    work(concurrency=3)
    assert not barrier.broken


def test_a_slow_task_holds_up_nobodys_completion(
    db: SQLAlchemy,
    note: Any,
    log: Log,
    database_url: str,
    probe: Probe,
    busy_worker: Callable[[int], Any],
    gate: threading.Event,
) -> None:
    probe.listen_states()
    with busy_worker(2) as worker:
        note.enqueue(number=1)
        db.session.commit()
        log.wait(2)
        probe.wait("note DONE")
        done = "SELECT count(*) FROM bq_tasks WHERE state = 'DONE'"
        assert query(database_url, done) == [(1,)]
        assert worker is not None
        gate.set()


def test_a_worker_writes_where_it_stands(
    app: Flask, db: SQLAlchemy, bq: BeanQueue, note: Any, log: Log
) -> None:
    with running(app, bq, name="me"), app.app_context():
        note.enqueue(number=1)
        db.session.commit()
        log.wait(1)
        worker = db.session.scalars(sa.select(bq.Worker)).one()
        assert (worker.state, worker.name, worker.channels) == ("RUNNING", "me", ["default"])
    with app.app_context():
        worker = db.session.scalars(sa.select(bq.Worker)).one()
        assert worker.state == "SHUTDOWN"
        assert [task.func_name for task in worker.tasks] == ["note"]


def test_the_first_claim_is_small_and_short_tasks_are_claimed_in_hundreds(
    app: Flask, db: SQLAlchemy, bq: BeanQueue, note: Any, work: Work, statements: Statements
) -> None:
    with app.app_context():
        note.enqueue_many({"number": number} for number in range(5_000))
        db.session.commit()
    work(concurrency=2)
    claims = statements.count("SET state = 'PROCESSING'")
    finishes = statements.count("SET state = 'DONE'")
    assert claims < 200  # by how long the tasks take, of which coverage makes more
    assert finishes < 300


def test_long_tasks_are_claimed_one_by_one(
    app: Flask, db: SQLAlchemy, bq: BeanQueue, log: Log, database_url: str, gate: threading.Event
) -> None:
    @bq.processor()
    def long(number: int) -> None:
        log.add(number)
        if number < 2:
            time.sleep(2 * HORIZON)  # what it is to be long
        else:
            gate.wait(30)

    with app.app_context():
        long.enqueue_many({"number": number} for number in range(12))
        db.session.commit()
    with running(app, bq, concurrency=2):
        log.wait(4)
        [(claimed,)] = query(
            database_url, "SELECT count(*) FROM bq_tasks WHERE state = 'PROCESSING'"
        )
        gate.set()
        log.wait(12)
    assert claimed <= 4


def test_claims_are_given_back_when_short_tasks_turn_long(
    app: Flask, db: SQLAlchemy, bq: BeanQueue, log: Log, database_url: str, gate: threading.Event
) -> None:
    @bq.processor()
    def work(number: int) -> None:
        if number >= 400:
            log.add(number)
            # Too long to be claimed ahead, and too short for its worker to seem stuck.
            gate.wait(3 * HORIZON)

    with app.app_context():
        work.enqueue_many({"number": number} for number in range(600))
        db.session.commit()
    claimed = "SELECT count(*) FROM bq_tasks WHERE state = 'PROCESSING'"
    with running(app, bq, concurrency=1):
        log.wait(5)
        assert query(database_url, claimed)[0][0] < 20
        gate.set()


def test_what_is_given_back_comes_before_what_was_made_later(
    app: Flask, db: SQLAlchemy, bq: BeanQueue, log: Log, probe: Probe, gate: threading.Event
) -> None:
    probe.listen_states()

    @bq.processor()
    def work(number: int) -> None:
        log.add(number)
        if number == 400:
            gate.wait(30)

    def waiting() -> int:
        pending = sa.select(sa.func.count()).where(bq.Task.state == "PENDING")
        return db.session.scalar(pending) or 0

    with app.app_context():
        work.enqueue_many({"number": number} for number in range(600))
        db.session.commit()
        with running(app, bq, concurrency=1):
            log.wait(401)
            probe.wait_until(lambda: waiting() == 199)
            work.enqueue_many({"number": number} for number in range(600, 1200))
            db.session.commit()
            gate.set()
            log.wait(1200)
    assert log == list(range(1200))


def test_channels_take_turns(app: Flask, db: SQLAlchemy, note: Any, work: Work, log: Log) -> None:
    with app.app_context():
        note.using(channel="one").enqueue_many({"number": 1} for _ in range(3_000))
        note.using(channel="two").enqueue_many({"number": 2} for _ in range(3_000))
        db.session.commit()
    work("one", "two", concurrency=1)
    assert len(log) == 6_000
    assert 1 in log[:2_000]
    assert 2 in log[:2_000]


def test_connections_from_before_the_worker_get_its_name(
    app: Flask, db: SQLAlchemy, bq: BeanQueue, work: Work, log: Log
) -> None:
    """Or nobody could end them when it freezes."""

    @bq.processor()
    def name(db: Any) -> None:
        log.add(db.scalar(sa.text("SELECT current_setting('application_name')")))

    with app.app_context():
        name.enqueue()
        db.session.commit()  # and a connection lies idle in the pool
    work()
    with app.app_context():
        [worker] = db.session.scalars(sa.select(bq.Worker))
    assert log == [f"beanqueue {worker.id}"]


@pytest.mark.parametrize("how", ["creator", "do_connect"])
def test_connections_that_the_app_makes_itself_get_the_name_too(
    make_app: Any, db: SQLAlchemy, bq: BeanQueue, log: Log, how: str
) -> None:
    """As it does where a cloud hands out its passwords by the hour."""
    app = make_app(db, bq)
    engine = bq.engine(app)
    if how == "do_connect":
        sa.event.listen(
            engine,
            "do_connect",
            lambda dialect, record, args, kwargs: dialect.connect(*args, **kwargs),
        )
    else:
        args, kwargs = engine.dialect.create_connect_args(engine.url)
        connect = engine.dialect.loaded_dbapi.connect
        with app.app_context():
            db.engines[None] = sa.create_engine(
                engine.url, creator=lambda: connect(*args, **kwargs), poolclass=sa.QueuePool
            )

    @bq.processor()
    def name(db: Any) -> None:
        log.add(db.scalar(sa.text("SELECT current_setting('application_name')")))

    with app.app_context():
        name.enqueue()
        db.session.commit()
        bq.process_tasks(app=app, burst=True)
        [worker] = db.session.scalars(sa.select(bq.Worker))
    assert log == [f"beanqueue {worker.id}"]
    engine.dispose()


def test_connections_do_not_keep_the_name_of_a_worker_that_has_gone(
    app: Flask, bq: BeanQueue, work: Work
) -> None:
    """Or those of a web process would be ended for a worker that ran there and was declared
    dead."""

    @bq.processor()
    def read(db: Any) -> None:
        db.scalar(sa.text("SELECT 1"))  # its connection goes back to the pool

    def connections() -> set[Any]:
        with contextlib.ExitStack() as stack:
            opened = [stack.enter_context(bq.engine(app).connect()) for _ in range(3)]
            query = "SELECT pg_backend_pid(), current_setting('application_name')"
            return {tuple(each.execute(sa.text(query)).one()) for each in opened}

    with app.app_context():
        read.enqueue()
        bq.db.session.commit()
    work()
    after = connections()
    assert not any("beanqueue" in name for _, name in after)
    assert connections() == after  # once anew is enough


def test_a_worker_survives_whatever_the_apps_own_way_to_connect_raises(
    app: Flask, db: SQLAlchemy, bq: BeanQueue, note: Any, log: Log, caplog: pytest.LogCaptureFixture
) -> None:
    """A token service is away while the connections are lost."""
    away = threading.Event()

    def do_connect(*args: Any) -> None:
        if away.is_set():
            raise OSError("the token service is away")

    sa.event.listen(bq.engine(app), "do_connect", do_connect)
    with running(app, bq) as worker, app.app_context():
        note.enqueue(number=1)
        db.session.commit()
        log.wait(1)
        away.set()
        lose(db, worker)
        wait_until(lambda: "is tried again: the token service is away" in caplog.text)
        away.clear()
        note.enqueue(number=2)
        db.session.commit()
        log.wait(2)


MAINTENANCE = trigger(
    "refuse",
    "BEFORE UPDATE ON bq_tasks",
    "RAISE EXCEPTION 'maintenance until six'",
    each="STATEMENT",
)


def test_a_worker_outlives_a_trigger_that_forbids_all_claims_for_a_while(
    app: Flask, db: SQLAlchemy, bq: BeanQueue, note: Any, log: Log, database_url: str, caplog: Any
) -> None:
    """It tries less and less often. psycopg 3 raises the class of errors that psycopg2 keeps for
    tables that do not fit."""
    with running(app, bq) as worker, app.app_context():
        note.enqueue(number=1)
        db.session.commit()
        log.wait(1)
        query(database_url, MAINTENANCE)
        note.enqueue(number=2)
        db.session.commit()
        wait_until(lambda: "is tried again: maintenance until six" in caplog.text)
        wait_until(lambda: worker._loop._failures > 3)
        query(database_url, "DROP TRIGGER refuse ON bq_tasks")
        log.wait(2)


def test_what_ends_while_a_trigger_forbids_all_that_is_written_is_written_afterwards(
    db: SQLAlchemy,
    bq: BeanQueue,
    note: Any,
    busy_worker: Callable[[int], Any],
    gate: threading.Event,
    database_url: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    with busy_worker(1):
        query(database_url, MAINTENANCE)
        gate.set()
        wait_until(lambda: "is tried again: maintenance until six" in caplog.text)
        query(database_url, "DROP TRIGGER refuse ON bq_tasks")
        wait_until(lambda: query(database_url, "SELECT state FROM bq_tasks") == [("DONE",)])
    assert query(database_url, "SELECT claims, attempts FROM bq_tasks") == [(1, 1)]


def test_what_ends_while_a_trigger_forbids_claims_is_written(
    db: SQLAlchemy,
    bq: BeanQueue,
    note: Any,
    busy_worker: Callable[[int], Any],
    gate: threading.Event,
    database_url: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """As an app may drain its queue."""
    on, body = "BEFORE UPDATE OF started_at ON bq_tasks", "RAISE EXCEPTION 'no new tasks'"
    with busy_worker(2):
        query(database_url, trigger("refuse", on, body, each="STATEMENT"))
        note.enqueue(number=2)
        db.session.commit()
        wait_until(lambda: "is tried again: no new tasks" in caplog.text)
        gate.set()
        done = "SELECT func_name FROM bq_tasks WHERE state = 'DONE'"
        wait_until(lambda: query(database_url, done) == [("long",)])
        query(database_url, "DROP TRIGGER refuse ON bq_tasks")
        wait_until(lambda: len(query(database_url, done)) == 2)


def test_what_succeeds_while_events_are_forbidden_is_written(
    app: Flask, db: SQLAlchemy, bq: BeanQueue, database_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    gate = threading.Event()

    @bq.processor()
    def bad() -> None:
        gate.wait(20)
        raise ValueError

    @bq.processor()
    def good() -> None:
        gate.wait(20)

    with app.app_context():
        for processor in (bad, good, good):
            processor.enqueue()
        db.session.commit()
    ended = "SELECT state FROM bq_tasks WHERE func_name = %s AND state <> 'PROCESSING'"
    with running(app, bq):
        wait_until(lambda: query(database_url, "SELECT min(claims) FROM bq_tasks") == [(1,)])
        on, body = "BEFORE INSERT ON bq_events", "RAISE EXCEPTION 'full'"
        query(database_url, trigger("refuse_events", on, body, each="STATEMENT"))
        gate.set()
        wait_until(lambda: "is tried again: full" in caplog.text)
        wait_until(lambda: query(database_url, ended, "good") == [("DONE",)] * 2)
        assert not query(database_url, ended, "bad")
        query(database_url, "DROP TRIGGER refuse_events ON bq_events")
        wait_until(lambda: query(database_url, ended, "bad") == [("FAILED",)])


def test_what_is_urgent_does_not_wait_until_all_that_cannot_be_claimed_is_stepped_over(
    app: Flask,
    db: SQLAlchemy,
    bq: BeanQueue,
    database_url: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    passed: list[Any] = []
    before: list[int] = []
    step_over = Cursor.step_over

    def count(self: Cursor, level: Any, refused: Any) -> Any:
        passed.append(refused)
        return step_over(self, level, refused)

    monkeypatch.setattr(Cursor, "step_over", count)

    @bq.processor()
    def urgent() -> None:
        before.append(len(passed))

    condition, body = "NEW.func_name = 'bad'", "RAISE EXCEPTION 'no'"
    on = "BEFORE UPDATE ON bq_tasks"
    query(database_url, trigger("refuse", on, body, condition=condition))
    query(
        database_url,
        "INSERT INTO bq_tasks (module, func_name) SELECT 'a', 'bad' FROM generate_series(1, 1000)",
    )
    with running(app, bq), app.app_context():
        wait_until(lambda: len(passed) > 10)
        urgent.using(priority=-5).enqueue()
        task = urgent.run()
        task.crashes = 1
        db.session.add(task)
        db.session.commit()
        wait_until(lambda: len(before) == 2)
    assert max(before) < 900


def test_a_burst_does_not_end_before_all_that_cannot_be_claimed_is_stepped_over(
    app: Flask, db: SQLAlchemy, bq: BeanQueue, note: Any, database_url: str
) -> None:
    on, condition = "BEFORE UPDATE ON bq_tasks", "NEW.func_name = 'bad'"
    query(database_url, trigger("refuse", on, "RAISE EXCEPTION 'no'", condition=condition))
    query(
        database_url,
        "INSERT INTO bq_tasks (module, func_name) SELECT 'a', 'bad' FROM generate_series(1, 400)",
    )
    with app.app_context():
        note.enqueue(number=1)
        db.session.commit()
    bq.process_tasks(["default"], app=app, burst=True)
    assert query(database_url, "SELECT state FROM bq_tasks WHERE func_name <> 'bad'") == [("DONE",)]


@pytest.mark.parametrize("change", ["priority = 7", "channel = 'other'"])
def test_a_trigger_that_changes_where_a_task_belongs_disturbs_no_worker(
    app: Flask, db: SQLAlchemy, bq: BeanQueue, note: Any, log: Log, database_url: str, change: str
) -> None:
    query(database_url, trigger("change", "BEFORE UPDATE ON bq_tasks", f"NEW.{change}"))
    with running(app, bq), app.app_context():
        for number in (1, 2):
            note.enqueue(number=number)
            db.session.commit()
            log.wait(number)


def test_a_debugger_that_starts_the_threads_is_no_library_of_greenlets(
    app: Flask, bq: BeanQueue, note: Any, log: Log, db: SQLAlchemy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Debuggers put a function of their own in the place of Python's."""
    start: Any = _thread.start_new_thread
    monkeypatch.setattr(_thread, "start_new_thread", lambda *args, **more: start(*args, **more))
    with running(app, bq), app.app_context():
        note.enqueue(number=1)
        db.session.commit()
        log.wait(1)


def test_several_apps_in_one_process_each_do_their_own_tasks(
    make_app: Any, db: SQLAlchemy, bq: BeanQueue, note: Any, log: Log, server_url: str
) -> None:
    from . import postgres

    with postgres.database(server_url) as other_url:
        one = make_app(db, bq)
        two = make_app(db, bq, SQLALCHEMY_DATABASE_URI=other_url)
        for number, app in enumerate([one, two]):
            with app.app_context():
                note.enqueue(number=number)
                db.session.commit()
        bq.process_tasks(app=two, burst=True)
        assert log == [1]
        bq.process_tasks(app=one, burst=True)
        assert log == [1, 0]
        with two.app_context():
            db.engine.dispose()


def test_serializable_apps_are_served(
    make_app: Any,
    db: SQLAlchemy,
    bq: BeanQueue,
    Note: Any,
    database_url: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Also where the isolation level is the database's own default: the queue's own connections go
    on when they have waited for somebody else's write, which other levels refuse to do."""
    query(
        database_url,
        "DO $$ BEGIN EXECUTE format('ALTER DATABASE %I SET default_transaction_isolation"
        " = ''serializable''', current_database()); END $$",
    )

    @bq.processor()
    def write(db: Any, number: int) -> None:
        db.add(Note(text=str(number)))

    options = {"isolation_level": "REPEATABLE READ"}
    app = make_app(db, bq, SQLALCHEMY_ENGINE_OPTIONS=options, BQ_WORKER_HEARTBEAT_PERIOD=0.1)
    with app.app_context():
        write.enqueue_many({"number": number} for number in range(200))
        db.session.commit()
        bq.process_tasks(burst=True, concurrency=4)
        assert db.session.scalar(sa.select(sa.func.count()).select_from(Note)) == 200
    statements = Statements()
    statements.listen(bq.engine(app))
    with running(app, bq), contextlib.closing(connect(database_url)) as connection:
        statements.wait("WITH beat", 2)
        connection.cursor().execute("BEGIN ISOLATION LEVEL READ COMMITTED")
        connection.cursor().execute("UPDATE bq_workers SET name = name")
        waiting = (
            "SELECT 1 FROM pg_stat_activity"
            " WHERE wait_event_type = 'Lock' AND datname = current_database()"
        )
        wait_until(lambda: query(database_url, waiting))
        beats = statements.count("WITH beat")
        connection.cursor().execute("COMMIT")
        statements.wait("WITH beat", beats + 1)
    assert "The heartbeat fails" not in caplog.text


def test_a_task_that_ends_just_before_a_leaving_worker_sleeps_is_seen(
    app: Flask, db: SQLAlchemy, bq: BeanQueue, Note: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    started, flushed = threading.Event(), threading.Event()
    write_outcomes = Loop._write

    def ends_here(loop: Loop, connection: Any) -> None:
        """Comes when the loop has looked for what is through."""
        write_outcomes(loop, connection)
        if loop._stopping and not flushed.is_set():
            flushed.set()
            wait_until(lambda: loop._threads.through)
            time.sleep(0.01)  # the thread asks itself whether that is news

    @bq.processor()
    def write(db: Any) -> None:
        db.add(Note(text="hello"))
        started.set()
        flushed.wait(10)

    with app.app_context():
        write.enqueue()
        db.session.commit()
    monkeypatch.setattr(Loop, "_write", ends_here)
    worker = bq.worker(app=app)
    thread = threading.Thread(target=worker.run, daemon=True)
    thread.start()
    assert started.wait(10)
    worker.stop()
    thread.join(15)
    assert not thread.is_alive(), "it sleeps until the end of its grace time"


@pytest.mark.parametrize("events", [False, True])
def test_a_worker_says_at_its_end_how_many_tasks_it_did(
    make_app: MakeApp,
    db: SQLAlchemy,
    bq: BeanQueue,
    Note: Any,
    note: Any,
    caplog: pytest.LogCaptureFixture,
    events: bool,
) -> None:
    """Whoever writes that they have ended: the loop, or a task's own transaction."""

    @bq.processor()
    def write() -> None:
        db.session.add(Note(text="written"))

    @bq.processor(auto_complete=False)
    def park() -> None:
        pass

    @bq.processor(retry_policy=LimitAttempt(2))
    def stumble(task: Any) -> None:
        if task.attempts == 0:
            raise ValueError("not yet")

    @bq.processor()
    def fail() -> None:
        raise ValueError("no good")

    app = make_app(db, bq, BQ_SUCCESS_EVENTS=events)
    with app.app_context():
        for number in range(3):
            note.enqueue(number=number)
        for processor in (write, write, park, stumble, fail):
            processor.enqueue()
        orphan = note.run(number=4)
        orphan.state = "PROCESSING"
        db.session.add(orphan)
        db.session.commit()
    with caplog.at_level("INFO", "flask_beanqueue"):
        bq.process_tasks(app=app, burst=True)
    assert "has stopped: 8 tasks done, 1 failed, 1 to be tried again" in caplog.text


@pytest.fixture
def hold(bq: BeanQueue, log: Log) -> Callable[[int], threading.Event]:
    """Make a task that is stuck until an event comes, and answer that."""
    events: dict[int, threading.Event] = {}

    @bq.processor()
    def hold(number: int) -> None:
        log.add(number)
        assert events[number].wait(60)

    def make(number: int, **columns: Any) -> threading.Event:
        events[number] = threading.Event()
        task = hold.run(number=number)
        for name, value in columns.items():
            setattr(task, name, value)
        bq.db.session.add(task)
        bq.db.session.commit()
        return events[number]

    return make


Hold = Callable[..., threading.Event]


def named(caplog: pytest.LogCaptureFixture) -> list[str]:
    """The tasks that were named as stuck."""
    pattern = r"test_worker\.hold (\S+) has run since \d{4}-\d\d-\d\d \d\d:\d\d:\d\d, and worker "
    return re.findall(pattern, caplog.text)


def test_a_worker_whose_threads_are_all_stuck_names_each_task_once(
    make_app: MakeApp, db: SQLAlchemy, bq: BeanQueue, hold: Hold, caplog: pytest.LogCaptureFixture
) -> None:
    app = make_app(db, bq, BQ_STUCK_AFTER=0.2)
    with app.app_context(), running(app, bq, "default", concurrency=2):
        first, second = hold(1), hold(2)
        wait_until(lambda: len(named(caplog)) == 2)
        first.set()
        third = hold(3)
        wait_until(lambda: len(named(caplog)) == 3)
        for event in (second, third):
            event.set()
        ids = [str(id) for id in db.session.scalars(sa.select(bq.Task.id).order_by(bq.Task.id))]
    assert sorted(named(caplog)[:2]) == ids[:2]
    assert named(caplog)[2] == ids[2]


def test_a_task_that_runs_alone_and_is_stuck_is_named(
    make_app: MakeApp, db: SQLAlchemy, bq: BeanQueue, hold: Hold, caplog: pytest.LogCaptureFixture
) -> None:
    """Its worker has free threads, and nothing for them."""
    app = make_app(db, bq, BQ_STUCK_AFTER=0.2)
    with app.app_context(), running(app, bq, "default", concurrency=2):
        alone = hold(1, crashes=1)
        wait_until(lambda: named(caplog))
        alone.set()


def test_a_worker_that_has_a_thread_left_says_nothing_of_long_tasks(
    make_app: MakeApp,
    db: SQLAlchemy,
    bq: BeanQueue,
    hold: Hold,
    note: Any,
    log: Log,
    caplog: pytest.LogCaptureFixture,
) -> None:
    app = make_app(db, bq, BQ_STUCK_AFTER=0.2)
    with app.app_context(), running(app, bq, "default", concurrency=2):
        long = hold(1)
        log.wait(1)
        note.using(delay=datetime.timedelta(seconds=0.5)).enqueue(number=2)
        db.session.commit()
        log.wait(2)
        long.set()
    assert not named(caplog)


def test_the_page_on_deployment_finds_tasks_that_are_stuck(
    app: Flask, db: SQLAlchemy, bq: BeanQueue, note: Any, database_url: str
) -> None:
    page = (Path(__file__).parent.parent / "docs/deployment.md").read_text()
    [sql] = [each for each in re.findall(r"```sql\n(.*?)```", page, re.S) if "10 minutes" in each]
    with app.app_context():
        for number, minutes in enumerate((1, 20)):
            task = note.run(number=number)
            task.state = "PROCESSING"
            task.started_at = sa.func.now() - datetime.timedelta(minutes=minutes)
            db.session.add(task)
        parked = note.run(number=3)
        parked.state, parked.parked, parked.started_at = "PROCESSING", True, task.started_at
        db.session.add(parked)
        db.session.commit()
        assert [row[0] for row in query(database_url, sql)] == [str(task.id)]
