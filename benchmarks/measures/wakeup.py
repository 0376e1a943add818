"""How long a worker takes from a commit to the first line of the task."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Iterator, Sequence
from functools import partial

from ..sizes import Sizes
from ..step import Figures, Step
from ..system import System
from ..systems.bare import Listener
from ..systems.ours import FlaskBeanQueue
from ..tally import tally
from ..worker import Worker

#: Seconds for which a worker has had nothing to do before the next commit.
REST = 0.02
#: Seconds after which a task is given up for lost.
LOST = 30.0


def spread(delays: Sequence[float]) -> Figures:
    """The median and the 99th percentile, and what they are of."""
    p99 = sorted(delays)[math.ceil(len(delays) * 0.99) - 1]
    return {"p50": statistics.median(delays), "p99": p99, "delays": delays}


def wakeup(system: System, number: int, rate: float | None, seconds: float) -> Figures:
    """Seconds from the call that enqueues a task to the task's first line; where the system tells
    when its commit began, also from there.

    :param number: how many tasks; fewer if the time is over before.
    :param rate: commits a second, whatever the worker does; None: each when the last one is done.
    """
    system.clean()
    tally().clear()
    with Worker(system.start()) as worker:
        warm_up(system, worker)
        return timed(system, worker, range(1, number + 1), rate, seconds)


def warm_up(system: System, worker: Worker) -> None:
    """Wait until a worker works."""
    system.enqueue("mark", 0)
    if not worker.wait(lambda: tally().time_of(0) is not None, LOST):
        raise RuntimeError("The worker does not begin.")


def timed(
    system: System, worker: Worker, numbers: range, rate: float | None, seconds: float
) -> Figures:
    """The same with a worker that is there; tasks are told apart by their numbers."""
    begun = time.monotonic()
    called: dict[int, float] = {}
    committed: dict[int, float] = {}
    for turn, number in enumerate(numbers):
        if time.monotonic() - begun > seconds:
            break
        time.sleep(REST if rate is None else max(begun + turn / rate - time.monotonic(), 0.0))
        called[number] = time.monotonic()
        commit = system.enqueue("mark", number)
        if commit is not None:
            committed[number] = commit
        if rate is None:
            arrival(worker, number)
    # Who cannot keep up is not waited for: its last tasks count as if they ran at the end.
    worker.wait(lambda: all(tally().time_of(each) for each in called), seconds)
    end = time.monotonic()
    arrivals = {number: tally().time_of(number) or end for number in called}
    figures = spread([arrivals[number] - called[number] for number in called])
    figures["missing"] = sum(tally().time_of(number) is None for number in called)
    if committed:
        after = spread([arrivals[number] - committed[number] for number in committed])
        figures |= {f"commit_{name}": after[name] for name in after}
    return figures


def arrival(worker: Worker, number: int) -> float:
    """When a task ran, once it has."""
    if not worker.wait(lambda: tally().time_of(number) is not None, LOST):
        raise RuntimeError(f"A task did not run within {LOST:g} s.")
    moment = tally().time_of(number)
    assert moment is not None
    return moment


def steps(sizes: Sizes, peers: Sequence[System]) -> Iterator[Step]:
    for case, number, rate in (
        ("idle", sizes.commits, None),
        ("200 commits/s", sizes.steady, 200.0),
    ):
        for system in [Listener(4), FlaskBeanQueue(), *peers]:
            yield Step(
                "wakeup",
                case,
                str(system),
                partial(wakeup, system, number, rate, 2 * sizes.box),
                number * (REST + 0.01 if rate is None else 1 / rate) + 2,
                rounds=1 if system in peers else 2,
            )
