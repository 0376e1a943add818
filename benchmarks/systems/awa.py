"""Awa: a queue in Rust with a Python interface, on PostgreSQL."""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import signal
import subprocess
import sys
import urllib.parse

import asyncpg
import awa
import sqlalchemy as sa
import uvloop

from .. import tally
from ..plain import add_row_in_thread
from ..system import System, clean_database, dsn, execute, run, settle_database

QUEUE = "bench"


@dataclasses.dataclass
class Nothing:
    number: int


@dataclasses.dataclass
class Write:
    number: int


@dataclasses.dataclass
class Session:
    number: int


@dataclasses.dataclass
class Mark:
    number: int


KINDS = {"nothing": Nothing, "write": Write, "session": Session, "mark": Mark}


def url() -> str:
    """The address as it wants it: its parser takes no user without a host."""
    parts = sa.make_url(dsn())
    query = {key: str(value) for key, value in parts.query.items()}
    if parts.host is None and parts.username is not None:
        query["user"] = parts.username
        return f"postgresql:///{parts.database}?{urllib.parse.urlencode(query)}"
    return dsn()


async def work(workers: int) -> None:
    client = awa.AsyncClient(url(), max_connections=20)
    pool = await asyncpg.create_pool(dsn(), min_size=1, max_size=20)

    @client.task(Nothing, queue=QUEUE)
    async def nothing(job: awa.Job[Nothing]) -> None:
        tally.tick()

    @client.task(Write, queue=QUEUE)
    async def write(job: awa.Job[Write]) -> None:
        async with pool.acquire() as connection, connection.transaction():
            await connection.execute("INSERT INTO bench_rows (number) VALUES ($1)", job.args.number)
        tally.tick()

    @client.task(Session, queue=QUEUE)
    async def session(job: awa.Job[Session]) -> None:
        await add_row_in_thread(job.args.number)
        tally.tick()

    @client.task(Mark, queue=QUEUE)
    async def mark(job: awa.Job[Mark]) -> None:
        tally.mark(job.args.number)

    over = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, over.set)
    await client.start([(QUEUE, workers)])
    await over.wait()
    await client.shutdown(timeout_ms=25_000)
    await client.close()
    await pool.close()


class Awa(System):
    """:param workers: how many jobs its worker runs at once.
    :param queue_storage: Whether jobs are in the tables that shall become its only ones; a fresh
        installation does not use them by itself.
    """

    name = "Awa"

    def __init__(
        self,
        settings: str = "",
        *,
        workers: int = 50,
        queue_storage: bool = False,
        processes: int = 1,
    ) -> None:
        super().__init__(settings, processes=processes)
        self.workers = workers
        self.queue_storage = queue_storage

    @functools.cached_property
    def client(self) -> awa.Client:
        return awa.Client(url())

    def clean(self) -> None:
        # It remembers which tables it uses.
        if "client" in self.__dict__:
            self.client.close()
            del self.client
        clean_database()
        self.client.migrate()
        if self.queue_storage:
            self.client.install_queue_storage()

    def fill(self, kind: str, number: int) -> None:
        jobs = [KINDS[kind](each) for each in range(number)]
        if self.queue_storage:
            self.client.enqueue_many_copy(jobs, queue=QUEUE)
        else:
            self.client.insert_many_copy(jobs, queue=QUEUE)
        settle_database()

    def enqueue(self, kind: str, number: int) -> None:
        self.client.insert(KINDS[kind](number), queue=QUEUE)

    def start(self) -> subprocess.Popen[bytes]:
        return run(__name__, str(self.workers))

    def left(self) -> int:
        [(count,)] = execute("SELECT count(*) FROM awa.jobs WHERE state <> 'completed'")
        return int(str(count))


SYSTEMS: list[System] = [
    Awa(),
    Awa("200 at once", workers=200),
    Awa("200 at once, queue storage", workers=200, queue_storage=True),
    Awa("200 at once, queue storage, 2 processes", workers=200, queue_storage=True, processes=2),
]

if __name__ == "__main__":
    uvloop.run(work(int(sys.argv[1])))
