"""An app whose tasks have large arguments and results, and little memory."""

from __future__ import annotations

import os
import resource
from typing import Any

import sqlalchemy as sa
from flask import Flask
from flask_sqlalchemy import SQLAlchemy

from flask_beanqueue import BeanQueue

db = SQLAlchemy()
bq = BeanQueue(db=db)


def create_app() -> Flask:
    app = Flask(__name__)
    app.config["SQLALCHEMY_DATABASE_URI"] = os.environ["DATABASE_URL"]
    db.init_app(app)
    bq.init_app(app)
    if limit := os.environ.get("MEMORY_LIMIT"):
        resource.setrlimit(resource.RLIMIT_AS, (int(limit), int(limit)))
    return app


@bq.processor(channel="large")
def measure(value: Any) -> int:
    """Returns the most memory that the process had so far, in megabytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1000


#: Each keeps the row of a task locked.
locks: list[sa.Connection] = []


@bq.processor(channel="large")
def lock(task: Any, value: Any) -> None:
    """Lets its task not be ended."""
    engine = sa.create_engine(os.environ["DATABASE_URL"], poolclass=sa.NullPool)
    locks.append(engine.connect())
    locks[-1].execute(sa.select(bq.Task.id).where(bq.Task.id == task.id).with_for_update())


@bq.processor(channel="large")
def give(size: int) -> str:
    return "x" * size
