"""How long a waiting worker takes from a commit to the first line of the processor.

Run it with ``make bench``. Beside it: a bare psycopg2 connection that LISTENs, wakes and makes the
same claim, in the same run. The clock is one that all processes of a machine share.
"""

from __future__ import annotations

import os
import select
import statistics
import subprocess
import sys
import threading
import time

import click
import psycopg2
import sqlalchemy as sa

from flask_beanqueue.marks import Level
from flask_beanqueue.models import uuid7

from .app import bq, create_app, db, mark
from .throughput import compiled

app = create_app()


def worker(number: int) -> list[float]:
    """Seconds from the beginning of a commit to the processor, in a worker process."""
    read, write = os.pipe()
    process = subprocess.Popen(
        [sys.executable, "-m", "flask", "--app", "benchmarks.app", "bq", "worker", "bench"],
        stderr=subprocess.DEVNULL,
        pass_fds=[write],
        env=os.environ | {"BENCH_PIPE": str(write)},
    )
    os.close(write)
    try:
        with open(read) as pipe:
            commit()  # until it is up
            pipe.readline()
            return [commit_and_read(pipe) for _ in range(number)]
    finally:
        process.terminate()
        process.wait()


def commit() -> float:
    """Commit one task; when the commit began."""
    with app.app_context():
        mark.enqueue()
        db.session.flush()
        start = time.monotonic()
        db.session.commit()
        return start


def commit_and_read(pipe: object) -> float:
    start = commit()
    return float(pipe.readline()) - start  # type: ignore[attr-defined]


def bare_listener(number: int) -> list[float]:
    """The same with a loop that LISTENs, wakes and claims, and does nothing else."""
    url = sa.make_url(os.environ["DATABASE_URL"]).set(drivername="postgresql")
    connection = psycopg2.connect(url.render_as_string(hide_password=False))
    connection.autocommit = True
    cursor = connection.cursor()
    cursor.execute("LISTEN bench")
    level = Level("bench", 0)
    worker_id = str(uuid7())
    cursor.execute(
        "INSERT INTO bq_workers (id, name, channels) VALUES (%s, 'bare', '{bench}')", (worker_id,)
    )
    parameters = {
        "worker_id": worker_id,
        "channels": [level.channel],
        "priorities": [level.priority],
        "ats": [level.at],
        "ids": [str(level.id)],
        "limit": 4,
    }
    statement = compiled(bq.queries._claim)
    claimed: list[float] = []
    arrived = threading.Semaphore(0)

    def listen() -> None:
        while len(claimed) < number:
            select.select([connection], [], [])
            connection.poll()
            connection.notifies.clear()
            cursor.execute(statement, parameters)
            if cursor.fetchall():
                claimed.append(time.monotonic())
                arrived.release()

    thread = threading.Thread(target=listen)
    thread.start()
    delays = []
    for each in range(number):
        start = commit()
        arrived.acquire()
        delays.append(claimed[each] - start)
    thread.join()
    connection.close()
    return delays


@click.command()
@click.option("--number", default=300, show_default=True, help="Commits to measure.")
def main(number: int) -> None:
    """Measure the time from a commit to the processor."""
    with app.app_context():
        db.drop_all()
        db.create_all()
    for name, measure in (("bare listener", bare_listener), ("worker", worker)):
        delays = sorted(measure(number))
        p99 = delays[int(len(delays) * 0.99) - 1]
        click.echo(
            f"{name:14} median {1000 * statistics.median(delays):6.2f} ms"
            f"   p99 {1000 * p99:6.2f} ms   ({number} commits, the commit itself included)"
        )


if __name__ == "__main__":
    main()
