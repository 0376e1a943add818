"""Who lives, and who is dead."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import sqlalchemy as sa
from flask import Flask
from flask_sqlalchemy import SQLAlchemy

from flask_beanqueue import BeanQueue
from flask_beanqueue.engine import heartbeat as module
from flask_beanqueue.engine.completer import LOCKED
from flask_beanqueue.engine.connection import application_name, connect
from flask_beanqueue.engine.heartbeat import Heartbeat, add_worker, retire
from flask_beanqueue.models.uuid7 import uuid7

MakeHeartbeat = Callable[..., Heartbeat]


@pytest.fixture
def buried() -> list[Heartbeat]:
    """Who has declared others dead."""
    return []


@pytest.fixture
def make_heartbeat(app: Flask, bq: BeanQueue, buried: list[Heartbeat]) -> Iterator[MakeHeartbeat]:
    """Makes workers of which there is nothing but the heartbeat."""
    made = []

    def nothing() -> None:
        pass

    def make(
        on_death: Callable[[], None] = nothing, on_loss: Callable[[], None] = nothing
    ) -> Heartbeat:
        worker_id = uuid7()
        connection = connect(bq.engine(app))
        add_worker(connection, bq.models, worker_id, "test", ["default"])
        connection.close()
        heartbeat = Heartbeat(
            bq.engine(app),
            bq.models,
            bq.config(app),
            worker_id,
            on_death=on_death,
            on_loss=on_loss,
            on_others_dead=lambda: buried.append(heartbeat),
        )
        made.append(heartbeat)
        return heartbeat

    yield make
    for heartbeat in made:
        heartbeat.own.close()


class Clock:
    """The heartbeats' own clock."""

    now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("flask_beanqueue.engine.heartbeat.time", clock)
    return clock


