"""Procrastinate: psycopg 3, a statement for each claim and each completion.

Tasks are deferred in the transaction of the sale, and completed in one of their own. What is done
about stalled jobs is what its documents advise.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

import procrastinate
import psycopg
import psycopg_pool

from ...processes import Process
from .. import app as shop
from ..ledger import cursor

TABLES = """
    CREATE TABLE sale (number int PRIMARY KEY);
    CREATE TABLE shipment (id serial PRIMARY KEY, number int NOT NULL,
        at timestamptz NOT NULL DEFAULT clock_timestamp());
"""

#: For what the database's absence makes fail.
RETRY = procrastinate.RetryStrategy(max_attempts=50, wait=1)


def dsn(url: str) -> str:
    return url.replace("postgresql+psycopg2:", "postgresql:")


def connector(url: str) -> Any:
    return procrastinate.PsycopgConnector(conninfo=dsn(url))


app = procrastinate.App(connector=connector(os.environ.get("DATABASE_URL", "")))
_pool: psycopg_pool.ConnectionPool | None = None


def pool() -> psycopg_pool.ConnectionPool:
    global _pool
    if _pool is None:
        check = psycopg_pool.ConnectionPool.check_connection
        _pool = psycopg_pool.ConnectionPool(dsn(os.environ["DATABASE_URL"]), open=True, check=check)
    return _pool


@app.task(retry=RETRY)
def ship(number: int) -> None:
    shop.take_time()
    with pool().connection() as connection:
        connection.execute("INSERT INTO shipment (number) VALUES (%s)", (number,))


@app.task(retry=RETRY)
def send(number: int) -> None:
    shop.take_time()
    shop.post(number)


@app.periodic(cron="* * * * * */2")
@app.task(queueing_lock="retry_stalled_jobs", pass_context=True)
async def retry_stalled_jobs(context: Any, timestamp: int) -> None:
    for job in await app.job_manager.get_stalled_jobs(seconds_since_heartbeat=3):
        await app.job_manager.retry_job(job)


def work() -> None:
    app.run_worker(concurrency=4, update_heartbeat_interval=0.5, stalled_worker_timeout=3)


class Procrastinate:
    name = "Procrastinate"
    code = 0

    def __init__(self, url: str) -> None:
        self._dsn = dsn(url)

    def create(self) -> None:
        with psycopg.connect(self._dsn) as connection:
            connection.execute(TABLES)
        with (
            app.replace_connector(procrastinate.SyncPsycopgConnector(conninfo=self._dsn)) as here,
            here.open(),
        ):
            here.schema_manager.apply_schema()

    def sell(self, numbers: Iterable[int]) -> None:
        numbers = list(numbers)
        with psycopg.connect(self._dsn) as connection:
            connection.cursor().executemany(
                "INSERT INTO sale VALUES (%s)", [(number,) for number in numbers]
            )
            for task in (ship, send):
                name = task.func.__name__
                mine = [{"number": each} for each in numbers if shop.processor(each) == name]
                if mine:
                    task.configure(connection=connection).batch_defer(*mine)

    def start(self, env: dict[str, str], *prefix: str, processes: int = 1) -> Process:
        # Not as the main module, in which it wants no app.
        return Process(
            "-c", f"from {__name__} import work; work()", env=env, prefix=prefix, strict=False
        )

    def dead(self, dsn: str) -> int:
        # It declares nobody dead; this is by what retry_stalled_jobs goes.
        with cursor(dsn) as database:
            database.execute(
                "SELECT count(*) FROM procrastinate_workers"
                " WHERE last_heartbeat < now() - interval '3 seconds'"
            )
            return int(database.fetchone()[0])

    def undone(self, dsn: str) -> dict[str, int]:
        with cursor(dsn) as database:
            database.execute(
                "SELECT status, count(*) FROM procrastinate_jobs WHERE status <> 'succeeded'"
                f" AND task_name <> '{retry_stalled_jobs.name}' GROUP BY status"
            )
            return dict(database.fetchall())

    def remarks(self, dsn: str) -> list[str]:
        return []

    def close(self) -> None:
        pass


SYSTEM: Any = Procrastinate
