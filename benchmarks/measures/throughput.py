"""How many tasks a system does in a second."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import click

from ..sizes import Sizes
from ..step import Figures, Step
from ..system import System
from ..systems.bare import LOOPS, WRITE_LOOPS
from ..systems.ours import FlaskBeanQueue
from ..tally import tally
from ..worker import Worker

ONE, FOUR, EIGHT = (
    FlaskBeanQueue("threads 1", "--concurrency", "1"),
    FlaskBeanQueue(),
    FlaskBeanQueue("threads 8", "--concurrency", "8"),
)
OURS = {"nothing": (ONE, FOUR), "write": (ONE, FOUR, EIGHT)}
#: Tasks a second below which filling a queue with many takes longer than what they tell.
SLOW = 1_000


def throughput(system: System, kind: str, number: int, seconds: float) -> Figures:
    """Tasks a second, from the first one to the last, or to when the time is over."""
    system.clean()
    system.fill(kind, number)
    tally().clear()
    with Worker(system.start()) as worker:
        told = worker.work(number, seconds)
    # What it had begun, it has ended: nothing else would be a fair count.
    left, began = system.left(), tally().sum().count
    if left is not None and left + began != number:
        click.echo(f"{system}: {number} tasks, {began} begun, {left} left", err=True)
    return {"rate": told.rate, "done": told.count, "waiting": number}


def paced(
    system: System, kind: str, number: int, few: int, seconds: float, fast: set[System]
) -> Figures:
    """The same, but with few tasks unless it turns out that it does more meanwhile.

    :param fast: those of which that is known.
    """
    if system not in fast and number > few:
        figures = throughput(system, kind, few, seconds)
        if figures["rate"] < SLOW:
            return figures
        fast.add(system)
    return throughput(system, kind, number, seconds)


def steps(sizes: Sizes, peers: Sequence[System]) -> Iterator[Step]:
    numbers = {"nothing": sizes.nothing, "write": sizes.write}
    for kind, loops in (("nothing", LOOPS), ("write", WRITE_LOOPS)):
        number = numbers[kind]
        fast: set[System] = set()
        for system in [*loops, *OURS[kind]]:
            yield Step(
                "throughput",
                kind,
                str(system),
                lambda system=system, kind=kind, number=number: throughput(
                    system, kind, number, sizes.box
                ),
                sizes.box + 3,
            )
        for system in peers:
            yield Step(
                "throughput",
                kind,
                str(system),
                lambda system=system, kind=kind, number=number, fast=fast: paced(
                    system, kind, number, sizes.slow, sizes.box, fast
                ),
                sizes.box + 5,
            )
