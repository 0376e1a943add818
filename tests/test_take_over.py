"""What becomes of the tasks of dead workers."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import sqlalchemy as sa
from flask import Flask
from flask_sqlalchemy import SQLAlchemy

from flask_beanqueue import BeanQueue, task_failed
from flask_beanqueue.engine import completer, heartbeat, takeover
from flask_beanqueue.engine.claim import claim_tasks
from flask_beanqueue.engine.connection import connect
from flask_beanqueue.engine.cursor import Level
from flask_beanqueue.engine.takeover import Orphans
from flask_beanqueue.models.uuid7 import uuid7

from .conftest import MakeApp, running
from .probe import Probe, query, wait_until
from .triggers import trigger

Work = Callable[..., None]


@pytest.fixture
def other(app: Flask, bq: BeanQueue) -> Any:
    """The loop of a worker of which there is nothing else."""
    worker: Any = bq.worker(["default"], app=app)
    return worker._loop


@pytest.fixture
def take_over(app: Flask, bq: BeanQueue, other: Any) -> Iterator[Callable[[], None]]:
    connection = connect(bq.engine(app))

    def take_over() -> None:
        while other._take_over(connection) == 0.0:
            pass

    yield take_over
    connection.close()


@pytest.fixture
def on_update(app: Flask, database_url: str) -> Callable[[str, str], None]:
    """Makes a trigger on the updates of all tasks whose functions' names start with its own."""

    def make(name: str, body: str) -> None:
        condition = f"starts_with(NEW.func_name, '{name}')"
        query(database_url, trigger(name, "BEFORE UPDATE ON bq_tasks", body, condition=condition))

    return make


def add_worker(app: Flask, bq: BeanQueue, state: str) -> Any:
    with contextlib.closing(connect(bq.engine(app))) as connection:
        worker_id = uuid7()
        heartbeat.add_worker(connection, bq.models, worker_id, "gone", ["default"])
        connection.execute(
            sa.update(bq.Worker).where(bq.Worker.id == worker_id).values(state=state)
        )
    return worker_id


def held(bq: BeanQueue, worker_id: Any = None, **columns: Any) -> Any:
    columns = {"module": "m", "name": "f", "state": "PROCESSING", "claims": 1} | columns
    return bq.Task(worker_id=worker_id, **columns)


@pytest.mark.parametrize(
    ("worker", "state", "crashes"),
    [
        ("RUNNING", "PROCESSING", 0),
        ("NO_HEARTBEAT", "PENDING", 1),
        ("SHUTDOWN", "PENDING", 0),
        (None, "PENDING", 1),
    ],
)
def test_tasks_of_workers_that_are_gone_wait_again(
    app: Flask,
    db: SQLAlchemy,
    bq: BeanQueue,
    take_over: Callable[[], None],
    worker: str | None,
    state: str,
    crashes: int,
) -> None:
    with app.app_context():
        task = held(bq, worker and add_worker(app, bq, worker))
        parked = held(bq, parked=True)
        db.session.add_all([task, parked])
        db.session.commit()
        take_over()
        assert (task.state, task.crashes, task.attempts) == (state, crashes, 0)
        assert [event.type for event in task.events] == ["CRASHED"] * crashes
        assert (parked.state, parked.crashes) == ("PROCESSING", 0)


def test_too_many_crashes_fail_a_task(
    app: Flask, db: SQLAlchemy, bq: BeanQueue, take_over: Callable[[], None]
) -> None:
    with app.app_context():
        task = held(bq, crashes=2)
        db.session.add(task)
        db.session.commit()
        take_over()
        assert (task.state, task.crashes) == ("FAILED", 3)
        assert "died 3 times" in task.error_message
        assert task.finished_at is not None


def test_a_thousand_and_one_are_taken_over_at_once(
    app: Flask, db: SQLAlchemy, bq: BeanQueue, take_over: Callable[[], None]
) -> None:
    with app.app_context():
        db.session.add_all(held(bq) for _ in range(takeover.SIZE + 1))
        db.session.commit()
        take_over()
        assert set(db.session.scalars(sa.select(bq.Task.state))) == {"PENDING"}


