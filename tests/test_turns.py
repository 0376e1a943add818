"""Whatever rows a worker takes over, it sees to everything else meanwhile."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from flask import Flask
from flask_sqlalchemy import SQLAlchemy

from flask_beanqueue import BeanQueue

from .conftest import running
from .probe import Probe, query
from .triggers import trigger

MANY = 3000
LEFT = "SELECT count(*) FROM bq_tasks WHERE channel <> 'default' AND state = 'PROCESSING'"


@pytest.fixture
def orphans(app: Flask, database_url: str) -> Callable[[str], None]:
    """Writes many tasks that are PROCESSING for nobody, by raw SQL."""

    def write(channel: str) -> None:
        query(
            database_url,
            "INSERT INTO bq_tasks (module, func_name, state, channel)"
            f" SELECT 'm', 'f', 'PROCESSING', %s FROM generate_series(1, {MANY})",
            channel,
        )

    return write


@pytest.fixture
def easy(bq: BeanQueue) -> Any:
    @bq.processor()
    def easy() -> None:
        pass

    return easy


def test_orphans_whose_outcomes_are_refused_hold_up_no_other_channel(
    app: Flask,
    db: SQLAlchemy,
    bq: BeanQueue,
    easy: Any,
    orphans: Callable[[str], None],
    probe: Probe,
    database_url: str,
) -> None:
    probe.listen_states()
    orphans("bad")
    tried = trigger(
        "refuse",
        "BEFORE UPDATE ON bq_tasks",
        "RAISE EXCEPTION 'not this one'",
        condition="NEW.channel = 'bad'",
    )
    query(database_url, tried)
    with app.app_context(), running(app, bq, "default"):
        for _ in range(3):
            easy.enqueue()
            db.session.commit()
            probe.wait("easy DONE", timeout=10)
    assert query(database_url, LEFT) == [(MANY,)]


@pytest.mark.parametrize("channel", ["", "a" * 100, '"; \\ %s'])
def test_orphans_of_any_channel_are_taken_over_many_at_a_time(
    app: Flask,
    bq: BeanQueue,
    easy: Any,
    orphans: Callable[[str], None],
    work: Callable[..., None],
    database_url: str,
    channel: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    orphans(channel)
    work("default")
    assert query(database_url, LEFT) == [(0,)]
    assert "refused" not in caplog.text