def beat(clock: Clock, seconds: int, *living: Heartbeat) -> list[bool]:
    """Let time pass in which some beat, and return what their last beats told."""
    assert seconds % 4 == 0
    alive = []
    for _ in range(seconds // 4):
        clock.now += 4
        alive = [heartbeat.beat() for heartbeat in living]
    return alive


@pytest.fixture
def app_context(app: Flask) -> Iterator[None]:
    with app.app_context():
        yield


def set_heartbeats(db: SQLAlchemy, bq: BeanQueue, offset: str) -> None:
    """Let the last heartbeats be so far from now; to set the clock would come to the same."""
    last = sa.func.now() + sa.cast(offset, sa.Interval)
    db.session.execute(sa.update(bq.Worker).values(last_heartbeat=last))
    db.session.commit()


def states(db: SQLAlchemy, bq: BeanQueue) -> list[str]:
    db.session.rollback()
    return sorted(db.session.scalars(sa.select(bq.Worker.state)))


@pytest.mark.usefixtures("app_context")
def test_a_beat_declares_silent_workers_dead(
    db: SQLAlchemy,
    bq: BeanQueue,
    make_heartbeat: MakeHeartbeat,
    buried: list[Heartbeat],
    clock: Clock,
) -> None:
    first, second = make_heartbeat(), make_heartbeat()
    assert first.beat()
    set_heartbeats(db, bq, "-9 seconds")
    assert beat(clock, 20, first) == [True]
    assert (states(db, bq), buried) == (["RUNNING", "RUNNING"], [])
    set_heartbeats(db, bq, "-11 seconds")
    assert beat(clock, 12, first) == [True]
    assert (states(db, bq), buried) == (["RUNNING", "RUNNING"], [])
    assert beat(clock, 4, first) == [True]
    assert (states(db, bq), buried) == (["NO_HEARTBEAT", "RUNNING"], [first])
    assert not second.beat()
    assert beat(clock, 40, first) == [True]
    assert buried == [first]


@pytest.mark.usefixtures("app_context")
@pytest.mark.parametrize("offset", ["-1 hour", "1 hour", "-infinity", "infinity"])
def test_a_clock_that_is_set_kills_nobody_and_keeps_nobody_alive(
    db: SQLAlchemy, bq: BeanQueue, make_heartbeat: MakeHeartbeat, clock: Clock, offset: str
) -> None:
    """The database's clock, that is: forward or back."""
    if offset.endswith("infinity") and db.session.scalar(sa.text("SHOW server_version_num")) < "17":
        pytest.skip("There are no infinite intervals.")
    first, second, _ = make_heartbeat(), make_heartbeat(), make_heartbeat()
    assert beat(clock, 4, first, second) == [True, True]
    set_heartbeats(db, bq, offset)
    assert beat(clock, 12, first, second) == [True, True]
    assert states(db, bq) == ["RUNNING", "RUNNING", "RUNNING"]
    assert beat(clock, 4, first, second) == [True, True]
    assert states(db, bq) == ["NO_HEARTBEAT", "RUNNING", "RUNNING"]


@pytest.mark.usefixtures("app_context")
def test_after_an_outage_the_first_to_come_back_lets_the_others_beat(
    db: SQLAlchemy, bq: BeanQueue, make_heartbeat: MakeHeartbeat, clock: Clock
) -> None:
    """The database was away for all of them, and none is dead."""
    first, second = make_heartbeat(), make_heartbeat()
    set_heartbeats(db, bq, "-11 seconds")
    assert beat(clock, 4, first) == [True]
    clock.now += 60
    set_heartbeats(db, bq, "-71 seconds")
    assert beat(clock, 20, first) == [True]
    assert states(db, bq) == ["RUNNING", "RUNNING"]
    assert second.beat()


@pytest.mark.usefixtures("app_context")
def test_a_worker_that_starts_lets_the_others_beat_before_it_declares_any_dead(
    db: SQLAlchemy, bq: BeanQueue, make_heartbeat: MakeHeartbeat, clock: Clock
) -> None:
    """It may be the first to start after an outage that the others have survived."""
    first, second = make_heartbeat(), make_heartbeat()
    set_heartbeats(db, bq, "-1 minute")
    assert first.beat()
    assert beat(clock, 8, first) == [True]
    assert states(db, bq) == ["RUNNING", "RUNNING"]
    assert second.beat()
    assert beat(clock, 20, first) == [True]
    assert states(db, bq) == ["RUNNING", "RUNNING"]


def test_a_refused_end_of_backends_keeps_nobody_from_being_declared_dead(
    app: Flask,
    db: SQLAlchemy,
    bq: BeanQueue,
    make_heartbeat: MakeHeartbeat,
    buried: list[Heartbeat],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    clock: Clock,
) -> None:
    def refuse(connection: Any, models: Any) -> int:
        raise sa.exc.ProgrammingError("SELECT", {}, Exception("permission denied for function"))

    monkeypatch.setattr(module, "terminate", refuse)
    with app.app_context():
        first, _ = make_heartbeat(), make_heartbeat()
        set_heartbeats(db, bq, "-31 seconds")
        assert beat(clock, 16, first) == [True]
        assert (states(db, bq), buried) == (["NO_HEARTBEAT", "RUNNING"], [first])
    assert "cannot be ended: permission denied" in caplog.text


def test_a_burial_is_told_also_where_the_end_of_backends_takes_too_long(
    app: Flask,
    db: SQLAlchemy,
    bq: BeanQueue,
    make_heartbeat: MakeHeartbeat,
    buried: list[Heartbeat],
    monkeypatch: pytest.MonkeyPatch,
    clock: Clock,
) -> None:
    """They are given a second each, and a statement_timeout may be shorter."""

    def take_too_long(connection: Any, models: Any) -> int:
        raise sa.exc.OperationalError("SELECT", {}, Exception("canceling statement"))

    with app.app_context():
        first, _ = make_heartbeat(), make_heartbeat()
        set_heartbeats(db, bq, "-31 seconds")
        beat(clock, 12, first)
        monkeypatch.setattr(module, "terminate", take_too_long)
        with pytest.raises(sa.exc.OperationalError):
            beat(clock, 4, first)
        assert (states(db, bq), buried) == (["NO_HEARTBEAT", "RUNNING"], [first])


@pytest.mark.parametrize("left", [True, False])
def test_a_worker_that_has_left_a_locked_task_behind_keeps_no_backends(
    app: Flask, db: SQLAlchemy, bq: BeanQueue, make_heartbeat: MakeHeartbeat, left: bool
) -> None:
    """If its process hangs on its way out, it would keep the task from everybody else."""
    first, second = make_heartbeat(), make_heartbeat()
    name = application_name(second._worker_id)
    with app.app_context(), contextlib.closing(connect(bq.engine(app))) as connection:
        task = bq.Task(module="m", name="f", state="PROCESSING", claims=1)
        task.worker_id = second._worker_id if left else None
        db.session.add(task)
        db.session.commit()
        retire(connection, bq.models, second._worker_id)
        with bq.engine(app).connect() as hanging:
            hanging.execute(
                sa.text("SELECT set_config('application_name', :name, false)"), {"name": name}
            )
            hanging.execute(sa.select(bq.Task.id).with_for_update())
            assert first.beat()
            locked = connection.scalars(LOCKED.on(bq.models), {"ids": [str(task.id)]}).all()
            assert locked == ([] if left else [str(task.id)])
            hanging.invalidate()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_worker_whose_heartbeat_has_ended_is_told(
    make_heartbeat: MakeHeartbeat, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All others will take it for dead. Its connection is closed."""
    told = threading.Event()
    heartbeat = make_heartbeat(on_loss=told.set)
    connections = []

    def exit() -> bool:
        connections.append(heartbeat.own.connection)
        raise SystemExit

    monkeypatch.setattr(heartbeat, "beat", exit)
    heartbeat.start()
    assert told.wait(30)
    heartbeat.stop()
    [connection] = connections
    assert connection.closed


def test_a_worker_that_leaves_while_a_beat_hangs_has_not_died(
    make_heartbeat: MakeHeartbeat, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The beat comes after the goodbye, and finds nobody of that id at work."""
    deaths: list[str] = []
    beating = threading.Event()
    heartbeat = make_heartbeat(lambda: deaths.append("told"))

    def late() -> bool:
        beating.set()
        assert heartbeat._stopped.wait(30)
        return False

    monkeypatch.setattr(heartbeat, "beat", late)
    heartbeat.start()
    assert beating.wait(30)
    heartbeat.stop()
    assert not heartbeat.is_alive()
    assert deaths == []
