"""An app whose processors tell the test where they are, wait there, or die."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from typing import Any

import sqlalchemy as sa
from flask import Flask
from flask_sqlalchemy import SQLAlchemy

from flask_beanqueue import BeanQueue, current_task
from tests.probe import pause, query, tell

db = SQLAlchemy()
bq = BeanQueue(db=db)


class Effect(db.Model):  # type: ignore[name-defined, misc]
    id = sa.Column(sa.Integer, primary_key=True)
    text = sa.Column(sa.Text, nullable=False)


class Unique(db.Model):  # type: ignore[name-defined, misc]
    text = sa.Column(sa.Text, primary_key=True)


def create_app() -> Flask:
    app = Flask(__name__)
    app.config["SQLALCHEMY_DATABASE_URI"] = os.environ["DATABASE_URL"]
    app.config["SQLALCHEMY_ENGINE_OPTIONS"] = {"pool_size": 20}
    app.config.from_prefixed_env()
    db.init_app(app)
    bq.init_app(app)

    with app.app_context():

        @sa.event.listens_for(db.engine, "commit")
        def before_commit(connection: Any) -> None:
            if current_task and current_task.func_name == "freeze_in_commit":
                pause("in commit")

    return app


@contextlib.contextmanager
def context() -> Iterator[Flask]:
    """A context of the app, with its tables, for a test."""
    app = create_app()
    with app.app_context():
        db.create_all()
        yield app
        db.session.remove()
        db.engine.dispose()


def effect(text: str) -> None:
    db.session.add(Effect(text=text))


def effects(url: str) -> list[str]:
    return [text for (text,) in query(url, "SELECT text FROM effect ORDER BY id")]


#: Where tasks stop that write through their session, and which.
STOPS = [
    ("before flush", "freeze_first"),
    ("after flush", "freeze_flushed"),
    ("in commit", "freeze_in_commit"),
]


@bq.processor(channel="faults")
def freeze_first() -> None:
    """Stops before it has touched the database."""
    pause("before flush")
    effect("freeze_first")


@bq.processor(channel="faults")
def freeze_flushed() -> None:
    """Stops while it holds a lock on a unique value."""
    effect("freeze_flushed")
    db.session.add(Unique(text="only one"))
    db.session.flush()
    pause("after flush")


@bq.processor(channel="faults")
def freeze_in_commit() -> None:
    """Stops when its outcome is written, but not committed."""
    effect("freeze_in_commit")


@bq.processor(channel="faults")
def freeze_without_session() -> None:
    """Stops and leaves its completion to the loop."""
    pause("no session")


@bq.processor(channel="faults")
def freeze_before_half() -> None:
    """Stops before it commits halfway."""
    effect("first half")
    db.session.flush()
    pause("before half")
    try:
        db.session.commit()
    except BaseException as error:
        tell(f"commit raised {type(error).__name__}")
        raise
    effect("second half")


@bq.processor(channel="faults")
def freeze_before_half_unflushed() -> None:
    """Stops before it commits halfway, with nothing sent to the database yet."""
    pause("before half")
    effect("first half")
    try:
        db.session.commit()
    except BaseException as error:
        tell(f"commit raised {type(error).__name__}")
        raise
    effect("second half")


@bq.processor(channel="faults")
def freeze_after_half() -> None:
    """Stops when it has committed halfway."""
    effect("first half")
    db.session.commit()
    pause("after half")
    effect("second half")


@bq.processor(channel="faults")
def number(number: int) -> None:
    effect(str(number))


@bq.processor(channel="faults")
def nothing() -> None:
    pass


@bq.processor(channel="faults")
def talk() -> None:
    print("a word")


@bq.processor(channel="faults")
def killer() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@bq.processor(channel="faults")
def wait(name: str) -> None:
    """Runs as long as the test wants it to."""
    pause(f"waiting {name}")
    effect(name)


@bq.processor(channel="faults")
def fork() -> str:
    """Leaves a child that returns as if it were the worker."""
    effect("fork")
    db.session.flush()
    pid = os.fork()
    if pid == 0:
        return "child"
    os.waitpid(pid, 0)
    return "parent"


@bq.processor(channel="faults")
def lock_own_row() -> None:
    """Keeps its own row locked for as long as the test wants it to."""
    current_task.priority = 3
    db.session.flush()
    pause("own row locked")


@bq.processor(channel="faults")
def stop_worker() -> None:
    os.kill(os.getpid(), signal.SIGTERM)
