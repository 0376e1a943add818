"""What workers cost that have nothing to do."""

from __future__ import annotations

import contextlib
import os
import statistics
import time
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import psutil

from tests import postgres

from ..sizes import Sizes
from ..step import Figures, Step
from ..system import ROWS, System, execute
from ..systems.bare import connect
from ..systems.ours import FlaskBeanQueue
from ..worker import Worker
from .limit import rate

COMMITTED = "SELECT xact_commit FROM pg_stat_database WHERE datname = current_database()"
#: Seconds after which commits beside workers and beside bare listeners take turns: their rates vary
#: too much from one second to the next for anything longer.
TURN = 0.05
#: A commit that writes something and notifies somebody else, in one round trip.
NOTIFY = "INSERT INTO bench_rows (number) VALUES (1); NOTIFY others"


def idle(
    system: FlaskBeanQueue, number: int, settled: float, seconds: float, notify_for: float
) -> Figures:
    """Statements, processor time and memory of idle workers, and commits with NOTIFY beside them.

    :param number: how many there are.
    :param settled: seconds after which they count as idle.
    :param notify_for: seconds of such commits, and of those beside bare listeners.
    """
    system.clean()
    with Worker(system.start()) as worker, contextlib.closing(connect()) as connection:
        if not worker.wait(lambda: beating(settled) == number):
            raise RuntimeError(f"Only {beating(settled)} of {number} workers are up.")
        processes = family(worker)
        cursor = connection.cursor()
        before = committed(cursor), processor_time(processes), time.monotonic()
        time.sleep(seconds)
        after = committed(cursor), processor_time(processes), time.monotonic()
        memory = [each.memory_full_info() for each in processes]
        for_each = number * (after[2] - before[2])
        return {
            # The first of our own questions may be among what the second one counts.
            "statements": max(after[0] - before[0] - 1, 0) / for_each,
            "processor": (after[1] - before[1]) / for_each,
            "rss": statistics.median(each.rss for each in memory),
            "pss": sum(each.pss for each in memory) / number,
            **notifies(cursor, number, notify_for),
        }


def notifies(cursor: Any, number: int, seconds: float) -> Figures:
    """Commits a second with NOTIFY beside the workers, and beside as many bare connections that
    listen in another database.

    Both are there all the time, and commits take turns: only who listens in the same database is
    told of a NOTIFY.
    """
    with contextlib.ExitStack() as stack:
        url = stack.enter_context(postgres.database(os.environ["DATABASE_URL"]))

        def connection() -> Any:
            return stack.enter_context(contextlib.closing(connect(url)))

        for _ in range(number):
            connection().cursor().execute("LISTEN bench")
        other = connection().cursor()
        other.execute(ROWS)
        rates: tuple[list[float], list[float]] = ([], [])
        for _ in range(max(round(seconds / TURN), 1)):
            for each, found in zip((cursor, other), rates, strict=True):
                found.append(rate(partial(each.execute, NOTIFY), TURN))
        workers, bare = map(statistics.mean, rates)
        return {"notify": workers, "notify_bare": bare, "notify_rates": rates}


def beating(seconds: float) -> int:
    """How many workers have had a heartbeat so many seconds after they started."""
    [(count,)] = execute(
        "SELECT count(*) FROM bq_workers"
        f" WHERE last_heartbeat > created_at + interval '{seconds} seconds'"
    )
    return int(str(count))


def committed(cursor: Any) -> int:
    cursor.execute(COMMITTED)
    return int(cursor.fetchone()[0])


def family(worker: Worker) -> list[psutil.Process]:
    """All processes of a worker, the parent included."""
    parents = [psutil.Process(process.pid) for process in worker.processes]
    return parents + [child for each in parents for child in each.children(recursive=True)]


def processor_time(processes: Sequence[psutil.Process]) -> float:
    times = [each.cpu_times() for each in processes]
    return sum(each.user + each.system for each in times)


def steps(sizes: Sizes, peers: Sequence[System]) -> Iterator[Step]:
    number = sizes.idle
    system = FlaskBeanQueue(f"processes {number}", "--processes", str(number))
    yield Step(
        "idle",
        f"workers {number}",
        system.name,
        lambda: idle(system, number, sizes.settled, sizes.idle_for, sizes.notify_for),
        sizes.settled + sizes.idle_for + 2 * sizes.notify_for + 5,
        rounds=1,
    )
