"""Tables that grow by orders of magnitude while a worker lives, and the plans for them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import sqlalchemy as sa
from flask import Flask
from flask_sqlalchemy import SQLAlchemy

from flask_beanqueue import BeanQueue

from .conftest import MakeApp, running
from .probe import Probe, query, wait_until

GROWN = 50_000


@pytest.fixture
def grow(database_url: str) -> Callable[[], None]:
    """Writes many tasks that are done, so that reading all of them would show."""

    def grow() -> None:
        query(
            database_url,
            "INSERT INTO bq_tasks (module, func_name, state)"
            f" SELECT 'm', 'f', 'DONE' FROM generate_series(1, {GROWN})",
        )

    return grow


def fail(db: Any) -> None:
    raise ValueError


def use_the_session(db: Any) -> None:
    db.execute(sa.text("SELECT 1"))


def do_nothing() -> None:
    pass


@pytest.mark.parametrize("events", [False, True])
@pytest.mark.parametrize("function", [fail, use_the_session, do_nothing])
def test_a_worker_that_has_seen_a_small_table_reads_no_large_one(
    make_app: MakeApp,
    db: SQLAlchemy,
    bq: BeanQueue,
    probe: Probe,
    grow: Callable[[], None],
    database_url: str,
    function: Callable[..., None],
    events: bool,
) -> None:
    """Its first statements are planned for a few rows, of which it would read all."""
    app = make_app(db, bq, BQ_SUCCESS_EVENTS=events)
    query(database_url, "ALTER TABLE bq_tasks SET (autovacuum_enabled = false)")
    processor: Any = bq.processor()(function)
    end = f"{function.__name__} {'FAILED' if function is fail else 'DONE'}"
    probe.listen_states()

    def some() -> None:
        for _ in range(7):
            processor.enqueue()
            db.session.commit()
            probe.wait(end)

    with app.app_context():
        with running(app, bq, concurrency=1):
            some()
            query(database_url, "VACUUM ANALYZE bq_tasks")
            some()
            grow()
            some()
        db.session.remove()
        db.engine.dispose()
    # A backend tells what it has read when it ends.
    left = (
        "SELECT FROM pg_stat_activity"
        " WHERE application_name LIKE 'beanqueue %' AND datname = current_database()"
    )
    wait_until(lambda: not query(database_url, left))
    read = (
        "SELECT coalesce(sum(seq_tup_read), 0) FROM pg_stat_user_tables WHERE relname = 'bq_tasks'"
    )
    assert query(database_url, read)[0][0] < GROWN


def test_nothing_of_a_worker_is_prepared(
    app: Flask, db: SQLAlchemy, bq: BeanQueue, work: Callable[..., None]
) -> None:
    """psycopg 3 prepares what comes often."""
    left: list[int] = []

    @bq.processor()
    def count(db: Any) -> None:
        left.append(db.scalar(sa.text("SELECT count(*) FROM pg_prepared_statements")))

    with app.app_context():
        count.enqueue_many([{}] * 30)
        db.session.commit()
        work(concurrency=1)
    assert left == [0] * 30
