"""LISTEN where connecting takes long, or fails."""

from __future__ import annotations

import contextlib
import logging
import threading
import types
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import sqlalchemy as sa
from flask import Flask
from flask_sqlalchemy import SQLAlchemy

from flask_beanqueue import BeanQueue
from flask_beanqueue.engine import listener as listen
from flask_beanqueue.engine import loop, worker
from flask_beanqueue.engine.connection import application_name
from flask_beanqueue.engine.listener import Listener

from .conftest import MakeApp, parameters, running
from .probe import Probe, query, wait_until


class Address:
    """Where workers LISTEN: it accepts, and is silent until it is told to answer."""

    def __init__(self, url: str) -> None:
        self.engine = sa.create_engine(url, poolclass=sa.NullPool)
        self.asked = threading.Semaphore(0)
        self.answers = threading.Event()
        sa.event.listen(self.engine, "do_connect", self._be_silent)

    def _be_silent(self, *args: Any) -> None:
        self.asked.release()
        assert self.answers.wait(60)


@pytest.fixture
def address(database_url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Address]:
    address = Address(database_url)
    monkeypatch.setattr(worker, "make_listen_engine", lambda engine, config: address.engine)
    monkeypatch.setattr(listen, "FIRST_ATTEMPT", 0.0)
    yield address
    address.answers.set()


@pytest.fixture
def app(make_app: MakeApp, db: SQLAlchemy, bq: BeanQueue) -> Flask:
    return make_app(db, bq, BQ_POLL_TIMEOUT=3600)


@pytest.fixture
def nothing(app: Flask, db: SQLAlchemy, bq: BeanQueue, probe: Probe) -> Callable[..., None]:
    """Make a task that does nothing, and see it done if need be."""

    @bq.processor()
    def nothing() -> None:
        pass

    probe.listen_states()

    def make(*, wait: bool = True, **options: Any) -> None:
        with app.app_context():
            nothing.using(**options).enqueue()
            db.session.commit()
        if wait:
            probe.wait("nothing DONE", timeout=15)

    return make


def listening(url: str, worker: Any) -> list[int]:
    """The backends with which a worker LISTENs."""
    rows = query(
        url,
        "SELECT pid FROM pg_stat_activity WHERE query LIKE 'LISTEN%%' AND application_name = %s",
        application_name(worker.id),
    )
    return [pid for (pid,) in rows]


