"""The Flask app whose tasks are measured."""

from __future__ import annotations

import os
import time
from typing import Any

import sqlalchemy as sa
from flask import Flask
from flask_sqlalchemy import SQLAlchemy
from sqlalchemy.dialects.postgresql import JSONB

from flask_beanqueue import BeanQueue

from . import tally

db = SQLAlchemy()
bq = BeanQueue(db=db)


class Row(db.Model):  # type: ignore[name-defined]
    __tablename__ = "bench_rows"
    id = sa.Column(sa.Integer, primary_key=True)
    number = sa.Column(sa.Integer, nullable=False)


class Note(db.Model):  # type: ignore[name-defined]
    """What an app might write in place of a task."""

    __tablename__ = "bench_notes"
    id = sa.Column(sa.Integer, primary_key=True)
    kind = sa.Column(sa.Text, nullable=False)
    content = sa.Column(JSONB, nullable=False)


@bq.processor(channel="bench")
def nothing(number: int) -> None:
    tally.tick()


@bq.processor(channel="bench")
def write(db: Any, number: int) -> None:
    db.add(Row(number=number))
    tally.tick()


#: It uses the session already.
session = write


@bq.processor(channel="bench")
def mark(number: int) -> None:
    tally.mark(number)


@bq.processor(channel="bench")
def wait(number: int) -> None:
    tally.tick()
    time.sleep(0.005)


def create_app() -> Flask:
    app = Flask(__name__)
    app.config["SQLALCHEMY_DATABASE_URI"] = os.environ["DATABASE_URL"]
    db.init_app(app)
    bq.init_app(app)
    return app
