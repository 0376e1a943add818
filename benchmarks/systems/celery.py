"""Celery on Redis: no results kept, each task acknowledged before it runs."""

from __future__ import annotations

import subprocess

import celery

from .. import tally
from ..plain import add_row
from ..redis import RedisSystem, client, url, write_row
from ..system import System, run

app = celery.Celery(
    "bench",
    # It has a name of its own for a Redis on a Unix socket.
    broker=url().replace("unix:", "redis+socket:", 1),
)
app.conf.task_ignore_result = True
app.conf.broker_connection_retry_on_startup = True


@app.task
def nothing(number: int) -> None:
    tally.tick()


@app.task
def write(number: int) -> None:
    write_row(number)
    tally.tick()


@app.task
def session(number: int) -> None:
    add_row(number)
    tally.tick()


@app.task
def mark(number: int) -> None:
    tally.mark(number)


TASKS = {"nothing": nothing, "write": write, "session": session, "mark": mark}


class Celery(RedisSystem):
    """:param worker: further arguments of its worker."""

    name = "Celery"

    def __init__(self, settings: str, *worker: str) -> None:
        super().__init__(settings)
        self.worker = worker

    def fill(self, kind: str, number: int) -> None:
        with app.producer_pool.acquire(block=True) as producer:
            for each in range(number):
                TASKS[kind].apply_async((each,), producer=producer)

    def enqueue(self, kind: str, number: int) -> None:
        TASKS[kind].delay(number)

    def start(self) -> subprocess.Popen[bytes]:
        return run("celery", "--app", __name__, "worker", *self.worker)

    def left(self) -> int:
        with client() as connection:
            return int(connection.llen("celery")) + int(connection.hlen("unacked"))


SYSTEMS: list[System] = [
    Celery("2 processes", "--concurrency", "2"),
    Celery("one process", "--pool", "solo"),
]
