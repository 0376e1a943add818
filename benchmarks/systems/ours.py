"""This queue, by the app that :mod:`benchmarks.app` has."""

from __future__ import annotations

import subprocess

from .. import app as bench
from ..system import System, clean_database, execute, run, settle_database


class FlaskBeanQueue(System):
    """:param worker: further arguments of ``flask bq worker``."""

    name = "Flask-BeanQueue"

    def __init__(self, settings: str = "", *worker: str) -> None:
        super().__init__(settings)
        self.worker = worker
        self.app = bench.create_app()

    def clean(self) -> None:
        clean_database()
        with self.app.app_context():
            bench.db.create_all()

    def fill(self, kind: str, number: int) -> None:
        with self.app.app_context():
            getattr(bench, kind).enqueue_many({"number": each} for each in range(number))
            bench.db.session.commit()
        settle_database()

    def enqueue(self, kind: str, number: int) -> None:
        with self.app.app_context():
            getattr(bench, kind).enqueue(number=number)
            bench.db.session.commit()

    def start(self) -> subprocess.Popen[bytes]:
        return run("flask", "--app", "benchmarks.app", "bq", "worker", "bench", *self.worker)

    def left(self) -> int:
        [(count,)] = execute("SELECT count(*) FROM bq_tasks WHERE state <> 'DONE'")
        return int(str(count))
