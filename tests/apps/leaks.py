"""An app whose processors do with their argument what could bring it into a log."""

from __future__ import annotations

import contextlib
import enum
import logging
import os
import signal
from typing import Any

import sqlalchemy as sa
from flask import Flask
from flask_sqlalchemy import SQLAlchemy

from flask_beanqueue import BeanQueue, LimitAttempt, current_task, task_started

db = SQLAlchemy()
bq = BeanQueue(db=db)


class Mood(enum.Enum):
    GOOD = 1


class Unique(db.Model):  # type: ignore[name-defined, misc]
    text = sa.Column(sa.Text, primary_key=True)
    other = sa.Column(sa.Text, nullable=False, default="")


def create_app() -> Flask:
    app = Flask(__name__)
    app.config["SQLALCHEMY_DATABASE_URI"] = os.environ["DATABASE_URL"]
    if os.environ.get("HIDE"):
        app.config["SQLALCHEMY_ENGINE_OPTIONS"] = {"hide_parameters": True}
    db.init_app(app)
    bq.init_app(app)
    with app.app_context():
        db.create_all()
    app.teardown_appcontext(teardown)
    task_started.connect(receiver, app)
    if not os.environ.get("TRACEBACKS"):
        logging.getLogger("flask_beanqueue").addFilter(without_traceback)
    return app


def without_traceback(record: logging.LogRecord) -> bool:
    """As docs/security.md has it."""
    record.exc_info = record.exc_text = None
    return True


def clash(password: str) -> None:
    """Let the database refuse a statement that holds the argument."""
    db.session.execute(sa.insert(Unique), [{"text": password}, {"text": password}])


def receiver(app: Flask, task: Any) -> None:
    if task.func_name == "receive":
        clash(**task.kwargs)


def teardown(error: BaseException | None) -> None:
    if current_task and current_task.func_name == "tear_down":
        clash(**current_task.kwargs)


@bq.processor(channel="leaks")
def work(password: str) -> None:
    pass


@bq.processor(channel="leaks")
def write(password: str) -> None:
    db.session.add(Unique(text=password))


@bq.processor(channel="leaks")
def write_again(password: str) -> None:
    """The database refuses it when the worker commits."""
    db.session.add(Unique(text=f"{password} again"))


@bq.processor(channel="leaks")
def fail(password: str) -> None:
    raise ValueError("no good")


@bq.processor(channel="leaks")
def insert(password: str) -> None:
    clash(password)


@bq.processor(channel="leaks", retry_policy=LimitAttempt(2))
def insert_and_retry(password: str) -> None:
    clash(password)


@bq.processor(channel="leaks")
def leave_empty(password: str) -> None:
    """Its error shows the whole row."""
    db.session.execute(sa.insert(Unique).values(text=password, other=None))


@bq.processor(channel="leaks")
def misspell(password: str) -> None:
    """Its error shows the line of the statement, with psycopg2 after the values were put in."""
    db.session.execute(sa.text("SELECT :password, misspelt"), {"password": password})


@bq.processor(channel="leaks")
def cast(password: str) -> None:
    """Its error quotes the value."""
    db.session.execute(sa.text("SELECT CAST(:password AS int)"), {"password": password})


@bq.processor(channel="leaks")
def choose(password: str) -> None:
    """SQLAlchemy itself refuses the value, and quotes it."""
    db.session.execute(sa.select(sa.literal(password, sa.Enum(Mood, validate_strings=True))))


@bq.processor(channel="leaks")
def go_on(password: str) -> None:
    """The session refuses to go on, and says after what."""
    db.session.add(Unique(text=f"{password} again"))
    with contextlib.suppress(sa.exc.IntegrityError):
        db.session.flush()
    db.session.execute(sa.text("SELECT 1"))


@bq.processor(channel="leaks")
def insert_by_driver(password: str) -> None:
    cursor = db.session.connection().connection.cursor()
    cursor.execute('INSERT INTO "unique" VALUES (%(p)s, %(p)s), (%(p)s, %(p)s)', {"p": password})


@bq.processor(channel="leaks")
def insert_after_its_end(password: str) -> None:
    current_task.state = "DONE"
    db.session.commit()
    clash(password)


@bq.processor(channel="leaks")
def raise_several_after_its_end(password: str) -> None:
    current_task.state = "DONE"
    db.session.commit()
    try:
        clash(password)
    except sa.exc.IntegrityError as error:
        raise ExceptionGroup("several", [LookupError("none"), error]) from None


def broken_policy(task: Any) -> None:
    clash(**task.kwargs)


@bq.processor(channel="leaks", retry_policy=broken_policy)
def ask_policy(password: str) -> None:
    raise ValueError("no good")


@bq.processor(channel="leaks")
def receive(password: str) -> None:
    pass


@bq.processor(channel="leaks")
def tear_down(password: str) -> None:
    pass


@bq.processor(channel="leaks")
def answer_object(password: str) -> Any:
    return {password: object()}


@bq.processor(channel="leaks")
def answer_nul(password: str) -> str:
    return f"{password}\0"


@bq.processor(channel="leaks")
def answer(password: str) -> str:
    """A CHECK of the test refuses that it is DONE."""
    return password


@bq.processor(channel="leaks")
def stay(password: str) -> str:
    """A CHECK of the test refuses that it ends at all."""
    return password


@bq.processor(channel="leaks")
def enqueue_one_as_many(password: str) -> None:
    work.enqueue_many({"password": password})


@bq.processor(channel="leaks")
def enqueue_a_pair(password: str) -> None:
    work.enqueue_many([["password", password]])  # type: ignore[list-item]


@bq.processor(channel="leaks")
def enqueue_a_set(password: str) -> None:
    work.enqueue(password={password})


@bq.processor(channel="leaks", auto_complete=False)
def park(password: str) -> str:
    return password


@bq.processor(channel="crash")
def crash(password: str) -> None:
    os.kill(os.getpid(), signal.SIGKILL)
