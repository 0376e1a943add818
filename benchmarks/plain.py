"""A Flask app without this queue: other queues' tasks write a row through its session.

It is made once in a process, before any fork: its engine has no connection then.
"""

from __future__ import annotations

import asyncio
import os
from concurrent.futures import ThreadPoolExecutor

import sqlalchemy as sa
from flask import Flask
from flask_sqlalchemy import SQLAlchemy

#: Threads for queues with coroutines. On a small machine, asyncio has fewer of itself, which are
#: slower together.
THREADS = 20
#: Connections that are kept: as many as threads that any of the queues is run with, and more.
POOL = 40

db = SQLAlchemy()


class Row(db.Model):  # type: ignore[name-defined]
    __tablename__ = "bench_rows"
    id = sa.Column(sa.Integer, primary_key=True)
    number = sa.Column(sa.Integer, nullable=False)


def create_app() -> Flask:
    app = Flask(__name__)
    # The address is for those who only import, as in benchmarks.redis.
    app.config["SQLALCHEMY_DATABASE_URI"] = os.environ.get("DATABASE_URL", "postgresql+psycopg2://")
    app.config["SQLALCHEMY_ENGINE_OPTIONS"] = {"pool_size": POOL}
    db.init_app(app)
    return app


app = create_app()
threads = ThreadPoolExecutor(THREADS)


def add_row(number: int) -> None:
    """Write a row in a transaction, as an app does it; blocks the thread."""
    with app.app_context():
        db.session.add(Row(number=number))
        db.session.commit()


async def add_row_in_thread(number: int) -> None:
    """The same for a coroutine, as ``asyncio.to_thread`` would do it."""
    await asyncio.get_running_loop().run_in_executor(threads, add_row, number)
