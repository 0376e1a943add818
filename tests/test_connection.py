"""The connections of the queue's own: how they are made, and what ends them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import sqlalchemy as sa
from flask import Flask
from flask_sqlalchemy import SQLAlchemy

from flask_beanqueue import BeanQueue
from flask_beanqueue.engine.connection import OwnConnection, connect, limits, named
from flask_beanqueue.engine.database import SURVIVABLE, reason
from flask_beanqueue.engine.listener import Listener

from .apps import faults
from .conftest import MakeApp, parameters
from .probe import Probe, query, wait_until
from .processes import Processes


@pytest.fixture
def full_engine(make_app: MakeApp, db: SQLAlchemy, bq: BeanQueue) -> Iterator[sa.Engine]:
    """An engine whose pool has nothing left to give."""
    options = {"pool_size": 1, "max_overflow": 0, "pool_timeout": 1}
    app = make_app(db, bq, SQLALCHEMY_ENGINE_OPTIONS=options)
    engine = bq.engine(app)
    with engine.connect():
        yield engine


def test_the_queues_connections_wait_for_none_of_the_apps(full_engine: sa.Engine) -> None:
    """Or a worker whose tasks use all of them could not come back after an outage, and be taken
    for dead."""
    with contextlib.closing(OwnConnection(full_engine)) as line:
        assert line.connection.scalar(sa.text("SELECT 1")) == 1
    with contextlib.closing(Listener(full_engine, ["default"])) as listener:
        assert listener.listen()
    assert full_engine.pool.checkedout() == 1  # type: ignore[attr-defined]


def test_the_queues_connections_are_made_as_the_app_makes_its_own(
    make_app: MakeApp, db: SQLAlchemy, bq: BeanQueue
) -> None:
    options = {"connect_args": {"options": "-c work_mem=5MB"}}
    engine = bq.engine(make_app(db, bq, SQLALCHEMY_ENGINE_OPTIONS=options))
    connected = []
    sa.event.listen(engine, "connect", lambda connection, record: connected.append(connection))
    with contextlib.closing(connect(engine)) as connection:
        assert connection.scalar(sa.text("SHOW work_mem")) == "5MB"
    assert len(connected) == 1


def test_a_line_calls_whatever_keeps_it_from_opening_again_the_databases_trouble(
    app: Flask, bq: BeanQueue
) -> None:
    """Where the app connects by itself, that may be any exception; a worker is to survive it, but
    to say it as it is when it starts."""
    engine = bq.engine(app)

    def refuse(*args: Any) -> None:
        raise OSError("the token service is away")

    with contextlib.closing(OwnConnection(engine)) as line:
        sa.event.listen(engine, "do_connect", refuse)
        with pytest.raises(OSError, match="the token service is away"):
            assert line.connection
        sa.event.remove(engine, "do_connect", refuse)
        assert line.connection
        line.close()
        sa.event.listen(engine, "do_connect", refuse)
        with pytest.raises(SURVIVABLE) as caught:
            assert line.connection
        assert reason(caught.value) == "the token service is away"
        sa.event.remove(engine, "do_connect", refuse)
        assert line.connection


def settings(engine: sa.Engine) -> dict[str, str]:
    """What libpq was given for a connection."""
    with engine.connect() as connection:
        return parameters(connection.connection.dbapi_connection)


def test_connections_of_a_worker_find_out_when_the_network_is_gone(
    app: Flask, bq: BeanQueue
) -> None:
    engine = bq.engine(app)
    with named([engine], "beanqueue test", timeout=20):
        found = settings(engine)
    assert {name: int(found[name]) for name in limits(20)} == limits(20)
    assert found["application_name"] == "beanqueue test"


def test_what_the_app_says_of_its_connections_goes_before(
    make_app: MakeApp, db: SQLAlchemy, bq: BeanQueue
) -> None:
    options = {"connect_args": {"tcp_user_timeout": 12345, "keepalives": 0}}
    engine = bq.engine(make_app(db, bq, SQLALCHEMY_ENGINE_OPTIONS=options))
    with named([engine], "beanqueue test", timeout=20):
        found = settings(engine)
    assert (found["tcp_user_timeout"], found["keepalives"]) == ("12345", "0")
    assert found["keepalives_idle"] == "5"


@pytest.mark.parametrize("timeout", [0.2, 1, 2, 3, 5, 10, 20, 30, 100, 3600])
def test_the_end_of_a_connection_is_found_out_within_the_timeout(timeout: float) -> None:
    each = limits(timeout)
    idle = each["keepalives_idle"] + each["keepalives_interval"] * each["keepalives_count"]
    # Whole seconds, and at least one.
    assert idle <= max(timeout, 4)
    assert 0 < each["tcp_user_timeout"] / 1000 <= timeout
    assert 2 <= each["connect_timeout"] <= max(timeout, 2)


@pytest.mark.parametrize("arguments", [[], ["--processes", "2"]], ids=["one", "processes"])
def test_a_servers_idle_timeout_closes_none_of_the_queues_connections(
    database_url: str,
    probe: Probe,
    processes: Processes,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
) -> None:
    monkeypatch.setenv("DATABASE_URL", database_url)
    with faults.context():
        name = sa.make_url(database_url).database
        query(database_url, f"ALTER DATABASE {name} SET idle_session_timeout = '200ms'")
        heartbeat = {"BQ_WORKER_HEARTBEAT_PERIOD": 0.5, "BQ_WORKER_HEARTBEAT_TIMEOUT": 10}
        worker = processes.worker(faults.__name__, *arguments, **heartbeat, BQ_POLL_TIMEOUT=3600)
        probe.listen_states()
        beats = "SELECT last_heartbeat FROM bq_workers"
        for _ in range(3):  # as long as between two heartbeats
            before = {*query(database_url, beats)}
            wait_until(lambda before=before: not before & {*query(database_url, beats)})
        query(
            database_url,
            "INSERT INTO bq_tasks (channel, module, func_name) VALUES ('faults', %s, 'nothing');"
            " NOTIFY faults",
            faults.__name__,
        )
        probe.wait("nothing DONE")
        assert worker.stop() == 0
    assert "WARNING" not in worker.output
