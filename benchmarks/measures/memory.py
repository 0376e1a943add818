"""How much memory a worker takes, and how long the package takes to import."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence

import psutil

from ..sizes import Sizes
from ..step import Figures, Step
from ..system import System, settle_database
from ..systems.ours import FlaskBeanQueue
from ..tally import Sum, tally
from ..worker import Worker

#: Share of the tasks after which a worker has seen all that it keeps.
WARM = 0.1
POINTS = 100


def memory(system: FlaskBeanQueue, number: int, seconds: float) -> Figures:
    """Bytes that a worker has resident over so many tasks."""
    system.clean()
    system.insert("nothing", number)
    settle_database()
    tally().clear()
    points: list[tuple[int, int]] = []
    with Worker(system.start()) as worker:
        process = psutil.Process(worker.processes[0].pid)

        def glance(told: Sum) -> None:
            if told.done and (not points or told.done >= points[-1][0] + number / POINTS):
                points.append((told.done, process.memory_info().rss))

        told = worker.work(number, seconds, glance)
        points.append((told.done, process.memory_info().rss))
    warm = next(rss for count, rss in points if count >= WARM * told.done)
    return {
        "start": points[0][1],
        "warm": warm,
        "end": points[-1][1],
        "growth": points[-1][1] / warm - 1,
        "done": told.done,
        "rate": told.rate,
        "points": points,
    }


IMPORT = """
import time
begun = time.perf_counter()
import flask, flask_sqlalchemy
between = time.perf_counter()
import flask_beanqueue
print(between - begun, time.perf_counter() - between)
"""


def import_time(repeats: int) -> Figures:
    """Seconds that Flask and Flask-SQLAlchemy take to import, and then this package."""
    # Once they are compiled, as pip does it.
    environ = {name: os.environ[name] for name in os.environ if name != "PYTHONDONTWRITEBYTECODE"}
    took = []
    for _ in range(repeats + 1):
        done = subprocess.run(
            [sys.executable, "-c", IMPORT], check=True, capture_output=True, text=True, env=environ
        )
        took.append([float(each) for each in done.stdout.split()])
    others, ours = (statistics.median(each) for each in zip(*took[1:], strict=True))
    return {"flask": others, "package": ours}


def steps(sizes: Sizes, peers: Sequence[System]) -> Iterator[Step]:
    system = FlaskBeanQueue()
    yield Step(
        "memory",
        "worker",
        str(system),
        lambda: memory(system, sizes.memory, sizes.memory_box),
        sizes.memory / 25_000 + 5,
        rounds=1,
    )
    yield Step(
        "memory",
        "import",
        system.name,
        lambda: import_time(sizes.imports),
        0.5 * sizes.imports,
        rounds=1,
    )
