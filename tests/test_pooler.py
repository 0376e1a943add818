"""PgBouncer in transaction mode between the app, its workers and the database."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator

import pytest
import sqlalchemy as sa
from flask import Flask

from flask_beanqueue.engine.connection import connect

from .apps import faults
from .apps.faults import effects
from .pooler import installed, pooler
from .probe import Probe, query
from .processes import HEARTBEAT, ZOMBIE, Process, Processes, done_by_the_next

pytestmark = pytest.mark.skipif(
    installed() is None and os.environ.get("REQUIRE_POOLER") != "1",
    reason="There is no PgBouncer. (With REQUIRE_POOLER=1 this would be a failure.)",
)

APP = faults.__name__


@pytest.fixture
def pooled_url(database_url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The database through the pooler; also for the app, and for what the processes start with."""
    with pooler(database_url) as url:
        monkeypatch.setenv("DATABASE_URL", url)
        monkeypatch.setenv("PROBE_DATABASE_URL", database_url)
        if sa.make_url(database_url).get_driver_name() == "psycopg":
            # Debian's PgBouncer is too old for prepared statements.
            options = '{"pool_size": 20, "connect_args": {"prepare_threshold": null}}'
            monkeypatch.setenv("FLASK_SQLALCHEMY_ENGINE_OPTIONS", options)
        yield url


@pytest.fixture
def app(pooled_url: str, probe: Probe) -> Iterator[Flask]:
    with faults.context() as app:
        probe.listen_states()
        yield app


@pytest.fixture
def pooled(pooled_url: str) -> Iterator[Processes]:
    """Processes whose database is behind the pooler."""
    with contextlib.closing(Processes(pooled_url)) as processes:
        yield processes


def several(processes: int) -> list[str]:
    return ["--processes", str(processes)] if processes > 1 else []


@pytest.fixture
def start(pooled: Processes) -> Callable[[], Process]:
    return lambda: pooled.worker(APP, **ZOMBIE)


@pytest.mark.parametrize("processes", [1, 2])
def test_a_worker_behind_a_pooler_says_so_and_polls(
    app: Flask, database_url: str, probe: Probe, pooled: Processes, processes: int
) -> None:
    worker = pooled.worker(APP, *several(processes), **HEARTBEAT)
    assert "Set BQ_LISTEN_DATABASE_URL" in worker.output
    assert "polling every 1 s" in worker.output
    for number in range(100):  # more often than psycopg 3 waits before it prepares
        faults.number.enqueue(number=number)
        faults.db.session.commit()
    probe.wait_until(lambda: probe.heard.count("number DONE") == 100)
    assert sorted(effects(database_url), key=int) == [str(number) for number in range(100)]
    assert worker.stop() == 0


@pytest.mark.parametrize("processes", [1, 2])
def test_with_the_databases_own_address_a_worker_behind_a_pooler_is_woken(
    app: Flask, database_url: str, probe: Probe, pooled: Processes, processes: int
) -> None:
    settings = {"BQ_LISTEN_DATABASE_URL": database_url, "BQ_POLL_TIMEOUT": 300}
    worker = pooled.worker(APP, *several(processes), **HEARTBEAT, **settings)
    assert "pooler" not in worker.output
    for number in range(5):
        faults.number.enqueue(number=number)
        faults.db.session.commit()
        probe.wait("number DONE")
    assert worker.stop() == 0


@pytest.mark.parametrize(("point", "task"), faults.STOPS)
def test_a_frozen_worker_behind_a_pooler_holds_nobody_up_and_leaves_no_trace(
    app: Flask, database_url: str, probe: Probe, start: Callable[[], Process], point: str, task: str
) -> None:
    first = start()
    second = done_by_the_next(first.freeze, start, probe, point, getattr(faults, task))
    first.thaw()
    assert first.wait() == 1
    assert effects(database_url) == [task]
    assert second.stop() == 0


def test_a_killed_workers_task_is_done_by_another_behind_a_pooler(
    app: Flask, database_url: str, probe: Probe, start: Callable[[], Process]
) -> None:
    done_by_the_next(start().kill, start, probe, "waiting mail", faults.wait, name="mail")
    assert effects(database_url) == ["mail"]


def test_an_isolation_level_that_a_pooler_would_not_keep_is_refused(
    app: Flask, database_url: str, pooled: Processes
) -> None:
    name = sa.make_url(database_url).database
    query(database_url, f"ALTER DATABASE {name} SET default_transaction_isolation = serializable")
    faults.db.engine.dispose()
    with pooler(database_url) as url:  # with new backends
        worker = pooled.flask("--app", APP, "bq", "worker", DATABASE_URL=url)
        assert worker.wait() == 1
    assert "Error: The database's default_transaction_isolation is 'serializable'" in worker.output


def test_the_queues_own_connections_prepare_nothing_behind_a_pooler(pooled_url: str) -> None:
    """The next backend would not know it. The app need not say so for them."""
    engine = sa.create_engine(pooled_url)  # with psycopg 3's own threshold
    with contextlib.closing(connect(engine)) as connection, engine.connect() as other:
        backend = sa.text("SELECT pg_backend_pid()")
        first = {connection.scalar(backend) for _ in range(20)}
        with other.begin():
            assert {other.scalar(backend)} == first  # keeps it
            assert connection.scalar(backend) not in first
    engine.dispose()
