"""What workers cost that have nothing to do."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Iterator, Sequence

import psutil

from ..sizes import Sizes
from ..step import Figures, Step
from ..system import System, clean_database, execute
from ..systems.bare import connect
from ..systems.ours import FlaskBeanQueue
from ..worker import Worker
from .limit import rate

COMMITTED = "SELECT xact_commit FROM pg_stat_database WHERE datname = current_database()"
#: A commit that writes something and notifies somebody else, in one round trip.
NOTIFY = "INSERT INTO bench_rows (number) VALUES (1); NOTIFY others"


def idle(system: FlaskBeanQueue, number: int, seconds: float, notify_for: float) -> Figures:
    """Statements, processor time and memory of idle workers, and commits with NOTIFY beside them.

    :param number: how many there are.
    :param notify_for: seconds of such commits.
    """
    system.clean()
    with Worker(system.start()) as worker, contextlib.closing(connect()) as connection:
        if not worker.wait(lambda: beating() == number):
            raise RuntimeError(f"Only {beating()} of {number} workers are up.")
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
            "notify": rate(lambda: cursor.execute(NOTIFY), notify_for),
        }


def listeners(number: int, seconds: float) -> Figures:
    """Commits a second with NOTIFY beside bare connections that listen to another channel."""
    clean_database()
    with contextlib.ExitStack() as stack:
        for _ in range(number):
            connection = stack.enter_context(contextlib.closing(connect()))
            connection.cursor().execute("LISTEN bench")
        cursor = stack.enter_context(contextlib.closing(connect())).cursor()
        return {"notify": rate(lambda: cursor.execute(NOTIFY), seconds)}


def beating() -> int:
    """How many workers have had their first heartbeat, and so have settled."""
    [(count,)] = execute("SELECT count(*) FROM bq_workers WHERE last_heartbeat > created_at")
    return int(str(count))


def committed(cursor: object) -> int:
    cursor.execute(COMMITTED)  # type: ignore[attr-defined]
    return int(cursor.fetchone()[0])  # type: ignore[attr-defined]


def family(worker: Worker) -> list[psutil.Process]:
    """All processes of a worker, the parent included."""
    parents = [psutil.Process(process.pid) for process in worker.processes]
    return parents + [child for each in parents for child in each.children(recursive=True)]


def processor_time(processes: Sequence[psutil.Process]) -> float:
    times = [each.cpu_times() for each in processes]
    return sum(each.user + each.system for each in times)


def steps(sizes: Sizes, peers: Sequence[System]) -> Iterator[Step]:
    for number in (1, sizes.idle):
        system = FlaskBeanQueue(f"processes {number}", "--processes", str(number))
        yield Step(
            "idle",
            f"workers {number}",
            system.name,
            lambda system=system, number=number: idle(
                system, number, sizes.idle_for, sizes.notify_for
            ),
            sizes.idle_for + sizes.notify_for + 8,
            rounds=2 if number > 1 else 1,
        )
    yield Step(
        "idle",
        f"workers {sizes.idle}",
        "Bare listeners",
        lambda: listeners(sizes.idle, sizes.notify_for),
        sizes.notify_for + 1,
        rounds=2,
    )
