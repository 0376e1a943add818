"""Procrastinate: psycopg 3 on PostgreSQL, one statement for each claim and each completion."""

from __future__ import annotations

import subprocess
import threading

import procrastinate
import psycopg
import psycopg_pool

from .. import tally
from ..plain import add_row, add_row_in_thread
from ..system import System, clean_database, dsn, execute, run, settle_database

#: As many as the worker's own pool has, which serves claims and completions.
CONNECTIONS = 20

app = procrastinate.App(
    connector=procrastinate.PsycopgConnector(conninfo=dsn(), min_size=1, max_size=CONNECTIONS)
)
_own = threading.local()
_pool: psycopg_pool.AsyncConnectionPool | None = None


@app.task
def nothing(number: int) -> None:
    tally.tick()


@app.task
def write(number: int) -> None:
    if not hasattr(_own, "connection"):
        _own.connection = psycopg.connect(dsn())
    with _own.connection.transaction():
        _own.connection.execute("INSERT INTO bench_rows (number) VALUES (%s)", (number,))
    tally.tick()


@app.task
def session(number: int) -> None:
    add_row(number)
    tally.tick()


@app.task
def mark(number: int) -> None:
    tally.mark(number)


@app.task
async def nothing_async(number: int) -> None:
    tally.tick()


@app.task
async def write_async(number: int) -> None:
    global _pool
    if _pool is None:
        _pool = psycopg_pool.AsyncConnectionPool(
            dsn(), min_size=1, max_size=CONNECTIONS, open=False
        )
        await _pool.open()
    async with _pool.connection() as connection:
        await connection.execute("INSERT INTO bench_rows (number) VALUES (%s)", (number,))
    tally.tick()


@app.task
async def session_async(number: int) -> None:
    await add_row_in_thread(number)
    tally.tick()


@app.task
async def mark_async(number: int) -> None:
    tally.mark(number)


class Procrastinate(System):
    """:param worker: further arguments of its worker.
    :param coroutines: Whether the tasks are coroutines, which need no thread.
    """

    name = "Procrastinate"

    def __init__(
        self, settings: str = "", *worker: str, log: str = "info", coroutines: bool = False
    ) -> None:
        super().__init__(settings)
        self.worker = worker
        self.log = log
        self.coroutines = coroutines

    def clean(self) -> None:
        app.close()
        clean_database()
        app.open()
        app.schema_manager.apply_schema()

    def task(self, kind: str) -> procrastinate.tasks.Task[..., object, object]:
        name = f"{kind}_async" if self.coroutines else kind
        return app.tasks[f"{__name__}.{name}"]

    def fill(self, kind: str, number: int) -> None:
        for first in range(0, number, 1000):
            numbers = range(first, min(first + 1000, number))
            self.task(kind).batch_defer(*({"number": each} for each in numbers))
        settle_database()

    def enqueue(self, kind: str, number: int) -> None:
        self.task(kind).defer(number=number)

    def start(self) -> subprocess.Popen[bytes]:
        return run(
            "procrastinate",
            *("--log-level", self.log, "--app", f"{__name__}.app", "worker", *self.worker),
        )

    def left(self) -> int:
        [(count,)] = execute("SELECT count(*) FROM procrastinate_jobs WHERE status <> 'succeeded'")
        return int(str(count))


SYSTEMS: list[System] = [
    Procrastinate(),
    Procrastinate(
        "coroutines, concurrency 20, done jobs deleted, no log",
        *("--concurrency", "20", "--delete-jobs", "always"),
        log="warning",
        coroutines=True,
    ),
]