def test_tasks_that_somebody_has_locked_are_taken_over_later(
    app: Flask,
    db: SQLAlchemy,
    bq: BeanQueue,
    other: Any,
    take_over: Callable[[], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(completer, "LOCKED_AGAIN", 0.0)
    with app.app_context():
        locked, free = held(bq), held(bq)
        db.session.add_all([locked, free])
        db.session.commit()
        locked_id, free_id = locked.id, free.id
        db.session.get(bq.Task, locked_id, with_for_update=True)
        take_over()
        take_over()
        with bq.engine(app).connect() as connection:
            rows = connection.execute(sa.select(bq.Task.__table__.c["id", "state"]))
            states = {row.id: row.state for row in rows}
        assert states == {locked_id: "PROCESSING", free_id: "PENDING"}
        db.session.rollback()
        take_over()
        assert [locked.state, locked.crashes, free.crashes] == ["PENDING", 1, 1]


def test_a_trigger_that_waits_holds_up_no_other_outcome_of_its_statement(
    app: Flask,
    db: SQLAlchemy,
    bq: BeanQueue,
    on_update: Callable[[str, str], None],
    take_over: Callable[[], None],
) -> None:
    with app.app_context():
        on_update("slow", "PERFORM pg_advisory_xact_lock(1)")
        tasks = [held(bq, name=name) for name in ("f", "slow", "f", "slow", "f")]
        db.session.add_all(tasks)
        db.session.commit()
        with bq.engine(app).begin() as connection:
            connection.execute(sa.text("SELECT pg_advisory_xact_lock(1)"))
            take_over()
            assert [task.state for task in tasks] == [
                *("PENDING", "PROCESSING", "PENDING", "PROCESSING", "PENDING"),
            ]
        db.session.rollback()

        def are_taken_over() -> bool:
            take_over()
            db.session.expire_all()
            return {task.state for task in tasks} == {"PENDING"}

        wait_until(are_taken_over)


def test_an_outcome_that_is_refused_holds_up_no_other_and_is_given_up_in_the_end(
    app: Flask,
    db: SQLAlchemy,
    bq: BeanQueue,
    take_over: Callable[[], None],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A trigger of the app's own refuses whatever becomes of one task."""
    with app.app_context():
        db.session.execute(
            sa.text("ALTER TABLE bq_tasks ADD CHECK (func_name <> 'odd' OR state = 'PROCESSING')")
        )
        odd, *others = (held(bq, name=name) for name in ("odd", "f", "f"))
        db.session.add_all([odd, *others])
        db.session.commit()
        take_over()
        take_over()
        assert [task.state for task in (odd, *others)] == ["PROCESSING", "PENDING", "PENDING"]
        assert caplog.text.count("nothing can be written of it") == 2, "each time anew"
        # The app has been mended, and another worker has claimed it and died.
        odd.func_name, odd.claims = "f", 2
        db.session.commit()
        take_over()
        assert odd.state == "PENDING"


@pytest.mark.parametrize(
    "body",
    [
        "PERFORM NEW.no_such_column",
        *(f"RAISE EXCEPTION 'no' USING ERRCODE = '{code}'" for code in ("A0001", "45000", "3F000")),
    ],
)
def test_a_trigger_that_raises_for_one_task_holds_up_no_other(
    app: Flask,
    db: SQLAlchemy,
    bq: BeanQueue,
    on_update: Callable[[str, str], None],
    take_over: Callable[[], None],
    body: str,
) -> None:
    with app.app_context():
        on_update("odd", body)
        odd, *others = (held(bq, name=name) for name in ("odd", "f", "f"))
        db.session.add_all([odd, *others])
        db.session.commit()
        take_over()
        assert [task.state for task in (odd, *others)] == ["PROCESSING", "PENDING", "PENDING"]


def test_outcomes_that_take_too_long_are_kept_and_others_go_on(
    app: Flask,
    db: SQLAlchemy,
    bq: BeanQueue,
    on_update: Callable[[str, str], None],
    take_over: Callable[[], None],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A statement_timeout is no fault of theirs."""
    with app.app_context():
        on_update("slow", "RAISE EXCEPTION 'too slow' USING ERRCODE = 'query_canceled'")
        tasks = [held(bq, name=name) for name in ("f", "slow", "f", "slow", "f")]
        db.session.add_all(tasks)
        db.session.commit()
        take_over()
        waits = ["PENDING", "PROCESSING", "PENDING", "PROCESSING", "PENDING"]
        assert [task.state for task in tasks] == waits
        db.session.execute(sa.text("ALTER TABLE bq_tasks DISABLE TRIGGER slow"))
        db.session.commit()

        def are_taken_over() -> bool:
            take_over()
            db.session.expire_all()
            return {task.state for task in tasks} == {"PENDING"}

        wait_until(are_taken_over)
        assert [task.crashes for task in tasks] == [1] * 5
        assert caplog.text.count("cannot be ended yet: too slow") == 2


def test_no_outcome_is_given_up_because_none_can_be_written(
    app: Flask, db: SQLAlchemy, bq: BeanQueue, take_over: Callable[[], None]
) -> None:
    """A table is missing or a right was revoked: that is no fault of any task."""
    with app.app_context():
        tasks = [held(bq) for _ in range(3)]
        db.session.add_all(tasks)
        db.session.execute(sa.text("ALTER TABLE bq_events RENAME TO elsewhere"))
        db.session.commit()
        with pytest.raises(sa.exc.ProgrammingError, match='"bq_events" does not exist'):
            take_over()
        db.session.execute(sa.text("ALTER TABLE elsewhere RENAME TO bq_events"))
        db.session.commit()
        take_over()
        assert [task.state for task in tasks] == ["PENDING"] * 3


def test_events_that_cannot_be_written_keep_no_task_from_being_taken_over(
    app: Flask, db: SQLAlchemy, bq: BeanQueue, take_over: Callable[[], None]
) -> None:
    with app.app_context():
        db.session.execute(sa.text("ALTER TABLE bq_events ADD CHECK (type <> 'CRASHED')"))
        task = held(bq)
        db.session.add(task)
        db.session.commit()
        take_over()
        assert (task.state, task.crashes, task.events) == ("PENDING", 1, [])


def test_a_task_that_is_taken_over_by_two_is_counted_once(
    app: Flask,
    db: SQLAlchemy,
    bq: BeanQueue,
    take_over: Callable[[], None],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Both find it, and the fence lets one of them write."""
    find = Orphans.next_part
    found: list[Any] = []

    def both(*args: Any) -> Any:
        orphans = find(*args)
        if not found:
            found.extend(orphans)
            take_over()
        return orphans

    with app.app_context():
        task = held(bq)
        db.session.add(task)
        db.session.commit()
        second: Any = bq.worker(["default"], app=app)
        monkeypatch.setattr(Orphans, "next_part", both)
        with contextlib.closing(connect(bq.engine(app))) as connection:
            second._loop._take_over(connection)
        assert len(found) == 1
        assert (task.state, task.crashes, len(task.events)) == ("PENDING", 1, 1)
    assert "no longer this worker's" not in caplog.text


def test_a_worker_that_counts_as_dead_does_not_take_over_what_it_has_in_its_own_hands(
    app: Flask, db: SQLAlchemy, bq: BeanQueue, other: Any, take_over: Callable[[], None]
) -> None:
    """It has been frozen, and may take over before its heartbeat tells it. What it runs would be
    counted as crashed, and run a second time, while it may still end."""
    worker_id = add_worker(app, bq, "NO_HEARTBEAT")
    with app.app_context(), contextlib.closing(connect(bq.engine(app))) as connection:
        mine = bq.Task(module="m", name="f")
        db.session.add(mine)
        db.session.commit()
        other.held.update(claim_tasks(connection, bq.models, worker_id, [Level("default", 0)], 1))
        orphan = held(bq)
        db.session.add(orphan)
        db.session.commit()
        take_over()
        assert [(task.state, task.crashes) for task in (mine, orphan)] == [
            ("PROCESSING", 0),
            ("PENDING", 1),
        ]


def test_a_task_that_ends_while_it_is_given_back_is_not_called_rolled_back(
    app: Flask, db: SQLAlchemy, bq: BeanQueue, other: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """The time to leave was over while its processor committed."""
    worker_id = add_worker(app, bq, "RUNNING")
    with app.app_context(), contextlib.closing(connect(bq.engine(app))) as connection:
        task = bq.Task(module="m", name="f")
        db.session.add(task)
        db.session.commit()
        claims = claim_tasks(connection, bq.models, worker_id, [Level("default", 0)], 1)
        other.held.update(claims)
        task.state = "DONE"
        db.session.commit()
        other._give_back(claims)
        other._write(connection)
        assert task.state == "DONE"
    assert "had ended, or was taken over, when it was to be given back" in caplog.text
    assert "rolled back" not in caplog.text


def test_a_stray_claim_that_is_being_taken_over_is_not_given_back_as_well(
    app: Flask, db: SQLAlchemy, bq: BeanQueue, other: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The worker came back before the claim whose answer it lost, and has counted as dead since.
    Of two outcomes of one claim in one statement, either may be written."""
    worker_id = add_worker(app, bq, "NO_HEARTBEAT")
    with app.app_context(), contextlib.closing(connect(bq.engine(app))) as connection:
        db.session.add(held(bq, worker_id))
        db.session.commit()
        with monkeypatch.context() as patch:
            patch.setattr(other._completer, "write", lambda connection: None)
            other._take_over(connection)
            other._worker_id = worker_id
            other._give_back_strays(connection)
        assert not other.held
        other._write(connection)
        task = db.session.scalars(sa.select(bq.Task)).one()
        assert (task.state, task.crashes) == ("PENDING", 1)


def test_a_worker_takes_over_when_it_starts_and_before_a_burst_ends(
    app: Flask, db: SQLAlchemy, bq: BeanQueue, work: Work, Note: Any
) -> None:
    @bq.processor()
    def first(db: Any) -> None:
        # Another worker dies meanwhile.
        with bq.engine(app).begin() as connection:
            connection.execute(
                sa.insert(bq.Task.__table__).values(
                    module=first.module, func_name="second", state="PROCESSING", claims=1
                )
            )

    @bq.processor()
    def second(db: Any) -> None:
        db.add(Note(text="done"))

    with app.app_context():
        db.session.add(held(bq, module=first.module, name="first"))
        db.session.commit()
        work()
        assert set(db.session.scalars(sa.select(bq.Task.state))) == {"DONE"}
        assert list(db.session.scalars(sa.select(Note.text))) == ["done"]


def test_a_burst_declares_dead_whoever_is_overdue_when_it_starts(
    make_app: MakeApp, db: SQLAlchemy, bq: BeanQueue
) -> None:
    """There may be none but bursts, and none that lives for as long as a heartbeat's timeout."""
    app = make_app(db, bq)
    ran = []

    @bq.processor()
    def left() -> None:
        ran.append("left")

    worker_id = add_worker(app, bq, "RUNNING")
    with app.app_context():
        task = held(bq, worker_id, module=left.module, name="left")
        db.session.add(task)
        last = sa.func.now() - sa.cast("21 seconds", sa.Interval)
        db.session.execute(sa.update(bq.Worker).values(last_heartbeat=last))
        db.session.commit()
        bq.process_tasks(["default"], app=app, burst=True)
        assert ran == ["left"]
        assert (task.state, task.crashes) == ("DONE", 1)


def test_a_burst_ends_although_what_it_takes_over_can_never_be_written(
    make_app: MakeApp, db: SQLAlchemy, bq: BeanQueue, on_update: Callable[[str, str], None]
) -> None:
    """Or each that a timer starts would stay."""
    app = make_app(db, bq, BQ_WORKER_HEARTBEAT_PERIOD=0.1, BQ_WORKER_HEARTBEAT_TIMEOUT=0.5)
    on_update("slow", "RAISE EXCEPTION 'too slow' USING ERRCODE = 'query_canceled'")
    worker_id = add_worker(app, bq, "NO_HEARTBEAT")
    with app.app_context():
        db.session.add(held(bq, worker_id, name="slow"))
        db.session.commit()
    worker = bq.worker(["default"], app=app, burst=True)
    thread = threading.Thread(target=worker.run)
    thread.start()
    thread.join(20)
    ended = not thread.is_alive()
    worker.stop(at_once=True)
    thread.join()
    assert ended


@pytest.mark.parametrize("body", ["RETURN NULL", "RETURN OLD"])
def test_rows_that_a_trigger_leaves_as_they_are_are_taken_over_no_more_than_twice(
    app: Flask,
    db: SQLAlchemy,
    bq: BeanQueue,
    take_over: Callable[[], None],
    on_update: Callable[[str, str], None],
    monkeypatch: pytest.MonkeyPatch,
    body: str,
) -> None:
    """And do not hide others."""
    monkeypatch.setattr(takeover, "SIZE", 2)
    on_update("odd", body)
    with app.app_context():
        db.session.add_all([held(bq, name=name) for name in ("odd", "odd", "odd", "good")])
        db.session.commit()
    rounds = []
    find = Orphans.next_part

    def count(*args: Any) -> Any:
        rounds.append(1)
        return [] if len(rounds) > 20 else find(*args)

    monkeypatch.setattr(Orphans, "next_part", count)
    take_over()
    assert len(rounds) < 10
    with app.app_context():
        good = sa.select(bq.Task.state).where(bq.Task.func_name == "good")
        assert db.session.scalars(good).one() == "PENDING"


def test_a_worker_takes_over_as_soon_as_its_heartbeat_has_declared_others_dead(
    app: Flask, db: SQLAlchemy, bq: BeanQueue, probe: Probe
) -> None:
    """It would do so by itself after half a minute."""

    @bq.processor()
    def nothing() -> None:
        pass

    probe.listen_states()
    with running(app, bq) as worker:
        with app.app_context():
            nothing.enqueue()
            db.session.commit()
            probe.wait("nothing DONE")  # it has started
            db.session.add(held(bq, module=nothing.module, name="nothing"))
            db.session.commit()
        worker._loop.take_over_soon()
        probe.wait("nothing DONE", timeout=20)


def test_a_slow_receiver_does_not_hold_up_the_heartbeat(
    make_app: Any, db: SQLAlchemy, bq: BeanQueue, probe: Probe
) -> None:
    """It hears of tasks that were taken over in the worker's loop, not in the heartbeat."""
    app = make_app(db, bq, BQ_WORKER_HEARTBEAT_PERIOD=0.05)
    beats = threading.Semaphore(0)
    heard = []

    def count(connection: Any, cursor: Any, statement: str, *rest: Any) -> None:
        if "WITH beat" in statement:
            beats.release()

    def receive(sender: Any, task: Any, **rest: Any) -> None:
        while beats.acquire(blocking=False):
            pass
        heard.append([beats.acquire(timeout=30) for _ in range(3)])

    sa.event.listen(bq.engine(app), "before_cursor_execute", count)
    with app.app_context(), task_failed.connected_to(receive, app):
        db.session.add(held(bq, crashes=2))
        db.session.commit()
        bq.process_tasks(["default"], app=app, burst=True)
    assert heard == [[True] * 3]
