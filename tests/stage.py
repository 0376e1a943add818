"""Where odd things are done to a worker: an app of its own, whose tasks one worker does."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import sqlalchemy as sa
from flask import Flask
from flask_sqlalchemy import SQLAlchemy

from flask_beanqueue import BeanQueue, LimitAttempt
from flask_beanqueue.engine import outcome

from . import postgres

#: What a processor does, given the session and its task.
Act = Callable[[Any, Any], Any]

EFFECT = sa.text("INSERT INTO note (text) VALUES (:text)")


class End(NamedTuple):
    """How a task ended."""

    state: str
    error: str
    attempts: int
    result: Any
    #: What it wrote.
    effects: list[str]
    #: What each attempt that failed has left.
    events: list[Any]
    log: str


class Stage(NamedTuple):
    """An app whose tasks are done by one worker with one thread."""

    app: Flask
    db: SQLAlchemy
    bq: BeanQueue
    url: str

    def processor(self, name: str, act: Act, **options: Any) -> Any:
        """A processor that writes something and acts, at its first attempt."""

        def processor(db: Any, task: Any) -> Any:
            db.execute(EFFECT, {"text": name})
            return act(db, task) if task.attempts == task.interruptions == 0 else None

        processor.__name__ = name
        return self.bq.processor(**options)(processor)

    def work(self) -> None:
        self.bq.process_tasks(app=self.app, burst=True, concurrency=1)


@contextlib.contextmanager
def stage(url: str) -> Iterator[Stage]:
    """Set a stage in an empty database, and clear it afterwards."""
    db = SQLAlchemy()
    bq = BeanQueue(db=db)

    class Note(db.Model):  # type: ignore[name-defined, misc]
        id = sa.Column(sa.Integer, primary_key=True)
        text = sa.Column(sa.Text, nullable=False)

    app = Flask("tests")
    app.config["SQLALCHEMY_DATABASE_URI"] = url
    db.init_app(app)
    bq.init_app(app)
    with app.app_context():
        db.create_all()
        # An engine that is disposed of takes another pool, and what is out of the first stays open.
        pools = [db.engine.pool]
        sa.event.listen(db.engine, "engine_disposed", lambda engine: pools.append(engine.pool))
    try:
        yield Stage(app, db, bq, url)
    finally:
        for pool in pools:
            pool.dispose()
        postgres.empty(url)


def end_all(url: str, acts: dict[str, Act], attempts: int = 1) -> dict[str, End]:
    """Let one worker do a task for each act, and a next one after each; tell how they ended."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("flask_beanqueue")
    with stage(url) as on, on.app.app_context(), pytest.MonkeyPatch.context() as patch:
        # What loses its connection is not due again.
        patch.setattr(outcome, "INTERRUPTION_DELAY", outcome.LONGEST_INTERRUPTION_DELAY)
        after = on.processor("after", lambda db, task: None)
        tasks = {}
        for number, (name, act) in enumerate(acts.items()):
            policy = LimitAttempt(attempts)
            processor = on.processor(f"act {number}", act, retry_policy=policy)
            tasks[name] = processor.enqueue().id, f"act {number}"
            after.enqueue()
        on.db.session.commit()
        logger.addHandler(handler)
        try:
            on.work()
        finally:
            logger.removeHandler(handler)
        effects = list(on.db.session.scalars(sa.text("SELECT text FROM note")))
        assert effects.count("after") == len(acts)
        ends = {}
        for name, (task_id, text) in tasks.items():
            task: Any = on.db.session.get(on.bq.Task, task_id)
            ends[name] = End(
                task.state,
                task.error_message or "",
                task.attempts,
                task.result,
                [effect for effect in effects if effect == text],
                [(each.error_message or "", each.traceback or "") for each in task.events],
                "\n".join(line for line in lines if str(task_id) in line),
            )
        return ends


def raising(error: Any) -> Act:
    def act(db: Any, task: Any) -> None:
        raise error

    return act
