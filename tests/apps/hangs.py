"""An app whose processors keep Python's lock."""

from __future__ import annotations

import ctypes
import os
import re
from typing import Any

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
    return app


@bq.processor(channel="hangs")
def backtrack() -> Any:
    """Matches for longer than there is time."""
    return re.match(r"(a+)+$", "a" * 200 + "b")


@bq.processor(channel="hangs")
def sleep_in_c() -> None:
    """Calls a function in C without giving Python's lock away, as a careless extension does."""
    ctypes.PyDLL(None).sleep(600)


@bq.processor(channel="hangs")
def easy(number: int) -> int:
    return number
