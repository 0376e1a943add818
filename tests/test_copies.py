"""Copies of the queue's rows: in a database beside it, and in tables below its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import sqlalchemy as sa
from flask import Flask
from flask_sqlalchemy import SQLAlchemy

from flask_beanqueue import BeanQueue

from .apps import faults
from .conftest import only_task
from .probe import Probe, query, wait_until
from .processes import HEARTBEAT, Processes

APP = faults.__name__


@pytest.fixture
def faults_app(database_url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Flask]:
    monkeypatch.setenv("DATABASE_URL", database_url)
    with faults.context() as app:
        yield app


@pytest.mark.parametrize("state", ["RUNNING", "NO_HEARTBEAT", "SHUTDOWN"])
def test_a_worker_on_a_copy_of_the_database_ends_no_connections_of_the_original(
    faults_app: Flask,
    database_url: str,
    other_database_url: str,
    probe: Probe,
    processes: Processes,
    state: str,
) -> None:
    """As after ``pg_dump production | psql staging``, whatever the copy holds of the worker."""
    probe.listen_states()
    original = processes.worker(APP, "--name", "original", **HEARTBEAT)
    engine = sa.create_engine(other_database_url)
    faults.db.metadata.create_all(engine)
    engine.dispose()
    with probe.paused("after flush", faults.freeze_flushed) as open_gate:
        [(worker_id, task_id)] = query(
            database_url, "SELECT worker_id::text, id::text FROM bq_tasks"
        )
        query(
            other_database_url,
            "INSERT INTO bq_workers (id, state, name, channels, last_heartbeat)"
            " VALUES (%s, %s, 'original', '{}', now() - interval '1 hour')",
            worker_id,
            state,
        )
        query(
            other_database_url,
            "INSERT INTO bq_tasks (id, state, channel, module, func_name, worker_id)"
            " VALUES (%s, 'PROCESSING', 'elsewhere', 'm', 'f', %s)",
            task_id,
            worker_id,
        )
        copy = processes.worker(APP, **HEARTBEAT, DATABASE_URL=other_database_url)
        beats = "SELECT max(last_heartbeat) - min(created_at) > '2 s' FROM bq_workers WHERE name ~ '-'"
        wait_until(lambda: query(other_database_url, beats) == [(True,)])
        open_gate()
    probe.wait("freeze_flushed DONE")
    assert query(database_url, "SELECT claims, interruptions FROM bq_tasks") == [(1, 0)]
    assert "went away" not in original.output
    assert copy.stop() == 0
    assert original.stop() == 0
