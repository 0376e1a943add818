"""Tests that freeze time."""

from __future__ import annotations

import datetime
from collections.abc import Callable
from typing import Any

import pytest
import sqlalchemy as sa
from flask import Flask
from flask_sqlalchemy import SQLAlchemy
from freezegun import freeze_time

from flask_beanqueue import BeanQueue, DelayRetry

from .conftest import running
from .probe import Probe, query


@pytest.mark.parametrize("moment", ["2020-02-29", "2040-01-01"])
@pytest.mark.parametrize("uses_session", [False, True])
def test_a_burst_ends_although_time_is_frozen(
    app: Flask,
    db: SQLAlchemy,
    bq: BeanQueue,
    work: Callable[..., None],
    database_url: str,
    moment: str,
    uses_session: bool,
) -> None:
    seen: list[datetime.date] = []

    @bq.processor(retry_policy=DelayRetry(datetime.timedelta(0)))
    def look(db: Any, task: Any) -> None:
        seen.append(datetime.date.today())
        if uses_session:
            db.execute(sa.text("SELECT 1"))
        if task.attempts == 0:
            raise ValueError

    with freeze_time(moment), app.app_context():
        look.enqueue()
        db.session.commit()
        work()
    assert query(database_url, "SELECT state, attempts FROM bq_tasks") == [("DONE", 2)]
    assert [str(date) for date in seen] == [moment] * 2


def test_a_worker_is_woken_and_stopped_although_time_is_frozen(
    app: Flask, db: SQLAlchemy, bq: BeanQueue, probe: Probe
) -> None:
    @bq.processor()
    def easy() -> None:
        pass

    probe.listen_states()
    with app.app_context(), running(app, bq), freeze_time("2020-02-29", ignore=["tests.probe"]):
        for _ in range(3):
            easy.enqueue()
            db.session.commit()
            probe.wait("easy DONE")
