"""This queue, by the app that :mod:`benchmarks.app` has."""

from __future__ import annotations

import functools
import subprocess
import time

from flask import Flask

from .. import app as bench
from ..system import System, clean_database, execute, run, settle_database


@functools.cache
def app() -> Flask:
    """The app of this process, which makes the tasks."""
    return bench.create_app()


class FlaskBeanQueue(System):
    """:param worker: further arguments of ``flask bq worker``."""

    name = "Flask-BeanQueue"

    def __init__(self, settings: str = "", *worker: str) -> None:
        super().__init__(settings)
        self.worker = worker

    @property
    def app(self) -> Flask:
        return app()

    def clean(self) -> None:
        clean_database()
        with self.app.app_context():
            bench.db.create_all()

    def fill(self, kind: str, number: int) -> None:
        with self.app.app_context():
            getattr(bench, kind).enqueue_many({"number": each} for each in range(number))
            bench.db.session.commit()
        settle_database()

    def insert(self, kind: str, number: int, **columns: str) -> None:
        """Insert tasks past the queue, a million in a few seconds.

        :param columns: SQL for columns that differ; ``n`` is the task's number, from 0.
        """
        now = f"{time.time_ns() // 1_000_000:012x}"  # where an id of version 7 begins
        values = {
            "id": f"CAST('{now[:8]}-{now[8:]}-7000-8000-' || lpad(to_hex(n), 12, '0') AS uuid)",
            "channel": "'bench'",
            "module": f"'{bench.__name__}'",
            "func_name": f"'{kind}'",
            "kwargs": "jsonb_build_object('number', n)",
            **columns,
        }
        execute(
            f"INSERT INTO bq_tasks ({', '.join(values)})"
            f" SELECT {', '.join(values.values())} FROM generate_series(0, {number - 1}) AS n"
        )

    def enqueue(self, kind: str, number: int) -> float:
        with self.app.app_context():
            getattr(bench, kind).enqueue(number=number)
            bench.db.session.flush()
            begun = time.monotonic()
            bench.db.session.commit()
            return begun

    def start(self) -> subprocess.Popen[bytes]:
        return self.start_on("bench")

    def start_on(self, *channels: str) -> subprocess.Popen[bytes]:
        """Start a worker of these channels."""
        return run("flask", "--app", bench.__name__, "bq", "worker", *channels, *self.worker)

    def workers(self) -> int:
        """How many worker processes are at work."""
        [(count,)] = execute("SELECT count(*) FROM bq_workers WHERE state = 'RUNNING'")
        return int(str(count))

    def left(self) -> int:
        [(count,)] = execute("SELECT count(*) FROM bq_tasks WHERE state <> 'DONE'")
        return int(str(count))
