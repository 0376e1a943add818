"""An app with a table of its own, for roles that may not do everything."""

from __future__ import annotations

import os
from typing import Any

import sqlalchemy as sa
from flask import Flask
from flask_sqlalchemy import SQLAlchemy

from flask_beanqueue import BeanQueue, LimitAttempt
from tests.probe import pause

db = SQLAlchemy()
bq = BeanQueue(db=db)


class Effect(db.Model):  # type: ignore[name-defined, misc]
    id = sa.Column(sa.Integer, sa.Identity(), primary_key=True)
    text = sa.Column(sa.Text, unique=True)
    task_id = sa.Column(sa.ForeignKey("bq_tasks.id"))
    task = sa.orm.relationship("BQTask")


def create_app(url: str = "") -> Flask:
    app = Flask(__name__)
    app.config["SQLALCHEMY_DATABASE_URI"] = url or os.environ["DATABASE_URL"]
    db.init_app(app)
    bq.init_app(app)
    if role := os.environ.get("CONNECT_AS"):
        with app.app_context():

            @sa.event.listens_for(db.engine, "connect")
            def connect(connection: Any, record: Any) -> None:
                connection.cursor().execute(f"SET ROLE {role}")
                connection.commit()

    return app


@bq.processor(channel="rights")
def write(task: Any, text: str) -> str:
    db.session.add(Effect(text=text, task_id=task.id))
    return text


@bq.processor(channel="rights")
def nothing() -> None:
    pass


@bq.processor(channel="rights")
def make(texts: list[str]) -> None:
    first, *others = texts
    write.enqueue(text=first)
    write.enqueue_many([{"text": text} for text in others])


@bq.processor(channel="rights", retry_policy=LimitAttempt(2))
def stumble(task: Any) -> None:
    if task.attempts == 0:
        raise ValueError("not yet")
    db.session.add(Effect(text="stumbled"))


@bq.processor(channel="rights")
def fail() -> None:
    raise ValueError("no good")


@bq.processor(channel="rights", auto_complete=False)
def park() -> None:
    db.session.add(Effect(text="parked"))


@bq.processor(channel="rights")
def wait(text: str) -> None:
    """Keeps a unique value locked for as long as the test wants it to."""
    db.session.add(Effect(text=text))
    db.session.flush()
    pause("waiting")


@bq.processor(channel="rights")
def think(text: str) -> None:
    """Locks nothing meanwhile."""
    pause("thinking")
    db.session.add(Effect(text=text))