def test_a_worker_works_while_it_waits_for_an_address_that_is_silent(
    app: Flask,
    bq: BeanQueue,
    address: Address,
    nothing: Callable[..., None],
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    with running(app, bq):
        assert address.asked.acquire(timeout=30)
        nothing()
        nothing()
        assert "polling every 1 s" in caplog.text
        address.answers.set()
        wait_until(lambda: "The worker LISTENs" in caplog.text)
        nothing()
    assert "LISTEN fails" not in caplog.text


def test_a_worker_leaves_while_it_waits_for_an_address_that_is_silent(
    app: Flask, bq: BeanQueue, database_url: str, address: Address
) -> None:
    with running(app, bq, "default") as worker:
        assert address.asked.acquire(timeout=30)
    [attempt] = [each for each in threading.enumerate() if each.name == "beanqueue-listen"]
    address.answers.set()
    attempt.join(30)
    wait_until(lambda: not listening(database_url, worker))


def test_what_was_committed_while_nobody_listened_waits_for_no_poll(
    app: Flask,
    bq: BeanQueue,
    database_url: str,
    address: Address,
    nothing: Callable[..., None],
    probe: Probe,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(loop, "LISTEN_LOST", 3600.0)
    address.answers.set()
    with running(app, bq) as it:
        wait_until(lambda: listening(database_url, it))
        nothing()
        assert address.asked.acquire(timeout=30)
        address.answers.clear()
        [pid] = listening(database_url, it)
        query(database_url, "SELECT pg_terminate_backend(%s)", pid)
        assert address.asked.acquire(timeout=30)
        nothing(wait=False)
        address.answers.set()
        probe.wait("nothing DONE", timeout=15)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Any:
    clock = types.SimpleNamespace(now=1.0)
    monkeypatch.setattr(listen, "time", types.SimpleNamespace(monotonic=lambda: clock.now))
    return clock


def lose(url: str, listener: Listener) -> None:
    """End the backend of a listener."""
    [(ended,)] = query(
        url,
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
        " WHERE datname = current_database() AND query LIKE 'LISTEN%%'",
    )
    assert ended
    wait_until(lambda: not listener.drain() and not listener.listens)


def test_attempts_to_listen_come_less_and_less_often(
    app: Flask, bq: BeanQueue, database_url: str, clock: Any, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)

    def refuse(*args: Any) -> None:
        raise OSError("the token service is away")

    def pauses(number: int) -> Iterator[float]:
        for _ in range(number):
            assert not listener.listen()
            yield listener.next_try - clock.now
            clock.now = listener.next_try

    engine = bq.engine(app)
    with contextlib.closing(Listener(engine, ["default"])) as listener:
        sa.event.listen(engine, "do_connect", refuse)
        assert list(pauses(7)) == [1, 2, 4, 8, 16, 30, 30]
        sa.event.remove(engine, "do_connect", refuse)
        assert listener.listen()
        clock.now += 1
        lose(database_url, listener)
        sa.event.listen(engine, "do_connect", refuse)
        assert list(pauses(2)) == [1, 2]
        sa.event.remove(engine, "do_connect", refuse)
        assert listener.listen()
    fails, listens, lost, fails_again, listens_again = (
        record.getMessage() for record in caplog.records
    )
    assert fails == fails_again == "LISTEN fails, polling meanwhile: the token service is away"
    assert listens == "The worker LISTENs"
    assert lost.startswith("The LISTEN connection is lost: ")
    assert listens_again == "The worker LISTENs again"


def test_a_connection_that_is_lost_and_made_again_at_once_is_told(
    app: Flask, bq: BeanQueue, database_url: str, clock: Any, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    with contextlib.closing(Listener(bq.engine(app), ["default"])) as listener:
        assert listener.listen()
        clock.now += 1
        lose(database_url, listener)
        assert listener.listen()
    assert caplog.records[-1].getMessage() == "The worker LISTENs again"


def test_connections_that_do_not_last_are_made_less_and_less_often(
    app: Flask, bq: BeanQueue, database_url: str, clock: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """A proxy may let LISTEN through, and then close."""
    caplog.set_level(logging.INFO)
    pauses = []
    with contextlib.closing(Listener(bq.engine(app), ["default"])) as listener:
        for _ in range(4):
            assert listener.listen()
            lose(database_url, listener)
            pauses.append(listener.next_try - clock.now)
            assert not listener.listen()
            clock.now = listener.next_try
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(listener, "_connect", lambda: 1 / 0)
            assert not listener.listen()
    assert pauses == [1, 2, 4, 8]
    assert caplog.records[-1].getMessage() == ("LISTEN fails, polling meanwhile: division by zero")


def test_who_connects_by_itself_is_not_held_up_for_long(app: Flask, bq: BeanQueue) -> None:
    """It is the parent of processes, and must have no threads when it forks."""
    made: list[Any] = []
    engine = bq.engine(app)
    sa.event.listen(engine, "connect", lambda connection, record: made.append(connection))
    with contextlib.closing(
        Listener(engine, ["default"], name="beanqueue test", timeout=20.0)
    ) as it:
        assert it.listen()
        assert not any(each.name == "beanqueue-listen" for each in threading.enumerate())
        assert parameters(made[-1])["connect_timeout"] == "2"


def test_a_worker_that_listens_at_another_database_says_so_and_polls(
    make_app: MakeApp,
    db: SQLAlchemy,
    bq: BeanQueue,
    other_database_url: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(listen, "ECHO_WITHIN", 0.1)
    app = make_app(db, bq, BQ_LISTEN_DATABASE_URL=other_database_url)
    with running(app, bq, "default"):
        wait_until(lambda: "polling every 1 s" in caplog.text)
    assert "LISTEN fails, polling meanwhile: at BQ_LISTEN_DATABASE_URL, nothing is" in caplog.text


@pytest.mark.parametrize("by_itself", [False, True])
def test_a_listener_at_an_address_of_its_own_hears_what_the_app_tells(
    app: Flask, bq: BeanQueue, database_url: str, by_itself: bool
) -> None:
    engine = sa.create_engine(database_url, poolclass=sa.NullPool)
    name = "beanqueue test" if by_itself else None
    with contextlib.closing(
        Listener(engine, ["default"], name=name, timeout=20.0, teller=bq.engine(app))
    ) as listener:
        assert listener.listen()
        query(database_url, 'NOTIFY "default"')
        wait_until(listener.drain)
