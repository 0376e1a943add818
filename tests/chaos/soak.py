"""The soak: a worker at full speed for a long time, and what grows meanwhile.

python -m tests.chaos.soak --minutes 60
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path

import click
import psutil

from .. import postgres
from ..processes import READY
from . import systems
from .ledger import Ledger, cursor
from .scenarios import dsn

#: Tasks that wait, at least, so that the worker never runs dry, and how many are sold at once.
STOCK, LOT = 10_000, 1_000
#: Tasks that are done and their rows are kept for as long, in seconds, as an operator would see to.
HISTORY = 60
#: What may grow, from the second tenth of the time to the last, and by which share.
LIMITS = {
    "memory": 0.05,
    "threads": 0.0,
    "files": 0.0,
    "connections": 0.0,
    "dead": 1.0,
    "size": 1.0,
}

#: Minutes of which the table's first and last tenth tell something.
ENOUGH = 20.0
#: What they are called in the table, where their name does not say all.
UNITS = {"memory": "memory (MB)", "dead": "dead rows", "size": "table and indexes (MB)"}


@dataclasses.dataclass
class Sample:
    """One look at the worker and at the database."""

    #: Seconds since the start, and tasks done by then.
    at: float
    done: int
    #: The worker's own memory in MB, its threads and open files.
    memory: float
    threads: int
    files: int
    #: Connections to the database, of everybody.
    connections: int
    #: Dead rows of bq_tasks, and the size of the table with its indexes in MB.
    dead: int
    size: float


def look(process: psutil.Process, address: str, start: float, done: int) -> Sample:
    with cursor(address) as database:
        database.execute(
            "SELECT n_dead_tup, pg_total_relation_size(relid) / 1e6,"
            " (SELECT count(*) FROM pg_stat_activity WHERE application_name LIKE 'beanqueue %')"
            " FROM pg_stat_user_tables WHERE relname = 'bq_tasks'"
        )
        [(dead, size, connections)] = database
    return Sample(
        at=time.monotonic() - start,
        done=done,
        memory=process.memory_full_info().uss / 1e6,
        threads=process.num_threads(),
        files=process.num_fds(),
        connections=connections,
        dead=dead,
        size=float(size),
    )


def clean(address: str) -> int:
    """Delete history, as operators do; return how many tasks that were."""
    with cursor(address) as database:
        database.execute(
            "DELETE FROM bq_tasks WHERE state = 'DONE'"
            f" AND finished_at < now() - interval '{HISTORY} seconds'"
        )
        return int(database.rowcount)


def growth(samples: list[Sample], name: str) -> tuple[float, float]:
    """How much there was of something in the second tenth of the time, and in the last; at most,
    where vacuum takes it away from time to time."""
    tenth = max(len(samples) // 10, 1)
    measure = max if name in ("dead", "size") else statistics.median
    early, late = samples[tenth : 2 * tenth], samples[-tenth:]
    return tuple(measure(getattr(each, name) for each in part) for part in (early, late))


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--minutes", type=float, default=ENOUGH, show_default=True, help="For how long.")
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    help="Write the samples to a JSON file, and the table beside it.",
)
def main(minutes: float, output: Path | None) -> None:
    """Let a worker work at full speed, and see whether its memory, its threads, files and
    connections, and the dead rows of its table stay as they are.

    A shop sells as fast as the worker works. Rows of tasks that are done are deleted after a
    minute. The exit code is 1 if something has grown from the second tenth of the time to the last,
    so fewer than 20 minutes tell little of what vacuum sees to.
    """
    with postgres.running() as server, tempfile.TemporaryDirectory(prefix="soak-") as folder:
        address = dsn(server.url)
        system = systems.load("ours")(server.url)
        system.create()
        closed = threading.Event()
        seller = threading.Thread(target=sell, args=(system, address, closed), daemon=True)
        seller.start()
        worker = system.start(
            {"DATABASE_URL": server.url, "CHAOS_FOLDER": folder, "CHAOS_PAUSE": "0"}
        )
        try:
            worker.wait_line(READY)
            samples = watch(psutil.Process(worker.pid), address, minutes)
            closed.set()
            seller.join()
            while waiting(address):
                time.sleep(0.1)
        finally:
            code = worker.stop()
            worker.clean_up()
            system.close()
        ledger = Ledger(address, Path(folder))
        lost, doubled = ledger.lost(), ledger.doubled()
    lines = ["| what | early | late | |", "| --- | ---: | ---: | --- |"]
    grown = []
    for name, limit in LIMITS.items():
        early, late = growth(samples, name)
        fine = late <= early * (1 + limit)
        grown += [] if fine else [name]
        label = UNITS.get(name, name)
        lines.append(f"| {label} | {early:,.0f} | {late:,.0f} | {'flat' if fine else 'grows'} |")
    lines += [
        "",
        f"{samples[-1].done:,} tasks in {minutes:g} minutes, {lost} lost, {doubled} doubled;"
        f" the worker left with {code}.",
    ]
    if grown and minutes < ENOUGH:
        lines.append(
            f"Fewer than {ENOUGH:g} minutes tell nothing of what grows until vacuum comes."
        )
    click.echo("\n".join(lines))
    if output is not None:
        output.write_text(json.dumps([dataclasses.asdict(each) for each in samples], indent=1))
        output.with_suffix(".md").write_text("\n".join(lines) + "\n")
    sys.exit(1 if grown or code or lost or doubled else 0)


def waiting(address: str) -> int:
    with cursor(address) as database:
        database.execute("SELECT count(*) FROM bq_tasks WHERE state IN ('PENDING', 'PROCESSING')")
        return int(database.fetchone()[0])


def sell(system: systems.System, address: str, closed: threading.Event) -> None:
    """Sell as fast as the worker works."""
    numbers = itertools.count(1)
    while not closed.wait(0.1):
        while waiting(address) < STOCK:
            system.sell(itertools.islice(numbers, LOT))


def watch(process: psutil.Process, address: str, minutes: float) -> list[Sample]:
    start = time.monotonic()
    pause = max(minutes * 60 / 400, 0.5)
    samples: list[Sample] = []
    deleted = 0
    while time.monotonic() < start + minutes * 60:
        time.sleep(pause)
        deleted += clean(address)
        with cursor(address) as database:
            database.execute("SELECT count(*) FROM bq_tasks WHERE state = 'DONE'")
            [(done,)] = database
        samples.append(look(process, address, start, deleted + done))
        if len(samples) % 20 == 0:
            each = samples[-1]
            click.echo(
                f"{each.at / 60:5.1f} min {each.done:11,} tasks {each.memory:7.1f} MB"
                f" {each.threads} threads {each.files} files {each.connections} connections"
                f" {each.dead:9,} dead rows {each.size:7.1f} MB"
            )
    return samples


if __name__ == "__main__":
    main()
