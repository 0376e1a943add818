"""How fast a worker is when there is much in the table: waiting, done, or scheduled for later."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from functools import partial

from ..sizes import Sizes
from ..step import Figures, Step
from ..system import System, execute
from ..systems.ours import FlaskBeanQueue
from ..tally import tally
from ..worker import Worker

#: How many tasks a worker could claim.
DUE = "SELECT count(*) FROM bq_tasks WHERE state = 'PENDING' AND scheduled_at <= now()"


def depth(
    system: FlaskBeanQueue,
    number: int,
    repeats: int,
    *,
    waiting: int,
    done: int = 0,
    later: int = 0,
) -> Figures:
    """Tasks a second over so many tasks, with others in the table.

    :param repeats: how often; the median counts.
    :param waiting: tasks that wait behind those that are measured.
    :param done: tasks that have been done before, and vacuumed.
    :param later: tasks that are due in a day.
    """
    system.clean()
    if done:
        system.insert("nothing", done, state="'DONE'", finished_at="now()")
    if later:
        system.insert("nothing", later, scheduled_at="now() + interval '1 day'")
    rates = []
    for _ in range(repeats):
        [(due,)] = execute(DUE)
        system.insert("nothing", waiting + number - int(str(due)))
        execute("VACUUM ANALYZE", "CHECKPOINT")
        tally().clear()
        with Worker(system.start()) as worker:
            rates.append(worker.work(number, 60.0).rate)
    return {"rate": statistics.median(rates), "rates": rates}


def steps(sizes: Sizes, peers: Sequence[System]) -> Iterator[Step]:
    system = FlaskBeanQueue()
    fewest, *more = sizes.waiting
    few = ("waiting", fewest, {"waiting": fewest})
    cases = [
        *(("waiting", waiting, {"waiting": waiting}) for waiting in more),
        *(("done", done, {"waiting": fewest, "done": done}) for done in sizes.done),
        ("later", sizes.later, {"waiting": fewest, "later": sizes.later}),
    ]
    # What all others are measured by comes between them, for the machine is not the same from one
    # minute to the next.
    for what, number, options in [few, *(each for case in cases for each in (case, few))]:
        yield Step(
            "depth",
            f"{what} {number:,}",
            str(system),
            partial(depth, system, sizes.depth, sizes.repeats, **options),
            sum(options.values()) / 180_000 + (0.7 + sizes.depth / 25_000) * sizes.repeats,
            rounds=1 if what == "done" else 2,
        )
