"""What no queue is in: loops that do the same with the same statements. They are the limit.

``python -m benchmarks.systems.bare LOOP NUMBER`` is the worker of each.
"""

from __future__ import annotations

import json
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import psycopg2
import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import psycopg2 as dialect

from flask_beanqueue.codec import decode
from flask_beanqueue.engine import heartbeat
from flask_beanqueue.engine.claim import CLAIM, Claim, claim_tasks
from flask_beanqueue.engine.completer import LOCK_TIMEOUT
from flask_beanqueue.engine.cursor import Level
from flask_beanqueue.engine.settle import FINISH, FINISH_ONE, finish_one, milliseconds
from flask_beanqueue.models.uuid7 import uuid7
from flask_beanqueue.sql import array

from .. import app as bench
from ..system import System, dsn, run
from ..tally import mark, tick
from .ours import FlaskBeanQueue


class Bare(FlaskBeanQueue):
    """:param number: what the loop has so many of."""

    loop: ClassVar[str]
    unit: ClassVar[str]

    def __init__(self, number: int) -> None:
        super().__init__(self.unit.format(number))
        self.number = number

    def start(self) -> subprocess.Popen[bytes]:
        return run(__name__, self.loop, str(self.number))


class BareLoop(Bare):
    """psycopg2 alone, one connection: claims a batch from a mark and finishes it, with the same two
    statements as the worker, and calls nothing in between."""

    name = "Bare loop"
    loop = "claims"
    unit = "batch {}"


class FrontLoop(Bare):
    """The same without a mark: each claim reads the index from its front, as is usual."""

    name = "Bare loop from the front"
    loop = "front"
    unit = "batch {}"


class SessionLoop(Bare):
    """For each task an app context, ``db.session.add``, the fenced UPDATE and the commit. Nobody
    claims anything: the rows stand ready in memory."""

    name = "Session loop"
    loop = "session"
    unit = "threads {}"


class StatementLoop(Bare):
    """The same without SQLAlchemy: INSERT, the fenced UPDATE and COMMIT over psycopg2."""

    name = "Statement loop"
    loop = "statements"
    unit = "threads {}"


class Listener(Bare):
    """Listens, wakes and makes the worker's claim, and does nothing else."""

    name = "Bare listener"
    loop = "listen"
    unit = "batch {}"


LOOPS: list[System] = [BareLoop(batch) for batch in (1, 10, 100, 500, 1000)]
WRITE_LOOPS: list[System] = [
    kind(threads) for kind in (SessionLoop, StatementLoop) for threads in (1, 4, 8)
]

#: What a worker does instead of its claim if it knows no marks.
FRONT = """
    UPDATE bq_tasks SET state = 'PROCESSING', worker_id = %(worker_id)s,
        claims = claims + 1, started_at = now()
    WHERE ctid = ANY (ARRAY(
        SELECT ctid FROM bq_tasks
        WHERE state = 'PENDING' AND channel = 'bench' AND scheduled_at <= now()
        ORDER BY priority, scheduled_at, id LIMIT %(limit)s
        FOR NO KEY UPDATE SKIP LOCKED))
    RETURNING CAST(ctid AS text), CAST(id AS text), claims
"""

stopping = threading.Event()


def compiled(statement: sa.ClauseElement) -> str:
    """A statement as SQLAlchemy hands it to psycopg2."""
    return str(statement.compile(dialect=dialect.dialect()))


def connect(address: str | None = None, *, autocommit: bool = True) -> Any:
    connection = psycopg2.connect(dsn(address))
    connection.autocommit = autocommit
    return connection


def add_worker(cursor: Any) -> str:
    worker_id = str(uuid7())
    cursor.execute(
        "INSERT INTO bq_workers (id, name, channels) VALUES (%s, 'bare', '{bench}')", (worker_id,)
    )
    return worker_id


def claim_from(level: Level, worker_id: str, limit: int) -> dict[str, Any]:
    """The parameters of the worker's claim."""
    return {
        "worker_id": worker_id,
        "channels": [level.channel],
        "priorities": [level.priority],
        "ats": [level.at],
        "ids": [level.id],
        "limit": limit,
        "most": 8_000,
    }


