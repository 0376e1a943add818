"""Settings of the database that change how values are written and what statements may do."""

from __future__ import annotations

import datetime
from typing import Any

import pytest
import sqlalchemy as sa
from flask import Flask
from flask_sqlalchemy import SQLAlchemy

from flask_beanqueue import BeanQueue

from .conftest import running
from .probe import Probe, query

SETTINGS = {
    "extra_float_digits": "0",
    "extra_float_digits -15": "-15",
    "DateStyle": "SQL, DMY",
    "IntervalStyle": "sql_standard",
    "TimeZone": "Asia/Kolkata",
    "standard_conforming_strings": "off",
    "lc_monetary": "C",
}


@pytest.fixture
def tell(app: Flask, bq: BeanQueue) -> Any:
    @bq.processor()
    def tell(number: int) -> None:
        pass

    return tell


@pytest.mark.parametrize("name", SETTINGS)
def test_a_due_task_before_the_mark_is_done_at_once_whatever_the_settings(
    app: Flask,
    db: SQLAlchemy,
    bq: BeanQueue,
    tell: Any,
    probe: Probe,
    database_url: str,
    name: str,
) -> None:
    database = sa.make_url(database_url).database
    query(
        database_url, f"ALTER DATABASE {database} SET {name.partition(' ')[0]} = {SETTINGS[name]!r}"
    )
    probe.listen_states()
    times = ["2025-06-01 12:34:56.123456", "2020-01-01 00:00:00.999999", "1500-01-01", "-infinity"]
    with app.app_context():
        db.engine.dispose()
        with running(app, bq):
            tell.enqueue(number=1)
            db.session.commit()
            probe.wait("tell DONE")
            for time in times:
                task = tell.run(number=2)
                task.scheduled_at = sa.cast(time, sa.DateTime(timezone=True))
                db.session.add(task)
                db.session.commit()
                probe.wait("tell DONE", timeout=10)
            delay = datetime.timedelta(seconds=0.3)
            tell.using(delay=delay).enqueue(number=3)
            db.session.commit()
            probe.wait("tell DONE", timeout=10)
    late = "SELECT max(started_at - scheduled_at) < '0.3 s' FROM bq_tasks WHERE kwargs = %s"
    assert query(database_url, late, '{"number": 3}') == [(True,)]
