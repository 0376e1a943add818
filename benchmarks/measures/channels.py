"""What many channels cost, and many priorities."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

from ..sizes import Sizes
from ..step import Figures, Step
from ..system import System, execute, settle_database
from ..systems.ours import FlaskBeanQueue
from ..tally import tally
from ..worker import Worker

#: Workers that each channel has.
EACH = 2


def channels(system: FlaskBeanQueue, number: int, channels: int, workers: int) -> Figures:
    """Tasks a second that wait in some channels, of workers that each serve some of them.

    The workers are up before the tasks come, which all come at once.
    """
    system.clean()
    tally().clear()
    names = [f"bench{each}" for each in range(channels)]
    parts = max(workers // EACH, 1)

    def served(worker: int) -> list[str]:
        """One channel is everybody's; of many, each one is some workers'."""
        return names if channels == 1 else names[worker % parts :: parts]

    with Worker(*(system.start_on(*served(each)) for each in range(workers))) as worker:
        if not worker.wait(lambda: system.workers() == workers):
            raise RuntimeError(f"Only {system.workers()} of {workers} workers are up.")
        system.insert("nothing", number, channel=f"'bench' || n % {channels}")
        execute(f"SELECT pg_notify('bench' || n, '') FROM generate_series(0, {channels - 1}) AS n")
        told = worker.work(number, 60.0)
    return {"rate": told.rate, "done": told.done}


def priorities(system: FlaskBeanQueue, number: int, priorities: int) -> Figures:
    """Tasks a second of one worker, with as many tasks of each priority."""
    system.clean()
    system.insert("nothing", number, priority=f"n % {priorities}")
    settle_database()
    tally().clear()
    with Worker(system.start()) as worker:
        told = worker.work(number, 60.0)
    return {"rate": told.rate, "done": told.done}


def steps(sizes: Sizes, peers: Sequence[System]) -> Iterator[Step]:
    system = FlaskBeanQueue()
    for number in (1, sizes.channels):
        yield Step(
            "channels",
            f"channels {number}, workers {sizes.workers}",
            str(system),
            partial(channels, system, sizes.shared, number, sizes.workers),
            0.2 * sizes.workers + sizes.shared / 25_000 + 2,
            rounds=2,
        )
    for number in (1, 10):
        yield Step(
            "channels",
            f"priorities {number}",
            str(system),
            partial(priorities, system, sizes.shared, number),
            sizes.shared / 25_000 + 1,
            rounds=2,
        )
