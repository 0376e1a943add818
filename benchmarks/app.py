"""The app whose tasks are measured."""

from __future__ import annotations

import os
from typing import Any

import sqlalchemy as sa
from flask import Flask
from flask_sqlalchemy import SQLAlchemy

from flask_beanqueue import BeanQueue

db = SQLAlchemy()
bq = BeanQueue(db=db)


class Row(db.Model):  # type: ignore[name-defined, misc]
    id = sa.Column(sa.Integer, primary_key=True)
    number = sa.Column(sa.Integer, nullable=False)


@bq.processor(channel="bench")
def nothing(number: int) -> None:
    pass


@bq.processor(channel="bench")
def write(db: Any, number: int) -> None:
    db.add(Row(number=number))


def create_app() -> Flask:
    app = Flask(__name__)
    app.config["SQLALCHEMY_DATABASE_URI"] = os.environ["DATABASE_URL"]
    db.init_app(app)
    bq.init_app(app)
    return app
