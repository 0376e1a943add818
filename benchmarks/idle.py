"""What an idle worker costs: statements, processor time and memory in a minute.

Run it with ``make bench``. ``SQLALCHEMY_RECORD_QUERIES`` is on, which grows where a worker keeps an
app context.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time

import click
import psutil

from .app import create_app, db, nothing

app = create_app()


def count(pipe: int) -> int:
    """How many statements have been told since the last time; maybe none."""
    try:
        return len(os.read(pipe, 1 << 20))
    except BlockingIOError:
        return 0


@click.command()
@click.option("--seconds", default=60, show_default=True, help="How long to watch.")
def main(seconds: int) -> None:
    """Watch an idle worker."""
    with app.app_context():
        db.drop_all()
        db.create_all()
        nothing.enqueue_many({"number": each} for each in range(1000))
        db.session.commit()
    read, write = os.pipe()
    os.set_blocking(read, False)
    process = subprocess.Popen(
        [sys.executable, "-m", "flask", "--app", "benchmarks.app", "bq", "worker", "bench"],
        stderr=subprocess.DEVNULL,
        pass_fds=[write],
        env=os.environ | {"BENCH_RECORD_QUERIES": "1", "BENCH_STATEMENTS": str(write)},
    )
    try:
        time.sleep(5)
        count(read)
        watched = psutil.Process(process.pid)
        memory, before = watched.memory_info().rss, watched.cpu_times()
        time.sleep(seconds)
        statements = count(read)
        after = watched.cpu_times()
        cpu = (after.user - before.user) + (after.system - before.system)
        grown = watched.memory_info().rss - memory
        click.echo(
            f"idle for {seconds} s: {statements} statements, {1000 * cpu:.0f} ms of processor"
            f" time, memory {memory / 1e6:.1f} MB {grown / 1e3:+.0f} kB"
        )
    finally:
        process.terminate()
        process.wait()


if __name__ == "__main__":
    main()
