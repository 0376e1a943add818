"""Chancy: psycopg 3 on PostgreSQL, claims in batches, completions once a second."""

from __future__ import annotations

import asyncio
import functools
import logging
import subprocess
import threading
from typing import Any

import chancy
import psycopg
import psycopg_pool

from .. import tally
from ..plain import add_row, add_row_in_thread
from ..system import System, clean_database, dsn, execute, run, settle_database

FAST: dict[str, Any] = {"quiet": True, "eager_polling": True}
COROUTINES = chancy.Chancy.Executor.Async

log = logging.getLogger("bench.chancy")
_own = threading.local()
_pool: psycopg_pool.AsyncConnectionPool | None = None


@functools.cache
def app() -> chancy.Chancy:
    return chancy.Chancy(dsn())


@functools.cache
def quiet_app() -> chancy.Chancy:
    log.setLevel(logging.WARNING)
    return chancy.Chancy(dsn(), log=log)


@chancy.job(queue="bench")
def nothing(*, number: int) -> None:
    tally.tick()


@chancy.job(queue="bench")
def write(*, number: int) -> None:
    if not hasattr(_own, "connection"):
        _own.connection = psycopg.connect(dsn())
    with _own.connection.transaction():
        _own.connection.execute("INSERT INTO bench_rows (number) VALUES (%s)", (number,))
    tally.tick()


@chancy.job(queue="bench")
def session(*, number: int) -> None:
    add_row(number)
    tally.tick()


@chancy.job(queue="bench")
def mark(*, number: int) -> None:
    tally.mark(number)


@chancy.job(queue="bench")
async def nothing_async(*, number: int) -> None:
    tally.tick()


@chancy.job(queue="bench")
async def write_async(*, number: int) -> None:
    global _pool
    if _pool is None:
        _pool = psycopg_pool.AsyncConnectionPool(dsn(), min_size=1, max_size=20, open=False)
        await _pool.open()
    async with _pool.connection() as connection:
        await connection.execute("INSERT INTO bench_rows (number) VALUES (%s)", (number,))
    tally.tick()


@chancy.job(queue="bench")
async def session_async(*, number: int) -> None:
    await add_row_in_thread(number)
    tally.tick()


@chancy.job(queue="bench")
async def mark_async(*, number: int) -> None:
    tally.mark(number)


class Chancy(System):
    """:param queue: settings of its queue, which its worker reads from the database.
    :param quiet: Whether its worker logs only warnings.
    """

    name = "Chancy"

    def __init__(self, settings: str = "", *, quiet: bool = False, **queue: Any) -> None:
        super().__init__(settings)
        self.quiet = quiet
        self.queue = chancy.Queue("bench", **queue)
        self.coroutines = self.queue.executor == COROUTINES

    def clean(self) -> None:
        clean_database()
        asyncio.run(self.install())

    async def install(self) -> None:
        async with chancy.Chancy(dsn()) as own:
            await own.migrate()
            await own.declare(self.queue)

    def job(self, kind: str, number: int) -> chancy.Job:
        function = globals()[f"{kind}_async" if self.coroutines else kind]
        return function.job.with_kwargs(number=number)

    def fill(self, kind: str, number: int) -> None:
        for _ in app().sync_push_many([self.job(kind, each) for each in range(number)]):
            pass
        settle_database()

    def enqueue(self, kind: str, number: int) -> None:
        app().sync_push(self.job(kind, number))

    def start(self) -> subprocess.Popen[bytes]:
        name = quiet_app.__name__ if self.quiet else app.__name__
        return run("chancy.cli.cli", "--app", f"{__name__}.{name}", "worker", "start")

    def left(self) -> int:
        [(count,)] = execute("SELECT count(*) FROM chancy_jobs WHERE state <> 'succeeded'")
        return int(str(count))


SYSTEMS: list[System] = [
    Chancy(),  # 2 tasks every 5 seconds: it looks for more only then.
    Chancy("1000 coroutines, eager polling, no log", executor=COROUTINES, concurrency=1000, **FAST),
]