def finish_of(rows: list[tuple[Any, ...]]) -> dict[str, Any]:
    """The parameters of the worker's UPDATE to DONE."""
    return {
        "ctids": array(f'"{row[0]}"' for row in rows),
        "ids": array(row[1] for row in rows),
        "claims": array(str(row[2]) for row in rows),
        "results": [],
        "lock_timeout": milliseconds(LOCK_TIMEOUT),
    }


def batches(limit: int, *, front: bool) -> None:
    cursor = connect().cursor()
    claim = FRONT if front else compiled(CLAIM.on(bench.bq.models))
    finish = compiled(FINISH.on(bench.bq.models))
    level = Level("bench", 0)
    worker_id = add_worker(cursor)
    tick(0)
    while not stopping.is_set():
        cursor.execute(claim, claim_from(level, worker_id, limit))
        rows = cursor.fetchall()
        if not rows:
            break
        if not front:
            level.place = max((row[8], row[1]) for row in rows)
        cursor.execute(finish, finish_of(rows))
        assert len(cursor.fetchall()) == len(rows)
        tick(len(rows))


def claims() -> list[Claim]:
    """All tasks, claimed beforehand."""
    bq, db = bench.bq, bench.db
    connection = db.session.connection()
    claims: list[Claim] = []
    level = Level("bench", 0)
    worker_id = uuid7()
    heartbeat.add_worker(connection, bq.models, worker_id, "session loop", ["bench"])
    while batch := claim_tasks(connection, bq.models, worker_id, [level], 500):
        claims += batch
        level.place = batch[-1].scheduled_at, batch[-1].key
    db.session.commit()
    return claims


def share(
    threads: int, claims: list[Claim], each: Callable[[], Iterator[Callable[[Claim], None]]]
) -> None:
    """Share claimed tasks out to threads."""

    def work(own: list[Claim]) -> None:
        for perform in each():
            tick(0)
            for claim in own:
                if stopping.is_set():
                    break
                perform(claim)
                tick()

    crew = [
        threading.Thread(target=work, args=(claims[number::threads],)) for number in range(threads)
    ]
    for thread in crew:
        thread.start()
    for thread in crew:
        thread.join()


def session(threads: int) -> None:
    app, bq, db = bench.create_app(), bench.bq, bench.db

    def perform(claim: Claim) -> None:
        with app.app_context():
            db.session.add(bench.Row(number=decode(claim.arguments or "")["number"]))
            db.session.flush()
            assert finish_one(db.session.connection(), bq.models, claim, None)
            db.session.commit()

    with app.app_context():
        ready = claims()
    share(threads, ready, lambda: iter([perform]))


def statements(threads: int) -> None:
    finish = compiled(FINISH_ONE.on(bench.bq.models))

    def each() -> Iterator[Callable[[Claim], None]]:
        connection = connect(autocommit=False)
        cursor = connection.cursor()

        def perform(claim: Claim) -> None:
            number = decode(claim.arguments or "")["number"]
            cursor.execute("INSERT INTO bench_rows (number) VALUES (%s)", (number,))
            parameters = {"ctid": claim.ctid, "id": claim.key, "claims": claim.claims}
            cursor.execute(finish, {**parameters, "result": None})
            assert cursor.rowcount == 1
            connection.commit()

        yield perform
        connection.close()

    with bench.create_app().app_context():
        ready = claims()
    share(threads, ready, each)


def listen(limit: int) -> None:
    connection = connect()
    cursor = connection.cursor()
    cursor.execute("LISTEN bench")
    claim = compiled(CLAIM.on(bench.bq.models))
    level = Level("bench", 0)
    worker_id = add_worker(cursor)
    while not stopping.is_set():
        cursor.execute(claim, claim_from(level, worker_id, limit))
        rows = cursor.fetchall()
        for row in rows:
            mark(json.loads(row[6])["number"])
        if rows:
            level.place = max((row[8], row[1]) for row in rows)
        while not connection.notifies and not stopping.is_set():
            select.select([connection], [], [], 0.5)
            connection.poll()
        connection.notifies.clear()


def main() -> None:
    loop, number = sys.argv[1], int(sys.argv[2])
    signal.signal(signal.SIGTERM, lambda *_: stopping.set())
    {
        BareLoop.loop: lambda: batches(number, front=False),
        FrontLoop.loop: lambda: batches(number, front=True),
        SessionLoop.loop: lambda: session(number),
        StatementLoop.loop: lambda: statements(number),
        Listener.loop: lambda: listen(number),
    }[loop]()


if __name__ == "__main__":
    main()
