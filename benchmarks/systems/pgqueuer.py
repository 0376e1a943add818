"""PgQueuer: asyncpg on PostgreSQL, coroutines, claims and completions in batches."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import subprocess
import sys
from collections.abc import AsyncIterator

import asyncpg
import pgqueuer
import psycopg
import uvloop
from pgqueuer.db import AsyncpgDriver, SyncPsycopgDriver
from pgqueuer.models import Context, Job
from pgqueuer.queries import SyncQueries

from .. import tally
from ..plain import add_row_in_thread
from ..system import System, clean_database, dsn, execute, run, settle_database


@contextlib.asynccontextmanager
async def worker() -> AsyncIterator[pgqueuer.PgQueuer]:
    connection = await asyncpg.connect(dsn())
    pool = await asyncpg.create_pool(dsn(), min_size=1, max_size=20)
    manager = pgqueuer.PgQueuer(AsyncpgDriver(connection), resources={"pool": pool})

    @manager.entrypoint("nothing")
    async def nothing(job: Job) -> None:
        tally.tick()

    @manager.entrypoint("write", accepts_context=True)
    async def write(job: Job, context: Context) -> None:
        async with context.resources["pool"].acquire() as own, own.transaction():
            await own.execute("INSERT INTO bench_rows (number) VALUES ($1)", number_of(job))
        tally.tick()

    @manager.entrypoint("session")
    async def session(job: Job) -> None:
        await add_row_in_thread(number_of(job))
        tally.tick()

    @manager.entrypoint("mark")
    async def mark(job: Job) -> None:
        tally.mark(number_of(job))

    try:
        yield manager
    finally:
        await pool.close()
        await connection.close()


def number_of(job: Job) -> int:
    return int(job.payload or b"")


class PgQueuer(System):
    """:param batch: how many jobs its worker claims at once.
    :param most: How many it may hold at once; 0 for as many as there are.
    :param vacuum: Whether its tables are vacuumed as its documents advise.
    """

    name = "PgQueuer"

    def __init__(
        self,
        settings: str = "",
        *,
        batch: int = 10,
        most: int = 0,
        vacuum: bool = False,
        processes: int = 1,
    ) -> None:
        super().__init__(settings, processes=processes)
        self.batch = batch
        self.most = most
        self.vacuum = vacuum

    @functools.cached_property
    def queries(self) -> SyncQueries:
        return SyncQueries(SyncPsycopgDriver(psycopg.connect(dsn(), autocommit=True)))

    def clean(self) -> None:
        clean_database()
        asyncio.run(self.install())

    async def install(self) -> None:
        connection = await asyncpg.connect(dsn())
        try:
            queries = pgqueuer.Queries.from_asyncpg_connection(connection)
            await queries.install()
            if self.vacuum:
                await queries.optimize_autovacuum()
        finally:
            await connection.close()

    def fill(self, kind: str, number: int) -> None:
        for first in range(0, number, 1000):
            numbers = range(first, min(first + 1000, number))
            payloads: list[bytes | None] = [str(each).encode() for each in numbers]
            self.queries.enqueue([kind] * len(numbers), payloads, [0] * len(numbers))
        settle_database()

    def enqueue(self, kind: str, number: int) -> None:
        self.queries.enqueue(kind, str(number).encode())

    def start(self) -> subprocess.Popen[bytes]:
        return run(__name__, str(self.batch), str(self.most))

    def left(self) -> int:
        [(count,)] = execute("SELECT count(*) FROM pgqueuer")
        return int(str(count))


SYSTEMS: list[System] = [
    PgQueuer(),
    PgQueuer("batch 100, at most 200 at once", batch=100, most=200, vacuum=True),
    PgQueuer("batch 100, at most 200, 2 processes", batch=100, most=200, vacuum=True, processes=2),
    PgQueuer("batch 1000, at most 2000 at once", batch=1000, most=2000, vacuum=True),
]

if __name__ == "__main__":
    # What ``pgq run`` does, on the same event loop; the command itself fails with newer typers.
    batch, most = map(int, sys.argv[1:])
    uvloop.run(pgqueuer.run(worker, batch_size=batch, max_concurrent_tasks=most))
