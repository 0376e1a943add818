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
#: Tasks a second from which on more than a few tasks are worth filling in; and from which on a
#: system is given as many as ours.
SLOW, FAST = 1_000, 4_000
#: Share of the rate of a queue's fastest setting below which another one is not looked at again.
WORTH = 0.5
#: Share of the rate of the fastest queue below which one round is enough.
FAR = 0.1


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

    Some have many settings, of which only the fastest is worth more than a short look.
    """

    def __init__(self, kind: str, number: int, few: int, seconds: float) -> None:
        self.kind = kind
        self.number = number
        self.few = min(few, number)
        self.seconds = seconds
        self.rates: dict[System, float] = {}

    def measure(self, system: System) -> Figures:
        rate = self.rates.get(system, 0.0)
        if rate < SLOW:
            figures = self._throughput(system, self.few)
            rate = self.rates[system]
            if rate < SLOW or rate < WORTH * self._best(system) or self.few == self.number:
                return figures
        # Too few tasks would flatter who claims very many at once, and filling takes its time.
        enough = int(1.5 * rate * self.seconds)
        full = self.kind == "nothing" and rate >= FAST
        return self._throughput(system, self.number if full else min(enough, self.number))

    def goes_on(self, system: System) -> bool:
        """Whether it is the fastest setting of a queue that is not far behind the others."""
        rate = self.rates.get(system, -1.0)
        return rate == self._best(system) and rate >= FAR * max(self.rates.values(), default=0.0)

    def _best(self, system: System) -> float:
        """The rate of the fastest setting of the same queue, so far."""
        own = [rate for other, rate in self.rates.items() if other.name == system.name]
        return max(own, default=0.0)

    def _throughput(self, system: System, number: int) -> Figures:
        figures = throughput(system, self.kind, number, self.seconds)
        self.rates[system] = figures["rate"]
        return figures


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
                seconds=sizes.peers_box + 3,
                rounds=2,
                odds=1 / sum(system.name == each.name for each in peers),
                again=lambda system=system, contest=contest: contest.goes_on(system),
            )
