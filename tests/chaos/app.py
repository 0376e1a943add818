"""The app under test: a shop."""

from __future__ import annotations

import ctypes
import datetime
import functools
import os
import re
import resource
import threading
import time
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from flask import Flask
from flask_sqlalchemy import SQLAlchemy
from sqlalchemy.orm import Session

from flask_beanqueue import BeanQueue, DelayRetry

db = SQLAlchemy()
bq = BeanQueue(db=db)

#: Of so many sales, one is posted and not shipped.
POSTED = 4


class Sale(db.Model):  # type: ignore[name-defined]
    number = sa.Column(sa.Integer, primary_key=True)


class Shipment(db.Model):  # type: ignore[name-defined]
    id = sa.Column(sa.Integer, primary_key=True)
    number = sa.Column(sa.Integer, nullable=False)
    at = sa.Column(
        sa.DateTime(timezone=True), nullable=False, server_default=sa.func.clock_timestamp()
    )


@functools.cache
def folder() -> Path:
    """Where the trial looks on. It is made once: pathlib interns its parts, and CPython's table of
    interned strings wanders through all threads' memory if strings come and go in it."""
    return Path(os.environ["CHAOS_FOLDER"])


def take_time() -> None:
    """Wait as for somebody else's answer, unless it is closing time."""
    if not (folder() / "closing").exists():
        # Not sleep(), which libfaketime breaks.
        threading.Event().wait(float(os.environ["CHAOS_PAUSE"]))


def post(number: int) -> None:
    """Do something that no rollback takes back."""
    with (folder() / "letters").open("a") as letters:
        letters.write(f"{number} {time.time()}\n")


@bq.processor(channel="chaos")
def ship(db: Session, number: int) -> None:
    take_time()
    db.add(Shipment(number=number))


@bq.processor(channel="chaos")
def send(number: int) -> None:
    take_time()
    post(number)


# What some trials have done beside the sales.


@bq.processor(channel="chaos")
def backtrack() -> None:
    """Match for longer than there is time, and let no other thread have a turn."""
    re.match(r"(a+)+$", "a" * 200 + "b")


@bq.processor(channel="chaos")
def sleep_in_c() -> None:
    """Call a C function that keeps Python's lock, as a careless extension does."""
    ctypes.PyDLL(None).sleep(600)


@bq.processor(channel="chaos")
def measure(value: str) -> int:
    return len(value)


@bq.processor(channel="chaos", retry_policy=DelayRetry(datetime.timedelta(seconds=1)))
def stumble(task: Any) -> None:
    """Fail at the first attempt."""
    if task.attempts == 0:
        raise ValueError


def processor(number: int) -> str:
    """What is to be done about a sale."""
    return "send" if number % POSTED == 0 else "ship"


def limit_memory(room: int) -> None:
    """Let the process's address space grow by so many bytes from now on."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * resource.getpagesize() + room
    resource.setrlimit(resource.RLIMIT_AS, (most, most))


def create_app(url: str | None = None) -> Flask:
    app = Flask(__name__)
    app.config["SQLALCHEMY_DATABASE_URI"] = url or os.environ["DATABASE_URL"]
    app.config.from_prefixed_env()
    db.init_app(app)
    bq.init_app(app)
    if room := os.environ.get("CHAOS_ROOM"):
        limit_memory(int(room))
    if safeguard := os.environ.get("CHAOS_WITHOUT"):
        from .broken import SAFEGUARDS

        SAFEGUARDS[safeguard]()
    if fail_at := os.environ.get("CHAOS_FAIL_AT"):
        from .failpoint import install

        with app.app_context():
            install(db.engine, fail_at)
    return app
