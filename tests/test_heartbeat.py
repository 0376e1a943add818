"""Who lives, who is dead, and what becomes of their tasks."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import sqlalchemy as sa
from flask import Flask
from flask_sqlalchemy import SQLAlchemy

from flask_beanqueue import BeanQueue
from flask_beanqueue.connection import connect
from flask_beanqueue.heartbeat import Heartbeat
from flask_beanqueue.models import uuid7

MakeHeartbeat = Callable[[], Heartbeat]


@pytest.fixture
def make_heartbeat(app: Flask, bq: BeanQueue) -> Iterator[MakeHeartbeat]:
    """Makes workers of which there is nothing but the heartbeat."""
    made = []

    def make() -> Heartbeat:
        worker_id = uuid7()
        connection = connect(bq.engine(app))
        bq.queries.add_worker(connection, worker_id, "test", ["default"])
        connection.close()
        heartbeat = Heartbeat(
            bq.engine(app),
            bq.queries,
            bq.config(app),
            worker_id,
            on_death=lambda: None,
            on_outcome=lambda outcome: None,
        )
        made.append(heartbeat)
        return heartbeat

    yield make
    for heartbeat in made:
        heartbeat.line.close()


def fall_silent(db: SQLAlchemy, bq: BeanQueue, seconds: int) -> None:
    db.session.execute(
        sa.update(bq.Worker).values(
            last_heartbeat=sa.func.now() - sa.cast(f"{seconds} seconds", sa.Interval)
        )
    )
    db.session.commit()


def states(db: SQLAlchemy, bq: BeanQueue) -> list[str]:
    db.session.rollback()
    return sorted(db.session.scalars(sa.select(bq.Worker.state)))


def test_a_beat_declares_silent_workers_dead_and_takes_their_tasks(
    app: Flask, db: SQLAlchemy, bq: BeanQueue, make_heartbeat: MakeHeartbeat
) -> None:
    with app.app_context():
        first, second = make_heartbeat(), make_heartbeat()
        held = bq.Task(module="m", name="f", state="PROCESSING", claims=1, crashes=1)
        held.worker_id = second._worker_id
        parked = bq.Task(module="m", name="g", state="PROCESSING", claims=1, parked=True)
        db.session.add_all([held, parked])
        db.session.commit()
        assert first.beat()
        assert states(db, bq) == ["RUNNING", "RUNNING"]
        fall_silent(db, bq, 31)
        assert first.beat()
        assert states(db, bq) == ["NO_HEARTBEAT", "RUNNING"]
        assert (held.state, held.crashes, held.attempts) == ("PENDING", 2, 0)
        assert [event.type for event in held.events] == ["CRASHED"]
        assert parked.state == "PROCESSING"
        assert not second.beat()


def test_too_many_crashes_fail_a_task(
    app: Flask, db: SQLAlchemy, bq: BeanQueue, make_heartbeat: MakeHeartbeat
) -> None:
    with app.app_context():
        task = bq.Task(module="m", name="f", state="PROCESSING", claims=3, crashes=2)
        db.session.add(task)
        db.session.commit()
        make_heartbeat().beat()
        db.session.rollback()
        assert (task.state, task.crashes) == ("FAILED", 3)
        assert "died 3 times" in task.error_message
        assert task.finished_at is not None


def test_after_an_outage_the_first_to_come_back_lets_the_others_beat(
    app: Flask, db: SQLAlchemy, bq: BeanQueue, make_heartbeat: MakeHeartbeat
) -> None:
    """The database was away for all of them, and none is dead."""
    with app.app_context():
        first, second = make_heartbeat(), make_heartbeat()
        task = bq.Task(module="m", name="f", state="PROCESSING", claims=1)
        task.worker_id = second._worker_id
        db.session.add(task)
        db.session.commit()
        assert first.beat()
        fall_silent(db, bq, 60)
        first._last_beat -= 60
        first._next_search = 0.0
        assert first.beat()
        assert states(db, bq) == ["RUNNING", "RUNNING"]
        db.session.refresh(task)
        assert (task.state, task.crashes) == ("PROCESSING", 0)
        assert second.beat()


def test_a_worker_that_starts_lets_the_others_beat_before_it_declares_any_dead(
    app: Flask,
    db: SQLAlchemy,
    bq: BeanQueue,
    make_heartbeat: MakeHeartbeat,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It may be the first to start after an outage that the others have survived."""
    beaten = threading.Event()
    beat = bq.queries.beat

    def tell(*args: Any, **kwargs: Any) -> Any:
        answer = beat(*args, **kwargs)
        beaten.set()
        return answer

    with app.app_context():
        first, second = make_heartbeat(), make_heartbeat()
        fall_silent(db, bq, 60)
        monkeypatch.setattr(bq.queries, "beat", tell)
        first.start()  # it beats at once, and then after the heartbeat period
        assert beaten.wait(60)
        assert states(db, bq) == ["RUNNING", "RUNNING"]
        assert second.beat()
        first.stop()


def test_a_refused_end_of_backends_does_not_keep_tasks_from_being_taken_over(
    app: Flask,
    db: SQLAlchemy,
    bq: BeanQueue,
    make_heartbeat: MakeHeartbeat,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def refuse(connection: Any) -> int:
        raise sa.exc.ProgrammingError("SELECT", {}, Exception("permission denied for function"))

    monkeypatch.setattr(bq.queries, "terminate", refuse)
    with app.app_context():
        task = bq.Task(module="m", name="f", state="PROCESSING", claims=1)
        db.session.add(task)
        db.session.commit()
        assert make_heartbeat().beat()
        db.session.refresh(task)
        assert task.state == "PENDING"
    assert "cannot be ended: permission denied" in caplog.text


def test_tasks_that_somebody_has_locked_are_taken_over_later(
    app: Flask, db: SQLAlchemy, bq: BeanQueue, make_heartbeat: MakeHeartbeat
) -> None:
    with app.app_context():
        db.session.add(bq.Task(module="m", name="f", state="PROCESSING", claims=1))
        db.session.commit()
        heartbeat = make_heartbeat()
        locked: Any = db.session.scalars(sa.select(bq.Task).with_for_update()).one()
        assert heartbeat.beat()
        db.session.rollback()
        assert locked.state == "PROCESSING"
        heartbeat._next_search = 0.0
        assert heartbeat.beat()
        db.session.rollback()
        assert locked.state == "PENDING"
