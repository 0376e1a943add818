"""How many tasks a system does in a second."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
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
#: As advised for tasks that spend their time in Python.
PROCESSES = FlaskBeanQueue("processes 2", "--processes", "2")
OURS = {"nothing": (ONE, FOUR, PROCESSES), "write": (ONE, FOUR, EIGHT, PROCESSES)}
#: Tasks a second to expect, for the plan.
EXPECTED = {"nothing": 25_000, "write": 1_000}
#: Seconds that other queues take to get ready and to end, and for a first look.
BESIDES = {"nothing": 5.0, "write": 2.5, "session": 2.0}
#: Loops that no bar asks for.
BESIDE = (*LOOPS[:3], *(loop for loop in WRITE_LOOPS if isinstance(loop, StatementLoop)))
#: Tasks a second from which on more than a few tasks are worth filling in; and from which on a
#: system is given as many as ours.
SLOW, FAST = 1_000, 8_000
#: Share of the rate of a queue's fastest setting below which another one is not looked at again.
WORTH = 0.5
#: Share of the rate of the fastest queue below which one round is enough, and about how many of the
#: queues are not below it.
FAR, NEAR = 0.5, 0.4
#: Settings of each queue, the fastest with ``write``, that are measured with ``session``.
AGAIN = 3


def throughput(system: System, kind: str, number: int, seconds: float) -> Figures:
    """Tasks a second, from the first one to the last, or to when the time is over."""
    system.clean()
    system.fill(kind, number)
    tally().clear()
    with Worker(*system.start_all()) as worker:
        told = worker.work(number, seconds)
    # What it had begun, it has ended: nothing else would be a fair count.
    left, began = system.left(), tally().sum().done
    if left is not None and left + began != number:
        click.echo(f"{system}: {number} tasks, {began} begun, {left} left", err=True)
    return {"rate": told.rate, "done": told.done, "waiting": number}


class Contest:
    """Throughput of other queues, with as many tasks as each can be expected to do.

    Some have many settings, of which only the fastest is worth more than a short look.

    :param number: tasks at most.
    :param few: tasks at least.
    :param before: a contest of the same systems with tasks that do no more; its rates tell how many
        tasks are enough.
    :param settings: how many settings of each queue take part, the fastest ones of ``before``; 0
        for all.
    """

    def __init__(
        self,
        kind: str,
        number: int,
        few: int,
        seconds: float,
        before: Contest | None = None,
        settings: int = 0,
    ) -> None:
        self.kind = kind
        self.number = number
        self.few = min(few, number)
        self.seconds = seconds
        self.before = before
        self.settings = settings
        self.rates: dict[System, float] = {}

    def measure(self, system: System) -> Figures:
        rate = self.rates.get(system) or (self.before.rates.get(system) if self.before else None)
        if rate is None:
            figures = self._throughput(system, self.few)
            rate = self.rates[system]
            behind = rate < max(SLOW, WORTH * self._best(system), FAR * max(self.rates.values()))
            if behind or self.few == self.number:
                return figures
        # Too few tasks would flatter who claims very many at once, and filling takes its time.
        enough = max(int(1.5 * rate * self.seconds), self.few)
        full = self.kind == "nothing" and rate >= FAST
        return self._throughput(system, self.number if full else min(enough, self.number))

    def takes_part(self, system: System, turn: int) -> bool:
        """Whether it does in a round: after the first one, only the fastest setting of a queue
        that is not far behind the others."""
        if turn:
            rate = self.rates.get(system, -1.0)
            most = max(self.rates.values(), default=0.0)
            return rate == self._best(system) and rate >= FAR * most
        known = self.before.ranking(system) if self.before and self.settings else []
        return not known or system in known[: self.settings]

    def ranking(self, system: System) -> list[System]:
        """The settings of the same queue whose rates are known, the fastest first."""
        own = [other for other in self.rates if other.name == system.name]
        return sorted(own, key=lambda other: self.rates[other], reverse=True)

    def _best(self, system: System) -> float:
        """The rate of the fastest setting of the same queue, so far."""
        return max((self.rates[other] for other in self.ranking(system)), default=0.0)

    def _throughput(self, system: System, number: int) -> Figures:
        figures = throughput(system, self.kind, number, self.seconds)
        self.rates[system] = figures["rate"]
        return figures


def steps(sizes: Sizes, peers: Sequence[System]) -> Iterator[Step]:
    def step(kind: str, system: System, run: Callable[[], Figures], **options: Any) -> Step:
        return Step("throughput", kind, str(system), run, **options)

    numbers = {"nothing": sizes.nothing, "write": sizes.write}
    few, box, most = sizes.slow, sizes.peers_box, 4 * sizes.write
    nothing = Contest("nothing", sizes.nothing, few, box)
    write = Contest("write", most, few, box, before=nothing)
    session = Contest("session", most, few, box, before=write, settings=AGAIN)
    # Ours has no case ``session``: it does that with ``write``.
    for contest, loops in ((nothing, LOOPS), (write, WRITE_LOOPS), (session, [])):
        kind = contest.kind
        for system in [*loops, *OURS.get(kind, ())]:
            yield step(
                kind,
                system,
                partial(throughput, system, kind, numbers[kind], sizes.box),
                seconds=min(sizes.box, numbers[kind] / EXPECTED[kind]) + 1.2,
                rounds=1 if system in BESIDE else 99,
            )
        for system in peers:
            settings = sum(system.name == each.name for each in peers)
            some = min(contest.settings or settings, settings)
            yield step(
                kind,
                system,
                partial(contest.measure, system),
                seconds=box + BESIDES[kind],
                rounds=2,
                worth=partial(contest.takes_part, system),
                odds=(some / settings, NEAR / settings),
            )
