"""How many tasks a system does in a second."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import click

from ..sizes import Sizes
from ..step import Figures, Step
from ..system import System
from ..systems.bare import LOOPS, WRITE_LOOPS, StatementLoop
from ..systems.ours import FlaskBeanQueue
from ..tally import tally
from ..worker import Worker

ONE, FOUR, EIGHT = (
    FlaskBeanQueue("threads 1", "--concurrency", "1"),
    FlaskBeanQueue(),
    FlaskBeanQueue("threads 8", "--concurrency", "8"),
)
OURS = {"nothing": (ONE, FOUR), "write": (ONE, FOUR, EIGHT)}
#: Tasks a second to expect, for the plan.
EXPECTED = {"nothing": 15_000, "write": 800}
#: Loops that no bar asks for.
BESIDE = (*LOOPS[:3], *(loop for loop in WRITE_LOOPS if isinstance(loop, StatementLoop)))
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


class Contest:
    """Throughput of other queues, with as many tasks as each can be expected to do.

    Some have many settings, of which only the fastest is worth another round.
    """

    def __init__(self, kind: str, number: int, few: int, seconds: float) -> None:
        self.kind = kind
        self.number = number
        self.few = min(few, number)
        self.seconds = seconds
        self.rates: dict[System, float] = {}

    def measure(self, system: System) -> Figures:
        known = self.rates.get(system)
        figures = self._throughput(system, self.few) if known is None or known < SLOW else {}
        if self.rates[system] >= SLOW and self.number > self.few:
            # Too few tasks would flatter who claims very many at once.
            enough = self.number
            if self.kind != "nothing":
                enough = min(enough, int(1.5 * self.rates[system] * self.seconds))
            figures = self._throughput(system, enough)
        return figures

    def _throughput(self, system: System, number: int) -> Figures:
        figures = throughput(system, self.kind, number, self.seconds)
        self.rates[system] = figures["rate"]
        return figures

    def is_fastest(self, system: System) -> bool:
        """Whether no other setting of the same queue is faster."""
        own = self.rates.get(system, 0.0)
        return all(rate <= own for other, rate in self.rates.items() if other.name == system.name)


def steps(sizes: Sizes, peers: Sequence[System]) -> Iterator[Step]:
    def step(kind: str, system: System, run: Callable[[], Figures], **options: Any) -> Step:
        return Step("throughput", kind, str(system), run, **options)

    numbers = {"nothing": sizes.nothing, "write": sizes.write}
    for kind, loops in (("nothing", LOOPS), ("write", WRITE_LOOPS)):
        number = numbers[kind]
        for system in [*loops, *OURS[kind]]:
            yield step(
                kind,
                system,
                lambda system=system, kind=kind, number=number: throughput(
                    system, kind, number, sizes.box
                ),
                seconds=min(sizes.box, number / EXPECTED[kind]) + 1.5,
                rounds=1 if system in BESIDE else 99,
            )
        contest = Contest(kind, sizes.nothing, sizes.slow, sizes.peers_box)
        for system in peers:
            yield step(
                kind,
                system,
                lambda system=system, contest=contest: contest.measure(system),
                seconds=2 * sizes.peers_box + 1,
                rounds=2,
                odds=1 / sum(system.name == each.name for each in peers),
                again=lambda system=system, contest=contest: contest.is_fastest(system),
            )
