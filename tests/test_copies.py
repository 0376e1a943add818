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
        beats = (
            "SELECT max(last_heartbeat) - min(created_at) > '2 s' FROM bq_workers WHERE name ~ '-'"
        )
        wait_until(lambda: query(other_database_url, beats) == [(True,)])
        open_gate()
    probe.wait("freeze_flushed DONE")
    assert query(database_url, "SELECT claims, interruptions FROM bq_tasks") == [(1, 0)]
    assert "was in trouble" not in original.output
    assert copy.stop() == 0
    assert original.stop() == 0


@pytest.fixture
def archive(app: Flask, database_url: str) -> Callable[[], None]:
    """Moves all tasks into a table that inherits from theirs, each to its old place there."""
    query(database_url, "CREATE TABLE bq_tasks_2025 () INHERITS (bq_tasks)")

    def archive() -> None:
        query(
            database_url,
            "INSERT INTO bq_tasks_2025 SELECT * FROM ONLY bq_tasks ORDER BY id",
        )
        query(database_url, "TRUNCATE ONLY bq_tasks CASCADE")  # the first place is free again

    return archive


def test_tasks_in_a_table_that_inherits_are_not_done_again(
    app: Flask,
    db: SQLAlchemy,
    bq: BeanQueue,
    work: Callable[..., None],
    archive: Callable[[], None],
    database_url: str,
) -> None:
    """A ctid tells rows apart within one table only."""
    ran: list[int] = []

    @bq.processor()
    def note(number: int) -> None:
        ran.append(number)

    for lot in (range(5), range(5, 10)):
        with app.app_context():
            note.enqueue_many([{"number": number} for number in lot])
            db.session.commit()
        if 5 in lot:
            places = "SELECT array_agg(ctid ORDER BY ctid) FROM bq_tasks GROUP BY tableoid"
            one, other = query(database_url, places)
            assert one == other
        work()
        if 0 in lot:
            archive()
    assert sorted(ran) == [*range(10)]
    assert query(database_url, "SELECT DISTINCT claims, attempts FROM bq_tasks") == [(1, 1)]


@pytest.mark.parametrize("state", ["PENDING", "PROCESSING"])
def test_what_waits_in_a_table_that_inherits_is_left_alone(
    app: Flask,
    db: SQLAlchemy,
    bq: BeanQueue,
    work: Callable[..., None],
    archive: Callable[[], None],
    state: str,
) -> None:
    @bq.processor()
    def refuse() -> None:
        raise AssertionError

    with app.app_context():
        db.session.add(bq.Task(module=refuse.module, func_name="refuse", state=state))
        db.session.commit()
    archive()
    work()
    task = only_task(app, bq)
    assert (task.state, task.claims, task.crashes) == (state, 0, 0)
