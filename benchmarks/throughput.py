"""How fast one worker process is, beside loops that do the same without a queue.

Run it with ``make bench``. Every figure is of the same run, on the same tables and indexes; each is
the median of several rounds, in which the systems take turns. The loops are the limit:

- *bare loop*: psycopg2 alone, one connection; claims a batch from a mark and finishes it with the
  same two statements as the worker, and calls nothing in between.
- *session loop*: for each task an app context, ``db.session.add``, the fenced UPDATE and the
  commit; nobody claims anything, and the rows stand ready in memory.
"""

from __future__ import annotations

import concurrent.futures
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import click
import sqlalchemy as sa

from flask_beanqueue.claim import Claim
from flask_beanqueue.marks import Level
from flask_beanqueue.models import uuid7
from flask_beanqueue.queries import milliseconds
from flask_beanqueue.writer import LOCK_TIMEOUT

from .app import Row, bq, create_app, db, nothing, write

app = create_app()


def fill(processor: object, number: int) -> None:
    """Start afresh with a number of waiting tasks."""
    with app.app_context():
        db.drop_all()
        db.create_all()
        processor.enqueue_many({"number": each} for each in range(number))  # type: ignore[attr-defined]
        db.session.commit()
        db.session.execute(sa.text("ANALYZE bq_tasks"))
        db.session.commit()
        with db.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            connection.execute(sa.text("CHECKPOINT"))


def rate(number: int, seconds: float) -> float:
    with app.app_context():
        done = db.session.scalar(
            sa.select(sa.func.count()).select_from(bq.Task).where(bq.Task.state == "DONE")
        )
    if done != number:
        raise click.ClickException(f"{done} of {number} tasks are done.")
    return number / seconds


def worker(number: int, concurrency: int) -> float:
    """A worker process as users start it: from its first claim to its last completion."""
    subprocess.run(
        [
            *(sys.executable, "-m", "flask", "--app", "benchmarks.app"),
            *("bq", "worker", "bench", "--burst", "--concurrency", str(concurrency)),
        ],
        check=True,
        stderr=subprocess.DEVNULL,
    )
    with app.app_context():
        seconds = db.session.scalar(
            sa.select(
                sa.func.extract(
                    "epoch", sa.func.max(bq.Task.finished_at) - sa.func.min(bq.Task.started_at)
                )
            )
        )
    return rate(number, float(seconds))


def bare_loop(number: int, batch: int) -> float:
    """The worker's two statements, and nothing else, over psycopg2."""
    import psycopg2

    url = sa.make_url(os.environ["DATABASE_URL"])
    connection = psycopg2.connect(
        url.set(drivername="postgresql").render_as_string(hide_password=False)
    )
    connection.autocommit = True
    cursor = connection.cursor()
    claim = compiled(bq.queries._claim)
    finish = compiled(bq.queries._finish)
    worker_id = str(uuid7())
    cursor.execute(
        "INSERT INTO bq_workers (id, name, channels) VALUES (%s, 'bare', '{bench}')", (worker_id,)
    )
    level = Level("bench", 0)
    start = time.perf_counter()
    while True:
        cursor.execute(
            claim,
            {
                "worker_id": worker_id,
                "channels": [level.channel],
                "priorities": [level.priority],
                "ats": [level.at],
                "ids": [str(level.id)],
                "limit": batch,
            },
        )
        rows = cursor.fetchall()
        if not rows:
            break
        level.mark = max((row[8], row[1]) for row in rows)
        cursor.execute(
            finish,
            {
                "ctids": [row[0] for row in rows],
                "ids": [row[1] for row in rows],
                "claims": [row[2] for row in rows],
                "results": [None] * len(rows),
                "lock_timeout": milliseconds(LOCK_TIMEOUT),
            },
        )
        assert len(cursor.fetchall()) == len(rows)
    seconds = time.perf_counter() - start
    connection.close()
    return rate(number, seconds)


def compiled(statement: sa.ClauseElement) -> str:
    from sqlalchemy.dialects.postgresql import psycopg2

    return str(statement.compile(dialect=psycopg2.dialect()))


def session_loop(number: int, concurrency: int) -> float:
    """What a processor's transaction costs by itself, with the same fence."""
    with app.app_context():
        connection = db.session.connection()
        claims: list[Claim] = []
        mark = Level("bench", 0)
        worker_id = uuid7()
        bq.queries.add_worker(connection, worker_id, "session loop", ["bench"])
        while batch := bq.queries.claim(connection, worker_id, [mark], 500):
            claims += batch
            mark.mark = batch[-1].scheduled_at, batch[-1].id
        db.session.commit()

    def each(claim: Claim) -> None:
        with app.app_context():
            db.session.add(Row(number=claim.kwargs["number"]))
            db.session.flush()
            assert bq.queries.finish(db.session.connection(), [(claim, None)])
            db.session.commit()

    start = time.perf_counter()
    with concurrent.futures.ThreadPoolExecutor(concurrency) as threads:
        list(threads.map(each, claims))
    return rate(number, time.perf_counter() - start)


@click.command()
@click.option("--rounds", default=3, show_default=True, help="Rounds, of which the median counts.")
@click.option("--scale", default=1.0, show_default=True, help="Share of the tasks to run.")
def main(rounds: int, scale: float) -> None:
    """Measure a worker's speed beside bare loops."""
    many, some = int(20_000 * scale), int(5_000 * scale)
    systems: list[tuple[str, object, int, Callable[[int], float], str | None]] = [
        ("nothing: bare loop, batch 100", nothing, many, lambda n: bare_loop(n, 100), None),
        ("nothing: bare loop, batch 500", nothing, many, lambda n: bare_loop(n, 500), None),
    ]
    for threads in (1, 4):
        systems.append(
            (
                f"nothing: worker, {threads} thread(s)",
                nothing,
                many,
                lambda n, threads=threads: worker(n, threads),
                "nothing: bare loop, batch 500",
            )
        )
    for threads in (1, 4, 8):
        systems += [
            (
                f"one row: session loop, {threads} thread(s)",
                write,
                some,
                lambda n, threads=threads: session_loop(n, threads),
                None,
            ),
            (
                f"one row: worker, {threads} thread(s)",
                write,
                some,
                lambda n, threads=threads: worker(n, threads),
                f"one row: session loop, {threads} thread(s)",
            ),
        ]
    rates: dict[str, list[float]] = {name: [] for name, *_ in systems}
    with click.progressbar(length=rounds * len(systems), label="Measuring", file=sys.stderr) as bar:
        for _ in range(rounds):
            for name, processor, number, measure, _limit in systems:
                fill(processor, number)
                rates[name].append(measure(number))
                bar.update(1)
    with app.app_context():
        version, fsync, commit = db.session.execute(
            sa.text(
                "SELECT version(), current_setting('fsync'), current_setting('synchronous_commit')"
            )
        ).one()
    click.echo(f"{version.split(' on ')[0]}, fsync {fsync}, synchronous_commit {commit}")
    click.echo(f"{many:,} tasks that do nothing, {some:,} that write a row; {rounds} rounds\n")
    for name, _, _, _, limit in systems:
        median = statistics.median(rates[name])
        ratio = f"{median / statistics.median(rates[limit]):6.2f} of its loop" if limit else ""
        click.echo(f"{name:40} {median:8,.0f}/s {ratio}")


if __name__ == "__main__":
    main()
