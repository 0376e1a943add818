"""Databases whose encoding lacks letters that tasks use."""

from __future__ import annotations

import datetime
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import sqlalchemy as sa
from flask import Flask
from flask_sqlalchemy import SQLAlchemy

from flask_beanqueue import BeanQueue, DelayRetry

from . import postgres
from .conftest import MakeApp, only_task, with_driver

WORDS = "connection → bank 😀"
#: None of the encodings has the last letter.
SPELT = "\\U0001f600"


@pytest.fixture(params=["LATIN1", "WIN1250", "EUC_KR"])
def app(
    request: pytest.FixtureRequest,
    server_url: str,
    make_app: MakeApp,
    db: SQLAlchemy,
    bq: BeanQueue,
) -> Iterator[Flask]:
    options = f"ENCODING '{request.param}' LOCALE 'C' TEMPLATE template0"
    with postgres.database(server_url, options) as url:
        app = make_app(db, bq, SQLALCHEMY_DATABASE_URI=with_driver(url))
        yield app
        with app.app_context():
            db.engine.dispose()


@pytest.mark.parametrize("uses_session", [False, True])
@pytest.mark.parametrize("retries", [False, True])
def test_an_error_keeps_its_words_but_for_letters_that_the_database_lacks(
    app: Flask,
    db: SQLAlchemy,
    bq: BeanQueue,
    work: Callable[..., None],
    uses_session: bool,
    retries: bool,
) -> None:
    policy = DelayRetry(datetime.timedelta(hours=1)) if retries else None

    @bq.processor(retry_policy=policy)
    def fail() -> None:
        if uses_session:
            db.session.execute(sa.select(1))
        raise ConnectionError(f"é {WORDS}")

    with app.app_context():
        fail.enqueue()
        db.session.commit()
        work()
        task = only_task(app, bq)
        [event] = db.session.scalars(sa.select(bq.Event))
        assert (task.state, task.attempts) == ("PENDING" if retries else "FAILED", 1)
        assert task.error_message.endswith(SPELT)
        assert "raise ConnectionError" in event.traceback


@pytest.mark.parametrize("uses_session", [False, True])
def test_a_result_that_the_database_cannot_hold_is_left_out(
    app: Flask,
    db: SQLAlchemy,
    bq: BeanQueue,
    work: Callable[..., None],
    caplog: pytest.LogCaptureFixture,
    uses_session: bool,
) -> None:
    @bq.processor()
    def give(words: bool) -> Any:
        if uses_session:
            db.session.execute(sa.select(1))
        return {"words": WORDS} if words else {"words": "none"}

    with app.app_context():
        tasks = [give.enqueue(words=True), give.enqueue(words=False)]
        db.session.commit()
        work()
        assert [(task.state, task.result) for task in tasks] == [
            ("DONE", None),
            ("DONE", {"words": "none"}),
        ]
    assert "is not stored: the database's encoding lacks" in caplog.text


def test_a_parked_task_is_failed_with_words_that_the_database_lacks(
    app: Flask, db: SQLAlchemy, bq: BeanQueue, work: Callable[..., None]
) -> None:
    @bq.processor(auto_complete=False)
    def park() -> None:
        pass

    with app.app_context():
        task = park.enqueue()
        db.session.commit()
        work()
        bq.fail(task.id, error=WORDS)
        db.session.commit()
        assert task.state == "FAILED"
        assert task.error_message.endswith(SPELT)
