"""How often client and server wait for each other: the unit of cost of a queue in a database.

A timed test would be right on one machine and wrong on the next; these numbers are the same on all.
Whoever changes one says in the commit what it is good for.
"""

from __future__ import annotations

import contextlib
import datetime
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from flask import Flask
from flask_sqlalchemy import SQLAlchemy

from flask_beanqueue import BeanQueue

from .conftest import MakeApp
from .wire import Wire

MANY = 1_000


@pytest.fixture
def wire(database_url: str) -> Iterator[Wire]:
    with contextlib.closing(Wire(database_url)) as wire:
        yield wire


@pytest.fixture
def app(make_app: MakeApp, db: SQLAlchemy, bq: BeanQueue, Note: Any, wire: Wire) -> Flask:
    app = make_app(db, bq, SQLALCHEMY_DATABASE_URI=wire.url, BQ_BATCH_SIZE=100, BQ_LISTEN=False)

    @bq.processor()
    def nothing() -> None:
        pass

    @bq.processor()
    def answer() -> str:
        return "a result"

    @bq.processor()
    def write(db: Any) -> None:
        db.add(Note(text="written"))

    @bq.processor()
    def read(db: Any, task: Any) -> None:
        db.get(Note, 1)

    @bq.processor(retry_policy=lambda task: datetime.timedelta(days=1))
    def fail() -> None:
        raise ValueError

    @bq.processor()
    def chain() -> None:
        nothing.using(delay=datetime.timedelta(days=1)).enqueue()

    return app


def processor(bq: BeanQueue, name: str) -> Any:
    return bq.registry.get(__name__, name)


def enqueue(db: SQLAlchemy, bq: BeanQueue, Note: Any) -> None:
    """One task a request."""
    processor(bq, "nothing").enqueue()
    db.session.commit()


def enqueue_with_row(db: SQLAlchemy, bq: BeanQueue, Note: Any) -> None:
    """The request has a row of its own to save."""
    db.session.add(Note(text="a row", task=processor(bq, "nothing").run()))
    db.session.commit()


def enqueue_five(db: SQLAlchemy, bq: BeanQueue, Note: Any) -> None:
    for _ in range(5):
        processor(bq, "nothing").enqueue()
    db.session.commit()


def enqueue_many(db: SQLAlchemy, bq: BeanQueue, Note: Any) -> None:
    processor(bq, "nothing").enqueue_many({} for _ in range(MANY))
    db.session.commit()


@pytest.mark.parametrize(
    ("request_", "round_trips"),
    [
        (enqueue, 4),  # BEGIN, INSERT, NOTIFY, COMMIT
        (enqueue_with_row, 5),
        (enqueue_five, 4),
        (enqueue_many, 3),  # its NOTIFY goes with the INSERT
    ],
)
def test_round_trips_of_a_request(
    app: Flask,
    db: SQLAlchemy,
    bq: BeanQueue,
    Note: Any,
    wire: Wire,
    request_: Any,
    round_trips: int,
) -> None:
    with app.app_context():  # the first one connects
        request_(db, bq, Note)
    with app.app_context(), wire.counting() as counts:
        request_(db, bq, Note)
    assert counts.round_trips == round_trips
    if bq.engine(app).driver == "psycopg2":  # psycopg 3 sends row by row, and waits once
        assert counts.statements == round_trips


@pytest.mark.parametrize(
    ("name", "each", "loop"),
    [
        ("nothing", 0, 200),  # 10 claims, 10 completions, the beginning and the end
        ("answer", 0, 200),
        ("fail", 0, 500),
        ("write", 4, 500),  # BEGIN, INSERT, the fenced UPDATE, COMMIT
        ("read", 4, 500),
        ("chain", 5, 500),  # one more for the NOTIFY
    ],
)
def test_round_trips_of_a_thousand_tasks(
    app: Flask,
    db: SQLAlchemy,
    bq: BeanQueue,
    wire: Wire,
    work: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    each: int,
    loop: int,
) -> None:
    """Those of a task are exact; those of the loop depend on how the threads take turns, and on how
    often it has to look around meanwhile."""
    # On a slow machine, too, as many are claimed and written at once as may be.
    monkeypatch.setattr("flask_beanqueue.engine.threads.HORIZON", 60.0)
    monkeypatch.setattr("flask_beanqueue.engine.loop.GIVE_BACK_AFTER", 60.0)
    monkeypatch.setattr("flask_beanqueue.engine.loop.FLUSH_AFTER", 60.0)
    with app.app_context():
        processor(bq, name).enqueue_many({} for _ in range(MANY))
        db.session.commit()
    with wire.counting() as counts:
        work(concurrency=1)
    least = 2 * MANY / app.config["BQ_BATCH_SIZE"]
    assert least <= counts.round_trips - each * MANY < loop
    assert least <= counts.statements - each * MANY < loop
