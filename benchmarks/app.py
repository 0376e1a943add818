"""The Flask app whose tasks are measured."""

from __future__ import annotations

import os
from typing import Any

import sqlalchemy as sa
from flask import Flask
from flask_sqlalchemy import SQLAlchemy

from flask_beanqueue import BeanQueue

from . import tally

db = SQLAlchemy()
bq = BeanQueue(db=db)


class Row(db.Model):  # type: ignore[name-defined, misc]
    __tablename__ = "bench_rows"
    id = sa.Column(sa.Integer, primary_key=True)
    number = sa.Column(sa.Integer, nullable=False)


@bq.processor(channel="bench")
def nothing(number: int) -> None:
    tally.tick()


@bq.processor(channel="bench")
def write(db: Any, number: int) -> None:
    db.add(Row(number=number))
    tally.tick()


@bq.processor(channel="bench")
def mark(number: int) -> None:
    tally.mark(number)


def create_app() -> Flask:
    app = Flask(__name__)
    app.config["SQLALCHEMY_DATABASE_URI"] = os.environ["DATABASE_URL"]
    app.config["SQLALCHEMY_RECORD_QUERIES"] = "BENCH_RECORD_QUERIES" in os.environ
    db.init_app(app)
    bq.init_app(app)
    if "BENCH_STATEMENTS" in os.environ:
        with app.app_context():
            sa.event.listen(db.engine, "before_cursor_execute", tell_statement)
    return app


def tell_statement(*_: object) -> None:
    os.write(int(os.environ["BENCH_STATEMENTS"]), b".")
