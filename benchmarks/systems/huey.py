"""Huey on Redis or PostgreSQL: a task leaves the queue before it runs, and is lost in a crash."""

from __future__ import annotations

import subprocess
from typing import ClassVar

import huey
import psycopg

from .. import tally
from ..plain import add_row
from ..redis import RedisSystem, url, write_row
from ..system import System, clean_database, dsn, run, settle_database

on_redis = huey.RedisHuey("bench", url=url(), results=False)
on_postgres = huey.PostgresHuey("bench", dsn=dsn(), results=False, create_tables=False)


def nothing(number: int) -> None:
    tally.tick()


def write(number: int) -> None:
    write_row(number)
    tally.tick()


def session(number: int) -> None:
    add_row(number)
    tally.tick()


def mark(number: int) -> None:
    tally.mark(number)


TASKS = {
    (own, each.__name__): own.task()(each)
    for own in (on_redis, on_postgres)
    for each in (nothing, write, session, mark)
}


class Huey(RedisSystem):
    """:param worker: further arguments of its worker."""

    name = "Huey"
    app: ClassVar[str] = "on_redis"

    def __init__(self, settings: str, *worker: str) -> None:
        super().__init__(settings)
        self.worker = worker

    @property
    def own(self) -> huey.Huey:
        own: huey.Huey = globals()[self.app]
        return own

    def fill(self, kind: str, number: int) -> None:
        for each in range(number):
            self.enqueue(kind, each)

    def enqueue(self, kind: str, number: int) -> None:
        TASKS[self.own, kind](number)

    def start(self) -> subprocess.Popen[bytes]:
        return run(
            "huey.bin.huey_consumer",
            *("--graceful-signal", "TERM", *self.worker, f"{__name__}.{self.app}"),
        )

    def left(self) -> int:
        return int(self.own.pending_count())


class HueyOnPostgres(Huey):
    name = "Huey on PostgreSQL"
    store = System.store
    app = "on_postgres"

    def clean(self) -> None:
        self.own.storage.close()
        clean_database()
        self.own.storage.initialize_schema()

    def fill(self, kind: str, number: int) -> None:
        # It has no way to enqueue many: each would be a commit.
        task = TASKS[self.own, kind]
        statement = "COPY huey_task (queue, data) FROM STDIN (FORMAT binary)"
        with psycopg.connect(dsn()) as connection, connection.cursor().copy(statement) as copy:
            copy.set_types(["text", "bytea"])
            for each in range(number):
                copy.write_row(("bench", self.own.serialize_task(task.s(each))))
        settle_database()


PROCESSES = ("--worker-type", "process")

SYSTEMS: list[System] = [
    Huey("1 thread"),
    Huey("8 threads, no log", "--quiet", "--workers", "8"),
    Huey("2 processes, no log", "--quiet", *PROCESSES, "--workers", "2"),
    HueyOnPostgres("1 thread"),
    HueyOnPostgres("4 processes, no log", "--quiet", *PROCESSES, "--workers", "4"),
]
